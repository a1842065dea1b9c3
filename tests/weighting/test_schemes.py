"""The invariants: every public weighting runs through every one of them, and none may be missing from the table."""

import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_table import (
    ALL,
    BEYOND,
    INF,
    NAN,
    PARAMS,
    QUICKLY,
    TABLE,
    K,
    assert_close,
    assert_equal,
    assert_normalised,
    assert_sound,
    compiled,
    described,
    every_scheme,
    exact,
    own_needs,
    run,
    same_score,
    scheme,
    signals,
    stack,
    step_of,
    take,
    two_rounds,
)

from wavg_jax import tree
from wavg_jax.base import Weighting
from wavg_jax.weighting import penalty, pool, robust, scores, search, wrappers

pytestmark = (
    pytest.mark.optimized
)  # all tests of a scheme share its program, and some compare it with that of fewer replicas
MODULES = (scores, wrappers, search, pool, penalty, robust)


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


def test_every_public_weighting_is_in_the_table():
    assert {key.split("/")[0] for key in TABLE} == set(public_weightings())


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
    rounds = two_rounds()
    done = run(name, rounds)
    stacked, arrays = jax.device_put((rounds[0][0], {need: rounds[0][1][need] for need in own_needs(name)}))
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


@every_scheme
def test_the_state_keeps_its_shape_and_two_rounds_compile_once(name):
    before, first, second = described([scheme(name).init(PARAMS, K), *run(name, two_rounds()).state])
    assert before == first == second
    assert compiled(name, K, "float32")._cache_size() == 1


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
    replicas = max(replicas, TABLE[name].fewest)
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
