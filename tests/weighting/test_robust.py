"""Robust weightings and clipping: numbers worked by hand, NumPy's and SciPy's estimators, what no outlier may do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import wavg_jax as wavg
from wavg_jax.averaging import reduce
from wavg_jax.devices import placement
from wavg_jax.weighting import robust

SCHEMES = {
    "median": robust.coordinate_median(),
    "trimmed": robust.trimmed_mean(1),
    "geometric": robust.geometric_median(),
    "krum": robust.krum(1),
    "multi_krum": robust.multi_krum(1, keep=3),
    "around_median": robust.mean_around_median(1),
    "bulyan": robust.bulyan(1),
}
AVERAGERS = {
    **{name: wavg.averager(scheme) for name, scheme in SCHEMES.items()},
    "clipped": wavg.averager(wavg.uniform(), transform=robust.clip_deltas()),
    "clipped_to_2": wavg.averager(wavg.uniform(), transform=robust.clip_deltas(2.0)),
}
UPDATES = {name: jax.jit(avg.update) for name, avg in AVERAGERS.items()}


def weigher(scheme):
    """`(stacked, alive, params) -> weights`, compiled."""

    def weigh(stacked, alive, params):
        blend = functools.partial(reduce.weighted_mean, stacked)
        return scheme.update(stacked, (), params, alive=alive, blend=blend)[0]

    return jax.jit(weigh)


WEIGH = {name: weigher(scheme) for name, scheme in SCHEMES.items()}


def column(*values):
    return {"w": jnp.asarray(values, jnp.float32).reshape(len(values), -1)}


def trees(replicas, seed=0, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (37, 53), "bias": (53,)}
    return {name: jnp.asarray(scale * rng.normal(size=(replicas, *shape)), dtype) for name, shape in shapes.items()}


def flat(stacked):
    """[K, everything] float64."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(stacked)]
    return np.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)


def run(name, stacked, params, alive=None):
    """One round. Always with a mask, so that every shape compiles once."""
    alive = jnp.ones(len(jax.tree.leaves(stacked)[0]), bool) if alive is None else alive
    return UPDATES[name](stacked, AVERAGERS[name].init(params, alive.shape[0]), params, alive=alive)


def by_hand(name, values, alive=None):
    stacked = column(*values)
    alive = jnp.ones(len(values), bool) if alive is None else jnp.array(alive)
    weights = WEIGH[name](stacked, alive, {"w": jnp.zeros(stacked["w"].shape[1])})
    return (weights["w"] if isinstance(weights, dict) else weights).squeeze().tolist()


@pytest.mark.parametrize(
    ("values", "alive", "expected"),
    [
        ([5, 1, 9, 2, 7], [True] * 5, [1, 0, 0, 0, 0]),
        ([5, 1, 9, 2, 7], [True, True, True, True, False], [0.5, 0, 0, 0.5, 0]),
        ([5, 1, 9, 2, 7], [False, True, False, False, True], [0, 0.5, 0, 0, 0.5]),
        ([5, 1, 9, 2, 7], [False, False, True, False, False], [0, 0, 1, 0, 0]),
        ([3, 3, 3, 3, 1], [True] * 5, [0, 1, 0, 0, 0]),  # ties by index: 1 first, then the 3s
        ([5, 1, 9, 2, 7], [False] * 5, [0, 0, 0, 0, 0]),
    ],
)
def test_the_median_weighs_the_middle_living_values(values, alive, expected):
    assert by_hand("median", values, alive) == expected


@pytest.mark.parametrize(
    ("values", "alive", "expected"),
    [
        ([5, 1, 9, 2, 7], [True] * 5, [1 / 3, 0, 0, 1 / 3, 1 / 3]),
        ([5, 1, 9, 2, 7], [True, True, True, True, False], [0.5, 0, 0, 0.5, 0]),
        # Of two living nothing can be left out at both ends: their mean.
        ([5, 1, 9, 2, 7], [True, True, False, False, False], [0.5, 0.5, 0, 0, 0]),
        ([5, 1, 9, 2, 7], [False] * 5, [0, 0, 0, 0, 0]),
    ],
)
def test_the_trimmed_mean_leaves_out_the_ends(values, alive, expected):
    np.testing.assert_allclose(by_hand("trimmed", values, alive), expected, rtol=1e-6)


