"""Sums over the devices of one process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from wavg_jax.devices import collectives
from wavg_jax.devices.placement import place

D, LARGE = 8, collectives._LARGE


def summed(leaves):
    """The compiled sum of stacked leaves [D, ...], and what it returns."""
    where = place(D)
    run = jax.shard_map(
        lambda tree: collectives.sum_trees("replicas", jax.tree.map(lambda x: x[0], tree)),
        mesh=where.stacked.mesh,
        in_specs=PartitionSpec("replicas"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    program = jax.jit(run).lower(jax.device_put(leaves, where.stacked)).compile()
    return program.as_text(), program(jax.device_put(leaves, where.stacked))


@pytest.fixture(scope="module")
def leaves():
    rng = np.random.default_rng(0)
    shapes = {"large": (D, LARGE // 64, 64), "odd": (D, LARGE + 1), "small": (D, 5), "half": (D, 7)}
    made = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return made | {"half": made["half"].astype(jnp.bfloat16)}


def test_large_leaves_are_summed_in_shares_and_the_others_together(leaves):
    text, sums = summed(leaves)
    assert text.count("reduce-scatter(") == text.count("all-gather(") == 1
    assert text.count("all-reduce(") == 2  # float32 and bfloat16
    for name, x in leaves.items():
        expected = np.asarray(x, np.float64).sum(0)
        np.testing.assert_allclose(np.asarray(sums[name], np.float64), expected, atol=0.1 if name == "half" else 1e-4)
        assert sums[name].dtype == x.dtype


def test_between_processes_all_leaves_of_a_dtype_travel_as_one(leaves, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    text, _ = summed({name: leaves[name] for name in ("large", "small")})
    assert "reduce-scatter(" not in text
    assert text.count("all-reduce(") == 1
