"""Transforms that sparsify deltas: numbers worked by hand, TIES as a whole, and what DARE's masks hang on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wavg_jax as wavg
from wavg_jax.averaging.reduce import disjoint_mean
from wavg_jax.averaging.transforms import drop_deltas, trim_deltas
from wavg_jax.devices import placement

BOTH = jnp.ones(2, bool)


def trees(replicas, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=(replicas, *s)), dtype) for n, s in {"kernel": (20, 30), "b": (30,)}.items()}


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        # From (1, 1) and 1 the first moved by 4, -1 and 2, the second by -3, 3 and 0; of three elements one, two, all.
        (0.2, {"w": [[5, 1], [-2, 4]], "b": [1, 1]}),  # 0.6 elements are rounded to one; the tie stays
        (0.6, {"w": [[5, 1], [-2, 4]], "b": [3, 1]}),
        (1, {"w": [[5, 0], [-2, 4]], "b": [3, 1]}),
        (1e-9, {"w": [[5, 1], [-2, 4]], "b": [1, 1]}),
    ],
)
def test_trimming_by_hand(density, expected):
    stacked = {"w": jnp.array([[5.0, 0.0], [-2.0, 4.0]]), "b": jnp.array([3.0, 1.0])}
    kept = jax.jit(trim_deltas(density))(stacked, {"w": jnp.ones(2), "b": jnp.ones(())}, BOTH)
    assert jax.tree.map(lambda x: x.tolist(), kept) == expected


def test_the_largest_changes_of_all_tensors_together_are_kept():
    stacked, params = trees(3), wavg.replica(trees(1, seed=9), 0)
    kept = jax.jit(trim_deltas(0.1))(stacked, params, jnp.ones(3, bool))
    sizes = [np.abs(np.asarray(stacked[n] - params[n][None])).reshape(3, -1) for n in stacked]
    least = np.sort(np.concatenate(sizes, axis=1), axis=1)[:, -63]  # 63 of 630
    for size, name in zip(sizes, stacked, strict=True):
        same = np.asarray(kept[name] == stacked[name]).reshape(3, -1)
        np.testing.assert_array_equal(same, size >= least[:, None])


def test_ties_merging_by_hand():
    # From 10 the replicas moved by (4, 1, -1, 0), (-3, 2, 0, 1) and (2, 0, -5, -1); half of four elements stay:
    # (4, 1, -1, 0), as 1 and -1 tie, (-3, 2, 0, 0) and (2, 0, -5, 0). Sums 3, 3, -6, 0: signs +, +, -, none.
    # Means (4 + 2) / 2, (1 + 2) / 2, (-1 - 5) / 2, nothing.
    avg = wavg.averager(wavg.uniform(), transform=trim_deltas(0.5), reduce=disjoint_mean, deltas=True)
    deltas = jnp.array([[4.0, 1.0, -1.0, 0.0], [-3.0, 2.0, 0.0, 1.0], [2.0, 0.0, -5.0, -1.0]])
    params = {"w": jnp.full(4, 10.0)}
    new, _, _ = jax.jit(avg.update)({"w": 10 + deltas}, avg.init(params, 3), params)
    np.testing.assert_allclose(new["w"], [13, 11.5, 7, 10], rtol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("transform", "dtype"),
    [(trim_deltas(0.3), jnp.float32), (drop_deltas(0.7), jnp.bfloat16)],
    ids=["trim", "drop in bfloat16"],
)
def test_elements_are_kept_or_taken_back_whoever_else_is_there(transform, dtype):
    stacked, params = trees(5, dtype=dtype), wavg.replica(trees(1, seed=9, dtype=dtype), 0)
    change = jax.jit(transform)
    sent = change(stacked, params, jnp.ones(5, bool))
    assert jax.tree.map(lambda x: x.dtype, sent) == jax.tree.map(lambda x: x.dtype, stacked)
    back = {n: np.asarray(sent[n] == params[n][None]) for n in sent}
    shares = sum(x.reshape(5, -1).sum(axis=1) for x in back.values()) / 630
    np.testing.assert_allclose(shares, 0.7, atol=0.1)  # sd 0.02 for the masks
    # In another order, beside others, and a dead one among them.
    order, alive = np.array([3, 0, 4]), jnp.array([True, False, True])
    again = change(jax.tree.map(lambda x: x[order], stacked), params, alive)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), sent, again)


def test_changes_that_are_not_dropped_are_scaled_up_so_that_the_mean_stays():
    stacked, params = {"w": jnp.full((2, 4000), 3.0)}, {"w": jnp.full(4000, 2.0)}
    sent = np.asarray(drop_deltas(0.75)(stacked, params, BOTH)["w"])
    assert set(np.unique(sent)) == {2, 6}  # 2 + 1 / (1 - 0.75)
    np.testing.assert_allclose(sent.mean(axis=1), 3, atol=0.15)  # sd 4 sqrt(0.25 * 0.75 / 4000) = 0.03


def test_masks_differ_between_replicas_rounds_and_seeds_and_are_the_same_again():
    stacked, params = trees(3), wavg.replica(trees(1, seed=9), 0)
    later = jax.tree.map(lambda x: x.at[0, 3].add(1e-3), stacked)

    def masks(seed, stacked):
        sent = drop_deltas(0.5, seed)(stacked, params, jnp.ones(3, bool))
        return np.asarray(sent["kernel"] == params["kernel"][None])

    one, again, other, next_round = masks(0, stacked), masks(0, stacked), masks(1, stacked), masks(0, later)
    np.testing.assert_array_equal(one, again)
    for a, b in [(one[0], one[1]), (one[0], other[0]), (one[0], next_round[0])]:
        assert 0.3 < (a != b).mean() < 0.7  # independent masks differ in half of the elements
    np.testing.assert_array_equal(one[1:], next_round[1:])


@pytest.mark.parametrize("transform", [trim_deltas(0.3), drop_deltas(0.7)], ids=["trim", "drop"])
def test_over_devices_the_same_elements_are_kept(transform):
    stacked, params, alive = trees(4), wavg.replica(trees(1, seed=9), 0), jnp.arange(4) != 1
    there = placement.on(tuple(jax.devices()[:4]))
    change = jax.jit(transform)
    spread = change(jax.device_put(stacked, there.stacked), *jax.device_put((params, alive), there.shared))
    one = change(stacked, params, alive)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), spread, one)


@pytest.mark.optimized
@pytest.mark.parametrize("transform", [trim_deltas(0.3), drop_deltas(0.3)], ids=["trim", "drop"])
def test_a_dead_replica_equals_a_run_of_the_survivors_exactly(transform):
    avg = wavg.averager(wavg.uniform(), transform=transform)
    update = jax.jit(avg.update)
    stacked, params, alive = trees(5), wavg.replica(trees(1, seed=9), 0), np.arange(5) % 2 == 0
    stacked["b"] = stacked["b"].at[3, 2].set(jnp.nan)
    new, _, _ = update(stacked, avg.init(params, 5), params, alive=alive)
    alone, _, _ = update(jax.tree.map(lambda x: x[alive], stacked), avg.init(params, 3), params, alive=alive[alive])
    jax.tree.map(np.testing.assert_array_equal, new, alone)
