"""EDiT's penalty: numbers worked by hand, its averages against NumPy, who is screened, and clipping behind it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wavg_jax as wavg
from wavg_jax.weighting.penalty import pseudo_gradient_penalty

E = np.exp


def rounds(penalty, norms, alive=None):
    """Weights [rounds, K] of replicas of one tensor that moved by these norms [rounds, K], and the last state."""
    norms = np.asarray(norms, np.float32)
    alive = np.ones(norms.shape, bool) if alive is None else np.asarray(alive)
    params = {"w": jnp.zeros(2)}
    avg = wavg.averager(penalty)
    update, state, done = jax.jit(avg.update), avg.init(params, norms.shape[1]), []
    for norm, living in zip(norms, alive, strict=True):
        stacked = {"w": jnp.asarray(norm)[:, None] * jnp.array([[0.6, -0.8]])}
        _, state, weights = update(stacked, state, params, alive=living)
        done.append(jax.tree.map(np.asarray, weights))
    assert update._cache_size() == 1
    return done, state.weighting


def test_weights_are_a_softmax_of_minus_the_norm():
    (weights,), _ = rounds(pseudo_gradient_penalty(0.5), [[1.0, 2.0, 1.5]])
    # exp(-2), exp(-4), exp(-3)
    np.testing.assert_allclose(weights, E([-2, -4, -3]) / E([-2, -4, -3]).sum(), rtol=1e-5)


def test_layers_are_weighed_by_their_own_norms():
    stacked = {"a": jnp.array([[3.0, 4.0], [0.0, 6.0]]), "b": jnp.array([1.0, -1.0])}
    params = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    avg = wavg.averager(pseudo_gradient_penalty(layerwise=True))
    _, state, weights = avg.update(stacked, avg.init(params, 2), params)
    np.testing.assert_allclose(weights["a"], E([1, 0]) / E([1, 0]).sum(), rtol=1e-5)  # norms 5 and 6
    np.testing.assert_allclose(weights["b"], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(state.weighting.mean["a"], [5, 6], rtol=1e-6)


def numpy_averages(norms, rate):
    """Of one replica: mean and variance of all norms, until there are 1 / rate, then moving averages."""
    mean = variance = 0.0
    for t, norm in enumerate(norms, start=1):
        a = max(rate, 1 / t)
        mean, variance = (1 - a) * mean + a * norm, (1 - a) * (variance + a * (norm - mean) ** 2)
    return mean, variance


def test_the_averages_are_those_of_each_replica_over_the_rounds_it_was_alive():
    norms = np.random.default_rng(0).uniform(1, 2, size=(9, 3))
    alive = np.ones((9, 3), bool)
    alive[[2, 5, 6], 1] = False
    _, state = rounds(pseudo_gradient_penalty(rate=0.2), norms, alive)
    for k in range(3):
        mean, variance = numpy_averages(norms[alive[:, k], k], 0.2)
        np.testing.assert_allclose([state.mean[k], state.variance[k]], [mean, variance], rtol=1e-4)
    np.testing.assert_array_equal(state.rounds, [9, 6, 9])
    # With fewer rounds than 1 / rate they are the plain mean and variance.
    _, state = rounds(pseudo_gradient_penalty(), norms)
    np.testing.assert_allclose(state.mean, norms.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(state.variance, norms.var(axis=0), rtol=1e-3)


STEADY = [[1.0, 1.0], [3.0, 3.0], [1.0, 1.0], [3.0, 3.0]]
"""Mean 2 and standard deviation 1 of either replica."""


@pytest.mark.parametrize(
    ("threshold", "last", "expected"),
    [
        (3.0, [2.0, 4.9], [1 / (1 + E(-2.9)), 1 / (1 + E(2.9))]),  # z = 2.9
        (3.0, [2.0, 5.1], [1, 0]),  # z = 3.1
        (1.0, [2.0, 3.1], [1, 0]),
        (1.0, [2.0, 0.1], [1 / (1 + E(1.9)), 1 / (1 + E(-1.9))]),  # small norms are no anomaly
        (3.0, [5.1, 5.6], [1 / (1 + E(-0.5)), 1 / (1 + E(0.5))]),  # if all are screened, none is
    ],
)
def test_a_replica_far_above_its_own_average_is_screened(threshold, last, expected):
    done, _ = rounds(pseudo_gradient_penalty(threshold=threshold, warmup=4), [*STEADY, last])
    np.testing.assert_allclose(done[-1], expected, rtol=1e-4, atol=1e-7)


def test_nobody_is_screened_before_its_warmup_or_when_its_norms_were_equal():
    done, _ = rounds(pseudo_gradient_penalty(warmup=5), [*STEADY, [2.0, 9.0]])
    assert done[-1][1] > 0
    done, _ = rounds(pseudo_gradient_penalty(warmup=2), [[2.0, 2.0]] * 4 + [[2.0, 9.0]])
    assert done[-1][1] > 0


def test_a_dead_replica_keeps_its_averages_and_one_of_infinite_norm_too():
    _, before = rounds(pseudo_gradient_penalty(), STEADY)
    alive = [[True, True]] * 4 + [[True, False]]
    _, after = rounds(pseudo_gradient_penalty(), [*STEADY, [2.0, 99.0]], alive)
    _, huge = rounds(pseudo_gradient_penalty(), [*STEADY, [2.0, 1e25]])  # its square overflows
    for state in (after, huge):
        assert [x[1] for x in state] == [x[1] for x in before]
        assert state.rounds[0] == 5


def test_a_huge_norm_leaves_averages_that_are_finite():
    done, state = rounds(pseudo_gradient_penalty(warmup=2), [[1.0, 1e19], [1.0, 1e15], [1.0, 1e19]])
    assert all(np.isfinite(x).all() for x in state)
    assert all(weights[1] == 0 for weights in done)


def test_clipping_behind_it_bounds_the_step():
    # Both moved from 10 by (-30, -40): the pseudo-gradient (30, 40) is clipped from 50 to 5, and half of it is taken.
    outer = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.5))
    avg = wavg.averager(pseudo_gradient_penalty(), outer=outer)
    params = {"w": jnp.full(2, 10.0)}
    stacked = wavg.replicate({"w": jnp.array([-20.0, -30.0])}, 2)
    new, _, _ = jax.jit(avg.update)(stacked, avg.init(params, 2), params)
    np.testing.assert_allclose(new["w"], [8.5, 8], rtol=1e-5)
    assert avg.reads_replicas
