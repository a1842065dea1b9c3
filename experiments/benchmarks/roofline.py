"""How close the local steps come to the machine's limits, and what bounds them.

  python -m experiments.benchmarks.roofline
  python -m experiments.benchmarks.roofline --networks=mlp --replica_counts=1,8 --product=1024

Compares the operations per second of K replicas' local steps, with the automatic mapping on the most devices that
divide K, with those of large matrix products on the same devices, timed in turn. Only matrix products and convolutions
count; see `wavg_jax.training.operations`. Three shares of a network's time show what bounds it:

  compute  the time of its operations at the rate of the large products
  memory   the time of the bytes that the compiled step reads and writes, by XLA's count, at the speed of a plain copy
           beyond the caches; more than 1 means that caches serve them
  fixed    the time that does not grow with the batch (dispatch, optimizer, reading the weights): 2 t - T, with T for a
           batch and t for half a batch

The largest share bounds the network; if none reaches a half, no single one does.

Rows: network, replicas, mapping, devices, local_steps, batch_size, flops_per_sample, flops_per_second,
matmul_per_second (on those devices), matmul_one_device, copy_bytes_per_second, step_bytes (of one replica), ratio (to
the large products), memory, fixed (ratios), bound.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from absl import flags

from experiments.benchmarks import limits, networks
from experiments.benchmarks.harness import (
    BenchmarkTable,
    Ratio,
    Recording,
    alternate,
    begin,
    in_place,
    ratio,
    shown,
)
from experiments.benchmarks.limits import Limit
from experiments.benchmarks.networks import INNER, PLAIN, Network, local_phase
from experiments.benchmarks.sync_cost import LARGEST_COPY
from experiments.setup import app
from wavg_jax.base import PyTree, Replicas, SettingsError
from wavg_jax.rounds.local import local_steps
from wavg_jax.training import progress

flags.DEFINE_integer("product", 2048, "Side of the large matrices.", lower_bound=16)
F = flags.FLAGS

READS = (*networks.READS, "round_steps", "product", "repeats")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)

HALF = 0.5


def main(argv: Sequence[str]) -> None:
    """Times local steps, large products and copies in turn, and writes the table."""
    app.refuse_arguments(argv)
    pairs = networks.pairs(networks.chosen(), networks.replica_counts(4))
    for net, _ in pairs:
        if net.batch_size < 2:
            raise SettingsError(f"--shrink={F.shrink} leaves {net.name} batches of {net.batch_size}; 2 are needed")
    recording = begin("roofline", READS)
    with progress.bar(5 * len(pairs) * (F.repeats + 1)) as advance:
        for net, replicas in pairs:
            _measure(recording, net, replicas, advance)
    recording.publish(_table(recording))


def _measure(recording: Recording, net: Network, replicas: int, advance: Callable[[str], None]) -> None:
    """Times one network's local steps in turn with the machine's limits."""
    recipe = net.recipe(net.sharded(replicas), PLAIN)
    devices = len(recipe.placement.devices)
    best: dict[str, Limit] = {
        "products": limits.matmul(devices, F.product),
        "products, one device": limits.matmul(1, F.product),
        "copy": limits.copy(LARGEST_COPY, devices),
    }
    steps = net.steps(replicas)
    cases = {
        "local steps": in_place(*local_phase(recipe, net, replicas, steps)),
        "half batches": in_place(*local_phase(recipe, net, replicas, steps, net.batch_size // 2)),
        **{name: limit.case for name, limit in best.items()},
    }
    times = alternate(cases, F.repeats, lambda name: advance(f"{net.name}, K={replicas}: {name}"))
    done = net.flops * net.batch_size * replicas * steps
    moved = step_bytes(net)
    shares = {
        "compute": ratio(times["products"], times["local steps"], done / best["products"].amount),
        "memory": ratio(times["copy"], times["local steps"], moved * replicas * steps / best["copy"].amount),
        # Half a batch, rounded down, may be less than half.
        "fixed": fixed_share(times["local steps"], times["half batches"], net.batch_size),
    }
    speed = {name: limit.amount / float(np.median(times[name])) for name, limit in best.items()}
    recording.case(
        network=net.name,
        replicas=replicas,
        mapping=recipe.placement.replica_map,
        devices=devices,
        local_steps=steps,
        batch_size=net.batch_size,
        flops_per_sample=net.flops,
        flops_per_second=done / float(np.median(times["local steps"])),
        matmul_per_second=speed["products"],
        matmul_one_device=speed["products, one device"],
        copy_bytes_per_second=speed["copy"],
        step_bytes=moved,
        ratio=shares["compute"],
        memory=shares["memory"],
        fixed=shares["fixed"],
        bound=bound({name: share.median for name, share in shares.items()}),
    )


def fixed_share(whole: np.ndarray, half: np.ndarray, batch_size: int) -> Ratio:
    """The share of the time `whole` that a batch of no samples would take, by a straight line through both times."""
    fewer = batch_size // 2
    return ratio(half * batch_size - whole * fewer, whole, 1 / (batch_size - fewer))


def bound(shares: Mapping[str, float]) -> str:
    """Names the largest share, or says that none reaches a half.

    >>> bound({"compute": 0.7, "memory": 0.2, "fixed": 0.1}), bound({"compute": 0.4, "memory": 0.3, "fixed": 0.2})
    ('compute', 'none alone')
    """
    known = {name: share for name, share in shares.items() if not np.isnan(share)}
    largest = max(known, key=known.__getitem__)
    return largest if known[largest] >= HALF else "none alone"


def step_bytes(net: Network) -> float:
    """Bytes that the compiled step of one replica reads and writes, by XLA's count; each operation counts its own.

    NaN where the step holds a loop, as the gradients of our convolutions do on a CPU: XLA counts its body once.
    """
    one = jax.eval_shape(lambda rng: Replicas(*_start(net, rng)), jax.random.key(0))
    items = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), net.batch())
    step = jax.jit(local_steps(net.task, INNER), donate_argnums=0)
    compiled = step.lower(one, items, None).compile()
    looped = " while(" in (compiled.as_text() or "")  # not that over the steps: there is one
    return np.nan if looped else float((compiled.cost_analysis() or {}).get("bytes accessed", np.nan))


def _start(net: Network, rng: jax.Array) -> tuple[PyTree, PyTree, PyTree, jax.Array]:
    params, mutable = net.task.init(rng)
    return params, INNER.init(params), mutable, rng


def _table(recording: Recording) -> BenchmarkTable:
    text = (
        "Operations a second of the local steps as a ratio to those of large float32 matrix products "
        f"({F.product} x {F.product}, at the precision the networks run in) on the same devices. Operations are "
        f"counted by hand. Median and quartiles of {F.repeats} alternating runs."
    )
    columns = (
        *("network", "K", "mapping", "devices", "GFLOP/s", "products, GFLOP/s", "on one device"),
        *("memory", "fixed", "bound by"),
    )
    lines = [
        (
            row["network"],
            str(row["replicas"]),
            row["mapping"],
            str(row["devices"]),
            *(f"{row[name] / 1e9:,.0f}" for name in ("flops_per_second", "matmul_per_second", "matmul_one_device")),
            *("not counted" if row[name][0] is None else shown(row[name]) for name in ("memory", "fixed")),
            row["bound"],
            shown(row["ratio"]),
        )
        for row in recording.cases()
    ]
    return BenchmarkTable("Roofline of the local steps", text, columns, lines)


if __name__ == "__main__":
    app.run(main)
