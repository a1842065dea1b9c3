"""Averages of the global parameters over rounds, by hand and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wavg_jax import SettingsError
from wavg_jax.averaging import smoothing

RNG = np.random.default_rng(0)
ROUNDS = [
    {"dense": {"kernel": RNG.normal(size=(3, 4)), "bias": RNG.normal(size=4)}, "scale": RNG.normal(size=())}
    for _ in range(7)
]


def as_jax(params, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def run(rule, rounds):
    """The smoothed parameters after each round, from one compiled update."""
    update, state, smoothed = jax.jit(rule.update), rule.init(rounds[0]), []
    for params in rounds:
        new, state = update(params, state)
        smoothed.append(new)
    assert update._cache_size() == 1
    return smoothed


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def numbers(*values):
    return [{"w": jnp.array([value], jnp.float32)} for value in values]


def test_ema_by_hand():
    # m: 4, 4 * 0.5 + 0 = 2, 1 + 1 = 2; corrected by 1/2, 3/4, 7/8.
    smoothed = run(smoothing.ema(0.5), numbers(8, 0, 2))
    np.testing.assert_allclose([s["w"].item() for s in smoothed], [8, 8 / 3, 16 / 7], rtol=1e-6)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_ema_against_numpy(decay):
    smoothed = run(smoothing.ema(decay), [as_jax(params) for params in ROUNDS])
    for r in range(len(ROUNDS)):
        weights = decay ** np.arange(r, -1, -1.0)
        expected = jax.tree.map(lambda *xs, w=weights: np.average(np.stack(xs), axis=0, weights=w), *ROUNDS[: r + 1])
        assert_close(smoothed[r], expected)


def test_ema_is_optaxs(standard_promotion):
    rounds = [as_jax(params) for params in ROUNDS]
    for ours, theirs in zip(run(smoothing.ema(0.9), rounds), run(optax.ema(0.9), rounds), strict=True):
        assert_close(ours, theirs)


def test_swa_by_hand():
    values = [s["w"].item() for s in run(smoothing.swa(start=2, every=2), numbers(9, 7, 1, 5, 3, 6, 8))]
    # The newest before round 2, then the means of rounds 2; 2 and 4; 2, 4 and 6.
    assert values == [9, 7, 1, 1, 2, 2, 4]


def test_swa_against_numpy():
    smoothed = run(smoothing.swa(), [as_jax(params) for params in ROUNDS])
    for r in range(len(ROUNDS)):
        assert_close(smoothed[r], jax.tree.map(lambda *xs: np.mean(np.stack(xs), axis=0), *ROUNDS[: r + 1]))


def test_lawa_by_hand():
    # The means of 8; 8, 2; 8, 2, 5; then 2, 5, 11 and 5, 11, 2.
    values = [s["w"].item() for s in run(smoothing.lawa(3), numbers(8, 2, 5, 11, 2))]
    assert values == [8, 5, 5, 6, 6]


@pytest.mark.parametrize("window", [1, 3, 20])
def test_lawa_against_numpy(window):
    smoothed = run(smoothing.lawa(window), [as_jax(params) for params in ROUNDS])
    for r in range(len(ROUNDS)):
        latest = ROUNDS[max(0, r + 1 - window) : r + 1]
        assert_close(smoothed[r], jax.tree.map(lambda *xs: np.mean(np.stack(xs), axis=0), *latest))


def test_lawa_keeps_the_latest_as_they_are_stored():
    state = smoothing.lawa(4).init({"w": jnp.ones((3, 2), jnp.bfloat16)})
    assert (state.latest["w"].shape, state.latest["w"].dtype) == ((4, 3, 2), jnp.bfloat16)
    # 1 and 1 + 2^-7 are neighbours in bfloat16; their mean is rounded once, to the even one.
    smoothed = run(smoothing.lawa(2), [{"w": jnp.array([x], jnp.bfloat16)} for x in (1, 1 + 2**-7, 1 + 2**-6)])
    assert smoothed[1]["w"].dtype == jnp.bfloat16
    assert [s["w"].item() for s in smoothed] == [1, 1, 1 + 2**-6]


@pytest.mark.parametrize("rule", [smoothing.ema(0.9), smoothing.swa(), smoothing.swa(start=3), smoothing.lawa(3)])
def test_bfloat16_is_averaged_in_float32_and_comes_back_as_bfloat16(rule):
    ones = {"w": jnp.full(3, 1.0, jnp.bfloat16)}
    state = rule.init(ones)
    assert isinstance(state, smoothing.LawaState) or all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state))
    smoothed, after = rule.update(ones, state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert smoothed["w"].dtype == jnp.bfloat16
    assert smoothed["w"].tolist() == [1, 1, 1]


def test_swa_of_bfloat16_does_not_stick():
    # In bfloat16 a mean of 256 rounds would stop moving; the true mean of 0 and 255 ones is 0.996.
    rounds = [{"w": jnp.zeros(1, jnp.bfloat16)}] + [{"w": jnp.ones(1, jnp.bfloat16)}] * 255
    assert run(smoothing.swa(), rounds)[-1]["w"].item() == pytest.approx(0.996, abs=2e-3)


@pytest.mark.parametrize("rule", [smoothing.ema(0.999), smoothing.swa(start=1, every=3), smoothing.lawa(3)])
def test_parameters_that_do_not_move_are_not_moved(rule):
    params = as_jax(ROUNDS[0])
    for smoothed in run(rule, [params] * 5):
        assert_close(smoothed, params)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: smoothing.ema(0.0), "decay is 0.0"),
        (lambda: smoothing.ema(1.0), "decay is 1.0"),
        (lambda: smoothing.ema(float("nan")), "decay"),
        (lambda: smoothing.swa(start=-1), "start is -1"),
        (lambda: smoothing.swa(every=0), "every is 0"),
        (lambda: smoothing.lawa(0), "window is 0"),
    ],
)
def test_bad_numbers_are_refused_by_name(make, says):
    with pytest.raises(SettingsError, match=says):
        make()
