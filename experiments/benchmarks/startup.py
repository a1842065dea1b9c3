"""Seconds from the start of a process to the end of its first round, with a cold and a warm cache.

  python -m experiments.benchmarks.startup
  python -m experiments.benchmarks.startup --repeats=3 --starts=import,train

Every case is a process: `import` imports the library and ends; `train` and `compare` run a binary for one round with
the digits preset, and the clock stops when rows.jsonl has the row of the first round. Cold: the folder of the
persistent compilation cache is new. Warm: the process before has filled it. Each turn runs every case cold, then warm,
and starts with new folders.

Rows: what, cache ("cold", "warm" or null), seconds [repeats], median.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import flags

from experiments.benchmarks.harness import BenchmarkTable, Recording, begin
from experiments.setup import app
from experiments.setup.shared_flags import names
from wavg_jax.base import WavgError
from wavg_jax.storage.schema import FILE
from wavg_jax.training import progress

ROOT = pathlib.Path(__file__).parents[2]
PRESET = ROOT / "experiments" / "presets" / "digits.flags"
STARTS = ("import", "train", "compare")
flags.DEFINE_list("starts", list(STARTS), f"What to start, of {', '.join(STARTS)}.")
flags.DEFINE_float("longest_start", 300.0, "Seconds until a process without a first round fails.", lower_bound=1)
F = flags.FLAGS

READS = ("starts", "longest_start", "repeats")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)

POLL = 0.005
"""Seconds between two polls of the rows."""


def main(argv: Sequence[str]) -> None:
    """Starts the processes in turn, and writes the table."""
    app.refuse_arguments(argv)
    starts = names("starts", STARTS)
    recording = begin("startup", READS)
    seconds: dict[tuple[str, str | None], list[float]] = {}
    with progress.bar((2 * len(starts) - ("import" in starts)) * F.repeats) as advance:
        for _ in range(F.repeats):
            for what in starts:
                for cache, found in _turn(what, advance).items():
                    seconds.setdefault((what, cache), []).append(found)
    for (what, cache), measured in seconds.items():
        recording.case(what=what, cache=cache, seconds=measured, median=float(np.median(measured)))
    recording.publish(_table(recording))


def _turn(what: str, advance: Callable[[str], None]) -> dict[str | None, float]:
    """Starts one thing, cold and warm: {cache: seconds}."""
    found: dict[str | None, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder) / "cache"
        if what == "import":
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import wavg_jax"], cwd=ROOT, check=True, timeout=F.longest_start)
            found[None] = time.perf_counter() - start
            advance(what)
            return found
        for state in ("cold", "warm"):
            found[state] = first_round(what, pathlib.Path(folder) / state, {"JAX_COMPILATION_CACHE_DIR": str(cache)})
            advance(f"{what}, {state}")
    return found


def first_round(binary: str, workdir: pathlib.Path, environment: Mapping[str, str]) -> float:
    """Runs a binary with the digits preset, and returns the seconds to the row of its first round.

    Raises:
      WavgError: the process ends without such a row, or takes too long.
    """
    command = [sys.executable, "-m", f"experiments.{binary}", f"--flagfile={PRESET}", "--rounds=1"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, f"--workdir={workdir.absolute()}"], cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL
    )
    try:
        while not _has_round(workdir / FILE):
            ended, late = process.poll() is not None, time.perf_counter() - start > F.longest_start
            if late or (ended and not _has_round(workdir / FILE)):
                raise WavgError(f"experiments.{binary} finished no round; its output is above (--longest_start)")
            time.sleep(POLL)
        seconds = time.perf_counter() - start
        process.wait()  # completes the cache, and slows no one later
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return seconds


def _has_round(path: pathlib.Path) -> bool:
    return path.exists() and b'"kind": "round"' in path.read_bytes()


def _table(recording: Recording) -> BenchmarkTable:
    text = (
        "Seconds from the start of the process to the row of the first round (import: to the end of the process); "
        f"median, least and most of {F.repeats} turns. Digits preset."
    )
    lines = [
        (
            row["what"],
            row["cache"] or "-",
            f"{row['median']:.2f} ({min(row['seconds']):.2f} to {max(row['seconds']):.2f})",
        )
        for row in recording.cases()
    ]
    return BenchmarkTable("Start-up", text, ("what", "compilation cache"), lines)


if __name__ == "__main__":
    app.run(main)
