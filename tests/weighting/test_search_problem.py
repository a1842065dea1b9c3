"""Searches over blends on a real problem: softmax regressions on three blobs, some of them trained on random labels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import blobs

from wavg_jax import tree
from wavg_jax.averaging.averager import averager
from wavg_jax.base import Weighting
from wavg_jax.devices import placement
from wavg_jax.weighting import search
from wavg_jax.weighting.scores import normalise, per_replica, proportional

NAN = float("nan")
K, SPOILED = 8, 3


@functools.cache
def problem():
    """(stacked, own scores, evaluate) of K replicas, each with 20 steps on its own 24 samples."""
    data, rng = blobs(), np.random.default_rng(0)
    x, y = np.asarray(data.train.x), np.asarray(data.train.y, np.int32)
    own_y = y[: 24 * K].reshape(K, 24).copy()
    own_y[:SPOILED] = rng.integers(0, 3, size=(SPOILED, 24))
    held_x, held_y = jnp.asarray(x[24 * K :]), jnp.asarray(y[24 * K :])

    def logits(params, x):
        return x.astype(params["w"].dtype) @ params["w"] + params["b"][None]

    def loss(params, x, y):
        z = logits(params, x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    def train(x, y):
        def step(params, _):
            return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params, x, y)), None

        return jax.lax.scan(step, {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}, length=20)[0]

    def evaluate(params, weights):
        del weights
        right = logits(params, held_x).argmax(1) == held_y
        return {"loss": loss(params, held_x, held_y), "accuracy": right.mean(dtype=jnp.float32)}

    stacked = jax.jit(jax.vmap(train))(jnp.asarray(x[: 24 * K]).reshape(K, 24, 4), jnp.asarray(own_y))
    return stacked, jax.vmap(lambda p: evaluate(p, None))(stacked), evaluate


def by_layer(stacked, state, params, *, alive, **signals):
    """One weight per tensor, different in each."""
    return {"w": normalise(signals["accuracy"], alive), "b": normalise(1 / signals["loss"], alive)}, state


LAYERED = Weighting(lambda params, replicas: (), by_layer, ("accuracy", "loss"))
SCHEMES = {
    "greedy_soup": search.greedy_soup("loss"),
    "learned": search.learned(),
    "best_of": search.best_of(proportional("accuracy"), search.learned(LAYERED)),
    "layers": search.learned(LAYERED),
    "carry": search.learned(carry=True, steps=2),
}
SLOW = ("layers", "carry")


def schemes(*names):
    """Each compiles for some seconds."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]
    return pytest.mark.parametrize("name", marked)


every_scheme = schemes(*SCHEMES)


@functools.cache
def program(name, place=None):
    """One jitted round of a scheme; what it takes is `inputs(...)`."""
    kwargs = {} if place is None else {"place": place}
    avg = averager(SCHEMES[name])

    def one_round(stacked, state, params, alive, own):
        return avg.update(stacked, state, params, alive=alive, evaluate=problem()[2], **own, **kwargs)

    return jax.jit(one_round)


def inputs(name, keep=slice(None), dtype=jnp.float32):
    """The problem's replicas `keep`, all alive."""
    stacked, own, _ = problem()
    stacked = jax.tree.map(lambda x: x[keep].astype(dtype), stacked)
    params = tree.replica(jax.tree.map(jnp.zeros_like, stacked), 0)
    replicas = tree.count_replicas(stacked)
    own = {signal: values[keep] for signal, values in own.items()}
    state = averager(SCHEMES[name]).init(params, replicas=replicas)
    return stacked, state, params, jnp.ones(replicas, bool), own


def held_out_loss(params):
    return float(problem()[2](params, None)["loss"])


@functools.cache
def plain_loss():
    stacked = problem()[0]
    return held_out_loss(jax.tree.map(lambda x: x.mean(0), stacked))


@every_scheme
def test_spoiled_replicas_are_found_out(name):
    params, _, weights = program(name)(*inputs(name))
    assert held_out_loss(params) < plain_loss() - 0.01
    weights = np.asarray(per_replica(weights))
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert weights[:SPOILED].mean() < 0.7 * weights[SPOILED:].mean()


@every_scheme
def test_rounds_compile_once_and_none_is_worse_than_plain_averaging(name):
    run = program(name)
    stacked, state, params, alive, own = inputs(name)
    compiled = run._cache_size()
    for _ in range(3):
        params, state, _ = run(stacked, state, params, alive, own)
        assert held_out_loss(params) <= plain_loss() + 1e-6
    assert run._cache_size() == max(compiled, 1)


@every_scheme
def test_a_dead_replica_is_a_run_of_the_survivors_to_rounding(name):
    """Not to the last bit: XLA rounds a network, and its gradient, by the program that it stands in."""

    def close(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    dead = np.array([1, 4, 5])
    keep = np.setdiff1d(np.arange(K), dead)
    stacked, state, params, alive, own = inputs(name)
    alive = alive.at[dead].set(False)
    stacked = jax.tree.map(lambda x: x.at[dead].set(NAN), stacked)
    own = {signal: values.at[dead].set(NAN) for signal, values in own.items()}
    few, few_state, few_params, few_alive, few_own = inputs(name, keep)
    for _ in range(2):  # the second round goes on from what is carried
        params, state, weights = program(name)(stacked, state, params, alive, own)
        few_params, few_state, few_weights = program(name)(few, few_state, few_params, few_alive, few_own)
        for w, f in zip(jax.tree.leaves(weights), jax.tree.leaves(few_weights), strict=True):
            assert (w[dead] == 0).all()
            close(w[keep], f)
        jax.tree.map(close, params, few_params)


@every_scheme
def test_none_alive_changes_nothing(name):
    stacked, state, _, alive, own = inputs(name)
    before = tree.replica(stacked, 3)
    after, after_state, weights = program(name)(stacked, state, before, ~alive, own)
    jax.tree.map(np.testing.assert_array_equal, (after, after_state), (before, state))
    assert all((w == 0).all() for w in jax.tree.leaves(weights))


@pytest.mark.slow
@schemes("greedy_soup", "learned")
def test_jit_changes_nothing(name):
    with_jit = program(name)(*inputs(name))
    without = program(name).__wrapped__(*inputs(name))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), with_jit, without)


@schemes("learned", "carry")
def test_a_single_replica_has_it_all(name):
    stacked, state, params, alive, own = inputs(name, slice(6, 7))
    after, _, weights = program(name)(stacked, state, params, alive, own)
    assert all((w == 1).all() for w in jax.tree.leaves(weights))
    jax.tree.map(np.testing.assert_array_equal, after, tree.replica(stacked, 0))


@pytest.mark.slow
@schemes("greedy_soup", "learned")
def test_bfloat16_parameters(name):
    params, _, weights = program(name)(*inputs(name, dtype=jnp.bfloat16))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
    assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(weights))
    assert held_out_loss(params) < plain_loss() - 0.01


@schemes("best_of", "layers", "carry")
def test_sharded_replicas_give_the_same_numbers(name):
    """The slope goes through shard_map and psum, and in best_of through a switch inside a scan."""
    mesh = placement.on(tuple(jax.devices()))
    stacked, *rest = inputs(name)
    alone = program(name)(stacked, *rest)
    spread = program(name, mesh.reduce)(jax.device_put(stacked, mesh.stacked), *rest)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), spread, alone)
