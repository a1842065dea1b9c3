"""One run at a time writes a folder, and process 0 alone writes for all processes of the run."""

import contextlib
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from wavg_jax.base import WorkdirError
from wavg_jax.devices import processes
from wavg_jax.extras import need

FILE = ".lock"

_LOOK = 0.2
"""Seconds for which a folder may seem held only because another process is checking it."""


_SIGHT = 10.0
"""Seconds in which a network file system must show a new file on other machines."""


@contextlib.contextmanager
def hold_together(folder: pathlib.Path) -> Iterator[None]:
    """Holds a folder for all processes of a run, as `hold`; process 0 does it.

    Raises:
      WorkdirError: as in `hold`, or a process does not see what process 0 writes there; the same one in all processes.
    """
    with contextlib.ExitStack() as stack:
        processes.decided(lambda: stack.enter_context(hold(folder)))
        _check_shared(folder)
        yield


def _check_shared(folder: pathlib.Path) -> None:
    """Raises WorkdirError in all processes unless all of them see a file that process 0 writes."""
    if processes.count() == 1:
        return
    token = folder / processes.broadcast(f".seen-{uuid.uuid4().hex}")
    try:
        processes.decided(lambda: _write_token(token))
        end = time.monotonic() + _SIGHT
        while not (seen := token.exists()) and time.monotonic() < end:
            time.sleep(0.1)
        blind = np.flatnonzero(~processes.gather(np.asarray(seen)))
    finally:
        if processes.first():
            token.unlink(missing_ok=True)
    if len(blind):
        raise WorkdirError(
            f"process {', '.join(map(str, blind))} of {processes.count()} does not see what process 0 writes to "
            f"{folder}: give a workdir= on a file system that all processes share, by the same path",
            folder,
        )


def _write_token(token: pathlib.Path) -> None:
    try:
        token.touch()
    except OSError as error:
        raise WorkdirError(
            f"the folder {token.parent} cannot be written: {error.strerror}; choose another workdir=", token, error
        ) from error


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Holds a folder while the block runs, and makes it if need be. The system frees it however the process ends.

    Raises:
      WorkdirError: another process, or another run in this process, holds the folder; or it cannot be made or written.
      MissingExtra: filelock is not installed.
    """
    filelock = _filelock()
    path = folder / FILE
    lock = filelock.FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_LOOK, poll_interval=_LOOK / 20)
    except filelock.Timeout:
        raise WorkdirError(
            f"the folder {folder} is in use by {_holder(path)}; wait for it to end, or choose another workdir=",
            folder,
        ) from None
    except OSError as error:
        raise WorkdirError(
            f"the folder {folder} cannot be used: {error.strerror}; choose another workdir=", folder, error
        ) from error
    # Without system locks, filelock makes a lock file of its own, which we must not touch.
    ours = isinstance(lock, filelock.UnixFileLock)
    try:
        if ours:
            with contextlib.suppress(OSError):
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        if ours:  # while we hold it, so a process that has it open sees it gone
            path.unlink(missing_ok=True)
        lock.release()


def check_free(folder: pathlib.Path) -> None:
    """Raises WorkdirError if a folder is held, MissingExtra without filelock; leaves no trace if it is free."""
    _filelock()
    if (folder / FILE).exists():
        with hold(folder):
            pass


def _filelock() -> Any:
    """The package of the locks, which only runs with a folder need."""
    return need("filelock", extra="run", why="workdir=")


def _holder(path: pathlib.Path) -> str:
    with contextlib.suppress(OSError, UnicodeError):
        return path.read_text().strip() or "another process"
    return "another process"
