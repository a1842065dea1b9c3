"""Reading and writing `rows.jsonl`, one JSON object per line; `wavg_jax.storage.schema` says what a row holds.

Of several processes, process 0 alone reads and writes the file; the others keep the same rows in memory.
"""

import contextlib
import errno
import json
import os
import pathlib
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from wavg_jax.base import DataError, ResumeError, SettingsError, WavgError, WorkdirError
from wavg_jax.devices import processes
from wavg_jax.storage.lock import check_free, hold_together
from wavg_jax.storage.resumption import check_first, check_kept
from wavg_jax.storage.schema import FILE, Row, plain


def as_lines(rows: Iterable[Row]) -> bytes:
    """The rows as bytes of a file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_rows(path: pathlib.Path) -> list[Row]:
    """Reads the rows of a run folder or of a `rows.jsonl`, without a last line that was cut short.

    Raises:
      DataError: there are no rows, or a whole line is not a row.
    """
    path = path / FILE if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"no rows in {path}: {error.strerror}; give the folder of a run") from error
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            row["kind"], row["run"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a row ({error}); fix or delete the line") from error
        rows.append(row)
    if not rows:
        raise DataError(f"no rows in {path}: the file is empty; give the folder of a run")
    return rows


@contextlib.contextmanager
def replaced(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a new file that takes the place of `path` when the block ends, and vanishes if it fails.

    Raises:
      WorkdirError: the disk is full, or the folder is not writable.
    """
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not a tempfile, which is private: the mode is that of the old file, or follows the umask.
        with new.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            new.chmod(stat.S_IMODE(path.stat().st_mode))
        new.replace(path)
    except WavgError:
        raise
    except OSError as error:
        raise WorkdirError(
            f"{path} cannot be written: {error.strerror}; free the disk, or choose another workdir=", path, error
        ) from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file whole or not at all.

    Raises:
      WorkdirError: the disk is full, or the folder is not writable.
    """
    with replaced(path) as file:
        file.write(content)


def _append_line(path: pathlib.Path, line: bytes) -> None:
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())  # rows must reach the disk before the checkpoint does
    except OSError as error:
        if path.exists():
            os.truncate(path, before)
        message = f"{path} cannot be written: {error.strerror}; free the disk and use resume=True"
        raise WorkdirError(message, path, error) from error


def check_writable(workdir: pathlib.Path | None) -> None:
    """Raises WorkdirError if a folder is in use or cannot be made or written. Makes nothing; None is fine."""
    if workdir is not None:
        processes.decided(lambda: _try_writing(workdir))


def _try_writing(workdir: pathlib.Path) -> None:
    check_free(workdir)
    there = next(folder for folder in (workdir.absolute(), *workdir.absolute().parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there) as probe:
            probe.write(b" " * 4096)
    except OSError as error:
        raise WorkdirError(
            f"the folder {workdir} cannot be written: {error.strerror}; choose another workdir=", workdir, error
        ) from error


def check_name(name: str) -> None:
    """Raises SettingsError unless a run's name works as a folder name on every system, and in every message."""
    fits = 0 < len(name.encode(errors="replace")) <= _LONGEST and name.isprintable() and name.strip(" .")
    if not fits or {"/", "\\", ":"} & set(name):
        raise SettingsError(
            f"name is {name!r:.60}; give the run a name of 1 to {_LONGEST} printable characters that is not a path "
            "(no /, \\ or :, not only dots)"
        )


_LONGEST = 200
"""Bytes in the name of a run; file systems allow 255."""


