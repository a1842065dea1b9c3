"""Replicas that are processes of their own, made to wait between rounds.

The worker holds a `Gate`, and every replica's process an `Entrance` to it, found by its address: strategies travel to
the processes by pickle, and an address survives that. A replica's process ends when the worker does.
"""

import math
import os
import pathlib
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from experiments.benchmarks.peer_workers.lines import Arrays, Job

PROCESS = 0.25e9
"""Bytes that a replica's process takes for itself; the code of PyTorch, which all share, comes on top once."""
_KEY = b"rounds"


class Gate:
    """The worker's side: lets all replicas do a round."""

    def __init__(self, job: Job):
        """Opens it.

        Raises:
          MemoryError: the processes of K replicas would not fit.
        """
        free = _free()
        if job.replicas * PROCESS > free:
            wanted = f"{job.replicas} processes of about {PROCESS / 1e9} GB"
            raise MemoryError(f"needs {wanted} each, and {free / 1e9:.1f} GB are free")
        self.replicas = job.replicas
        self.address = str(pathlib.Path(job.folder) / f"gate-{os.getpid()}")
        self.listener = Listener(self.address, "AF_UNIX", backlog=job.replicas, authkey=_KEY)
        self.entrances: list[Connection] = []

    def admit(self, failed: Callable[[], str | None]) -> None:
        """Waits for all replicas to come to the gate.

        Args:
          failed: why none will come any more; None while they may.

        Raises:
          RuntimeError: they have failed.
        """
        # A listener has no public way to look up from waiting.
        self.listener._listener._socket.settimeout(0.2)  # type: ignore[attr-defined]
        while len(self.entrances) < self.replicas:
            try:
                self.entrances.append(self.listener.accept())
            except TimeoutError:
                if (why := failed()) is not None:
                    raise RuntimeError(why) from None

    def round(self) -> Arrays:
        """Lets the replicas do a round.

        Returns:
          The averaged parameters, from the replica that says them.

        Raises:
          EOFError: a replica's process has ended.
        """
        for entrance in self.entrances:
            entrance.send("go")
        said: dict[str, Any] = {}
        for entrance in self.entrances:
            said |= entrance.recv()
        return said

    def close(self) -> None:
        """Closes it, which ends the replicas' processes."""
        for entrance in self.entrances:
            entrance.close()
        self.listener.close()


def _free() -> float:
    """Bytes of memory that processes can have, caches included."""
    file = pathlib.Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return math.inf


class Entrance:
    """A replica's side."""

    def __init__(self, address: str):
        self.connection = Client(address, "AF_UNIX", authkey=_KEY)

    def wait(self) -> None:
        """Waits until the next round may begin; ends the process when the worker is gone."""
        try:
            self.connection.recv()
        except (EOFError, OSError):
            os._exit(0)

    def done(self, averaged: Mapping[str, Any] | None = None) -> None:
        """Says that the round is over, and what it came to."""
        self.connection.send(dict(averaged or {}))
