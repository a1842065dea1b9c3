"""Whether a run takes the memory that it is said to take before its first round.

  python -m experiments.benchmarks.footprint
  python -m experiments.benchmarks.footprint --footprints=mlp_k8,cnn

Every case trains with `experiments.train`, as a process of its own, on data that are in the package, and compares what
its report says: the memory predicted before the first round, and the most that the process then held. On a CPU both
count the whole process, some 0.4 GB of which are Python, JAX and what compiling leaves.

Rows: case, flags (of the command), predicted, held, limit (bytes of each device), ratio (held / predicted), devices.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from absl import flags

from experiments.benchmarks.harness import BenchmarkTable, Recording, begin
from experiments.setup import app
from experiments.setup.shared_flags import names
from wavg_jax.base import WavgError
from wavg_jax.storage.rows import read_rows
from wavg_jax.training import progress

_SHARED = ("--dataset=digits", "--local_steps=4", "--rounds=6", "--batch_size=64", "--heldout=200")
_MLP = ("--model=mlp", "--hidden=4096,4096", "--inner=momentum", "--weighting=plain")
_VMAP, _MAP, _ONE = "--replica_map=vmap", "--replica_map=map", "--devices=1"
CASES: dict[str, tuple[str, ...]] = {
    "small": ("--model=mlp", "--hidden=16", "--weighting=plain", "--replicas=4", _ONE),
    "mlp": (*_MLP, "--replicas=4", _VMAP, _ONE),
    "mlp_map": (*_MLP, "--replicas=4", _MAP, _ONE),
    "mlp_auto": (*_MLP, "--replicas=4", _ONE),
    "mlp_k8": (*_MLP, "--replicas=8", _MAP, _ONE),
    "mlp_k16": (*_MLP, "--replicas=16", _MAP, _ONE),
    "two_devices": (*_MLP, "--replicas=8", _MAP, "--devices=2"),
    "opinion_pool": (*_MLP, "--weighting=opinion_pool", "--replicas=4", _MAP, _ONE),
    "adam": (*_MLP, "--inner=adam", "--replicas=4", _MAP, _ONE),
    "int8": (*_MLP, "--wire=int8", "--replicas=4", _MAP, _ONE),
    "fragments": (*_MLP, "--fragments=2", "--replicas=4", "--devices=2", _MAP),
    "no_checkpoints_between": (*_MLP, "--checkpoint_every=6", "--replicas=8", _MAP, _ONE),
}
"""Name -> flags of `experiments.train`; later ones count."""

flags.DEFINE_list("footprints", list(CASES), f"What to train: {', '.join(CASES)}.")
F = flags.FLAGS
READS = ("footprints",)
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Trains each case, and writes the table."""
    app.refuse_arguments(argv)
    chosen = names("footprints", CASES)
    recording = begin("footprint", READS)
    with progress.bar(len(chosen)) as advance:
        for name in chosen:
            _measure(recording, name)
            advance(name)
    recording.publish(_table(recording))


def _measure(recording: Recording, name: str) -> None:
    given = [*_SHARED, "--checkpoint_every=2", *CASES[name]]
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder, "run")
        command = [sys.executable, "-m", "experiments.train", *given, f"--workdir={workdir}", "--compilation_cache="]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise WavgError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
        rows = read_rows(workdir)
    memory, held = rows[0]["memory"], rows[-1]["peak_memory"]
    ratio = None if not memory or not held else held / memory["predicted"]
    recording.case(
        case=name,
        flags=" ".join(given),
        predicted=memory and memory["predicted"],
        held=held,
        limit=memory and memory["limit"],
        ratio=ratio,
        devices=rows[0]["devices"],
    )


def _table(recording: Recording) -> BenchmarkTable:
    text = (
        "Memory of each device, in GB: predicted before the first round, and the most that the process held; the ratio "
        "of the two. Checkpoints every two rounds where nothing else is said."
    )
    lines = [
        (
            row["case"],
            str(row["devices"]),
            *("-" if row[name] is None else f"{row[name] / 1e9:.2f}" for name in ("predicted", "held")),
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        )
        for row in recording.cases()
    ]
    return BenchmarkTable("Memory foretold", text, ("run", "devices", "predicted", "held"), lines)


if __name__ == "__main__":
    app.run(main)
