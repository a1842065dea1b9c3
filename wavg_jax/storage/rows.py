"""The rows of a run: one JSON object per line in `rows.jsonl`, from which every report is made.

There are two kinds of rows. Times are in seconds, shares between 0 and 1, sizes in bytes; a number that is not finite
is null.

`kind="run"`, one per run, first:
  run, arm, seed        the run's name, unique in the file; the arm it is a run of; its seed
  started               when its first part began: UTC, ISO 8601, such as "2026-01-31T12:00:00Z"
  dataset, classes, train_samples, heldout_samples, test_samples, shard_sizes, noisy_shards
                        classes: of tokens the size of the vocabulary; null for regression
  class_names           [classes]; null where they are not known; it and started are missing in older rows
  data_crc              CRC-32 of the labels, the shards and the inputs as stored (all of them), to tell data apart; in
                        older rows of labels and shards alone
  devices               how many the replicas were spread over
  replica_map           how those of one device were run, a name in `wavg_jax.devices.mapping.MAPS`
  resident              whether the training split lay on the devices as a whole
  replicas, batch_size, rounds
  checkpoint_every      rounds between checkpoints
  local_steps, samples_per_round    of the longest round
  score_samples         held-out samples scored in a round; null for all
  faults                simulated: {speed, rate, sent}, [K] each; null for none
  parameters            numbers in one replica's parameters
  bytes_per_round       sent and received by all replicas together: parameters up, blend down
  compile_seconds       tracing and compiling the round and the evaluation, which are compiled side by side, added up,
                        the first time in the process; apart from every other clock
  critical_path         {local, score, blend, round}: what one of K devices would take for a round, computed from
                        measured parts; null when not measured
  target_accuracy       the test accuracy that "time to target" refers to; null when none is set
  hardware, versions    where and with what
  settings              the flags, or what `fit(settings=...)` was given; must agree when a run is resumed

`kind="round"`, one per round:
  run, arm, seed, round (from 1), local_steps (H of this round), samples (trained on so far)
  seconds, elapsed      measured wall time of this round and so far: feeding, training, scoring, blend; not compilation,
                        not the test split
  train_loss            mean over the living replicas and the local steps
  test_accuracy, test_loss, test_macro_f1, test_ece     of the global parameters, for reporting only; null in rounds
                        that were not evaluated
  weights, alive        [K]
  effective_replicas    1 / sum(weights^2)
  scores                {signal: [K]}, those that the weighting needed
  confusion             [classes][classes] counts on the test split, rows true; on a run's last round only
"""

import collections
import contextlib
import errno
import json
import math
import os
import pathlib
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from wavg_jax.base import DataError, ResumeError, SettingsError, WorkdirError
from wavg_jax.storage.lock import check_free, hold

FILE = "rows.jsonl"
Row = dict[str, Any]


