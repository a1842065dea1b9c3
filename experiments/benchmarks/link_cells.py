"""One cell of the link bench: an arm trained once in several processes, on links of a given rate."""

import contextlib
import json
import math
import pathlib
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from experiments.benchmarks import namespaces
from experiments.benchmarks.namespaces import Node, Traffic
from experiments.setup import processes
from experiments.setup.processes import Command
from wavg_jax.base import DataError, Stopped, WavgError
from wavg_jax.storage.rows import read_rows
from wavg_jax.storage.schema import FILE, Row, plain

ROOT = pathlib.Path(__file__).parents[2]
UNSHAPED, LOOPBACK, ALONE = "unshaped", "loopback", "none"
"""Links without a rate: as fast as the kernel copies; without namespaces; and of a run in a single process."""
ENDLESS = 100_000
"""Rounds of a run that time ends."""
_PORT = 7700
_LOOK = 0.5
"""Seconds between two looks at a run's rows and its traffic, which take some milliseconds of a core from it."""
_POINTS = 300
"""Of a recorded curve."""


class Cell(NamedTuple):
    """A run to measure.

    Attributes:
      link: rate of the links, as `tc` writes it, or one of `UNSHAPED`, `LOOPBACK`, `ALONE`.
      nodes: of the comparison; a run `ALONE` has the share of the cores that one of them has.
      arm, local_steps, wire, seed: of the run.
      options: further flags of experiments.train.
    """

    link: str
    nodes: int
    arm: str
    local_steps: int
    wire: str
    seed: int
    options: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        return 1 if self.link == ALONE else self.nodes

    @property
    def words(self) -> str:
        """What it is, for people."""
        where = "alone" if self.link == ALONE else f"{self.nodes} nodes, {self.link}"
        return f"{self.arm}, {where}, H={self.local_steps}, {self.wire}, seed {self.seed}"

    def same_as(self, row: Row) -> bool:
        """Whether a row recorded this cell."""
        return all(row[name] == value for name, value in plain(self._asdict()).items())

    def flags(self) -> list[str]:
        """The flags of experiments.train."""
        wire = [] if self.wire == "float32" else [f"--wire={self.wire}"]
        own = [f"--arm={self.arm}", f"--local_steps={self.local_steps}", f"--seed={self.seed}", *wire]
        # A checkpoint would take time from the run.
        return [f"--rounds={ENDLESS}", f"--checkpoint_every={ENDLESS}", *self.options, *own]


class Limits(NamedTuple):
    """When a run ends.

    Attributes:
      targets: test accuracies; a run ends once it has reached the highest.
      seconds: on the measured clock, after which it ends in any case.
      patience: seconds without a new row after which it is given up.
    """

    targets: tuple[float, ...]
    seconds: float
    patience: float

    def entries(self) -> Row:
        """A row's entries about them: targets, link_seconds."""
        return {"targets": list(self.targets), "link_seconds": self.seconds}

    def same_as(self, row: Row) -> bool:
        """Whether a row was recorded with these; older rows tell the targets alone."""
        return limits_of(row) in [(self.targets, self.seconds), (self.targets, None)]


def limits_of(row: Row) -> tuple[tuple[float, ...], float | None]:
    """The targets and the seconds that a recorded run ended at; None in older rows."""
    return tuple(sorted(map(float, row["reached"]))), row.get("link_seconds")


class _Place(NamedTuple):
    """Where the processes of a cell run: on nodes, or, without any, side by side on this machine."""

    nodes: tuple[Node, ...]

    @property
    def address(self) -> str:
        return f"{self.nodes[0].address}:{_PORT}" if self.nodes else f"127.0.0.1:{processes.free_port()}"

    def command(self, number: int, *arguments: str) -> tuple[str, ...]:
        return self.nodes[number].command(*arguments) if self.nodes else arguments

    def traffic(self) -> list[Traffic]:
        return [node.traffic() for node in self.nodes]


@contextlib.contextmanager
def _place(cell: Cell) -> Iterator[_Place]:
    if cell.link in (LOOPBACK, ALONE):
        yield _Place(())
    else:
        with namespaces.network(cell.nodes, None if cell.link == UNSHAPED else cell.link) as nodes:
            yield _Place(nodes)


class Count(NamedTuple):
    """What a look found: the last round and the samples up to it, and the bytes that all nodes had sent."""

    round: int
    samples: int
    sent: int


