"""One process at a time writes a run folder."""

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

from wavg_jax.base import WorkdirError
from wavg_jax.extras import need

FILE = ".lock"

_LOOK = 0.2
"""Seconds for which a folder may seem held only because another process is checking it."""


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
