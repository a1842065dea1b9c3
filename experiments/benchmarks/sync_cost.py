"""The cost of a sync, the blend of K replicas and their restart, against a plain copy of as many bytes.

  python -m experiments.benchmarks.sync_cost
  python -m experiments.benchmarks.sync_cost --sizes=1 --replica_counts=8 --networks=mlp

`blend` is the reduction alone: it reads K trees and writes one. `sync` is everything between the local steps of two
rounds of plain averaging: check, weigh, blend, and write the blend to all replicas in place; it reads at least K trees
and writes K + 1. Bandwidth counts those bytes only. The copies, one compiled and one by numpy, move as many bytes, up
to 512 MiB. For networks it also measures the sync's share of a round of --round_steps (default 50) local steps; those
are timed for about half a second and scaled.

Rows of trees: part="tree", what ("blend" or "sync"), parameters, replicas, devices, seconds, bytes, bytes_per_second,
copy_bytes_per_second, memcpy_bytes_per_second, ratio (of the bandwidth to that of the compiled copy), memcpy_ratio.
Rows of networks: part="share", network, replicas, devices, local_steps, measured_steps, sync_seconds, local_seconds,
share (of a round), a ratio.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks import limits, networks
from experiments.benchmarks.harness import BenchmarkTable, Case, Recording, alternate, begin, in_place, ratio, shown
from experiments.benchmarks.networks import PLAIN, Network, local_phase
from experiments.setup import app
from experiments.setup.shared_flags import numbers
from wavg_jax import tree
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.base import PyTree
from wavg_jax.devices import placement
from wavg_jax.devices.placement import Placement
from wavg_jax.training import progress

flags.DEFINE_list("sizes", "1,10,100", "Parameters of the trees, in millions.")
F = flags.FLAGS

READS = (*networks.READS, "sizes", "round_steps", "repeats")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)

LEAVES = 10
LARGEST_COPY = 2.0**29
"""Bytes read and written; a larger copy is no faster, and may not fit."""


def main(argv: Sequence[str]) -> None:
    """Times syncs against copies, and writes the tables."""
    app.refuse_arguments(argv)
    sizes, counts = numbers("sizes", float), networks.replica_counts(4)
    pairs = networks.pairs(networks.chosen(), counts)
    spread = [(k, n) for k in counts for n in sorted({1, len(placement.place(k).devices)})]
    recording = begin("sync_cost", READS)
    with progress.bar((5 * len(sizes) * len(spread) + 2 * len(pairs)) * (F.repeats + 1)) as advance:
        for size, (replicas, n) in itertools.product(sizes, spread):
            _trees(recording, int(size * 1e6), replicas, n, advance)
        for net, replicas in pairs:
            _share(recording, net, replicas, advance)
    recording.publish(*_tables(recording))


def _trees(recording: Recording, size: int, replicas: int, devices: int, advance: Callable[[str], None]) -> None:
    """Times the blend and the sync of K trees of one size, and copies of as many bytes."""
    place = placement.place(replicas, devices)
    leaf = jnp.zeros((replicas, max(size // LEAVES, 1)), jnp.float32, device=place.stacked)
    one = leaf.nbytes // replicas * LEAVES
    moved = {"blend": (replicas + 1) * one, "sync": (2 * replicas + 1) * one}
    copies = {name: limits.copy(min(amount, LARGEST_COPY), devices) for name, amount in moved.items()}
    host = limits.memcpy(min(moved["sync"], LARGEST_COPY))
    cases = {
        "blend": _blend(_stacked(leaf), place),
        "sync": sync_case(_stacked(leaf), place),
        **{f"copy for {name}": limit.case for name, limit in copies.items()},
        "memcpy": host.case,
    }
    del leaf
    times = alternate(cases, F.repeats, lambda name: advance(f"{size / 1e6:g} M on {devices}: {name}"))
    for what, amount in moved.items():
        copied = times[f"copy for {what}"]
        recording.case(
            part="tree",
            what=what,
            parameters=one // 4,
            replicas=replicas,
            devices=devices,
            seconds=float(np.median(times[what])),
            bytes=amount,
            bytes_per_second=amount / float(np.median(times[what])),
            copy_bytes_per_second=copies[what].amount / float(np.median(copied)),
            memcpy_bytes_per_second=host.amount / float(np.median(times["memcpy"])),
            ratio=ratio(copied, times[what], amount / copies[what].amount),
            memcpy_ratio=ratio(times["memcpy"], times[what], amount / host.amount),
        )


def _stacked(leaf: jax.Array) -> PyTree:
    """K stacked trees in fresh memory, ready for donation."""
    return {f"layer_{i}": leaf + i for i in range(LEAVES)}


def _blend(stacked: PyTree, place: Placement) -> Case:
    """The weighted mean of K trees, written over the last result."""
    replicas = tree.count_replicas(stacked)
    weights = jax.device_put(np.full(replicas, 1 / replicas, np.float32), place.stacked)
    mean = place.reduce(weighted_mean)
    run = jax.jit(
        lambda old, stacked, weights: mean(stacked, weights),
        donate_argnums=0,
        keep_unused=True,
        out_shardings=place.shared,
    )
    return in_place(run, run(_global(stacked, place), stacked, weights), stacked, weights)


def _global(stacked: PyTree, place: Placement) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype, device=place.shared), stacked)


def sync_case(stacked: PyTree, place: Placement) -> Case:
    """Everything plain averaging does to the replicas' parameters between two rounds, in place.

    Args:
      stacked: parameters [K, ...], donated.
      place: their placement.
    """
    params = _global(stacked, place)
    state = jax.device_put(PLAIN.init(params, tree.count_replicas(stacked)), place.shared)

    def sync(held: tuple[PyTree, PyTree, PyTree]) -> tuple[PyTree, PyTree, PyTree]:
        stacked, params, state = held
        new, state, _ = PLAIN.update(stacked, state, params, place=place.reduce)
        return PLAIN.restart(stacked, params, new), new, state

    where: Any = (place.stacked, place.shared, place.shared)
    return in_place(jax.jit(sync, donate_argnums=0, out_shardings=where), (stacked, params, state))


def _share(recording: Recording, net: Network, replicas: int, advance: Callable[[str], None]) -> None:
    """Times a network's sync in turn with a few of its local steps."""
    sharded = net.sharded(replicas)
    recipe = net.recipe(sharded, PLAIN)
    steps = F.round_steps or 50
    few = min(steps, net.calibrated(replicas))
    run, held = local_phase(recipe, net, replicas, few)
    copied = jax.tree.map(jnp.copy, held.params)
    cases = {"local steps": in_place(run, held), "sync": sync_case(copied, recipe.placement)}
    times = alternate(cases, F.repeats, lambda name: advance(f"{net.name}: {name}"))
    local = times["local steps"] * steps / few
    recording.case(
        part="share",
        network=net.name,
        replicas=replicas,
        devices=len(recipe.placement.devices),
        parameters=tree.count(held.params) // replicas,
        local_steps=steps,
        measured_steps=few,
        sync_seconds=float(np.median(times["sync"])),
        local_seconds=float(np.median(local)),
        share=ratio(times["sync"], times["sync"] + local),
    )


