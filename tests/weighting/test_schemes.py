"""The invariants: every public weighting runs through every one of them, and none may be missing from the table."""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavg_jax import tree
from wavg_jax.averaging import outer
from wavg_jax.averaging.averager import averager
from wavg_jax.base import Weighting
from wavg_jax.devices import placement
from wavg_jax.weighting import robust, scores, search, wrappers
from wavg_jax.weighting.signals import HIGHER_IS_BETTER

NAN, INF = float("nan"), float("inf")
K = 5
ALL = (True,) * K
MODULES = (scores, wrappers, search, robust)


def public_weightings():
    """The names of all public functions that say they return a `Weighting`."""
    return {
        name
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and typing.get_type_hints(function).get("return") is Weighting
    }


class Row(NamedTuple):
    """A weighting as the table runs it, and the few invariants that it has a reason to break.

    Attributes:
      make: builds it.
      floors: every living replica gets some weight, also one whose score is of no use.
      falls_back: what it falls back to when no score is usable is not equal weights.
      ordered: replicas that tie are tried in the order of their numbers.
    """

    make: Callable[[], Weighting]
    floors: bool = False
    falls_back: bool = False
    ordered: bool = False


TABLE = {
    "uniform": Row(scores.uniform),
    "proportional": Row(lambda: scores.proportional("accuracy")),
    "proportional/power": Row(lambda: scores.proportional("accuracy", chance=0.2, power=3.0)),
    "inverse": Row(lambda: scores.inverse("loss")),
    "inverse/layers": Row(lambda: scores.inverse("layer_grad_norm")),
    "softmax": Row(lambda: scores.softmax("loss", 0.2)),
    "softmax/standardise": Row(lambda: scores.softmax("accuracy", 0.5, standardise=True)),
    "rank": Row(lambda: scores.rank("macro_f1")),
    "best": Row(lambda: scores.best("train_loss")),
    "fisher_merging": Row(scores.fisher_merging),
    "fisher_merging/normalise": Row(lambda: scores.fisher_merging(normalise=True)),
    "uniform_floor": Row(lambda: wrappers.uniform_floor(scores.fisher_merging(), 0.1), floors=True),
    "momentum": Row(lambda: wrappers.momentum(scores.softmax("loss", 0.2), 0.9)),
    "momentum/layers": Row(lambda: wrappers.momentum(scores.inverse("layer_grad_norm"), 0.5)),
    "smooth_signals": Row(lambda: wrappers.smooth_signals(scores.fisher_merging())),
    "shortlist": Row(lambda: wrappers.shortlist(scores.softmax("loss", 0.2), 3)),
    "shortlist/robust": Row(lambda: wrappers.shortlist(robust.coordinate_median(), 3), falls_back=True),
    "grawa": Row(wrappers.grawa),
    "grawa/layers": Row(lambda: wrappers.grawa(layerwise=True)),
    "greedy_soup": Row(lambda: search.greedy_soup("accuracy"), ordered=True),
    "learned": Row(lambda: search.learned(scores.softmax("loss", 0.2), steps=3)),
    "learned/carry": Row(lambda: search.learned(steps=3, carry=True), floors=True),
    "best_of": Row(lambda: search.best_of(scores.best("ece"), wrappers.momentum(scores.softmax("loss", 0.2), 0.9))),
    "best_of/mixed": Row(lambda: search.best_of(scores.fisher_merging(), robust.krum(1), signal="accuracy")),
    "coordinate_median": Row(robust.coordinate_median),
    "trimmed_mean": Row(lambda: robust.trimmed_mean(1)),
    "geometric_median": Row(robust.geometric_median),
    "krum": Row(lambda: robust.krum(1)),
    "multi_krum": Row(lambda: robust.multi_krum(1, keep=3)),
}

every_scheme = pytest.mark.parametrize("name", TABLE)


def test_every_public_weighting_is_in_the_table():
    assert {key.split("/")[0] for key in TABLE} == set(public_weightings())


# A problem: K replicas with a few small tensors, and a signal of every kind.