class _Watch:
    """Ends a run by its rows: SIGTERM once it has come far enough, SIGKILL if it no longer moves.

    It also counts the bytes of the rounds, without those of the start, such as the test of the collectives.
    """

    def __init__(self, path: pathlib.Path, limits: Limits, place: _Place):
        self.path, self.limits, self.place = path, limits, place
        self.read, self.looked = 0, 0.0
        self.moved = time.monotonic()
        self.asked: int | None = None
        self.counts: list[Count] = []
        """At the first look that found a round, and at the last."""

    def __call__(self) -> int | None:
        now = time.monotonic()
        if now < self.looked + _LOOK:
            return self.asked
        self.look()
        if now > self.moved + self.limits.patience:
            self.asked = signal.SIGKILL
        return self.asked

    def look(self) -> None:
        """Reads the new rows, counts the bytes, and decides whether the run has come far enough."""
        now = self.looked = time.monotonic()
        new = self._new()
        if new:
            self.moved = now
        if rounds := _rounds(new):
            count = Count(rounds[-1]["round"], rounds[-1]["samples"], sum(one.sent for one in self.place.traffic()))
            self.counts = [*self.counts[:1], count]
        for row in rounds:
            if self.asked:
                break
            if (row["test_accuracy"] or 0) >= max(self.limits.targets) or row["elapsed"] >= self.limits.seconds:
                self.asked = signal.SIGTERM

    def _new(self) -> list[Row]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def measure(cell: Cell, limits: Limits, folder: pathlib.Path, data_dir: str) -> Row:
    """Runs a cell.

    Args:
      cell: the run.
      limits: when it ends.
      folder: for its rows and logs; emptied first, and removed if all goes well. An absolute path.
      data_dir: of experiments.train; no part of the cell.

    Returns:
      The row's entries.

    Raises:
      WavgError: a process fails, or no longer moves.
      Stopped: SIGINT or SIGTERM came.
    """
    shutil.rmtree(folder, ignore_errors=True)
    variables = processes.share(cell.nodes) | {"PYTHONPATH": str(ROOT)}
    with _place(cell) as place:
        told = [f"--coordinator_address={place.address}", f"--num_processes={cell.processes}"]
        commands = []
        for number in range(cell.processes):
            several = [*told, f"--process_id={number}"] if cell.processes > 1 else []
            where = [f"--data_dir={data_dir}", f"--workdir={folder}", *several]
            run = (sys.executable, "-m", "experiments.train", *cell.flags(), *where)
            commands.append(Command(place.command(number, *run), variables))
        before, watch = place.traffic(), _Watch(folder / FILE, limits, place)
        ended = processes.launch(commands, log_dir=folder, show=False, watch=watch)
        watch.look()
        traffic = [now - then for now, then in zip(place.traffic(), before, strict=True)]
    if ended.signal is not None:
        raise Stopped(f"stopped in {cell.words}; the same command with the same --workdir goes on there")
    if ended.code and (watch.asked, ended.code) != (signal.SIGTERM, 128 + signal.SIGTERM):
        stuck = watch.asked == signal.SIGKILL
        why = f"no new row in {limits.patience:g} s" if stuck else f"exit code {ended.code}: {_last_words(folder)}"
        raise WavgError(f"{why} (logs in {folder})")
    try:
        entries = summary(read_rows(folder), limits.targets) | sent(traffic, watch.counts)
    except DataError as error:
        raise WavgError(f"{error} (logs in {folder})") from error
    shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # logs of a cell that failed
        folder.parent.rmdir()
    return cell._asdict() | limits.entries() | entries


def _last_words(folder: pathlib.Path) -> str:
    """The last error that a process wrote, or else its last line; the first process's that wrote one."""
    logs = [log.read_text(errors="replace").splitlines() for log in sorted(folder.glob("process-*.log"))]
    errors = [found[-1] for lines in logs if (found := [line for line in lines if _ERROR.match(line)])]
    return [*errors, *(lines[-1] for lines in logs if lines), "it said nothing"][0]


_ERROR = re.compile(r"error: |[\w.]*(Error|Exception|Diverged): ")


def summary(rows: Sequence[Row], targets: Sequence[float]) -> Row:
    """What a run's rows say.

    Args:
      rows: of one run.
      targets: test accuracies.

    Returns:
      rounds, samples, elapsed (seconds on the measured clock), seconds (median of a round), final_accuracy, reached
      ({accuracy: seconds on that clock, or None}), lr, parameters, curve ([seconds, accuracy] pairs).

    Raises:
      DataError: no round was finished.
    """
    first, rounds = rows[0], _rounds(rows)
    if not rounds:
        raise DataError("no round was finished")
    seen = [(row["elapsed"], row["test_accuracy"]) for row in rounds if row.get("test_accuracy") is not None]
    return {
        "rounds": len(rounds),
        "samples": rounds[-1]["samples"],
        "elapsed": rounds[-1]["elapsed"],
        "seconds": statistics.median(row["seconds"] for row in rounds),
        "final_accuracy": seen[-1][1] if seen else None,
        "reached": {f"{target:g}": _first(seen, target) for target in targets},
        "lr": (first.get("settings") or {}).get(f"lr_{first['arm']}"),
        "parameters": first["parameters"],
        "curve": [(round(at, 4), round(accuracy, 5)) for at, accuracy in _thinned(seen)],
    }


def _rounds(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "round"]


def _first(seen: Sequence[tuple[float, float]], target: float) -> float | None:
    return next((at for at, accuracy in seen if accuracy >= target), None)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_POINTS` of them, denser at the start, as a logarithmic axis shows them."""
    if len(points) <= _POINTS:
        return list(points)
    growth = math.log(len(points)) / (_POINTS - 1)
    return [points[at - 1] for at in sorted({round(math.exp(growth * i)) for i in range(_POINTS)})]


def sent(traffic: Sequence[Traffic], counts: Sequence[Count]) -> Row:
    """What crossed the interfaces.

    Args:
      traffic: of every node, from the processes' start to their end; none if nothing was counted.
      counts: two looks at the run, some rounds apart.

    Returns:
      sent, received (bytes of every node in all), bytes_per_round (sent by a node, mean over nodes and rounds, without
      the start), bytes_per_sample (sent by all for each sample that any trained on). None where nothing was counted, or
      the looks are no round apart.
    """
    found: Row = dict.fromkeys(("sent", "received", "bytes_per_round", "bytes_per_sample"))
    if traffic:
        found |= {"sent": [one.sent for one in traffic], "received": [one.received for one in traffic]}
    if traffic and counts and counts[-1].round > counts[0].round:
        first, last = counts[0], counts[-1]
        total = last.sent - first.sent
        found["bytes_per_round"] = total / len(traffic) / (last.round - first.round)
        found["bytes_per_sample"] = total / (last.samples - first.samples)
    return found
