"""Training samples per second of K replicas, against the same work without replicas.

  python -m experiments.benchmarks.throughput
  python -m experiments.benchmarks.throughput --networks=mlp --replica_counts=4 --maps=auto,vmap --device_counts=1
  python -m experiments.benchmarks.throughput --networks=mlp --replica_counts=16,32,64 --round_steps=10

For every network, K, mapping and number of devices, times a round of plain averaging in turn with *one model with K
times the batch* and with *one replica alone*, which takes K times as many steps. The ceiling is the faster of those
two: the same operations without replicas. Both run on one device, which XLA spreads over all cores of a CPU; whatever
replicas on several devices gain beyond it, one model could gain by splitting its batch over them.

Each case's row: network, replicas, mapping, settled (the mapping that was run), devices, local_steps, batch_size,
seconds (of a round, median), samples_per_second, ceiling ("large batch" or "alone"), ceiling_samples_per_second, ratio
(to the ceiling).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from experiments.benchmarks import networks
from experiments.benchmarks.harness import BenchmarkTable, Case, Recording, alternate, begin, ratio, round_runner, shown
from experiments.benchmarks.networks import AUTO, PLAIN, Network
from experiments.setup import app
from experiments.setup.shared_flags import numbers
from wavg_jax import data
from wavg_jax.base import SettingsError
from wavg_jax.devices.mapping import MAPS
from wavg_jax.training import progress

flags.DEFINE_list("device_counts", None, "Numbers of devices; by default 1, and the most that divide K.")
F = flags.FLAGS

READS = (*networks.READS, "maps", "round_steps", "device_counts", "repeats")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)

LARGE, ALONE = "large batch", "alone"
LONGEST = 1000
"""Most steps of the replica alone, whose batches lie on the device."""


class Made(NamedTuple):
    """A case of replicas, and the facts of its row."""

    case: Case
    mapping: str
    settled: str
    devices: int


def main(argv: Sequence[str]) -> None:
    """Times every network, K, mapping and number of devices, and writes the table."""
    app.refuse_arguments(argv)
    counts = networks.replica_counts(1, 2, 4, 8, 16)
    names = networks.maps(AUTO, *MAPS)
    devices = {replicas: device_counts(replicas) for replicas in counts}
    pairs = networks.pairs(networks.chosen(), counts)
    recording = begin("throughput", READS)
    calls = sum(2 + len(devices[k]) * (len(names) if k > 1 else 1) for _, k in pairs) * (F.repeats + 1)
    with progress.bar(calls) as advance:
        for net, replicas in pairs:
            maps = names if replicas > 1 else names[:1]  # one replica needs no mapping
            _measure(recording, net, replicas, maps, devices[replicas], advance)
    recording.publish(_table(recording))


def device_counts(replicas: int) -> tuple[int, ...]:
    """The numbers of --device_counts that divide K.

    Raises:
      SettingsError: the machine has fewer devices, or none of the numbers divides K.
    """
    at_hand = jax.device_count()
    wanted = range(1, at_hand + 1) if F.device_counts is None else numbers("device_counts", int, least=1)
    fitting = [n for n in dict.fromkeys(wanted) if replicas % n == 0]
    if not fitting or max(wanted) > at_hand:
        raise SettingsError(
            f"--device_counts={','.join(map(str, wanted))}: {replicas} replicas need a number that divides them, of at "
            f"most {at_hand} devices"
        )
    return tuple(fitting) if F.device_counts is not None else tuple(sorted({1, max(fitting)}))


def _measure(
    recording: Recording,
    net: Network,
    replicas: int,
    maps: Sequence[str],
    devices: Sequence[int],
    advance: Callable[[str], None],
) -> None:
    """Times the cases of one network and K in turn, and records them."""
    steps, batch = net.steps(replicas), net.batch_size
    made = {f"{name} on {n}": _replicas(net, replicas, name, n, steps) for n in devices for name in maps}
    alone_steps = min(replicas * steps, LONGEST)
    pooled = data.pool(net.sharded(replicas))
    single = net.recipe(pooled, PLAIN, devices=1)
    cases = {name: one.case for name, one in made.items()}
    cases[LARGE] = round_runner(single, pooled, steps, replicas * batch)
    cases[ALONE] = round_runner(single, pooled, alone_steps, batch)
    samples = dict.fromkeys(cases, replicas * steps * batch) | {ALONE: alone_steps * batch}
    times = alternate(cases, F.repeats, lambda name: advance(f"{net.name}, K={replicas}: {name}"))
    speed = {name: samples[name] / float(np.median(found)) for name, found in times.items()}
    ceiling = max((LARGE, ALONE), key=speed.__getitem__)
    for name, one in made.items():
        recording.case(
            network=net.name,
            replicas=replicas,
            mapping=one.mapping,
            settled=one.settled,
            devices=one.devices,
            local_steps=steps,
            batch_size=batch,
            seconds=float(np.median(times[name])),
            samples_per_second=speed[name],
            ceiling=ceiling,
            ceiling_samples_per_second=speed[ceiling],
            ratio=ratio(times[ceiling], times[name], samples[name] / samples[ceiling]),
        )


def _replicas(net: Network, replicas: int, mapping: str, devices: int, steps: int) -> Made:
    sharded = net.sharded(replicas)
    recipe = net.recipe(sharded, PLAIN, devices=devices, replica_map=mapping)
    case = round_runner(recipe, sharded, steps, net.batch_size)
    return Made(case, mapping, recipe.placement.replica_map, devices)


def _table(recording: Recording) -> BenchmarkTable:
    text = (
        "Samples a second in rounds of plain averaging, as a ratio to the ceiling: the faster of one model with K "
        "times the batch and one replica alone, without replicas, on one device (of all cores). Median and "
        f"quartiles of {F.repeats} alternating runs."
    )
    columns = ("network", "K", "mapping", "devices", "H", "samples/s", "ceiling", "ceiling, samples/s")
    lines = [
        (
            row["network"],
            str(row["replicas"]),
            row["mapping"] + (f" ({row['settled']})" if row["mapping"] == AUTO else ""),
            str(row["devices"]),
            str(row["local_steps"]),
            f"{row['samples_per_second']:,.0f}",
            row["ceiling"],
            f"{row['ceiling_samples_per_second']:,.0f}",
            shown(row["ratio"]),
        )
        for row in recording.cases()
    ]
    return BenchmarkTable("Throughput of K replicas", text, columns, lines)


if __name__ == "__main__":
    app.run(main)