def stack(replicas=K, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    kernel, scale = rng.normal(size=(replicas, 3, 4)).astype(dtype), rng.normal(size=replicas).astype(dtype)
    return {"dense": {"kernel": kernel}, "scale": scale}


PARAMS = jax.device_put(tree.replica(stack(1, seed=99), 0))


def signals(stacked, seed=0):
    """A signal of every kind the library knows, positive and without ties; `evaluate` is added where a run is built."""
    rng = np.random.default_rng(seed + 1000)
    shape = jax.tree.leaves(stacked)[0].shape[:1]

    def numbers(shape):
        return rng.uniform(0.1, 0.9, size=shape).astype(np.float32)

    return {name: numbers(shape) for name in HIGHER_IS_BETTER} | {
        "layer_grad_norm": jax.tree.map(lambda x: numbers(shape), stacked),
        "fisher": jax.tree.map(lambda x: numbers(x.shape), stacked),
    }


def same_score(values, stacked):
    """Every signal says the same of a replica: `values` [K], in all layers and elements."""
    values = np.asarray(values, np.float32)

    def wide(x):
        return np.broadcast_to(values.reshape((-1,) + (1,) * (x.ndim - 1)), x.shape).copy()

    return dict.fromkeys(signals(stacked), values) | {
        "layer_grad_norm": jax.tree.map(lambda x: values, stacked),
        "fisher": jax.tree.map(wide, stacked),
    }


BEYOND = 1e6


def evaluate(params, weights):
    """Held-out score of a network: a bowl around 0.1, and NaN where a replica whose first element is BEYOND takes part
    in an equal blend."""
    del weights
    leaves = [x.astype(jnp.float32).reshape(-1) for x in jax.tree.leaves(params)]
    flat = jnp.concatenate(leaves)
    loss = jnp.mean((flat - 0.1) ** 2)
    loss = jnp.where(jnp.abs(flat[0]) >= BEYOND / K, jnp.nan, loss)
    return {"loss": loss, "accuracy": 1 / (1 + loss)}


@functools.cache
def scheme(name):
    return averager(TABLE[name].make())


def step_of(name, **place):
    """`(stacked, state, params, alive, signals) -> (params, state, weights)`."""
    avg = scheme(name)
    extra = place | ({"evaluate": evaluate} if "evaluate" in avg.needs else {})
    return lambda stacked, state, params, alive, arrays: avg.update(
        stacked, state, params, alive=alive, **arrays, **extra
    )


@functools.cache
def compiled(name, replicas, dtype):
    """One program per scheme and shape, shared by all tests; it must never be compiled for a second time."""
    return jax.jit(step_of(name))


class Rounds(NamedTuple):
    """What every round returned."""

    params: list
    state: list
    weights: list


def run(name, rounds, alive=ALL, params=PARAMS, step=None):
    """Runs `[(stacked, signals), ...]` from a new state on; every round starts from `params`."""
    avg, alive = scheme(name), jnp.asarray(alive)
    step = step or compiled(name, len(alive), jax.tree.leaves(params)[0].dtype.name)
    state, done = avg.init(params, len(alive)), Rounds([], [], [])
    for stacked, arrays in rounds:
        stacked, arrays = jax.device_put((stacked, {n: arrays[n] for n in avg.needs if n != "evaluate"}))
        new, state, weights = step(stacked, state, params, alive, arrays)
        for log, value in zip(done, jax.device_get((new, state, weights)), strict=True):
            log.append(value)
    return done


def two_rounds(replicas=K, seed=0, dtype=np.float32):
    stacks = [stack(replicas, seed, dtype), stack(replicas, seed + 1, dtype)]
    return [(s, signals(s, seed + r)) for r, s in enumerate(stacks)]


def take(values, which):
    """Some of the replicas, or all in another order, of a tree or of rounds."""
    return jax.tree.map(lambda x: x[np.asarray(which)], values)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def exact(name):
    """Whether the weights hang on each replica's own numbers alone. A search compares blends by what a network says of
    them, and a network's arithmetic is rounded by the program that it stands in."""
    return "evaluate" not in scheme(name).needs


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def assert_normalised(weights, alive, params=PARAMS):
    """Not negative, 0 for the dead, and 1 in sum over the living; a prefix tree of `params` with leaves [K, ...]."""
    alive = np.asarray(alive)

    def leaf(w, below):
        assert w.shape == alive.shape or w.shape == alive.shape + below.shape
        assert np.isfinite(w).all()
        assert (w >= 0).all()
        assert (w[~alive] == 0).all()
        np.testing.assert_allclose(w.sum(axis=0), float(alive.any()), rtol=1e-5)

    jax.tree.map(lambda w, below: jax.tree.map(lambda x: leaf(np.asarray(w), x), below), weights, params)


def assert_sound(done, alive, params=PARAMS):
    for new, weights in zip(done.params, done.weights, strict=True):
        assert_normalised(weights, alive, params)
        assert all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(new))


