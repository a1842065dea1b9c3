"""Networks that users write, as rounds run them, against the user's own loop and against the library's CNN.

  python -m experiments.benchmarks.own_networks
  python -m experiments.benchmarks.own_networks --networks=linen_cnn --repeats=3

A round of plain averaging with K replicas, on one device, takes turns with the loop that the user would write without
us: one model, one jitted step a call, the same network, optimizer and number of steps, batches gathered on the device.
`cnn` and `resnet20` are those of `wavg_jax.models`; the others use stock layers too, in other ways: see
`experiments.benchmarks.user_networks`. All networks take their turns together, so all ratios are of paired times.

Each case's row: network, replicas, settled (how the replicas ran), local_steps, batch_size, samples_per_second,
own_samples_per_second (of the user's loop), flops_per_second (operations of `wavg_jax.training.operations`), rate
(those to the CNN's, a ratio), ratio (samples a second, to the user's loop).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments.benchmarks import networks
from experiments.benchmarks.harness import (
    BenchmarkTable,
    Case,
    Recording,
    alternate,
    begin,
    in_place,
    ratio,
    round_runner,
    shown,
)
from experiments.benchmarks.networks import AUTO, INNER, PLAIN, SAMPLES, Network
from experiments.benchmarks.user_networks import KINDS
from experiments.setup import app
from experiments.setup.shared_flags import names
from wavg_jax import data
from wavg_jax.base import Batch
from wavg_jax.data import Dataset
from wavg_jax.training import progress

F = flags.FLAGS

READS = ("networks", "replica_counts", "round_steps", "shrink", "repeats")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)

OURS, BASE = ("cnn", "resnet20"), "cnn"


def main(argv: Sequence[str]) -> None:
    """Times all networks in turn, and writes the table."""
    app.refuse_arguments(argv)
    wanted = names("networks", (*OURS, *KINDS)) if F.networks is not None else (*OURS, *KINDS)
    counts = networks.replica_counts(4)
    nets = {name: build(name, F.shrink) for name in dict.fromkeys((BASE, *wanted))}
    networks.pairs(nets.values(), counts)
    recording = begin("own_networks", READS)
    with progress.bar(2 * len(nets) * len(counts) * (F.repeats + 1)) as advance:
        for replicas in counts:
            _measure(recording, nets, replicas, advance)
    recording.publish(_table(recording))


@functools.cache
def build(name: str, shrink: int = 1) -> Network:
    """Builds a network and its data; `shrink` divides images and batch."""
    if name in OURS:
        return networks.build(name, shrink)
    kind = KINDS[name]
    side = max((28 if kind.channels == 1 else 32) // shrink, 4)
    shape = (side, side, kind.channels) if kind.channels > 1 else (side, side)
    dataset = Dataset(name, networks.images(SAMPLES, shape), networks.images(64, shape), networks.CLASSES)
    return networks.network(name, kind.make(side), dataset, data.make_prepare(dataset), max(64 // shrink, 1))


def own_loop(net: Network, steps: int) -> Case:
    """The loop of a user without us: `steps` jitted steps of one model, one call each, on the default device."""
    x, y = jnp.asarray(net.dataset.train.x), jnp.asarray(net.dataset.train.y)
    rows = np.random.default_rng(0).permutation(SAMPLES)[: steps * net.batch_size].reshape(steps, -1).astype(np.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: tuple[Any, Any, Any], x: jax.Array, y: jax.Array, rows: np.ndarray, rng: jax.Array) -> Any:
        params, mutable, opt_state = state
        gradient = jax.value_and_grad(net.task.loss, has_aux=True)
        (_, (mutable, _)), slope = gradient(params, mutable, Batch(net.prepare(x[rows]), y[rows]), rng)
        updates, opt_state = INNER.update(slope, opt_state, params)
        return optax.apply_updates(params, updates), mutable, opt_state

    def run(state: tuple[Any, Any, Any]) -> Any:
        for some in rows:
            state = step(state, x, y, some, jax.random.key(0))
        return state

    params, mutable = jax.jit(net.task.init)(jax.random.key(0))
    return in_place(run, (params, mutable, INNER.init(params)))


def _measure(recording: Recording, nets: dict[str, Network], replicas: int, advance: Callable[[str], None]) -> None:
    """Times the rounds and the loops of all networks in turn, and records them."""
    cases: dict[str, Case] = {}
    settled, samples = {}, {}
    for name, net in nets.items():
        steps, sharded = net.steps(replicas), net.sharded(replicas)
        recipe = net.recipe(sharded, PLAIN, devices=1, replica_map=AUTO)
        settled[name], samples[name] = recipe.placement.replica_map, replicas * steps * net.batch_size
        cases[name] = round_runner(recipe, sharded, steps, net.batch_size)
        cases[f"{name}, own loop"] = own_loop(net, replicas * steps)
    times = alternate(cases, F.repeats, lambda name: advance(f"K={replicas}: {name}"))
    for name, net in nets.items():
        ours, own = times[name], times[f"{name}, own loop"]
        work = net.flops * samples[name] / (nets[BASE].flops * samples[BASE])
        recording.case(
            network=name,
            replicas=replicas,
            settled=settled[name],
            local_steps=net.steps(replicas),
            batch_size=net.batch_size,
            samples_per_second=samples[name] / float(np.median(ours)),
            own_samples_per_second=samples[name] / float(np.median(own)),
            flops_per_second=net.flops * samples[name] / float(np.median(ours)),
            rate=ratio(times[BASE], ours, work),
            ratio=ratio(own, ours),
        )


def _table(recording: Recording) -> BenchmarkTable:
    text = (
        "Samples a second in rounds of plain averaging on one device of all cores, as a ratio to the user's own loop: "
        "one model, one jitted step a call, without us. Beside it the rate of operations, as a ratio to that of the "
        f"library's CNN. Median and quartiles of {F.repeats} alternating runs."
    )
    columns = ("network", "K", "mapping", "H", "samples/s", "own loop, samples/s", "GFLOP/s", "rate to the CNN's")
    lines = [
        (
            row["network"],
            str(row["replicas"]),
            row["settled"],
            str(row["local_steps"]),
            f"{row['samples_per_second']:,.0f}",
            f"{row['own_samples_per_second']:,.0f}",
            f"{row['flops_per_second'] / 1e9:.0f}",
            shown(row["rate"]),
            shown(row["ratio"]),
        )
        for row in recording.cases()
    ]
    return BenchmarkTable("A user's own network", text, columns, lines)


if __name__ == "__main__":
    app.run(main)
