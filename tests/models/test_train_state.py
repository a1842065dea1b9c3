"""Flax's TrainState: into `fit` and out of it, and in a loop of the user's own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from flax.training import train_state
from runs import train
from small import sharded

import wavg_jax as wavg
from wavg_jax.models import from_train_state, to_train_state

K = 2


class State(train_state.TrainState):
    batch_stats: Any = None
    note: jax.Array | None = None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))


class Bare(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(x)


def made(module, kind=train_state.TrainState, tx=None, **fields):
    variables = dict(module.init(jax.random.key(0), jnp.zeros((1, 4))))
    tx = tx or optax.sgd(0.1, momentum=0.9)
    return kind.create(apply_fn=module.apply, params=variables.pop("params"), tx=tx, **variables, **fields)


def fitted(state, inner=None, **options):
    averager = wavg.averager(wavg.softmax("loss", 0.5))
    options = {"local_steps": 4, "rounds": 2, "batch_size": 8, "devices": 1} | options
    return train(from_train_state(state), sharded(replicas=K), averager, inner=inner or state.tx, **options)


def test_a_state_goes_in_and_comes_out_trained_and_can_go_on():
    state = made(Net(), State, note=jnp.ones(2))
    result = fitted(state)
    after = to_train_state(state, result)
    assert int(after.step) == 8
    np.testing.assert_array_equal(after.params["Dense_0"]["kernel"], result.params["Dense_0"]["kernel"])
    np.testing.assert_array_equal(
        after.batch_stats["BatchNorm_0"]["mean"], result.mutable["batch_stats"]["BatchNorm_0"]["mean"]
    )
    assert np.any(after.batch_stats["BatchNorm_0"]["mean"])
    np.testing.assert_array_equal(after.note, jnp.ones(2))
    momentum = result.state.replicas.opt_state[0].trace["Dense_0"]["kernel"]
    np.testing.assert_allclose(after.opt_state[0].trace["Dense_0"]["kernel"], momentum.mean(axis=0), rtol=1e-6)
    again = after.apply_gradients(grads=after.params)
    assert int(again.step) == 9
    # The second part starts where the first one ended: with nothing learnt, its blend is the same.
    still = fitted(after, inner=optax.sgd(0.0), rounds=1)
    np.testing.assert_allclose(still.params["Dense_0"]["kernel"], after.params["Dense_0"]["kernel"], rtol=1e-6)


def test_a_module_without_train_will_do_and_another_optimizer_leaves_a_fresh_state():
    state = made(Bare())
    after = to_train_state(state, fitted(state, inner=optax.sgd(0.1)))
    assert not np.any(after.opt_state[0].trace["Dense_0"]["kernel"])


def test_what_is_no_such_state_is_refused():
    with pytest.raises(wavg.SettingsError, match=r"^state is .*; it must be a flax.training.train_state.TrainState"):
        from_train_state({"params": 1})
    state = made(Bare()).replace(apply_fn=lambda variables, x: x)
    with pytest.raises(wavg.SettingsError, match=r"apply_fn is not the apply of a Linen module; .*models.classifier"):
        from_train_state(state)
    with pytest.raises(wavg.SettingsError, match="the result has other parameters than state"):
        to_train_state(made(Net(), State), fitted(made(Bare()), rounds=1))


def test_a_loop_of_ones_own_over_stacked_states():
    state = made(Bare())
    data = sharded(replicas=K)
    shards = [(data.train.x[i][:64], data.train.y[i][:64]) for i in data.shards]
    x, y = (jnp.asarray(np.stack(part)) for part in zip(*shards, strict=True))

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(state.apply_fn({"params": params}, x), y).mean()

    @jax.jit
    def local(stacked, x, y):
        return jax.vmap(lambda one, x, y: one.apply_gradients(grads=jax.grad(loss)(one.params, x, y)))(stacked, x, y)

    averager = wavg.averager(wavg.uniform())
    averaging = averager.init(state.params, K)
    stacked = wavg.replicate(state.replace(step=jnp.zeros((), int)), K)
    for _ in range(3):
        for _ in range(4):
            stacked = local(stacked, x, y)
        params, averaging, _ = averager.update(stacked.params, averaging, state.params)
        stacked = stacked.replace(params=wavg.replicate(params, K))
    assert stacked.step.tolist() == [12, 12]
    assert loss(params, x[0], y[0]) < loss(state.params, x[0], y[0])


@pytest.mark.usefixtures("standard_promotion")  # for Adam
def test_a_state_of_frozen_dicts_comes_back_frozen():
    """As older code of flax made them."""
    thawed = made(Net(), State, tx=optax.adam(0.01))
    state = State.create(
        apply_fn=thawed.apply_fn,
        params=freeze(thawed.params),
        tx=thawed.tx,
        batch_stats=freeze(thawed.batch_stats),
    )
    after = to_train_state(state, fitted(state))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert float(jnp.abs(after.opt_state[0].mu["Dense_0"]["kernel"]).max()) > 0