# The invariants.


@every_scheme
def test_equal_replicas_are_unchanged(name):
    same = tree.replicate(PARAMS, K)
    done = run(name, [(same, signals(same, seed)) for seed in (0, 1)])
    assert_sound(done, ALL)
    for new in done.params:
        assert_close(new, PARAMS)


@every_scheme
def test_permuting_the_replicas_permutes_the_weights_and_not_the_blend(name):
    rounds, order = two_rounds(), [3, 0, 4, 1, 2]
    straight, permuted = run(name, rounds), run(name, take(rounds, order))
    assert_close(permuted.weights, take(straight.weights, order))
    assert_close(permuted.params, straight.params)


def simplex():
    """Replicas at equal distances from each other."""
    return {"dense": {"kernel": np.eye(K, 12, dtype=np.float32).reshape(K, 3, 4)}, "scale": np.zeros(K, np.float32)}


def two_camps():
    """Two replicas at one point, two at its opposite, and one in the middle."""
    sign = np.array([1, 1, 0, -1, -1], np.float32)
    return jax.tree.map(lambda x: x[:1] * sign.reshape((K,) + (1,) * (x.ndim - 1)), stack())


@every_scheme
@pytest.mark.parametrize("places", [stack, simplex, two_camps])
def test_the_blend_does_not_depend_on_the_order_of_replicas_that_tie(name, places):
    if TABLE[name].ordered and places is stack:
        pytest.skip("tries replicas that tie in the order of their numbers")
    stacked = places()
    rounds = [(stacked, same_score([0.5] * K, stacked))] * 2
    straight, permuted = run(name, rounds), run(name, take(rounds, [3, 0, 4, 1, 2]))
    assert_sound(straight, ALL)
    assert_close(permuted.params, straight.params)


@every_scheme
@pytest.mark.parametrize("how", ["mask", "nan parameters", "infinite parameters"])
def test_a_dead_replica_equals_a_run_of_the_survivors(name, how):
    """To the last bit, or to rounding where a search decides."""
    same = assert_equal if exact(name) else assert_close
    for dead in (0, 2, K - 1):
        survivors = [k for k in range(K) if k != dead]
        alone = run(name, take(two_rounds(), survivors), (True,) * (K - 1))
        rounds = two_rounds()
        for stacked, arrays in rounds:
            stacked["dense"]["kernel"][dead, 1, 2] = INF if how == "infinite parameters" else NAN
            for leaf in jax.tree.leaves(arrays):
                leaf[dead] = NAN
        beside = run(name, rounds, [k != dead or how != "mask" for k in range(K)])
        assert_normalised(beside.weights[-1], [k != dead for k in range(K)])
        same(take(beside.weights, survivors), alone.weights)
        same(beside.params, alone.params)


@every_scheme
def test_when_all_are_dead_parameters_and_state_stay(name):
    rounds, avg = two_rounds(), scheme(name)
    done = run(name, rounds)
    stacked, arrays = jax.device_put((rounds[0][0], {n: rounds[0][1][n] for n in avg.needs if n != "evaluate"}))
    state = jax.device_put(done.state[-1])
    new, same, weights = compiled(name, K, "float32")(stacked, state, PARAMS, jnp.zeros(K, bool), arrays)
    assert_equal((new, same), (PARAMS, state))
    assert all((np.asarray(w) == 0).all() for w in jax.tree.leaves(weights))


