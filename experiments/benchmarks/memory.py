"""How much memory a replica takes, against the sum of its parts.

  python -m experiments.benchmarks.memory
  python -m experiments.benchmarks.memory --networks=mlp --replica_counts=4 --maps=vmap,map

Measures the peak memory of the compiled round of K replicas on one device, as the compiler plans it: arguments, results
that reuse no argument's buffer, and temporaries. Without the data, which all replicas share, it is compared with the
sum of the parts: the global parameters, and per replica its parameters, optimizer state, mutable collections, gradients
(as large as the parameters) and activations. Activations are an estimate: all arrays that the forward pass keeps for
the backward pass, except those as large as parameters. A mapping that runs replicas one after another need not hold all
their gradients and activations at once, and may come below 1.

Rows: network, replicas, mapping, argument, output, alias, temp, peak (argument + output - alias + temp), data, params,
opt_state, mutable, gradients, activations (of one replica), peak_per_replica (without the data), ratio (of the peak
without the data to the sum of the parts), device_peak (the device's peak in this process, if it reports one and it grew
in this case; else null).
"""

from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments.benchmarks import networks
from experiments.benchmarks.harness import BenchmarkTable, Recording, begin
from experiments.benchmarks.networks import AUTO, PLAIN, Network
from experiments.setup import app
from wavg_jax import tree
from wavg_jax.base import Batch, PyTree
from wavg_jax.devices.mapping import MAPS
from wavg_jax.training import progress
from wavg_jax.training.batches import make_work, put_shared
from wavg_jax.training.programs import compiled, programs_of

F = flags.FLAGS
READS = (*networks.READS, "maps", "round_steps")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Compiles the rounds, runs each once, and writes the table."""
    app.refuse_arguments(argv)
    counts, maps = networks.replica_counts(1, 2, 4, 8), networks.maps(AUTO, *MAPS)
    pairs = networks.pairs(networks.chosen(), sorted(counts))
    cases = [(net, k, name) for net, k in pairs for name in (maps if k > 1 else maps[:1])]
    recording = begin("memory", READS)
    with progress.bar(len(cases)) as advance:
        for net, replicas, name in cases:
            _measure(recording, net, replicas, name)
            advance(f"{net.name}, K={replicas}: {name}")
    recording.publish(_table(recording))


def _measure(recording: Recording, net: Network, replicas: int, mapping: str) -> None:
    """Compiles and runs one round, and records its memory."""
    sharded = net.sharded(replicas)
    recipe = net.recipe(sharded, PLAIN, devices=1, replica_map=mapping)
    before = _device_peak()
    shared = put_shared(recipe, sharded)
    work = make_work(recipe, sharded, seed=0, first_step=0, longest=F.round_steps or 20, batch_size=net.batch_size)
    program = programs_of(recipe, replicas)
    state = program.init(jax.random.key(0))
    parts = {
        "params": tree.nbytes(state.params),
        "opt_state": tree.nbytes(state.replicas.opt_state) // replicas,
        "mutable": tree.nbytes(state.mutable),
        "gradients": tree.nbytes(state.params),
        "activations": activations(net, state.params, state.mutable),
    }
    held = tree.nbytes((shared, work))
    total = parts["params"] + parts["mutable"] + replicas * sum(parts.values())
    step = compiled(program.run, state, work, shared).call
    planned = _planned(step)
    jax.block_until_ready(step(state, work, shared))
    after = _device_peak()
    own = planned["peak"] - held
    recording.case(
        network=net.name,
        replicas=replicas,
        mapping=mapping,
        settled=recipe.placement.replica_map,
        **planned,
        data=held,
        **parts,
        peak_per_replica=own / replicas,
        ratio=own / total,
        device_peak=after if after is not None and after > (before or 0) else None,
    )


def _planned(step: Any) -> dict[str, int]:
    """The compiler's memory plan of a program, in bytes."""
    plan = step.memory_analysis()
    found = {name: getattr(plan, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
    return found | {"peak": found["argument"] + found["output"] - found["alias"] + found["temp"]}


def _device_peak() -> int | None:
    """The peak bytes in use on the first device; None if it reports none, as a CPU."""
    (stats, *_) = (device.memory_stats() for device in jax.local_devices()[:1])
    return None if stats is None else stats.get("peak_bytes_in_use")


def activations(net: Network, params: PyTree, mutable: PyTree) -> int:
    """Bytes that the forward pass of a batch keeps for the backward pass, except arrays as large as parameters."""
    rng = jax.random.key(0)

    def kept(params: PyTree, mutable: PyTree, batch: Batch) -> PyTree:
        return jax.vjp(lambda p: net.task.loss(p, mutable, batch, rng)[0], params)[1]

    own = {x.shape for x in jax.tree.leaves(params)}
    saved = jax.tree.leaves(jax.eval_shape(kept, params, mutable, net.batch()))
    return tree.nbytes([x for x in saved if x.shape not in own])


def _table(recording: Recording) -> BenchmarkTable:
    text = (
        "Peak memory of the compiled round without the data, per replica, as a ratio to the sum of its parts: "
        "parameters, optimizer state, gradients, activations (estimated), and the global parameters. In MB."
    )
    columns = (
        *("network", "K", "mapping", "data", "parameters", "optimizer", "gradients", "activations"),
        *("peak per replica", "peak on the device"),
    )
    names = ("data", "params", "opt_state", "gradients", "activations", "peak_per_replica", "device_peak")
    lines = [
        (
            row["network"],
            str(row["replicas"]),
            row["mapping"] + (f" ({row['settled']})" if row["mapping"] == AUTO else ""),
            *("-" if row[name] is None else f"{row[name] / 1e6:.2f}" for name in names),
            f"{row['ratio']:.2f}",
        )
        for row in recording.cases()
    ]
    return BenchmarkTable("Memory of a replica", text, columns, lines)


if __name__ == "__main__":
    app.run(main)
