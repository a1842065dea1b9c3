"""What it costs that replicas train in workers: rounds of an elastic run beside those of `fit`.

  python -m experiments.benchmarks.elastic_rounds
  python -m experiments.benchmarks.elastic_rounds --steps_a_round=10,50,200 --repeats=3

An MLP of 0.7 million parameters (784 inputs, two layers of 512 units, SGD with momentum), K = 4, plain averaging, with
as many workers as there are cores, a core each; `fit` spreads its replicas over as many devices. Runs of --timed_rounds
rounds alternate; the first two rounds of each do not count.

Rows: local_steps, in_process, elastic (median seconds a round, by run), ratio (elastic / in process, of paired runs).
"""

import functools
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import optax
from absl import flags

import wavg_jax as wavg
from experiments.benchmarks.harness import BenchmarkTable, Recording, alternate, begin, ratio, shown
from experiments.setup import app
from experiments.setup.shared_flags import numbers
from wavg_jax import data, elastic, models
from wavg_jax.devices import machine
from wavg_jax.training import progress

flags.DEFINE_list("steps_a_round", "50,200", "Numbers of local steps H.")
flags.DEFINE_integer("timed_rounds", 12, "Rounds of a run.", lower_bound=4)
F = flags.FLAGS
READS = ("steps_a_round", "timed_rounds", "repeats")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)

REPLICAS, BATCH, UNTIMED = 4, 32, 2
INNER = optax.sgd(0.01, momentum=0.9)
PLAIN = wavg.averager(wavg.uniform())


def main(argv: Sequence[str]) -> None:
    """Times both for every H, and writes the table."""
    app.refuse_arguments(argv)
    steps = numbers("steps_a_round", int)
    recording = begin("elastic_rounds", READS)
    workers = elastic.Workers(machine.cores(), deadline=elastic.wait_for_all)
    with progress.bar(2 * len(steps) * (F.repeats + 1)) as advance:
        for h in steps:

            def one(fit: object, h: int = h, **settings: object) -> float:
                return _round_seconds(fit, h, **settings)

            cases = {
                "in process": functools.partial(one, wavg.fit),
                "elastic": functools.partial(one, elastic.fit, workers=workers),
            }
            seconds = alternate(cases, F.repeats, functools.partial(_told, advance, h))
            ours, theirs = seconds["elastic"], seconds["in process"]
            recording.case(
                local_steps=h, in_process=theirs.tolist(), elastic=ours.tolist(), ratio=list(ratio(ours, theirs))
            )
    recording.publish(_table(recording))


def _told(advance: Callable[[str], None], steps: int, name: str) -> None:
    advance(f"H={steps}: {name}")


def _problem() -> tuple[wavg.Task, data.ShardedData]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8192, 28, 28, 1)).astype(np.float32), rng.integers(0, 10, 8192)
    dataset = data.from_arrays(x, y, x[:512], y[:512], name="noise")
    sharded = data.shard(dataset, lambda split, seed: data.iid(len(split.y), REPLICAS, seed), heldout=0, seed=0)
    return models.from_linen(models.MLP(hidden=(512, 512), classes=10), (28, 28, 1)), sharded


TASK, DATA = _problem()


def _round_seconds(fit: object, steps: int, **settings: object) -> float:
    """The median seconds of a round of a run."""
    assert callable(fit)
    result = fit(
        TASK,
        DATA,
        PLAIN,
        inner=INNER,
        local_steps=steps,
        rounds=F.timed_rounds,
        batch_size=BATCH,
        scoring=wavg.Scoring(test_every=10**6),
        layout=wavg.Layout(replica_map="map"),
        progress=False,
        **settings,
    )
    return statistics.median(row["seconds"] for row in result.rows[1 + UNTIMED :])


def _table(recording: Recording) -> BenchmarkTable:
    text = (
        "Seconds of a round of an elastic run, by those of `fit` with as many devices as workers: the median of paired "
        "runs, and quartiles. MLP of 0.7 million parameters, K = 4, batches of 32."
    )
    lines = [
        (
            str(row["local_steps"]),
            f"{1000 * statistics.median(row['in_process']):.0f}",
            f"{1000 * statistics.median(row['elastic']):.0f}",
            shown(row["ratio"]),
        )
        for row in recording.cases()
    ]
    return BenchmarkTable("Rounds in workers", text, ("H", "in process (ms)", "elastic (ms)"), lines)


if __name__ == "__main__":
    app.run(main)