@given(st.integers(0, 2**16), st.lists(st.booleans(), min_size=5, max_size=5))
def test_median_and_trimmed_mean_are_numpys_and_scipys(seed, alive):
    # Few distinct values, so that ties abound; elements differ in their middle replicas.
    x = np.random.default_rng(seed).integers(0, 4, size=(5, 3)).astype(np.float32)
    alive = np.array(alive)
    params = {"w": jnp.full(3, 7.0)}
    median, _, _ = run("median", {"w": jnp.asarray(x)}, params, jnp.asarray(alive))
    trimmed, _, _ = run("trimmed", {"w": jnp.asarray(x)}, params, jnp.asarray(alive))
    if not alive.any():
        assert median["w"].tolist() == trimmed["w"].tolist() == [7, 7, 7]
        return
    np.testing.assert_allclose(median["w"], np.median(x[alive], axis=0), rtol=1e-6)
    cut = min(1, (alive.sum() - 1) // 2) / alive.sum()
    np.testing.assert_allclose(trimmed["w"], stats.trim_mean(x[alive], cut, axis=0), rtol=1e-6, atol=1e-7)


def numpy_weiszfeld(x, params, iterations, nu=1e-6):
    """Algorithm 2 of RFA with equal alpha, from the start that the docstring describes."""
    distance = np.linalg.norm(x - params, axis=1)
    w = 1 / np.maximum(max(nu, np.median(distance)), distance)
    for _ in range(iterations):
        z = (w / w.sum()) @ x
        w = 1 / np.maximum(nu, np.linalg.norm(x - z, axis=1))
    return w / w.sum()


@pytest.mark.parametrize("alive", [[True] * 5, [True, False, True, True, True]])
def test_the_geometric_median_is_rfas_weiszfeld_over_all_tensors_together(alive):
    stacked, params = trees(5), wavg.replica(trees(1, seed=9), 0)
    alive = np.array(alive)
    weights = WEIGH["geometric"](stacked, jnp.asarray(alive), params)
    expected = numpy_weiszfeld(flat(stacked)[alive], flat(jax.tree.map(lambda p: p[None], params)), 8)
    np.testing.assert_allclose(np.asarray(weights)[alive], expected, rtol=1e-4)
    assert (np.asarray(weights)[~alive] == 0).all()


def test_the_geometric_median_of_a_quadrangle_is_where_its_diagonals_cross():
    # From (0, 0) to (2, 2) and from (2, 0) to (0, 4): the point (4/3, 4/3).
    avg = wavg.averager(robust.geometric_median(iterations=200))
    params = {"w": jnp.zeros(2)}
    corners = {"w": jnp.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 4.0]])}
    new, _, _ = jax.jit(avg.update)(corners, avg.init(params, 4), params)
    np.testing.assert_allclose(new["w"], [4 / 3, 4 / 3], rtol=1e-4)


def test_a_replica_that_did_not_move_does_not_hold_the_geometric_median_back():
    # It sits on the start, where a plain Weiszfeld step would weigh it a million times more than the others.
    new, _, _ = run("geometric", column(0, 10, 10.1, 9.9, 10), {"w": jnp.zeros(1)})
    np.testing.assert_allclose(new["w"], 10, atol=0.05)