def _tables(recording: Recording) -> tuple[BenchmarkTable, BenchmarkTable]:
    rows = recording.cases()
    trees = [row for row in rows if row["part"] == "tree"]
    shares = [row for row in rows if row["part"] == "share"]
    return (
        BenchmarkTable(
            "Bandwidth of the blend and of the whole sync",
            "Bytes to read and write per second, as a ratio to a compiled copy of as many bytes. Median "
            f"and quartiles of {F.repeats} alternating runs; trees of {LEAVES} leaves, float32.",
            ("what", "parameters", "K", "devices", "GB/s", "copy, GB/s", "memcpy, GB/s", "to memcpy"),
            [
                (
                    row["what"],
                    f"{row['parameters'] / 1e6:g} M",
                    str(row["replicas"]),
                    str(row["devices"]),
                    *(f"{row[name] / 1e9:.1f}" for name in _SPEEDS),
                    shown(row["memcpy_ratio"]),
                    shown(row["ratio"]),
                )
                for row in trees
            ],
        ),
        BenchmarkTable(
            "Share of the sync in a round",
            "In %: sync / (sync + local steps). The local steps are timed for about half a second and scaled to H.",
            ("network", "parameters", "K", "devices", "H", "sync, ms", "local steps, ms"),
            [
                (
                    row["network"],
                    f"{row['parameters'] / 1e6:.2f} M",
                    str(row["replicas"]),
                    str(row["devices"]),
                    str(row["local_steps"]),
                    f"{1e3 * row['sync_seconds']:.2f}",
                    f"{1e3 * row['local_seconds']:.0f}",
                    shown([100 * share for share in row["share"]]),
                )
                for row in shares
            ],
        ),
    )


_SPEEDS = ("bytes_per_second", "copy_bytes_per_second", "memcpy_bytes_per_second")


if __name__ == "__main__":
    app.run(main)