BAD_SCORES = [
    [0.0] * K,
    [-1.0, -2.0, -3.0, -4.0, -5.0],
    [NAN] * K,
    [INF, -INF, NAN, 0.0, INF],
    [INF] * K,
    [3e38] * K,
    [1e-38, 1e-38, 1e-45, 0.0, 1e-45],
    [-3e38, 3e38, 1.0, 0.0, 3e38],
    [NAN, 1.0, 1.0, 1.0, 1.0],
]


@every_scheme
@pytest.mark.parametrize("alive", [ALL, (False, True, False, True, True)], ids=["all", "some"])
def test_no_scores_break_a_weighting(name, alive):
    stacked = stack()
    assert_sound(run(name, [(stacked, same_score(scores, stacked)) for scores in BAD_SCORES], alive), alive)


@every_scheme
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15, 1e30])
def test_no_size_of_the_parameters_breaks_a_weighting(name, size):
    stacked = jax.tree.map(lambda x: x * np.float32(size), stack())
    assert_sound(run(name, [(stacked, signals(stacked))] * 2), ALL)


@every_scheme
def test_without_a_usable_score_all_the_living_count_alike(name):
    if not scheme(name).needs or TABLE[name].falls_back:
        pytest.skip("reads no scores, or falls back to something else")
    stacked, alive = stack(), np.array([True, True, False, True, True])
    stacked["dense"]["kernel"][:, 0, 0] = BEYOND
    for weights in run(name, [(stacked, same_score([NAN] * K, stacked))] * 2, alive).weights:
        for w in jax.tree.leaves(weights):
            assert_close(w, np.broadcast_to((alive / 4).reshape((K,) + (1,) * (w.ndim - 1)), w.shape))


@every_scheme
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_replica_without_a_usable_score_counts_nothing_beside_others(name, bad):
    if not scheme(name).needs or TABLE[name].floors:
        pytest.skip("gives every living replica a weight")
    stacked = stack()
    stacked["dense"]["kernel"][2, 0, 0] = BEYOND
    for weights in run(name, [(stacked, same_score([0.5, 0.5, bad, 0.5, 0.5], stacked))] * 2).weights:
        assert all((w[2] == 0).all() for w in jax.tree.leaves(weights))


def described(states):
    return [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), state) for state in states]


@every_scheme
def test_the_state_keeps_its_shape_and_two_rounds_compile_once(name):
    before, first, second = described([scheme(name).init(PARAMS, K), *run(name, two_rounds()).state])
    assert before == first == second
    assert compiled(name, K, "float32")._cache_size() == 1


@every_scheme
def test_jit_changes_nothing(name):
    rounds = two_rounds()[:1]
    slow, fast = run(name, rounds, step=step_of(name)), run(name, rounds)
    assert_close(slow.weights, fast.weights, rtol=1e-4, atol=1e-5)
    assert_close(slow.params, fast.params, rtol=1e-4, atol=1e-5)


QUICKLY = {"xla_backend_optimization_level": 0}
"""Compiler options for where nothing hangs on the last bit."""


def all_at_once(stacked, params, alive, place):
    """One round of every scheme as one program, which compiles in a third of the time: `{name: (params, weights)}`."""
    replicas = len(alive)
    states = {name: scheme(name).init(params, replicas) for name in TABLE}

    def every(stacked, states, params, alive, arrays):
        done = {}
        for name in TABLE:
            read = {n: arrays[n] for n in scheme(name).needs if n != "evaluate"}
            new, _, weights = step_of(name, place=place.reduce)(stacked, states[name], params, alive, read)
            done[name] = new, weights
        return done

    over, everywhere = place.stacked, place.shared
    stacked, alive, arrays = jax.device_put((stacked, np.array(alive), signals(stacked)), over)
    states, params = jax.device_put((states, params), everywhere)
    return jax.device_get(jax.jit(every, compiler_options=QUICKLY)(stacked, states, params, alive, arrays))


HALF = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)


@functools.cache
def alone():
    return all_at_once(stack(1, dtype=jnp.bfloat16), HALF, [True], placement.single())


