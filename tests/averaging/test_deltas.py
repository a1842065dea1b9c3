"""The reductions of deltas, through the averager: numbers worked by hand, NumPy's formulas, and what they share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wavg_jax as wavg
from wavg_jax.averaging.reduce import disjoint_mean, model_stock, norm_preserving, radial_directional, weighted_mean
from wavg_jax.devices import placement
from wavg_jax.weighting import robust

NAN = float("nan")
REDUCTIONS = {
    "radial_directional": radial_directional,
    "disjoint_mean": disjoint_mean,
    "model_stock": model_stock,
    "norm_preserving": norm_preserving,
}
AVERAGERS = {
    name: wavg.averager(wavg.proportional("share", higher_is_better=True), reduce=reduce, deltas=True)
    for name, reduce in REDUCTIONS.items()
}
UPDATES = {name: jax.jit(avg.update) for name, avg in AVERAGERS.items()}
every_reduction = pytest.mark.parametrize("name", REDUCTIONS)


def run(name, stacked, params, weights, alive=None):
    """One round with these weights, which sum to 1 over the living. Always with a mask, so that shapes compile once."""
    weights = jnp.asarray(weights, jnp.float32)
    alive = jnp.ones(len(weights), bool) if alive is None else alive
    state = AVERAGERS[name].init(params, len(weights))
    return UPDATES[name](stacked, state, params, alive=alive, share=weights)[0]


def moved(name, deltas, weights):
    """How far the blend moved from (10, 10, ...), for replicas that moved by `deltas` [K, n]."""
    params = {"w": jnp.full(len(deltas[0]), 10.0)}
    stacked = {"w": 10 + jnp.asarray(deltas, jnp.float32)}
    return np.asarray(run(name, stacked, params, weights)["w"]) - 10


@pytest.mark.parametrize(
    ("deltas", "weights", "expected"),
    [
        # Lengths 5 and 10: 3/4 * 5 + 1/4 * 10 = 6.25; v = 3/4 (0.6, 0.8) + 1/4 (0.8, -0.6) = (0.65, 0.45).
        ([[3, 4], [8, -6]], [0.75, 0.25], 6.25 * np.array([0.65, 0.45]) / np.hypot(0.65, 0.45)),
        # Four orthogonal deltas of length 3: the plain mean has length 1.5, this one 3.
        (3 * np.eye(4), [0.25] * 4, [1.5] * 4),
        # One that did not move halves the length and has no say in the direction.
        ([[3, 4], [0, 0]], [0.5, 0.5], [1.5, 2]),
        ([[0, 0], [0, 0]], [0.5, 0.5], [0, 0]),
        # Opposite directions of equal weight cancel: the plain mean.
        ([[3, 4], [-6, -8]], [0.5, 0.5], [-1.5, -2]),
        # A tensor of one element: mean size 2, and the sign of 3/4 - 1/4.
        ([[1], [-5]], [0.75, 0.25], [2]),
    ],
)
def test_radial_directional_averaging_by_hand(deltas, weights, expected):
    np.testing.assert_allclose(moved("radial_directional", deltas, weights), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("deltas", "weights", "expected"),
    [
        # Sums 2, -2, 0, 1: signs +, -, none, +. Means of those that agree: (1 + 3) / 2, (-3) / 1, nothing, 1.
        ([[1, 1, 2, 1], [3, -3, -2, 0], [-2, 0, 0, 0]], [1 / 3] * 3, [2, -3, 0, 1]),
        # 0.6 * 1 < 0.4 * 2: the sign is -, though most weight says +.
        ([[1], [-2]], [0.6, 0.4], [-2]),
        # 0.5 * 1 and 0.25 * 4 agree: (0.5 + 1) / 0.75 = 2.
        ([[1], [4], [-1]], [0.5, 0.25, 0.25], [2]),
    ],
)
def test_the_disjoint_mean_by_hand(deltas, weights, expected):
    np.testing.assert_allclose(moved("disjoint_mean", deltas, weights), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("deltas", "weights", "expected"),
    [
        # cos = 15 / 25 = 0.6; t = 2 * 0.6 / 1.6 = 0.75; mean (4, 2).
        ([[5, 0], [3, 4]], [1 / 2] * 2, [3, 1.5]),
        # Cosines 1, 0, 0: c = 1/3, t = 3 * 1/3 / (1 + 2 * 1/3) = 0.6; mean (1, 1).
        ([[1, 0], [2, 0], [0, 3]], [1 / 3] * 3, [0.6, 0.6]),
        # Orthogonal or opposed: nothing in common.
        ([[5, 0], [0, 4]], [1 / 2] * 2, [0, 0]),
        ([[5, 0], [-3, -4]], [1 / 2] * 2, [0, 0]),
        ([[3, 4], [-3, -4]], [1 / 2] * 2, [0, 0]),
        # The second has no direction: its cosines are 0. c = 1/3 again, and the mean (1, 1/3).
        ([[1, 0], [0, 0], [2, 1e-9]], [1 / 3] * 3, [0.6, 0]),
        # Weights 1/2, 1/4, 1/4: N = 1 / (3/8) = 8/3. Pairs weigh 1/8, 1/8, 1/16, their cosines are 1, 0, 0:
        # c = 0.4, t = 8/3 * 0.4 / (1 + 5/3 * 0.4) = 0.64. Mean (1, 0.75).
        ([[1, 0], [2, 0], [0, 3]], [1 / 2, 1 / 4, 1 / 4], [0.64, 0.48]),
        # One replica alone is taken as it is.
        ([[1, 0], [0, 3]], [1, 0], [1, 0]),
    ],
)
def test_model_stock_by_hand(deltas, weights, expected):
    np.testing.assert_allclose(moved("model_stock", deltas, weights), expected, rtol=1e-5, atol=2e-6)


def random_trees(seed, replicas=3):
    rng = np.random.default_rng(seed)
    shapes = {"conv": (2, 2, 3, 4), "dense": (7, 4), "bias": (4,), "scale": ()}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {n: (p + rng.normal(size=(replicas, *p.shape))).astype(np.float32) for n, p in params.items()}, params


def unit(v):
    length = np.linalg.norm(v)
    return v / length if length else v


def numpy_radial_directional(d, w):
    """RDA({v_m, w_m}) = (sum w |v| / sum w) unit(sum w unit(v))."""
    return w @ np.linalg.norm(d, axis=1) * unit(w @ np.array([unit(one) for one in d]))


def numpy_ties(d, w):
    """Elect and disjoint mean, one element at a time."""
    merged = np.zeros(d.shape[1])
    for i in range(d.shape[1]):
        agree = np.sign(d[:, i]) == np.sign(w @ d[:, i])
        merged[i] = np.average(d[agree, i], weights=w[agree])
    return merged


def numpy_model_stock(d, w):
    """t = N cos / (1 + (N - 1) cos) with the mean cosine of all pairs, for equal weights."""
    cosines = [unit(a) @ unit(b) for a, b in itertools.combinations(d, 2)]
    n, c = len(d), max(np.mean(cosines), 0)
    return n * c / (1 + (n - 1) * c) * (w @ d)


PUBLISHED = {
    "radial_directional": numpy_radial_directional,
    "disjoint_mean": numpy_ties,
    "model_stock": numpy_model_stock,
}


@pytest.mark.parametrize("name", PUBLISHED)
@given(seed=st.integers(0, 2**16), weights=st.lists(st.floats(0.1, 1), min_size=3, max_size=3))
def test_random_trees_against_numpy(name, seed, weights):
    stacked, params = random_trees(seed)
    w = np.full(3, 1 / 3) if name == "model_stock" else np.array(weights) / np.sum(weights)
    new = run(name, stacked, params, w)
    for leaf, x in stacked.items():
        d = np.asarray(x - params[leaf][None], np.float64).reshape(3, -1)
        expected = params[leaf] + PUBLISHED[name](d, w).reshape(params[leaf].shape)
        np.testing.assert_allclose(new[leaf], expected, rtol=5e-4, atol=5e-5)


@every_reduction
def test_equal_replicas_are_unchanged_and_nobody_alive_changes_nothing(name):
    _, params = random_trees(0)
    there = jax.tree.map(lambda p: p + 1, params)
    new = run(name, wavg.replicate(there, 3), params, [0.2, 0.3, 0.5])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), new, there)
    lost = run(name, wavg.replicate(there, 3), params, [0.2, 0.3, 0.5], alive=jnp.zeros(3, bool))
    jax.tree.map(np.testing.assert_array_equal, lost, params)


@pytest.mark.optimized
@every_reduction
@pytest.mark.parametrize("weighting", [wavg.uniform(), robust.coordinate_median()], ids=["uniform", "median"])
def test_a_dead_replica_equals_a_run_of_the_survivors_exactly(name, weighting):
    avg = wavg.averager(weighting, reduce=REDUCTIONS[name], deltas=True)
    update = jax.jit(avg.update)
    alive = np.isin(np.arange(8), [0, 2, 4])
    for seed in range(4):  # rounding that depends on K shows in one of a few trees
        rng = np.random.default_rng(seed)
        shapes = {"wide": (200, 130), "scale": ()}
        stacked = {n: rng.normal(size=(8, *shape)).astype(np.float32) for n, shape in shapes.items()}
        params = wavg.replica({n: x + 1 for n, x in stacked.items()}, 0)
        stacked["wide"][1, 2, 3] = NAN
        new, _, _ = update(stacked, avg.init(params, 8), params, alive=alive)
        alone, _, _ = update(jax.tree.map(lambda x: x[alive], stacked), avg.init(params, 3), params, alive=alive[alive])
        jax.tree.map(np.testing.assert_array_equal, new, alone)


@every_reduction
def test_over_devices_all_sums_are_complete_before_they_are_combined(name):
    there = placement.on(tuple(jax.devices()[:4]))
    (stacked, _), weights = random_trees(1, 4), jnp.array([0.1, 0.2, 0.3, 0.4])
    spread = jax.jit(there.reduce(REDUCTIONS[name]))(*jax.device_put((stacked, weights), there.stacked))
    one = jax.jit(REDUCTIONS[name])(stacked, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), spread, one)


@every_reduction
def test_the_slope_in_the_weights_is_finite_even_where_directions_cancel(name):
    # Learned weights differentiate through the blend.
    slope = jax.jit(jax.grad(lambda w, x: REDUCTIONS[name]({"w": x}, w)["w"].sum()))
    for deltas in ([[3, 4], [-3, -4]], [[0, 0], [0, 0]], [[3, 4], [8, -6]], [[3, 4], [3, 4]]):
        for weights in ([0.5, 0.5], [1.0, 0.0]):
            assert np.isfinite(slope(jnp.array(weights), jnp.asarray(deltas, jnp.float32))).all()


@every_reduction
def test_deltas_of_bfloat16_are_reduced_in_float32(name):
    # Steps of 2^-7 from 1, each stored exactly; the deltas of all elements and replicas agree.
    params = {"w": jnp.ones((300, 2), jnp.bfloat16)}
    stacked = jax.tree.map(lambda p: p + jnp.bfloat16(2**-7), wavg.replicate(params, 4))
    avg = wavg.averager(wavg.uniform(), reduce=REDUCTIONS[name], deltas=True, outer=optax.sgd(0.25))
    new, state, _ = jax.jit(avg.update)(stacked, avg.init(params, 4), params)
    assert new["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.masters["w"], 1 + 2**-9, rtol=1e-6)


def test_weights_per_element_enter_the_direction_and_their_mean_the_length():
    # Lengths 5 and 10, mean weights 1/2 and 1/2: 7.5. v = (1 * 0.6, 1 * -0.6), of length 0.6 sqrt(2).
    deltas, weights = {"w": jnp.array([[3.0, 4.0], [8.0, -6.0]])}, {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
    expected = 7.5 * np.array([1, -1]) / np.sqrt(2)
    np.testing.assert_allclose(radial_directional(deltas, weights)["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_weighted_mean_of_deltas_is_that_of_the_replicas(dtype):
    stacked, params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_trees(2))
    ends = []
    for deltas in (False, True):
        avg = wavg.averager(wavg.uniform(), reduce=weighted_mean, deltas=deltas)
        ends.append(jax.jit(avg.update)(stacked, avg.init(params, 3), params)[0])
        assert not avg.reads_replicas
    rtol = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=rtol, atol=1e-5), *ends)


def test_the_outer_optimizer_steps_down_the_reduced_delta():
    # Orthogonal steps of length 3 from 10: (1.5, 1.5, 1.5, 1.5), half of which is taken.
    avg = wavg.averager(wavg.uniform(), reduce=radial_directional, deltas=True, outer=optax.sgd(0.5))
    params = {"w": jnp.full(4, 10.0)}
    new, _, _ = avg.update({"w": 10 + 3 * jnp.eye(4)}, avg.init(params, 4), params)
    np.testing.assert_allclose(new["w"], 10.75, rtol=1e-6)


def test_a_search_judges_the_blend_that_is_made_of_deltas():
    # From 10: steps of 1 and 3 agree, and one of -9 decides the sign of the sum of equal weights. Equal weights give
    # 10 - 9 = 1, the best replica 13: the loss is the distance to 13.
    def evaluate(params, weights):
        del weights
        return {"loss": abs(params["w"][0] - 13), "accuracy": jnp.float32(0)}

    avg = wavg.averager(wavg.best_of(wavg.best("loss")), reduce=disjoint_mean, deltas=True)
    params, loss = {"w": jnp.full(1, 10.0)}, jnp.array([2.0, 0.0, 12.0])
    stacked = {"w": jnp.array([[11.0], [13.0], [1.0]])}
    new, _, weights = avg.update(stacked, avg.init(params, 3), params, loss=loss, evaluate=evaluate)
    assert (weights.tolist(), new["w"].tolist()) == ([0, 1, 0], [13])