def _opened(workdir: pathlib.Path, path: pathlib.Path) -> list[Row]:
    """Makes a folder if need be, and returns its rows, rid of a last line that was cut short."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        message = f"the folder {workdir} cannot be used: {path.name}: {error.strerror}; choose another workdir="
        raise WorkdirError(message, path, error) from error
    whole = content[: content.rfind(b"\n") + 1]
    rows = read_rows(path) if whole else []
    if whole != content:  # a kill cut the last line short
        write_atomically(path, whole)
    return rows


class Records:
    """The rows of a run folder, appended whole line by whole line. Use `open_records` where others might write too."""

    def __init__(self, workdir: pathlib.Path | None):
        """Opens the folder, and makes it if need be; None keeps the rows in memory.

        Raises:
          WorkdirError: the folder cannot be made or written.
        """
        self.rows: list[Row] = []
        self.path = None if workdir is None else workdir / FILE
        if workdir is not None:
            self.rows = processes.decided(lambda: _opened(workdir, workdir / FILE))

    def append(self, row: Row) -> None:
        """Adds a row. A failed write leaves the file unchanged.

        Raises:
          WorkdirError: the file cannot be written.
        """
        row = plain(row)
        if self.path is not None and processes.first():
            _append_line(self.path, as_lines([row]))
        self.rows.append(row)

    def amend(self, run: str, entries: Row) -> None:
        """Adds entries to the last row of a run.

        Raises:
          WorkdirError: the file cannot be written.
        """
        last = self.of(run)[-1]
        rows = [row | plain(entries) if row is last else row for row in self.rows]
        if self.path is not None and processes.first():
            write_atomically(self.path, as_lines(rows))
        self.rows = rows

    def of(self, run: str) -> list[Row]:
        """The rows of one run."""
        return [row for row in self.rows if row["run"] == run]

    def last(self, run: str) -> Row:
        """The newest row of a run that has some; searched from the end, lest rounds slow down as rows come."""
        return next(row for row in reversed(self.rows) if row["run"] == run)

    def beyond(self, run: str, done: int) -> list[Row]:
        """The rows that a run wrote after `done` rounds, which `rewind` would drop; all of its rows if `done` is 0.

        Raises:
          ResumeError: an earlier round's row is missing, incomplete or there twice.
        """
        rows = self.of(run)
        rounds = [row for row in rows if done and row["kind"] == "round" and row.get("round", 0) <= done]
        try:
            check_kept(run, rounds, done)
        except DataError as error:
            raise ResumeError(f"cannot resume with {self.path}: {error}") from error
        return [row for row in rows if not done or row.get("round", 0) > done]

    def rewind(self, run: str, done: int, planned: int) -> None:
        """Drops the rows that a run wrote after `done` rounds, which it will run again; 0 drops the whole run.

        Args:
          run: the run's name.
          done: rounds to keep.
          planned: the run's new number of rounds.

        Raises:
          ResumeError: an earlier round's row is missing, incomplete or there twice.
        """
        dropped = {id(row) for row in self.beyond(run, done)}
        keep = [row for row in self.rows if id(row) not in dropped]
        keep = [r | {"rounds": planned} if r["run"] == run and r["kind"] == "run" else r for r in keep]
        if self.path is not None and processes.first():
            write_atomically(self.path, as_lines(keep))
        self.rows = keep


@contextlib.contextmanager
def open_records(workdir: pathlib.Path | None) -> Iterator[Records]:
    """Opens a folder to write rows, and makes it if need be; None keeps the rows in memory.

    Runs may share a folder, one after another. While the block runs, nobody else can write there.

    Raises:
      WorkdirError: the folder cannot be made or written, or another process writes to it.
    """
    with contextlib.nullcontext() if workdir is None else hold_together(workdir):
        yield Records(workdir)


def recorded_run(workdir: pathlib.Path | None, name: str) -> Row | None:
    """The first row of a run in a folder; None if there is none, or none that can be read.

    Raises:
      ResumeError: it lacks an entry that resuming needs.
    """
    return None if workdir is None else processes.decided(lambda: _recorded(workdir, name))


def _recorded(workdir: pathlib.Path, name: str) -> Row | None:
    if not (workdir / FILE).exists():
        return None
    with contextlib.suppress(DataError):  # the first row may be cut short; other damage is found later
        first = next((row for row in read_rows(workdir) if row["run"] == name), None)
        if first is not None:
            check_first(first)
        return first
    return None
