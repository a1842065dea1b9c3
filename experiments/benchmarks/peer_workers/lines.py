"""The protocol between the driver and its workers: a line of JSON each way.

  -> {"ask": "job", "system": "loop", "folder": ..., "network": "mlp", "replicas": 4, "steps": 50, ...}
  <- {"notes": {...}}        built; notes hold versions and the like
  -> {"ask": "check", "file": NAME}
  <- {}                      the first round, from the given parameters on the given batches, is done; the averaged
                             parameters are in FOLDER/NAME.npz
  -> {"ask": "go"}
  <- {"seconds": 0.31, "idle": 0.0}   one more round; idle: share of a core that it and its
                             descendants used since the last answer
  <- {"error": "..."}        instead of any of these

Everything else that a worker prints goes to its log. It ends when its input ends.
"""

import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]

PATIENCE = 1800.0
"""Seconds an answer may take: compiling a network is slow, and so is a stock one on a slow machine."""

ENDING = 30.0
"""Seconds a worker may take to end, and with it the processes that it started."""


class Job(NamedTuple):
    """The work of every system.

    Attributes:
      system: one of the worker's.
      folder: holds `data.npz` (x [N, ...] float32 as the network gets it, y [N], indices [K, H, B]) and `start.npz`
        (parameters `params/...` and collections such as `batch_stats/...`, named as flax names them).
      network: its name.
      replicas, steps, batch: K, H, B.
      rate, momentum: of SGD.
    """

    system: str
    folder: str
    network: str
    replicas: int
    steps: int
    batch: int
    rate: float
    momentum: float

    def read(self, name: str) -> Arrays:
        """The arrays of a file in the folder."""
        with np.load(pathlib.Path(self.folder) / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)


class ReadyJob(NamedTuple):
    """A job that is ready to run.

    Attributes:
      check: does the first round and returns the averaged parameters, named as in `start.npz`.
      round: does another round, to the end.
      notes: for the row.
      close: ends what would keep the process from ending.
    """

    check: Callable[[], Arrays]
    round: Callable[[], None]
    notes: Mapping[str, Any]
    close: Callable[[], None] = lambda: None


def serve(build: Callable[[Job], ReadyJob]) -> None:
    """Answers the lines of standard input until they end."""
    # Keeps the prints of libraries out of the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answer = _Answers(build)
    for line in sys.stdin:
        try:
            said = answer.to(json.loads(line))
        except Exception as error:
            said = {"error": first_line(f"{type(error).__name__}: {error}")}
        print(json.dumps(said), file=answers)
    if answer.system is not None:
        answer.system.close()


class _Answers:
    """The worker's side."""

    def __init__(self, build: Callable[[Job], ReadyJob]):
        self.build = build
        self.job: Job
        self.system: ReadyJob | None = None
        self.clocks = time.perf_counter(), _used()

    def to(self, question: dict[str, Any]) -> dict[str, Any]:
        ask = question.pop("ask")
        if ask == "job":
            self.job = Job(**question)
            self.system = self.build(self.job)
            return {"notes": dict(self.system.notes)}
        assert self.system is not None
        if ask == "check":
            averaged: Any = self.system.check()
            np.savez(pathlib.Path(self.job.folder) / f"{question['file']}.npz", **averaged)
            self.clocks = time.perf_counter(), _used()
            return {}
        wall, used = self.clocks
        used_before, start = _used(), time.perf_counter()
        self.system.round()
        end = time.perf_counter()
        self.clocks = end, _used()
        return {"seconds": end - start, "idle": (used_before - used) / (start - wall)}


def _used() -> float:
    """Seconds of a core that this process and its descendants have used."""
    if not pathlib.Path("/proc/self/stat").exists():
        return time.process_time()
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            pid = int(folder.name)
            children.setdefault(int(fields[1]), []).append(pid)
            ticks[pid] = sum(map(int, fields[11:15]))  # of itself, and of children that have ended
    total, family = 0, [os.getpid()]
    while family:
        pid = family.pop()
        total += ticks.get(pid, 0)
        family += children.get(pid, [])
    return total / os.sysconf("SC_CLK_TCK")


class WorkerFailed(Exception):
    """A worker cannot do its job; the message says why, in a line."""


class Worker:
    """A worker's process, seen from the driver. Use it in a `with` statement, which ends the process."""

    def __init__(self, command: Sequence[str], log: pathlib.Path, environment: Mapping[str, str]):
        """Starts it.

        Args:
          command: of the worker.
          log: file for what it prints.
          environment: variables of the process.
        """
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=dict(environment)
            )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(ENDING)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.answers.put(line)
        self.answers.put("")

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        """Asks and waits for the answer.

        Raises:
          WorkerFailed: the worker ended, took longer than PATIENCE, said that it failed, or no JSON.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"ask": what, **details}) + "\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=PATIENCE)
        except queue.Empty:
            self.process.kill()
            raise WorkerFailed(f"no answer in {PATIENCE:.0f} s") from None
        except OSError:
            line = ""
        if not line:
            said = [text for text in self.log.read_text().splitlines() if text.strip()]
            raise WorkerFailed(first_line(f"ended: {said[-1]}" if said else "ended and said nothing"))
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            raise WorkerFailed(first_line(f"answered {line!r}")) from None
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer


def first_line(text: str) -> str:
    """The first line of a message, short enough for a table, and without `|`, which ends a cell."""
    return text.strip().splitlines()[0][:200].replace("|", "/")
