"""Whether the memory of a run, or the time of its rounds, grows with their number.

  python -m experiments.benchmarks.endurance
  python -m experiments.benchmarks.endurance --endured=500 --weighting=opinion_pool

Trains a tiny network on the digits for --endured rounds of one local step, with a checkpoint every ten rounds, stops
halfway, resumes, and writes the report. Memory is what the process holds of the machine's (Linux tells it).

Rows: rounds (done by then), seconds (per round of this tenth: median, first and third quartile), resident (bytes at its
end); then one with what "resume" and one with "report", and their seconds and resident.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import optax
from absl import flags

import wavg_jax as wavg
from experiments.benchmarks.harness import BenchmarkTable, Recording, begin, shown
from experiments.setup import app, shared_flags  # noqa: F401 - defines --weighting
from experiments.setup.weightings import WEIGHTINGS
from wavg_jax import reporting
from wavg_jax.base import SettingsError
from wavg_jax.storage.rows import read_rows
from wavg_jax.storage.schema import Row
from wavg_jax.training import progress

flags.DEFINE_integer("endured", 5000, "Rounds, a multiple of ten.", lower_bound=20)
F = flags.FLAGS

READS = ("endured", "weighting")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)

_STATM = pathlib.Path("/proc/self/statm")
_PAGE = 4096
TENTHS = 10


def main(argv: Sequence[str]) -> None:
    """Trains, resumes and reports, and writes the table."""
    app.refuse_arguments(argv)
    if F.endured % TENTHS:
        raise SettingsError(f"--endured={F.endured}: give a multiple of ten")
    if not _STATM.exists():
        raise SettingsError(f"the memory of a process is read from {_STATM}, which this system has not: use Linux")
    recording = begin("endurance", READS)
    with tempfile.TemporaryDirectory() as folder, progress.bar(F.endured) as advance:
        workdir, half = pathlib.Path(folder, "run"), F.endured // 2
        watch = Watch(recording, F.endured // TENTHS, advance)
        _train(workdir, half, watch)
        begun = time.perf_counter()
        _train(workdir, F.endured, watch)
        recording.case(what="resume", seconds=watch.first - begun, resident=resident())
        begun = time.perf_counter()
        reporting.write_report(workdir / "report", read_rows(workdir))
        recording.case(what="report", seconds=time.perf_counter() - begun, resident=resident())
    recording.publish(_table(recording))


class Watch:
    """Times rounds, and records every tenth of the run."""

    def __init__(self, recording: Recording, every: int, advance: Callable[[str], None]) -> None:
        self._recording, self._every, self._advance = recording, every, advance
        self._ends: list[float] = []
        self.first = 0.0

    def begin(self) -> None:
        """Forgets when the last round ended, since another run begins."""
        self._ends, self.first = [], 0.0

    def __call__(self, row: Row) -> None:
        """Takes the row of a round, as `fit(on_round=)` hands it."""
        self._ends.append(time.perf_counter())
        self.first = self.first or self._ends[0]
        self._advance(f"round {row['round']}")
        if row["round"] % self._every == 0:
            seconds = np.quantile(np.diff(self._ends), [0.5, 0.25, 0.75]).tolist()
            self._recording.case(rounds=row["round"], seconds=seconds, resident=resident())
            self._ends = self._ends[-1:]


def resident() -> int:
    """Bytes of the machine's memory that this process holds."""
    return int(_STATM.read_text().split()[1]) * _PAGE


def _train(workdir: pathlib.Path, rounds: int, watch: Watch) -> None:
    """Trains up to a number of rounds, from the newest checkpoint if there is one."""
    watch.begin()
    dataset = wavg.data.digits()
    shards = wavg.data.shard(dataset, lambda split, seed: wavg.data.iid(len(split.y), 2, seed), heldout=200, seed=0)
    task = wavg.models.from_linen(wavg.models.MLP(hidden=(8,), classes=10), (8, 8, 1))
    wavg.fit(
        task,
        shards,
        wavg.averager(**WEIGHTINGS[F.weighting](F)),
        inner=optax.sgd(0.05),
        local_steps=1,
        rounds=rounds,
        batch_size=8,
        workdir=workdir,
        resume=workdir.exists(),
        store=wavg.Store("endurance", checkpoint_every=10),
        scoring=wavg.Scoring(samples=64, test_every=10),
        layout=wavg.Layout(devices=1, replica_map="map"),
        on_round=watch,
        progress=False,
    )


def _table(recording: Recording) -> BenchmarkTable:
    text = (
        "Milliseconds of a round, checkpoints included (median, quartiles), and megabytes that the process holds, by "
        "the rounds done; the run is stopped halfway and resumed in the same process."
    )
    lines = []
    for row in recording.cases():
        megabytes = f"{row['resident'] / 1e6:.0f} MB"
        if "what" in row:
            lines.append((row["what"], megabytes, f"{row['seconds']:.2f} s"))
        else:
            lines.append((f"{row['rounds']:,}", megabytes, f"{shown([1000 * x for x in row['seconds']])} ms"))
    return BenchmarkTable("Endurance", text, ("rounds", "resident"), lines)


if __name__ == "__main__":
    app.run(main)
