"""A process to be killed: it trains as `experiments.train` does, and marks where it is, for whoever kills it.

Processes are forked by a server that has imported this module and all that it needs, and has not made JAX's devices: a
start costs what the run costs, not the seconds of the imports, which write nothing.
"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import json
import mmap
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.stats  # noqa: F401 - what reports and checkpoints import late
from matplotlib.backends import backend_agg  # noqa: F401
from orbax.checkpoint import v1 as _orbax  # noqa: F401

import wavg_jax as wavg
from experiments import train
from experiments.setup import app, shared_flags
from wavg_jax import reporting  # noqa: F401
from wavg_jax.storage import checkpoints
from wavg_jax.storage.checkpoints import Checkpoints
from wavg_jax.storage.journal import Journal
from wavg_jax.storage.rows import Records, write_atomically
from wavg_jax.training import loop
from wavg_jax.training.run import Run
from wavg_jax.tree import is_key

_PLACES: dict[str, tuple[tuple[Any, str], ...]] = {
    "compiling": ((Run, "__init__"),),
    "resuming": ((Journal, "begin"),),
    "in a round": ((loop, "train"),),
    "writing rows": ((Records, "append"), (Records, "amend"), (Records, "rewind")),
    "saving": ((Checkpoints, "_save"),),
    "sealing": ((checkpoints, "_seal"),),
    "tidying": ((checkpoints, "_remove"), (Checkpoints, "set_aside")),
    "reporting": ((app, "_publish_rows"),),
}
"""Phase -> what a process runs in it, by owner and name. A later phase is part of an earlier one, or runs beside it."""
STARTING = "starting"
PHASES = (STARTING, *_PLACES)
"""The phases of a run; it is in the last one that is under way."""


class Marks:
    """What a process says of where it is, in a file mapped to memory, which outlives it.

    Of every phase how often it was entered and left, and the seconds between.
    """

    def __init__(self, path: pathlib.Path):
        """Opens the file, and makes it if need be."""
        with path.open("a+b") as file:
            file.truncate(24 * len(PHASES))
            self._numbers = np.frombuffer(mmap.mmap(file.fileno(), 0), np.float64).reshape(len(PHASES), 3)

    def during(self, phase: str, function: Callable) -> Callable:
        """The function, which marks when it runs."""
        numbers = self._numbers[PHASES.index(phase)]

        @functools.wraps(function)
        def marked(*arguments: Any, **options: Any) -> Any:
            begun = time.monotonic()
            numbers[0] += 1
            try:
                return function(*arguments, **options)
            finally:
                numbers[1] += 1
                numbers[2] += time.monotonic() - begun

        return marked

    def entered(self, phase: str) -> int:
        """How often a phase was entered."""
        return int(self._numbers[PHASES.index(phase), 0])

    def now(self) -> str:
        """The phase that a process is in, or was in when it was killed."""
        running = [phase for phase, (entered, left, _) in zip(PHASES, self._numbers, strict=True) if entered > left]
        return running[-1] if running else STARTING

    def seconds(self) -> dict[str, float]:
        """How long a phase took, on average, for those that were left."""
        return {phase: n[2] / n[1] for phase, n in zip(PHASES, self._numbers, strict=True) if n[1]}


@dataclasses.dataclass(frozen=True)
class Orders:
    """What a process is to do.

    Attributes:
      arguments: flags of `experiments.train`.
      folder: for its marks, its output, and the digest of its final state.
      index: which process of its run it is, from 0.
      variables: added to the environment.
    """

    arguments: Sequence[str]
    folder: pathlib.Path
    index: int
    variables: Mapping[str, str]

    @property
    def marks(self) -> pathlib.Path:
        """The file of the marks."""
        return self.folder / f"marks-{self.index}"

    @property
    def log(self) -> pathlib.Path:
        """The file of the output."""
        return self.folder / f"log-{self.index}.txt"

    @property
    def digest(self) -> pathlib.Path:
        """The file that says what the final state was."""
        return self.folder / f"digest-{self.index}.json"


def run(orders: Orders) -> None:
    """Trains, as a process by itself."""
    log = os.open(orders.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for shown in (1, 2):
        os.dup2(log, shown)
    os.environ.update(orders.variables)
    jax.config.update("jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"]))  # imported before that was set
    marks = Marks(orders.marks)
    for phase, places in _PLACES.items():
        for owner, name in places:
            setattr(owner, name, marks.during(phase, getattr(owner, name)))

    def main(argv: Sequence[str]) -> None:
        app.refuse_arguments(argv)
        shared_flags.refuse_unused(train.READS)
        train.train("train", functools.partial(_digested, orders.digest))

    sys.argv = ["train", *orders.arguments]
    begin = marks.during(STARTING, app.run)
    try:
        begin(main)
    finally:
        sys.stdout.flush()
        with contextlib.suppress(SystemExit):
            atexit._run_exitfuncs()  # as Python does at its end; multiprocessing does not


def _digested(path: pathlib.Path, *arguments: Any, **options: Any) -> wavg.Result:
    """`wavg.fit`, which leaves a digest of the final state: {path of a leaf: SHA-256 of this process's part}."""
    result = wavg.fit(*arguments, **options)
    found = {}
    for keys, leaf in jax.tree.leaves_with_path(result.state):
        array = jax.random.key_data(leaf) if is_key(leaf) else leaf
        own = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
        for shard in sorted(array.addressable_shards, key=lambda shard: shard.device.id):
            own.update(np.ascontiguousarray(shard.data).tobytes())
        found[jax.tree_util.keystr(keys, simple=True, separator="/")] = own.hexdigest()
    write_atomically(path, json.dumps(found).encode())
    return result