def _plain(value: Any) -> Any:
    """Turns arrays and NumPy scalars into what JSON knows, and what is not finite into null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_lines(rows: Iterable[Row]) -> bytes:
    """Rows as they stand in a file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_rows(path: pathlib.Path) -> list[Row]:
    """Reads the rows of a run folder (or of a `rows.jsonl`), leaving out a last line that was cut short.

    Raises:
      DataError: there are none, or a line in the middle is not JSON.
    """
    path = path / FILE if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"no rows in {path}: {error.strerror}; give a folder that a run has written") from error
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            row["kind"], row["run"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a row ({error}); fix or delete the line") from error
        rows.append(row)
    if not rows:
        raise DataError(f"no rows in {path}: the file is empty")
    return rows


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file as a whole or not at all.

    Raises:
      WorkdirError: the folder cannot be written or is full.
    """
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not one of tempfile's, which are private: a run is as open as the file before it, or as the umask says.
        with new.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            new.chmod(stat.S_IMODE(path.stat().st_mode))
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise WorkdirError(
            f"{path} cannot be written: {error.strerror}; free the disk or choose another --workdir", path, error
        ) from error


def _append_line(path: pathlib.Path, line: bytes) -> None:
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())  # a checkpoint must never be ahead of its rows
    except OSError as error:
        if path.exists():
            os.truncate(path, before)
        message = f"{path} cannot be written: {error.strerror}; free the disk and --resume"
        raise WorkdirError(message, path, error) from error


def check_writable(workdir: pathlib.Path | None) -> None:
    """Raises WorkdirError if a folder cannot be made or written or is in use, without making it; None is fine."""
    if workdir is None:
        return
    check_free(workdir)
    there = next(folder for folder in (workdir.absolute(), *workdir.absolute().parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there) as probe:
            probe.write(b" " * 4096)
    except OSError as error:
        raise WorkdirError(
            f"the folder {workdir} cannot be written: {error.strerror}; choose another --workdir", workdir, error
        ) from error


def check_name(name: str) -> None:
    """Raises SettingsError unless the name of a run can be that of a folder, on any system and in any message."""
    fits = 0 < len(name.encode(errors="replace")) <= _LONGEST and name.isprintable() and name.strip(" .")
    if not fits or {"/", "\\", ":"} & set(name):
        raise SettingsError(
            f"name is {name!r:.60}; give the run a name of 1 to {_LONGEST} printable characters that is not a path "
            "(no /, \\ or :, not only dots)"
        )


_LONGEST = 200
"""Bytes in the name of a run; file systems stop at 255."""


class Records:
    """The rows of a run folder, appended one whole line at a time. Where others might write too, use `open_records`."""

    def __init__(self, workdir: pathlib.Path | None):
        """Opens (and makes) the folder; None keeps the rows in memory.

        Raises:
          WorkdirError: it cannot be made or written.
        """
        self.rows: list[Row] = []
        self.path = None if workdir is None else workdir / FILE
        if workdir is not None:
            self._open(workdir, workdir / FILE)

    def _open(self, workdir: pathlib.Path, path: pathlib.Path) -> None:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            message = f"the folder {workdir} cannot be used: {path.name}: {error.strerror}; choose another --workdir"
            raise WorkdirError(message, path, error) from error
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            self.rows = read_rows(path)
        if whole != content:  # a process was killed while it wrote its last line
            write_atomically(path, whole)

    def append(self, row: Row) -> None:
        """Adds a row. If the disk is full, the file is as before.

        Raises:
          WorkdirError: it could not be written.
        """
        row = _plain(row)
        if self.path is not None:
            _append_line(self.path, as_lines([row]))
        self.rows.append(row)

    def amend(self, run: str, entries: Row) -> None:
        """Adds entries to the last row of a run.

        Raises:
          WorkdirError: the file could not be written.
        """
        last = self.of(run)[-1]
        rows = [row | _plain(entries) if row is last else row for row in self.rows]
        if self.path is not None:
            write_atomically(self.path, as_lines(rows))
        self.rows = rows

    def of(self, run: str) -> list[Row]:
        """The rows of one run."""
        return [row for row in self.rows if row["run"] == run]

    def beyond(self, run: str, done: int) -> list[Row]:
        """What a run wrote after `done` rounds, which `rewind` would drop; with 0 all of it.

        Raises:
          ResumeError: rows of the rounds before are missing, or there twice.
        """
        rows = self.of(run)
        rounds = [row for row in rows if done and row["kind"] == "round" and row.get("round", 0) <= done]
        if lacking := [name for row in rounds for name in ROUND if name not in row]:
            raise ResumeError(f"cannot resume with {self.path}: a row of {run!r} lacks {lacking[0]!r}")
        if done:
            try:
                check_rounds(run, rounds, done)
            except DataError as error:
                raise ResumeError(f"cannot resume with {self.path}: {error}") from error
        return [row for row in rows if not done or row.get("round", 0) > done]

    def rewind(self, run: str, done: int, planned: int) -> None:
        """Drops what a run wrote after `done` rounds (its later rounds are done again); 0 drops the run itself.

        Args:
          run: the run's name.
          done: rounds to keep.
          planned: rounds that the run is to have now.

        Raises:
          ResumeError: rows of the rounds before are missing, or there twice.
        """
        dropped = {id(row) for row in self.beyond(run, done)}
        keep = [row for row in self.rows if id(row) not in dropped]
        keep = [r | {"rounds": planned} if r["run"] == run and r["kind"] == "run" else r for r in keep]
        if self.path is not None:
            write_atomically(self.path, as_lines(keep))
        self.rows = keep


@contextlib.contextmanager
def open_records(workdir: pathlib.Path | None) -> Iterator[Records]:
    """Opens (and makes) a folder to write rows there; None keeps them in memory.

    Many runs may share a folder, one after another; while the block runs nobody else writes there.

    Raises:
      WorkdirError: it cannot be made or written, or another process writes it.
    """
    with contextlib.nullcontext() if workdir is None else hold(workdir):
        yield Records(workdir)


def _ranges(numbers: Iterable[int]) -> str:
    """
    >>> _ranges([7, 3, 4, 5])
    '3 to 5, 7'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


PATIENCE = 2
"""Lost rounds in a row that end a run."""


def lost(weights: Any) -> bool:
    """Whether nothing came of a round, by its weights [K]: they are all 0."""
    return not np.any(weights)


def lost_at_the_end(rows: Sequence[Row]) -> int:
    """How many rounds were lost in a row up to the last of a run's rows.

    >>> weights = ([0.5, 0.5], [0, 0], [0, 0])
    >>> lost_at_the_end([{"kind": "run"}, *({"kind": "round", "weights": w} for w in weights)])
    2
    """
    count = 0
    for row in reversed(rows):
        if row["kind"] != "round" or not lost(row["weights"]):
            break
        count += 1
    return count


def check_rounds(run: str, rounds: Sequence[Mapping[str, Any]], last: int, replicas: int | None = None) -> None:
    """Raises DataError unless rows are those of the rounds 1 to `last` of a run, each once, with K weights each."""
    counts = collections.Counter(row["round"] for row in rounds)
    if missing := set(range(1, last + 1)) - set(counts):
        raise DataError(f"run {run!r} lacks round {_ranges(missing)}; put the rows back from a copy, or train again")
    if twice := [number for number, count in counts.items() if count > 1]:
        raise DataError(
            f"run {run!r} has round {_ranges(twice)} twice, as if two processes had written at once; keep one row of "
            f"each in {FILE}"
        )
    for row in rounds:
        for name in ("weights", "alive") if replicas is not None else ():
            if len(row[name]) != replicas:
                raise DataError(
                    f"run {run!r}, round {row['round']}: {len(row[name])} {name} for {replicas} replicas; put the row "
                    "back from a copy, or train again"
                )


FIXED = (
    *("seed", "dataset", "train_samples", "shard_sizes", "noisy_shards"),
    *("local_steps", "batch_size", "parameters", "score_samples", "faults"),
)
"""Entries of a run's first row that must be as they were when the run is resumed, beside its `settings`."""
READ = (*FIXED, "settings", "data_crc", "classes", "heldout_samples", "test_samples", "rounds", "checkpoint_every")
"""Entries of a run's first row without which it cannot be resumed, beside `replica_map`."""
ROUND = ("round", "local_steps", "samples", "elapsed", "train_loss")
"""Entries of a round's row without which a run cannot be resumed."""


def recorded_run(workdir: pathlib.Path | None, name: str) -> Row | None:
    """The first row of a run in a folder, or None if there is none that can be read.

    Raises:
      ResumeError: it lacks an entry that is read when the run is resumed.
    """
    if workdir is None or not (workdir / FILE).exists():
        return None
    with contextlib.suppress(DataError):  # a first row that was cut short; what is damaged beyond that is found later
        first = next((row for row in read_rows(workdir) if row["run"] == name), None)
        if first is not None:
            _check_first(first)
        return first
    return None


def _check_first(first: Row) -> None:
    if first["kind"] != "run":
        raise ResumeError(f"cannot resume {first['run']!r}: its first row is missing; put it back from a copy")
    for name in (*READ, "replica_map"):
        if name not in first:
            raise ResumeError(
                f"cannot resume {first['run']!r}: its first row lacks {name!r}, as one that an earlier version wrote; "
                "start over in another workdir (--workdir)"
            )


def check_settings(before: Row, first: Row) -> None:
    """Compares the first row of a recorded run with that of the one that resumes it.

    Raises:
      ResumeError: they differ; names the first difference.
    """
    _check_first(before)
    first = _plain(first)
    # The data first: flags such as --chance follow from them. How they are split and spoilt is a matter of flags.
    then, now = (
        {
            "dataset": row["dataset"],
            "classes": row["classes"],
            "training samples": row["train_samples"] + row["heldout_samples"],
            "test samples": row["test_samples"],
        }
        for row in (before, first)
    )
    for name, value in then.items():
        if value != now[name]:
            raise ResumeError(
                f"cannot resume {before['run']!r}: the data are not those it was started with ({name}: {value}, now "
                f"{now[name]}); give the same data (--dataset, --data_dir), or choose another workdir (--workdir)"
            )
    # The settings last: a flag of that name is what the user can fix.
    then, now = ({key: row[key] for key in FIXED} | row["settings"] for row in (before, first))
    for name in sorted({*now, *then}):
        if now.get(name) != then.get(name):
            raise ResumeError(
                f"cannot resume {before['run']!r}: it was started with --{name}={then.get(name)}, "
                f"now it is {now.get(name)}; repeat the settings it was started with, or choose another --workdir"
            )
    if before["data_crc"] != first["data_crc"]:
        raise ResumeError(
            f"cannot resume {before['run']!r}: inputs, labels, splits or shards are not those it was started with; "
            "give the same data, or another --workdir"
        )
