"""How long a round takes to trace, lower and compile, by the network's depth, the replicas and the weighting.

  python -m experiments.benchmarks.compile_time
  python -m experiments.benchmarks.compile_time --depths=2 --replica_counts=4,64 --compiled_weightings=uniform

The network is an MLP of --depths layers of 64 units, which compiles fast for its number of tensors, two a layer; a
round is --round_steps (default 10) local steps on one device, scored on 64 samples where the weighting scores. Every
depth is taken with the fewest replicas, and every number of replicas with the least depth. `cpu` is the processor time
of all three together, which other work on the machine changes less than the seconds. Nothing is read from a cache.

Rows: depth, replicas, weighting, tensors, trace, lower, compile, cpu (seconds each), lines (of the lowered program),
compiled_lines (of the compiled one), load (of the machine, over a minute).
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.benchmarks import networks
from experiments.benchmarks.harness import BenchmarkTable, Recording, begin
from experiments.benchmarks.networks import CLASSES, INNER
from experiments.setup import app
from experiments.setup.shared_flags import names, numbers
from wavg_jax import averager, learned, make_rounds, models, opinion_pool, place, uniform
from wavg_jax.base import Batch
from wavg_jax.rounds.score import Scoring
from wavg_jax.training import progress

WEIGHTINGS = {"uniform": uniform, "opinion_pool": opinion_pool, "learned": learned}
flags.DEFINE_list("depths", "2,10,40", "Hidden layers of the network.")
flags.DEFINE_list("compiled_weightings", list(WEIGHTINGS), f"Which weightings, of {', '.join(WEIGHTINGS)}.")
F = flags.FLAGS

READS = ("depths", "compiled_weightings", "replica_counts", "round_steps")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)

WIDTH, SIDE, BATCH, HELD_OUT, SCORED = 64, 8, 32, 200, 64


def main(argv: Sequence[str]) -> None:
    """Compiles a round of each case, and writes the table."""
    app.refuse_arguments(argv)
    depths, counts = sorted(set(numbers("depths", int))), sorted(set(networks.replica_counts(4, 16, 64)))
    pairs = dict.fromkeys([*((depth, counts[0]) for depth in depths), *((depths[0], k) for k in counts)])
    chosen = names("compiled_weightings", tuple(WEIGHTINGS))
    recording = begin("compile_time", READS)
    with progress.bar(len(pairs) * len(chosen)) as advance, _without_cache():
        _measured(*_round(1, 1, "uniform"))  # the first of a process also starts the compiler
        for depth, replicas in pairs:
            for name in chosen:
                measured = _measured(*_round(depth, replicas, name))
                recording.case(depth=depth, replicas=replicas, weighting=name, tensors=2 * (depth + 1), **measured)
                advance(f"depth {depth}, K={replicas}: {name}")
    recording.publish(_table(recording))


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _round(depth: int, replicas: int, weighting: str) -> tuple[Callable, tuple]:
    """A round, and the shapes it is called with."""
    task = models.from_linen(models.MLP(hidden=(WIDTH,) * depth, classes=CLASSES), (SIDE, SIDE, 1))
    rounds = make_rounds(
        task,
        averager(WEIGHTINGS[weighting]()),
        INNER,
        scoring=Scoring(samples=SCORED),
        placement=place(replicas, devices=jax.devices()[:1]),
    )
    state = jax.eval_shape(lambda key: rounds.init(key, replicas), jax.random.key(0))
    return rounds.step, (state, _samples(replicas, F.round_steps or 10, BATCH), _samples(HELD_OUT))


def _samples(*shape: int) -> Batch:
    images = jax.ShapeDtypeStruct((*shape, SIDE, SIDE, 1), jnp.float32)
    return Batch(images, jax.ShapeDtypeStruct(shape, jnp.int32))


def _measured(function: Callable, arguments: tuple) -> dict[str, Any]:
    """Traces, lowers and compiles a function."""
    jax.clear_caches()  # what another case traced would be found again
    clock, cpu = [time.perf_counter()], time.process_time()
    traced = jax.jit(function).trace(*arguments)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    program = lowered.compile()
    clock.append(time.perf_counter())
    seconds = [end - start for start, end in itertools.pairwise(clock)]
    return {
        **dict(zip(("trace", "lower", "compile"), seconds, strict=True)),
        "cpu": time.process_time() - cpu,
        "load": os.getloadavg()[0],
        "lines": lowered.as_text().count("\n"),
        "compiled_lines": program.as_text().count("\n"),
    }


def _table(recording: Recording) -> BenchmarkTable:
    text = (
        "A round of an MLP of 64 units: lines of its program before and after the compiler's passes, seconds to trace, "
        "lower and compile, and processor seconds of the three."
    )
    loads = [row["load"] for row in recording.cases()]
    text += f" Load of the machine: {min(loads):.0f} to {max(loads):.0f}."
    lines = [
        (
            *(str(row[name]) for name in ("depth", "replicas", "weighting", "lines", "compiled_lines")),
            *(f"{row[name]:.2f}" for name in ("trace", "lower", "compile", "cpu")),
        )
        for row in recording.cases()
    ]
    columns = ("depth", "K", "weighting", "lines", "compiled lines", "trace", "lower", "compile")
    return BenchmarkTable("Time to compile a round", text, columns, lines)


if __name__ == "__main__":
    app.run(main)