@pytest.mark.parametrize(
    ("name", "values", "alive", "expected"),
    [
        # n = 5, f = 1: two neighbours. Scores 1+9, 1+4, 2.25+4, 2.25+12.25, far.
        ("krum", [0, 1, 3, 4.5, 99], [True] * 5, [0, 1, 0, 0, 0]),
        ("multi_krum", [0, 1, 3, 4.5, 99], [True] * 5, [1 / 3, 1 / 3, 1 / 3, 0, 0]),
        # n = 4, f = 1: one neighbour, and the closest pair, 0 and 1, ties.
        ("krum", [0, 1, 3, 4.5, 99], [True, True, True, False, True], [0.5, 0.5, 0, 0, 0]),
        # Scores 1, 1, 4: the third place goes to 3.
        ("multi_krum", [0, 1, 3, 4.5, 99], [True, True, True, False, True], [1 / 3, 1 / 3, 1 / 3, 0, 0]),
        # Scores 1, 1, 4, 4 over four living: the third place is shared.
        ("multi_krum", [0, 1, 3, -2, 99], [True, True, True, True, False], [1 / 3, 1 / 3, 1 / 6, 1 / 6, 0]),
        # Two or one living: fewer than the rule needs, and it goes on.
        ("krum", [0, 1, 3, 4.5, 99], [False, False, True, False, True], [0, 0, 0.5, 0, 0.5]),
        ("krum", [0, 1, 3, 4.5, 99], [False, False, True, False, False], [0, 0, 1, 0, 0]),
        ("multi_krum", [0, 1, 3, 4.5, 99], [False, False, True, False, True], [0, 0, 0.5, 0, 0.5]),
        ("krum", [0, 1, 3, 4.5, 99], [False] * 5, [0, 0, 0, 0, 0]),
    ],
)
def test_krum_by_hand(name, values, alive, expected):
    np.testing.assert_allclose(by_hand(name, values, alive), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "alive", "expected"),
    [
        # The median is 5: distances 0, 4, 4, 3, 2. The values 1 and 9 share the fourth place.
        ([5, 1, 9, 2, 7], [True] * 5, [1 / 4, 1 / 8, 1 / 8, 1 / 4, 1 / 4]),
        # The median of 5, 1, 9, 2 is 3.5: distances 1.5, 2.5, 5.5, 1.5.
        ([5, 1, 9, 2, 7], [True, True, True, True, False], [1 / 3, 1 / 3, 0, 1 / 3, 0]),
        # The median of 0, 0, 0, 1 and 9 is 0.
        ([0, 0, 1, 0, 9], [True] * 5, [1 / 4, 1 / 4, 1 / 4, 1 / 4, 0]),
        # Two living: both are as far from their median, and share the one place.
        ([5, 1, 9, 2, 7], [True, False, True, False, False], [1 / 2, 0, 1 / 2, 0, 0]),
        ([5, 1, 9, 2, 7], [False, False, True, False, False], [0, 0, 1, 0, 0]),
        ([5, 1, 9, 2, 7], [False] * 5, [0, 0, 0, 0, 0]),
    ],
)
def test_the_mean_around_the_median_by_hand(values, alive, expected):
    np.testing.assert_allclose(by_hand("around_median", values, alive), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "alive", "expected"),
    [
        # n = 7, f = 1: five of them. With 4 neighbours 2 scores 4 + 1 + 4 + 25 = 34, 4 has 4 + 9 + 9 + 16 = 38, 1 has
        # 47. Then, with 3 neighbours: 4 has 9 + 9 + 16 = 34, 1 has 1 + 9 + 36 = 46, 7 has 61. With 2: 1 has 37, 0 has
        # 50, 7 has 52. With 1: 7 and 11 have 16 and tie, 0 has 49. S = {1, 2, 4, 7, 11}, whose median is 4; three
        # places: 4, 2, and half of one for 1 and for 7.
        ([0, 1, 2, 4, 7, 11, 99], [True] * 7, [0, 1 / 6, 1 / 3, 1 / 3, 1 / 6, 0, 0]),
        # n = 5: Krum chooses 1 (5, see above), then 3 and 4.5 tie with 2.25. One place, at the median.
        ([0, 1, 3, 4.5, 99], [True] * 5, [0, 0, 1, 0, 0]),
        # n = 4: the pair 0 and 1 ties and is all of S.
        ([0, 1, 3, 4.5, 99], [True, True, True, True, False], [1 / 2, 1 / 2, 0, 0, 0]),
        ([0, 1, 3, 4.5, 99], [False, False, True, False, True], [0, 0, 1 / 2, 0, 1 / 2]),
        ([0, 1, 3, 4.5, 99], [False, False, True, False, False], [0, 0, 1, 0, 0]),
        ([0, 1, 3, 4.5, 99], [False] * 5, [0, 0, 0, 0, 0]),
    ],
)
def test_bulyan_by_hand(values, alive, expected):
    np.testing.assert_allclose(by_hand("bulyan", values, alive), expected, rtol=1e-6)