@every_scheme
def test_one_replica_is_taken_as_it_is_in_bfloat16_too(name):
    new, weights = alone()[name]
    assert_equal(new, tree.replica(stack(1, dtype=jnp.bfloat16), 0))
    assert_normalised(weights, [True])


ONE_DEAD = (True, True, False, True, True)


@functools.cache
def sharded():
    return all_at_once(stack(), PARAMS, ONE_DEAD, placement.on(tuple(jax.devices()[:K])))


@every_scheme
def test_sharded_is_unsharded(name):
    new, weights = sharded()[name]
    one = run(name, two_rounds()[:1], ONE_DEAD)
    assert_close(weights, one.weights[0], rtol=1e-4, atol=1e-5)
    assert_close(new, one.params[0], rtol=1e-4, atol=1e-5)


@every_scheme
def test_bfloat16_parameters_stay_bfloat16_and_the_rest_does_not_become_it(name):
    avg, stacked = scheme(name), stack(dtype=jnp.bfloat16)
    arrays = {n: x for n, x in signals(stacked).items() if n in avg.needs}
    state = avg.init(HALF, K)
    new, after, weights = jax.eval_shape(step_of(name), stacked, state, HALF, np.ones(K, bool), arrays)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    assert described([after]) == described([state])


@functools.cache
def slowly():
    """100 rounds of every scheme with steps of a hundredth from 1 toward 0.75, in bfloat16: `{name: params}`."""
    start = jax.tree.map(jnp.ones_like, HALF)
    stacked = tree.replicate(jax.tree.map(lambda x: 0.75 * x, start), K)
    arrays = jax.device_put(signals(stacked))

    def many(name):
        avg = averager(TABLE[name].make(), outer=outer.lookahead(0.01))
        read = {n: evaluate if n == "evaluate" else arrays[n] for n in avg.needs}

        def one(_, held):
            params, state = held
            return avg.update(stacked, state, params, **read)[:2]

        # A loop holds nothing whose shape or dtype changes.
        return jax.lax.fori_loop(0, 100, one, (start, avg.init(start, K)))[0]

    return jax.device_get(jax.jit(lambda: {name: many(name) for name in TABLE}, compiler_options=QUICKLY)())


@every_scheme
def test_small_outer_steps_add_up_in_bfloat16(name):
    for x in jax.tree.leaves(slowly()[name]):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(x), 0.75 + 0.25 * 0.99**100, atol=0.005)


@every_scheme
@settings(max_examples=10)
@given(
    scores=st.lists(st.floats(width=32), min_size=K, max_size=K),
    alive=st.lists(st.booleans(), min_size=K, max_size=K),
    seed=st.integers(0, 10**6),
)
def test_any_scores_and_any_living_give_weights_that_sum_to_one(name, scores, alive, seed):
    rounds = two_rounds(seed=seed)
    rounds[1] = (rounds[1][0], same_score(scores, rounds[1][0]))
    assert_sound(run(name, rounds, alive), alive)


shapes = st.lists(st.sampled_from([(), (1,), (3,), (2, 3), (1, 2, 2)]), min_size=1, max_size=3)


@settings(max_examples=8)
@given(st.sampled_from(sorted(TABLE)), shapes, st.integers(1, 4), st.integers(0, 10**6))
def test_any_tree_and_any_number_of_replicas(name, shapes, replicas, seed):
    rng = np.random.default_rng(seed)
    stacked = {f"layer{i}": {"w": rng.normal(size=(replicas, *s)).astype(np.float32)} for i, s in enumerate(shapes)}
    params = jax.device_put(tree.replica(stacked, 0))
    step = jax.jit(step_of(name), compiler_options=QUICKLY)
    alive = rng.integers(0, 2, size=replicas).astype(bool)
    assert_sound(run(name, [(stacked, signals(stacked, seed))] * 2, alive, params, step), alive, params)
    same = tree.replicate(params, replicas)
    for new in run(name, [(same, signals(same, seed))] * 2, alive, params, step).params:
        assert_close(new, params)
    assert step._cache_size() == 1
