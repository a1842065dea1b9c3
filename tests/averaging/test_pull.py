"""Pulls: EASGD, PAPA and LSGD round by round against NumPy, through `update` and `restart` of the averager."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wavg_jax as wavg
from wavg_jax.averaging import pull
from wavg_jax.devices import placement

K, ROUNDS = 4, 3
GOALS = np.random.default_rng(0).normal(size=(K, 3))  # replica k descends |x - goal_k|^2 / 2
RATE = 0.3


def start():
    return np.random.default_rng(1).normal(size=(K, 3)), np.array([1.0, -1.0, 0.5])


def rounds(avg, local, exchange_first=False, **signals):
    """Three rounds of `local` steps and an exchange; returns replicas and centre in float64."""
    update, restart = jax.jit(avg.update), jax.jit(avg.restart)
    replicas, centre = start()
    stacked, params = {"w": jnp.asarray(replicas, jnp.float32)}, {"w": jnp.asarray(centre, jnp.float32)}
    state = avg.init(params, K)
    for number in range(ROUNDS):
        before = stacked
        if not exchange_first:
            stacked = {"w": local(stacked["w"])}
        scores = {name: jnp.asarray(values[number], jnp.float32) for name, values in signals.items()}
        new, state, _ = update(stacked, state, params, **scores)
        stacked, params = restart(stacked, params, new, round=number), new
        if exchange_first:
            stacked = {"w": stacked["w"] + (local(before["w"]) - before["w"])}
    assert update._cache_size() == restart._cache_size() == 1
    return np.asarray(stacked["w"]), np.asarray(params["w"])


def descend(x):
    return x - RATE * (x - jnp.asarray(GOALS, jnp.float32))


def test_easgd_is_equations_5_and_6_of_the_paper():
    # x_k <- x_k - rate g_k(x_k) - a (x_k - c) and c <- c + a sum_k (x_k - c), gradient and force at the same x_k.
    a = 0.9 / K  # the paper's beta = 0.9
    x, c = start()
    for _ in range(ROUNDS):
        x, c = x - RATE * (x - GOALS) - a * (x - c), c + a * (x - c).sum(axis=0)
    avg = wavg.averager(wavg.uniform(), outer=optax.sgd(K * a), pull=pull.toward_old(a))
    replicas, centre = rounds(avg, descend, exchange_first=True)
    np.testing.assert_allclose(replicas, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(centre, c, rtol=1e-5, atol=1e-6)


def test_easgd_after_local_steps_moves_replicas_and_centre_by_what_they_were():
    a = 0.1
    x, c = start()
    for _ in range(ROUNDS):
        x = x - RATE * (x - GOALS)
        x, c = x - a * (x - c), c + a * (x - c).sum(axis=0)
    avg = wavg.averager(wavg.uniform(), outer=optax.sgd(K * a), pull=pull.toward_old(a))
    replicas, centre = rounds(avg, descend)
    np.testing.assert_allclose(replicas, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(centre, c, rtol=1e-5, atol=1e-6)


def test_papa_moves_every_member_a_little_toward_the_population_mean():
    # Every so many steps x_k <- alpha x_k + (1 - alpha) mean, and the mean is what is evaluated.
    alpha = 0.9
    x, _ = start()
    for _ in range(ROUNDS):
        x = x - RATE * (x - GOALS)
        mean = x.mean(axis=0)
        x = alpha * x + (1 - alpha) * mean
    replicas, centre = rounds(wavg.averager(wavg.uniform(), pull=1 - alpha), descend)
    np.testing.assert_allclose(replicas, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(centre, mean, rtol=1e-5, atol=1e-6)


def test_papas_pull_scales_with_the_learning_rate():
    # Rates 0.3, 0.15, 0.075: factors 0.1, 0.05, 0.025.
    x, _ = start()
    for number in range(ROUNDS):
        x = x - RATE * (x - GOALS)
        mean = x.mean(axis=0)
        x = x + 0.1 * 0.5**number * (mean - x)
    rate = optax.exponential_decay(RATE, 10, 0.5)  # of the local step, of which a round has 10

    def factor(number):
        return 0.1 * rate((number * 10).astype(jnp.float32)) / rate(jnp.float32(0))

    replicas, centre = rounds(wavg.averager(wavg.uniform(), pull=pull.scheduled(factor)), descend)
    np.testing.assert_allclose(replicas, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(centre, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_schedule_gives_each_round_its_pull(dtype):
    # Toward the old 8 by 0, 1/2 and 1 of the way; toward the new 4 by 1 replaces bit for bit.
    stacked, old, new = {"w": jnp.array([0.0, 1.0], dtype)}, {"w": jnp.array(8.0, dtype)}, {"w": jnp.array(4.0, dtype)}
    toward_old = wavg.averager(
        wavg.uniform(), pull=pull.scheduled(lambda r: r.astype(jnp.float32) / 2, pull.toward_old)
    )
    restart = jax.jit(toward_old.restart)
    found = [restart(stacked, old, new, round=number)["w"] for number in range(3)]
    assert [x.tolist() for x in found] == [[0, 1], [4, 4.5], [8, 8]]
    assert all(x.dtype == dtype for x in found)
    assert restart._cache_size() == 1
    replaced = wavg.averager(wavg.uniform(), pull=pull.scheduled(lambda r: 1.0)).restart(
        tree(dtype), wavg.replica(ONE(dtype, seed=1), 0), wavg.replica(ONE(dtype, seed=2), 0), round=jnp.int32(3)
    )
    jax.tree.map(np.testing.assert_array_equal, replaced, wavg.replicate(wavg.replica(ONE(dtype, seed=2), 0), K))


def test_a_pull_over_rounds_asks_for_the_round():
    avg = wavg.averager(wavg.uniform(), pull=pull.scheduled(lambda r: 2.0))
    old = {"w": jnp.zeros(2)}
    with pytest.raises(wavg.SettingsError, match="pull= changes over rounds: give restart"):
        avg.restart(wavg.replicate(old, K), old, old)
    with pytest.raises(wavg.SettingsError, match=r"pull's factor is 2\.0"):
        avg.restart(wavg.replicate(old, K), old, old, round=0)


def test_lsgd_pulls_every_replica_to_the_best_and_leaves_the_best_alone():
    losses = [[0.9, 0.2, 0.5, 0.4], [0.1, 0.7, 0.3, 0.8], [0.6, 0.5, 0.4, 0.3]]
    x, _ = start()
    for loss in losses:
        x = x - RATE * (x - GOALS)
        leader = x[np.argmin(loss)]
        x = x + 0.1 * (leader - x)
    # At this temperature a loss 0.1 behind counts exp(-100) of the best.
    avg = wavg.averager(wavg.softmax("loss", temperature=1e-3), pull=0.1)
    replicas, centre = rounds(avg, descend, loss=losses)
    np.testing.assert_allclose(replicas, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(centre, leader, rtol=1e-5, atol=1e-6)


def tree(dtype, replicas=K, seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=(replicas, *shape)), dtype) for n, shape in {"w": (3, 5), "b": ()}.items()}


ONE = functools.partial(tree, replicas=1)


@functools.cache
def restart_of(factor):
    return jax.jit(wavg.averager(wavg.uniform(), pull=factor).restart)


TOWARD_OLD = pull.toward_old(0.5)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_pull_of_one_replaces_bit_for_bit_and_is_the_default(dtype):
    stacked, old, new = tree(dtype), wavg.replica(ONE(dtype, seed=1), 0), wavg.replica(ONE(dtype, seed=2), 0)
    plain = jax.jit(wavg.averager(wavg.uniform()).restart)
    for restart in (plain, restart_of(1.0)):
        jax.tree.map(np.testing.assert_array_equal, restart(stacked, old, new), wavg.replicate(new, K))


@pytest.mark.parametrize("factor", [0.0, 0.25, TOWARD_OLD], ids=["zero", "quarter", "toward_old"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_living_are_pulled_and_the_dead_replaced(factor, dtype):
    stacked, old, new = tree(dtype), wavg.replica(ONE(dtype, seed=1), 0), wavg.replica(ONE(dtype, seed=2), 0)
    stacked["b"] = stacked["b"].at[3].set(jnp.nan)  # dead by its parameters; replica 1 is dead by the mask
    restarted = restart_of(factor)(stacked, old, new, alive=jnp.array([True, False, True, True]))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), restarted) == jax.tree.map(lambda x: (x.shape, x.dtype), stacked)
    for name, x in stacked.items():
        for k in (1, 3):
            np.testing.assert_array_equal(restarted[name][k], new[name])
        for k in (0, 2):
            x_k, centre = np.float32(x[k]), np.float32((old if factor is TOWARD_OLD else new)[name])
            share = 0.5 if factor is TOWARD_OLD else factor
            expected = jnp.asarray(x_k + np.float32(share) * (centre - x_k), dtype)
            np.testing.assert_allclose(np.float32(restarted[name][k]), np.float32(expected), rtol=1e-6, atol=1e-7)


def test_devices_change_nothing():
    there = placement.on(tuple(jax.devices()))
    stacked = tree(jnp.float32, 8)
    old, new = wavg.replica(ONE(jnp.float32, seed=1), 0), wavg.replica(ONE(jnp.float32, seed=2), 0)
    alive = jnp.arange(8) != 5
    restart = restart_of(0.25)
    spread = restart(
        jax.device_put(stacked, there.stacked),
        *jax.device_put((old, new), there.shared),
        alive=jax.device_put(alive, there.shared),
    )
    one = restart(stacked, old, new, alive=alive)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), spread, one)
    assert all(x.sharding.is_equivalent_to(there.stacked, x.ndim) for x in jax.tree.leaves(spread))


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_bad_pulls_are_refused(bad):
    for make in (pull.toward_new, pull.toward_old, lambda factor: wavg.averager(wavg.uniform(), pull=factor)):
        with pytest.raises(wavg.SettingsError, match=r"between 0|at most 1"):
            make(bad)


def test_a_pull_of_ones_own_sees_one_replica_at_a_time():
    def to_length_one(x, old, new):
        return x / jnp.sqrt((x * x).sum())

    avg = wavg.averager(wavg.uniform(), pull=to_length_one)
    old, stacked = {"w": jnp.zeros(2)}, {"w": jnp.array([[3.0, 4.0], [0.0, 2.0]])}
    np.testing.assert_allclose(avg.restart(stacked, old, old)["w"], [[0.6, 0.8], [0.0, 1.0]], rtol=1e-6)