def test_bulyan_bounds_an_element_that_distances_hide():
    # Seven replicas of 1000 elements around 0; the last is as close to the others as they are, but far off in one
    # element. Krum may select it; the mean around the median does not take its element.
    x = np.random.default_rng(0).normal(size=(7, 1000)).astype(np.float32)
    x[6] *= 0.1
    x[6, 5] = 20
    weights = WEIGH["bulyan"]({"w": jnp.asarray(x)}, jnp.ones(7, bool), {"w": jnp.zeros(1000)})["w"]
    assert np.asarray(weights)[6].max() > 0.3
    assert weights[6, 5] == 0


@pytest.mark.parametrize("name", AVERAGERS)
def test_one_outlier_of_any_size_cannot_drag_the_blend_away(name):
    # Four honest replicas have moved from 10 to about 11; the fifth sends anything finite.
    params = {"w": jnp.full(3, 10.0)}
    for far in (1e3, 1e9, 1e30, -3e38):
        stacked = {"w": jnp.asarray(np.random.default_rng(0).normal(11, 0.1, size=(5, 3)), jnp.float32).at[2].set(far)}
        new, _, _ = run(name, stacked, params)
        assert np.abs(np.asarray(new["w"]) - 11).max() < 0.7


@given(st.permutations(range(5)), st.integers(0, 9))
def test_permuting_the_replicas_changes_no_blend(order, seed):
    stacked = {"w": jnp.asarray(np.random.default_rng(seed).integers(0, 3, size=(5, 3)), jnp.float32)}
    params = {"w": jnp.ones(3)}
    for name in AVERAGERS:
        new, _, _ = run(name, stacked, params)
        same, _, _ = run(name, {"w": stacked["w"][jnp.array(order)]}, params)
        np.testing.assert_allclose(same["w"], new["w"], rtol=1e-5, atol=1e-5)


# Those that sum over elements, whose rounding the number of replicas must not reach.
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["geometric", "krum", "bulyan", "clipped"])
def test_a_dead_replica_equals_a_run_of_the_survivors_exactly(name):
    stacked, params = trees(5), wavg.replica(trees(1, seed=9), 0)
    stacked["bias"] = stacked["bias"].at[3, 2].set(jnp.nan)
    index = np.array([0, 1, 2, 4]) if name in ("krum", "bulyan") else np.array([0, 4])  # fewest for one broken replica
    new, _, weights = run(name, stacked, params, np.isin(np.arange(5), index))
    alone, _, kept = run(name, {n: x[index] for n, x in stacked.items()}, params)
    jax.tree.map(np.testing.assert_array_equal, new, alone)
    jax.tree.map(lambda w, k: np.testing.assert_array_equal(w[index], k), weights, kept)


@pytest.mark.optimized
def test_two_survivors_of_eight_are_blended_in_a_loop_as_two_alone_are():
    # The compiler specialises a loop on which weights are 0: with few replicas it once rounded another of two products.
    index = np.array([1, 6])
    for seed in range(24):
        rng = np.random.default_rng(seed)
        stacked, params = (
            {"w": rng.normal(size=(8, 5, 4)).astype(np.float32)},
            {"w": rng.normal(size=(5, 4)).astype("f4")},
        )
        _, _, weights = run("geometric", stacked, params, np.isin(np.arange(8), index))
        _, _, kept = run("geometric", {"w": stacked["w"][index]}, params)
        np.testing.assert_array_equal(weights[index], kept)


