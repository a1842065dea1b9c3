"""Random keys: all that a run uses, collected."""

import collections
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from runs import train
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax import models
from wavg_jax.averaging import smoothing
from wavg_jax.rounds import keys, policy

K, H, ROUNDS, BATCHES = 2, 3, 2, 2
RERUN = BATCHES + H
"""Batches on which statistics are re-estimated: by the policy, and all H of the round for smoothed parameters."""


class Spy:
    """Keeps the keys of every kind of use, while compiled programs run."""

    def __init__(self):
        self.seen = collections.defaultdict(list)

    def note(self, kind, rng):
        jax.debug.callback(lambda words: self.seen[kind].append(tuple(words.tolist())), jax.random.key_data(rng))

    def used(self):
        """The keys of every kind of use; what draws from a key may also split it, so with it its two children."""
        jax.effects_barrier()
        used = {kind: set(found) for kind, found in self.seen.items()}
        for kind in used.keys() - {"init", "loss", "split"}:  # whose children are noted where they are used
            parents = jax.random.wrap_key_data(jnp.array(list(used[kind]), jnp.uint32))
            children = jax.random.key_data(jax.vmap(jax.random.split)(parents)).reshape(-1, 2)
            used[kind] |= set(map(tuple, children.tolist()))
        return used

    def library_splits(self, monkeypatch):
        """Takes down every key that the library itself splits; nothing else may be done with it."""
        split = jax.random.split

        def noted(rng, *count):
            if sys._getframe(1).f_globals["__name__"].startswith("wavg_jax."):
                self.note("split", rng)
            return split(rng, *count)

        monkeypatch.setattr(jax.random, "split", noted)

    def augment(self, rng, x):
        self.note("fetch", rng)
        return x

    def optimizer(self):
        """Draws in every step, from a key that is the very key of the run."""

        def update(updates, key, params=None):
            key, drawn = jax.random.split(key)
            self.note("optimizer", drawn)
            return updates, key

        return optax.chain(optax.GradientTransformation(lambda params: jax.random.key(0), update), optax.sgd(0.1))

    def watch(self, task):
        def init(rng):
            self.note("init", rng)
            return task.init(rng)

        def loss(params, mutable, batch, rng):
            self.note("loss", rng)
            return task.loss(params, mutable, batch, rng)

        return task._replace(init=init, loss=loss)


def in_linen(spy):
    def weights(name):
        def init(rng, shape):
            spy.note(name, rng)
            return 0.1 * jax.random.normal(rng, shape)

        return init

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            if train:
                spy.note("dropout", self.make_rng("dropout"))
                spy.note("noise", self.make_rng("noise"))
            x = nn.BatchNorm(not train, momentum=0.9)(x)
            return x @ self.param("first", weights("first"), (4, 3)) @ self.param("last", weights("last"), (3, 3))

    return models.from_linen(Net(), (4,))


def in_nnx(spy):
    class Draw(nnx.Module):
        def __init__(self, name, rngs):
            self.name, self.rngs, self.deterministic = name, rngs, False

        def __call__(self, x):
            if not self.deterministic:
                spy.note(self.name, self.rngs.dropout())
            return x

    class Net(nnx.Module):
        def __init__(self, rngs):
            first, last = rngs.params(), rngs.params()
            spy.note("first", first)
            spy.note("last", last)
            self.weights = nnx.Param(0.1 * jax.random.normal(first, (4, 3)))
            self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
            self.dropout, self.noise = Draw("dropout", rngs.fork()), Draw("noise", rngs.fork())

        def __call__(self, x):
            return self.noise(self.dropout(self.norm(x))) @ self.weights[...]

    return models.from_nnx(Net, (4,))


def by_hand(spy):
    """Its collections hold a key of their own."""
    task = regression()

    def init(rng):
        for name in ("first", "last"):
            rng, own = jax.random.split(rng)
            spy.note(name, own)
        return task.init(rng)[0], {"key": jax.random.key(0)}

    def apply(params, mutable, x, *, train, rng):
        if not train:
            return x @ params["w"], mutable
        key, drawn = jax.random.split(mutable["key"])
        spy.note("dropout", drawn)
        spy.note("noise", jax.random.fold_in(rng, 7))
        return x @ params["w"], {"key": key}

    return models.classifier(init, apply)


@pytest.mark.parametrize("make", [in_linen, in_nnx, by_hand])
def test_no_two_uses_of_a_run_have_the_same_key(make, monkeypatch):
    spy = Spy()
    spy.library_splits(monkeypatch)
    source = sharded(K)._replace(augment=spy.augment)
    result = train(
        spy.watch(make(spy)),
        source,
        wavg.averager(wavg.inverse("grad_norm")),  # whose pass draws, too
        inner=spy.optimizer(),
        local_steps=H,
        rounds=ROUNDS,
        batch_size=8,
        stats=policy.reestimate(BATCHES),
        smoothing=smoothing.swa(),
        devices=1,
        on_round=lambda row: None,
    )
    for state in (result.state.replicas.rng, jax.tree.leaves(result.state.replicas.opt_state)[0]):
        for key in state:
            spy.note("next", key)
    used = spy.used()
    steps, common = K * ROUNDS, 1  # of the gradient norm
    expected = {
        "init": 1,
        "first": 1,
        "last": 1,
        "fetch": steps * (H + RERUN),
        "loss": steps * (H + RERUN) + common,
        "dropout": steps * (H + RERUN) + common,
        "noise": steps * (H + RERUN) + common,
        "optimizer": steps * H,
        "next": 2 * K,
    }
    # For the gradient norm, too, every replica draws from what its own collections hold.
    expected["dropout"] += K * ROUNDS - common if make is by_hand else 0
    noted = {kind: n if kind in ("init", "loss") else 3 * n for kind, n in expected.items()}
    assert {kind: len(found) for kind, found in used.items() if kind != "split"} == noted
    assert len(set.union(*used.values())) == sum(map(len, used.values()))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_that_a_state_holds_become_each_replicas_own_and_depend_on_both(impl):
    def made(seed, state):
        return jax.tree.map(jax.random.key_data, keys.own(state, jax.random.key(seed))["held"])

    state = {"held": jax.random.split(jax.random.key(3, impl=impl), (2, 3)), "count": jnp.int32(4)}
    other = state | {"held": jax.random.split(jax.random.key(4, impl=impl), (2, 3))}
    after = keys.own(state, jax.random.key(0))
    assert (after["held"].dtype, after["held"].shape, after["count"]) == (state["held"].dtype, (2, 3), 4)
    found = np.stack([made(0, state), made(1, state), made(0, other)]).reshape(3 * 6, -1)
    assert len(np.unique(found, axis=0)) == 3 * 6
    np.testing.assert_array_equal(made(0, state), made(0, state))
