"""The norm-preserving reduction: numbers worked by hand, NumPy's formula on random trees, and what it shares with the
plain weighted mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wavg_jax as wavg
from wavg_jax.averaging.reduce import norm_preserving, weighted_mean
from wavg_jax.devices import placement
from wavg_jax.weighting import robust

blend = jax.jit(norm_preserving)
NAN = float("nan")


def kernels(*units):
    """Stacked kernels [K, inputs, 1] from one list of weights per replica."""
    return {"kernel": jnp.asarray(units, jnp.float32)[..., None]}


def unit(tree):
    return np.asarray(tree["kernel"])[..., 0]


def test_orthogonal_replicas_shrink_by_the_root_of_k_in_the_plain_mean_and_not_here():
    # (3, 0, 0, 0), (0, 3, 0, 0), ...: the plain mean is (0.75, 0.75, 0.75, 0.75), of length 1.5 = 3 / sqrt(4).
    stacked, equal = kernels(*(3 * np.eye(4))), jnp.full(4, 0.25)
    plain, kept = unit(weighted_mean(stacked, equal)), unit(blend(stacked, equal))
    assert plain.tolist() == [0.75] * 4
    assert np.linalg.norm(plain) == pytest.approx(3 / np.sqrt(4))
    # g = 3, v = (1/4, 1/4, 1/4, 1/4) of length 1/2: 3 * v / (1/2) = (1.5, 1.5, 1.5, 1.5), of length 3.
    np.testing.assert_allclose(kept, [1.5] * 4, rtol=1e-6)
    assert np.linalg.norm(kept) == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize(
    ("units", "weights", "expected"),
    [
        # Lengths 5 and 10: g = 3/4 * 5 + 1/4 * 10 = 6.25; v = 3/4 (0.6, 0.8) + 1/4 (0.8, -0.6) = (0.65, 0.45).
        ([[3, 4], [8, -6]], [0.75, 0.25], 6.25 * np.array([0.65, 0.45]) / np.hypot(0.65, 0.45)),
        # A zero vector halves the length and has no say in the direction.
        ([[3, 4], [0, 0]], [0.5, 0.5], [1.5, 2]),
        ([[0, 0], [0, 0]], [0.5, 0.5], [0, 0]),
        # Opposite directions of equal weight cancel: the plain mean.
        ([[3, 4], [-6, -8]], [0.5, 0.5], [-1.5, -2]),
        # A length that overflows float32: the plain mean.
        ([[3e30, 4e30], [3, 4]], [0.5, 0.5], [1.5e30, 2e30]),
        # Nobody is alive: nothing.
        ([[3, 4], [8, -6]], [0, 0], [0, 0]),
        # A replica of weight 0 does not enter, whatever it holds.
        ([[3, 4], [NAN, -6]], [1, 0], [3, 4]),
    ],
)
def test_numbers_worked_by_hand(units, weights, expected):
    np.testing.assert_allclose(unit(blend(kernels(*units), jnp.asarray(weights, jnp.float32))), expected, rtol=1e-6)


def test_directions_that_nearly_cancel_still_have_a_mean():
    # v = (0, 1e-4) to rounding, far from float32's 1e-7: length 1 in the direction (0, 1), not the plain mean.
    np.testing.assert_allclose(unit(blend(kernels([1, 0], [-1, 2e-4]), jnp.full(2, 0.5))), [0, 1], atol=1e-3)


def random_tree(seed, replicas=3):
    rng = np.random.default_rng(seed)
    shapes = {"conv": (2, 3, 4), "dense": (5, 4), "bias": (4,), "scale": ()}
    return {name: rng.normal(size=(replicas, *shape)).astype(np.float32) for name, shape in shapes.items()}


def numpy_norm_preserving(x, w):
    if x.ndim < 3:
        return np.tensordot(w, x, 1)
    rows = x.reshape(x.shape[0], -1, x.shape[-1]).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    g, v = np.tensordot(w, lengths, 1), np.tensordot(w, rows / lengths, 1)
    return (g * v / np.linalg.norm(v, axis=0)).reshape(x.shape[1:])


@given(st.integers(0, 2**16), st.lists(st.floats(0.1, 1), min_size=3, max_size=3))
def test_random_trees_against_numpy(seed, weights):
    stacked, w = random_tree(seed), np.array(weights) / np.sum(weights)
    new = blend(stacked, jnp.asarray(w, jnp.float32))
    for name, x in stacked.items():
        np.testing.assert_allclose(new[name], numpy_norm_preserving(x, w), rtol=2e-4, atol=2e-5)


@given(st.integers(0, 2**16), st.lists(st.floats(0.1, 1), min_size=3, max_size=3))
def test_the_length_of_every_unit_is_the_mean_of_the_replicas(seed, weights):
    stacked, w = random_tree(seed), np.array(weights) / np.sum(weights)
    new = blend(stacked, jnp.asarray(w, jnp.float32))
    for name in ("conv", "dense"):
        lengths = np.linalg.norm(stacked[name].reshape(3, -1, 4), axis=1)
        np.testing.assert_allclose(np.linalg.norm(new[name].reshape(-1, 4), axis=0), w @ lengths, rtol=1e-5)


@given(st.integers(0, 2**16), st.floats(0.1, 10))
def test_equal_replicas_are_unchanged_and_scaling_all_scales_the_blend(seed, scale):
    w = jnp.array([0.2, 0.3, 0.5])
    one = wavg.replica(random_tree(seed), 0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), blend(wavg.replicate(one, 3), w), one
    )
    stacked = random_tree(seed)
    scaled = jax.tree.map(lambda x: np.float32(scale) * x, stacked)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, scale * b, rtol=1e-3, atol=1e-4), blend(scaled, w), blend(stacked, w)
    )


@pytest.mark.optimized
@pytest.mark.parametrize("weighting", [wavg.uniform(), robust.coordinate_median()], ids=["uniform", "median"])
def test_a_dead_replica_equals_a_run_of_the_survivors_exactly(weighting):
    avg = wavg.averager(weighting, reduce=norm_preserving)
    update = jax.jit(avg.update)
    alive = np.isin(np.arange(8), [0, 2, 4])
    for seed in range(8):  # rounding that depends on K shows in one of a few trees
        rng = np.random.default_rng(seed)
        stacked = {"wide": rng.normal(size=(8, 200, 130)).astype(np.float32)}
        params = wavg.replica({n: x + 1 for n, x in stacked.items()}, 0)
        stacked["wide"][1, 2, 3] = NAN
        new, _, _ = update(stacked, avg.init(params, 8), params, alive=alive)
        alone, _, _ = update(jax.tree.map(lambda x: x[alive], stacked), avg.init(params, 3), params, alive=alive[alive])
        jax.tree.map(np.testing.assert_array_equal, new, alone)


def test_weights_per_element_enter_the_direction_and_their_mean_the_length():
    # Lengths 5 and 10, mean weights 1/2 and 1/2: g = 7.5. v = (1 * 0.6, 1 * -0.6), of length 0.6 sqrt(2).
    stacked = kernels([3, 4], [8, -6])
    weights = {"kernel": jnp.array([[[1.0], [0.0]], [[0.0], [1.0]]])}
    np.testing.assert_allclose(unit(blend(stacked, weights)), 7.5 * np.array([1, -1]) / np.sqrt(2), rtol=1e-6)


def test_bfloat16_is_blended_in_float32_and_keeps_its_lengths():
    stacked = {"kernel": jnp.ones((4, 1000, 2), jnp.bfloat16)}  # in bfloat16 a sum of 1000 squares would stick at 256
    new = blend(stacked, jnp.full(4, 0.25))
    assert new["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(new["kernel"], 1, rtol=1e-5)


def test_over_devices_all_sums_are_complete_before_they_are_combined():
    there = placement.on(tuple(jax.devices()[:4]))
    stacked, weights = random_tree(1, 4), jnp.array([0.1, 0.2, 0.3, 0.4])
    spread = jax.jit(there.reduce(norm_preserving))(*jax.device_put((stacked, weights), there.stacked))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), spread, blend(stacked, weights))


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("replicas", [3, 70])  # beyond 64 they are summed in blocks of 16
def test_the_mean_and_its_slopes_are_those_of_a_sum_of_products(replicas, per_element):
    rng = np.random.default_rng(0)
    x, slope = rng.normal(size=(replicas, 4)), rng.normal(size=4)
    w = rng.uniform(0.1, 1, size=(replicas, 4) if per_element else replicas)
    w[1] = 0  # out for good: a search gives it no weight back
    given = [jnp.asarray(value, jnp.float32) for value in (x, w, slope)]
    mean, back = jax.vjp(lambda x, w: weighted_mean({"x": x}, w)["x"], *given[:2])
    by_replica, by_weight = back(given[2])
    np.testing.assert_allclose(mean, ((w if per_element else w[:, None]) * x).sum(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_replica, (w if per_element else w[:, None]) * slope, rtol=1e-5)
    expected = slope * x if per_element else x @ slope
    np.testing.assert_allclose(by_weight, np.where(w != 0, expected, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("units", [[[3, 4], [-3, -4]], [[0, 0], [0, 0]], [[3, 4], [8, -6]]])
def test_the_slope_in_the_weights_is_finite_even_where_directions_cancel(units):
    # Learned weights differentiate through the blend.
    slope = jax.grad(lambda w: norm_preserving(kernels(*units), w)["kernel"].sum())(jnp.array([0.5, 0.5]))
    assert np.isfinite(slope).all()