def test_clipping_by_hand():
    # From (1, 1) the replicas moved by (3, 4), (6, 8) and (0, 0): lengths 5, 10 and 0.
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    stacked = {"a": jnp.array([[4.0], [7.0], [1.0]]), "b": jnp.array([[5.0], [9.0], [1.0]])}
    everyone = jnp.ones(3, bool)
    clipped = jax.jit(robust.clip_deltas(2.5))(stacked, params, everyone)
    np.testing.assert_allclose(clipped["a"][:, 0], [2.5, 2.5, 1], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"][:, 0], [3, 3, 1], rtol=1e-6)
    clip = jax.jit(robust.clip_deltas())
    median = clip(stacked, params, everyone)  # 5
    np.testing.assert_allclose(median["a"][:, 0], [4, 4, 1], rtol=1e-6)
    of_two = clip(stacked, params, jnp.array([True, True, False]))  # (5 + 10) / 2
    np.testing.assert_allclose(of_two["a"][:, 0], [4, 5.5, 1], rtol=1e-6)


def test_what_is_within_the_norm_is_kept_bit_for_bit_in_its_dtype():
    stacked = trees(4, dtype=jnp.bfloat16)
    params = wavg.replica(stacked, 0)
    kept = jax.jit(robust.clip_deltas(1e6))(stacked, params, jnp.ones(4, bool))
    jax.tree.map(np.testing.assert_array_equal, kept, stacked)
    clipped = jax.eval_shape(robust.clip_deltas(1e-3), stacked, params, jnp.ones(4, bool))
    assert jax.tree.map(lambda x: x.dtype, clipped) == jax.tree.map(lambda x: x.dtype, stacked)


def test_clipping_over_devices_gives_the_same_numbers():
    stacked, params = trees(4, dtype=jnp.bfloat16), wavg.replica(trees(1, seed=9, dtype=jnp.bfloat16), 0)
    there = placement.on(tuple(jax.devices()[:4]))
    alive = jnp.arange(4) != 1
    clip = jax.jit(robust.clip_deltas())
    spread = clip(jax.device_put(stacked, there.stacked), *jax.device_put((params, alive), there.shared))
    one = jax.tree.map(lambda x: np.asarray(x, np.float32), clip(stacked, params, alive))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=1e-2), spread, one)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: robust.trimmed_mean(-1), "trim is -1"),
        (lambda: robust.trimmed_mean(0.1), "whole number"),
        (lambda: robust.krum(-1), "byzantine is -1"),
        (lambda: robust.multi_krum(1, 0), "keep is 0"),
        (lambda: robust.mean_around_median(-1), "byzantine is -1"),
        (lambda: robust.bulyan(0.5), "whole number"),
        (lambda: robust.geometric_median(0), "iterations is 0"),
        (lambda: robust.geometric_median(smoothing=0.0), "smoothing is 0"),
        (lambda: robust.clip_deltas(0.0), "max_norm is 0"),
        (lambda: robust.clip_deltas(float("nan")), "max_norm is nan"),
    ],
)
def test_bad_arguments_are_refused(make, says):
    with pytest.raises(wavg.SettingsError, match=says):
        make()


@pytest.mark.parametrize(
    ("rule", "replicas", "says"),
    [
        (
            robust.krum(2),
            4,
            "byzantine=2 is too large for replicas=4: byzantine= must be 0 to 1, .*at least 5 replicas",
        ),
        (robust.krum(4), 4, "byzantine=4 .*0 to 1, .*at least 7"),
        (robust.multi_krum(1, keep=2), 3, "byzantine=1 .*byzantine= must be 0, .*at least 4"),
        (robust.krum(1), 1, "byzantine=1 .*byzantine= must be 0, .*at least 4"),
        (robust.trimmed_mean(2), 4, "trim=2 is too large for replicas=4: trim= must be 0 to 1, .*at least 5 replicas"),
        (robust.mean_around_median(2), 4, "byzantine=2 .*byzantine= must be 0 to 1, .*at least 5"),
        (robust.bulyan(2), 4, "byzantine=2 .*byzantine= must be 0 to 1, .*at least 5"),
        (robust.trimmed_mean(1), 2, "trim=1 .*trim= must be 0, .*at least 3"),
        (wavg.momentum(robust.trimmed_mean(9), 0.5), 8, "trim=9 .*0 to 3, .*at least 19"),
    ],
)
def test_more_broken_replicas_than_a_rule_can_tolerate_are_refused_at_init(rule, replicas, says):
    for init in (rule.init, wavg.averager(rule).init):
        with pytest.raises(wavg.SettingsError, match=says):
            init({"w": jnp.zeros(2)}, replicas)


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 7])
def test_the_most_broken_replicas_that_a_rule_allows_are_accepted(replicas):
    for rule in (robust.krum(max(replicas - 3, 0)), robust.trimmed_mean((replicas - 1) // 2)):
        assert wavg.averager(rule).init({"w": jnp.zeros(2)}, replicas).weighting == ()
