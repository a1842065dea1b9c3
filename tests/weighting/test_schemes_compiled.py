"""The invariants of programs: every public weighting without jit, on one replica, on several devices, in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheme_table import (
    COMMON,
    PARAMS,
    QUICKLY,
    TABLE,
    K,
    assert_close,
    assert_equal,
    assert_normalised,
    described,
    every_scheme,
    own_needs,
    run,
    scheme,
    signals,
    stack,
    step_of,
    two_rounds,
)

from wavg_jax import tree
from wavg_jax.averaging import outer
from wavg_jax.averaging.averager import averager
from wavg_jax.base import SettingsError
from wavg_jax.devices import placement


@every_scheme
def test_jit_changes_nothing(name):
    rounds = two_rounds()[:1]
    slow, fast = run(name, rounds, step=step_of(name)), run(name, rounds)
    assert_close(slow.weights, fast.weights, rtol=1e-4, atol=1e-5)
    assert_close(slow.params, fast.params, rtol=1e-4, atol=1e-5)


def all_at_once(stacked, params, alive, place):
    """One round of every scheme as one program, which compiles in a third of the time: `{name: (params, weights)}`."""
    replicas = len(alive)
    names = [name for name in TABLE if TABLE[name].fewest <= replicas]
    states = {name: scheme(name).init(params, replicas) for name in names}

    def every(stacked, states, params, alive, arrays):
        done = {}
        for name in names:
            read = {need: arrays[need] for need in own_needs(name)}
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
    if TABLE[name].fewest > 1:
        with pytest.raises(SettingsError, match="replicas=1"):
            scheme(name).init(HALF, 1)
        return
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


SMALL_STEPS = ("softmax", "inverse/layers", "fisher_merging", "learned", "coordinate_median")
"""Weights of replicas, layers and elements, and some that are searched for; the step is the averager's."""


@functools.cache
def slowly():
    """100 rounds of some schemes with steps of a hundredth from 1 toward 0.75, in bfloat16: `{name: params}`."""
    start = jax.tree.map(jnp.ones_like, HALF)
    stacked = tree.replicate(jax.tree.map(lambda x: 0.75 * x, start), K)
    arrays = jax.device_put(signals(stacked))

    def many(name):
        avg = averager(TABLE[name].make(), outer=outer.lookahead(0.01))
        read = {need: COMMON[need] if need in COMMON else arrays[need] for need in avg.needs}

        def one(_, held):
            params, state = held
            return avg.update(stacked, state, params, **read)[:2]

        # A loop holds nothing whose shape or dtype changes.
        return jax.lax.fori_loop(0, 100, one, (start, avg.init(start, K)))[0]

    return jax.device_get(jax.jit(lambda: {name: many(name) for name in SMALL_STEPS}, compiler_options=QUICKLY)())


@pytest.mark.parametrize("name", SMALL_STEPS)
def test_small_outer_steps_add_up_in_bfloat16(name):
    for x in jax.tree.leaves(slowly()[name]):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(x), 0.75 + 0.25 * 0.99**100, atol=0.005)
