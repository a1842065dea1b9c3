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
"""Seconds that a folder may seem held because another process looks whether it is, for which it holds it."""


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Holds (and makes) a folder while the block runs. The system lets go of it when the process ends, however it ends.

    Raises:
      WorkdirError: another process, or another run in this one, holds it; or it cannot be made or written.
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
            f"the folder {folder} is in use by {_holder(path)}; wait for it to end, or choose another workdir "
            "(--workdir)",
            folder,
        ) from None
    except OSError as error:
        raise WorkdirError(
            f"the folder {folder} cannot be used: {error.strerror}; choose another workdir (--workdir)", folder, error
        ) from error
    # Where the system has no such locks, filelock has made a file of its own kind, which is not ours to touch.
    ours = isinstance(lock, filelock.UnixFileLock)
    try:
        if ours:
            with contextlib.suppress(OSError):
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        if ours:  # while it is held: who has opened it already then sees that it is gone
            path.unlink(missing_ok=True)
        lock.release()


def check_free(folder: pathlib.Path) -> None:
    """Raises WorkdirError if a folder is held, and leaves no trace if it is not; MissingExtra without filelock."""
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
