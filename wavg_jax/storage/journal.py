"""A run's rows and checkpoints, kept in step, in a folder or in memory.

With several processes, all call the same functions in the same order; process 0 decides what to resume from and what to
refuse, and alone writes rows.
"""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator

from wavg_jax.base import PyTree, ResumeError, SettingsError, TrainState, WavgWarning
from wavg_jax.devices import processes
from wavg_jax.storage.checkpoints import Checkpoints, Found, open_checkpoints, snapshot
from wavg_jax.storage.resumption import FIXED, check_settings, other_versions
from wavg_jax.storage.rows import Records, as_lines, open_records
from wavg_jax.storage.schema import Row, plain


def _useless(found: Found) -> list[int]:
    return sorted({*found.damaged, *found.unfinished})


def _listed(found: Found) -> str:
    """The unusable checkpoints and what is wrong with each, newest first."""
    wrong = found.damaged | dict.fromkeys(found.unfinished, "was never finished")
    return "; ".join(f"checkpoint {step}: {wrong[step]}" for step in sorted(wrong, reverse=True))


class Journal:
    """The rows and checkpoints of one run. Use `open_journal`."""

    def __init__(self, records: Records, name: str, folder: pathlib.Path | None, stack: contextlib.ExitStack):
        self._records, self._name, self._folder, self._stack = records, name, folder, stack
        self._checkpoints: Checkpoints | None = None
        self._identity: Row = {}
        self.resumed = 0
        """Rounds of the checkpoint that `begin` found."""

    @property
    def workdir(self) -> pathlib.Path | None:
        """The folder of the rows; None in memory."""
        return None if self._records.path is None else self._records.path.parent

    def rows(self) -> list[Row]:
        """The run's rows so far."""
        return self._records.of(self._name)

    def last(self) -> Row:
        """The newest of them."""
        return self._records.last(self._name)

    def begin(self, first: Row, initial: TrainState, resume: bool) -> TrainState:
        """Records a run's first row and returns the state to start or resume from.

        Raises:
          SettingsError: the folder already holds this run, and `resume` is False; or processes differ in settings.
          ResumeError: the run cannot resume.
        """
        first = _agreed(first)
        self._identity = {key: first[key] for key in ("run", "arm", "seed")}
        before = self.rows()
        processes.decided(lambda: self._check(before, first, resume))
        if self._folder is None:
            self._records.append(first)
            return initial
        self._checkpoints = self._stack.enter_context(open_checkpoints(self._folder))
        found = self._checkpoints.find()
        done = found.whole or 0
        if done > first["rounds"]:
            raise ResumeError(
                f"{self._name!r} has done {done} rounds already, more than rounds={first['rounds']}; give "
                f"at least rounds={done}"
            )
        # Read everything before changing anything: if reading fails, nothing is lost.
        state, self.resumed = self._checkpoints.restore(done, initial) if done else initial, done
        self._records.rows = processes.decided(lambda: self._settle(found, done, before, first))
        if processes.first():
            self._say(found, done, len(before) - 1)
            if done and (differing := other_versions(before[0], first)):
                text = f"{self._name!r} was started with {differing}: it goes on, equal to rounding and not bit for bit"
                warnings.warn(text, WavgWarning, stacklevel=2)
        return state

    def _check(self, before: list[Row], first: Row, resume: bool) -> None:
        """Refuses to start what is there, and to resume what is something else."""
        if not resume and (before or (self._folder is not None and self._folder.exists())):
            raise SettingsError(
                f"the folder already holds the run {self._name!r}; use resume=True, or choose another workdir="
            )
        if before:
            check_settings(before[0], first)

    def _settle(self, found: Found, done: int, before: list[Row], first: Row) -> list[Row]:
        """Makes folder and rows those of a run that has done so many rounds; returns the rows."""
        if not done:
            self._check_start(found, before)
        dropped = self._records.beyond(self._name, done)
        self._set_aside(found, done, dropped)  # before rewind drops these rows, lest a kill in between lose them
        self._records.rewind(self._name, done, first["rounds"])
        if not done:
            self._records.append(first)
        return self._records.rows

    def _check_start(self, found: Found, before: list[Row]) -> None:
        """Refuses to start a recorded run over if it once had a checkpoint."""
        due = before[0]["checkpoint_every"] if before else 0
        if found.damaged or len(before) - 1 > due:
            raise ResumeError(
                f"{self._name!r} has rows of {len(before[1:])} rounds but no whole checkpoint in {self._folder} "
                f"({_listed(found) or 'it is empty'}); restore one from a copy, or start over in another workdir="
            )

    def _set_aside(self, found: Found, done: int, dropped: list[Row]) -> None:
        """Sets unusable checkpoints aside, with the rows that a good copy of each would need."""
        assert self._checkpoints is not None
        for step in _useless(found):
            self._checkpoints.set_aside(step, as_lines(dropped) if step > done else b"")

    def _say(self, found: Found, done: int, recorded: int) -> None:
        """Warns which checkpoints could not be used, and how many rounds that costs."""
        useless = _useless(found)
        again = f"{recorded - done} recorded rounds run again" if recorded > done else "no round runs again"
        if useless:
            warnings.warn(
                f"{self._name!r} resumes from {f'its checkpoint of round {done}' if done else 'the start'}, {again}: "
                f"{_listed(found)} (set aside in {self._folder} as damaged-{useless[-1]})",
                WavgWarning,
                stacklevel=2,
            )
        elif recorded > 0 and not done:
            warnings.warn(f"{self._name!r} was stopped before its first checkpoint: {again}", WavgWarning, stacklevel=2)

    def append(self, row: Row) -> None:
        """Adds a round's row, once the last checkpoint is on disk: rows that go past one which is missing tell that it
        was lost, and not that the run was killed before."""
        self.wait()
        self._records.append(self._identity | row)

    def amend(self, entries: Row) -> None:
        """Adds entries to the row of the last round."""
        self._records.amend(self._name, entries)

    def snapshot(self, state: TrainState, *, copy: bool = True) -> PyTree | None:
        """What to `save` of a state; None if the run has no folder. See `wavg_jax.storage.checkpoints.snapshot`.

        Waits until the last one is on disk, so that there is one copy of the state at a time.
        """
        if self._checkpoints is None:
            return None
        self.wait()
        return snapshot(state, copy=copy)

    def save(self, kept: PyTree | None) -> None:
        """Starts saving a `snapshot` as a checkpoint, after the row of its round."""
        if self._checkpoints is not None:
            self._checkpoints.save(kept)

    def wait(self) -> None:
        """Blocks until every checkpoint is on disk."""
        if self._checkpoints is not None:
            self._checkpoints.wait()


def _agreed(first: Row) -> Row:
    """Process 0's first row.

    Raises:
      SettingsError: another process has other settings.
    """
    theirs = processes.broadcast(first)
    mine = plain(first)
    processes.agree({name: mine[name] for name in FIXED} | mine["settings"])
    return theirs


@contextlib.contextmanager
def open_journal(workdir: pathlib.Path | None, name: str) -> Iterator[Journal]:
    """Opens the journal of the run `name` in a folder, or in memory if `workdir` is None.

    An error inside the block ends all processes; see `wavg_jax.devices.processes.guarded`.

    Raises:
      WorkdirError: the folder cannot be made or written, or another process writes to it.
    """
    with contextlib.ExitStack() as stack:
        folder = None if workdir is None else workdir / "checkpoints" / name
        journal = Journal(stack.enter_context(open_records(workdir)), name, folder, stack)
        with processes.guarded():  # the others hear of a failure before the last save is waited for
            yield journal
