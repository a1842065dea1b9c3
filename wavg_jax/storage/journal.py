"""Where a run's rows and checkpoints go, kept in step with each other: a folder, or memory alone."""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator

from wavg_jax.base import ResumeError, SettingsError, TrainState, WavgWarning
from wavg_jax.storage.checkpoints import Checkpoints, Found, open_checkpoints
from wavg_jax.storage.rows import Records, Row, as_lines, check_settings, open_records


def _useless(found: Found) -> list[int]:
    return sorted({*found.damaged, *found.unfinished})


def _listed(found: Found) -> str:
    """What cannot be used, newest first."""
    wrong = found.damaged | dict.fromkeys(found.unfinished, "was never finished")
    return "; ".join(f"checkpoint {step}: {wrong[step]}" for step in sorted(wrong, reverse=True))


class Journal:
    """The rows and checkpoints of one run. Use `open_journal`."""

    def __init__(self, records: Records, name: str, folder: pathlib.Path | None, stack: contextlib.ExitStack):
        self._records, self._name, self._folder, self._stack = records, name, folder, stack
        self._checkpoints: Checkpoints | None = None
        self._identity: Row = {}

    @property
    def workdir(self) -> pathlib.Path | None:
        """The folder of the rows; None in memory."""
        return None if self._records.path is None else self._records.path.parent

    def rows(self) -> list[Row]:
        """The run's rows so far."""
        return self._records.of(self._name)

    def begin(self, first: Row, initial: TrainState, resume: bool) -> TrainState:
        """Records a run's first row and returns the state to start from, or, resuming, the one to go on from.

        Raises:
          SettingsError: the folder already holds this run, and it is not to be resumed.
          ResumeError: it cannot be resumed.
        """
        self._identity = {key: first[key] for key in ("run", "arm", "seed")}
        before = self.rows()
        if not resume and (before or (self._folder is not None and self._folder.exists())):
            raise SettingsError(
                f"the folder already holds the run {self._name!r}; go on with resume=True (--resume), or choose "
                "another workdir (--workdir)"
            )
        if before:
            check_settings(before[0], first)
        if self._folder is None:
            self._records.append(first)
            return initial
        self._checkpoints = self._stack.enter_context(open_checkpoints(self._folder))
        found = self._checkpoints.find()
        done = found.whole or 0
        if done > first["rounds"]:
            raise ResumeError(
                f"{self._name!r} has done {done} rounds already, more than rounds={first['rounds']} "
                f"(--rounds={first['rounds']})"
            )
        # All is read before anything is touched: if it cannot be, nothing is lost.
        state = self._checkpoints.restore(done, initial) if done else initial
        if not done:
            self._check_start(found, before)
        dropped = self._records.beyond(self._name, done)
        self._set_aside(found, done, dropped)  # before they are dropped, lest a kill in between lose them
        self._records.rewind(self._name, done, first["rounds"])
        if not done:
            self._records.append(first)
        self._say(found, done, len(before) - 1)
        return state

    def _check_start(self, found: Found, before: list[Row]) -> None:
        """Refuses to start a recorded run from the beginning if it had a checkpoint once."""
        due = before[0]["checkpoint_every"] if before else 0
        if found.damaged or len(before) - 1 > due:
            raise ResumeError(
                f"{self._name!r} has rows of {len(before[1:])} rounds but no whole checkpoint in {self._folder} "
                f"({_listed(found) or 'it is empty'}); put one back from a copy, or start over in another workdir "
                "(--workdir)"
            )

    def _set_aside(self, found: Found, done: int, dropped: list[Row]) -> None:
        """Sets aside what cannot be used, with the rows that a good copy of it would need."""
        assert self._checkpoints is not None
        for step in _useless(found):
            self._checkpoints.set_aside(step, as_lines(dropped) if step > done else b"")

    def _say(self, found: Found, done: int, recorded: int) -> None:
        """Says what could not be used and what that costs."""
        useless = _useless(found)
        again = f"{recorded - done} recorded rounds are done again" if recorded > done else "no round is done again"
        if useless:
            warnings.warn(
                f"{self._name!r} goes on from {f'its checkpoint of round {done}' if done else 'the start'}, {again}: "
                f"{_listed(found)} (set aside in {self._folder} as damaged-{useless[-1]})",
                WavgWarning,
                stacklevel=2,
            )
        elif recorded > 0 and not done:
            warnings.warn(f"{self._name!r} was stopped before its first checkpoint: {again}", WavgWarning, stacklevel=2)

    def append(self, row: Row) -> None:
        """Adds the row of a round."""
        self._records.append(self._identity | row)

    def amend(self, entries: Row) -> None:
        """Adds entries to the row of the last round."""
        self._records.amend(self._name, entries)

    def save(self, state: TrainState) -> None:
        """Starts saving a checkpoint, if there is a folder for it; the state may be donated at once."""
        if self._checkpoints is not None:
            self._checkpoints.save(state)

    def wait(self) -> None:
        """Blocks until the checkpoints are on disk."""
        if self._checkpoints is not None:
            self._checkpoints.wait()


@contextlib.contextmanager
def open_journal(workdir: pathlib.Path | None, name: str) -> Iterator[Journal]:
    """Opens the journal of the run `name` in a folder, or in memory if `workdir` is None.

    Raises:
      WorkdirError: the folder cannot be made or written, or another process writes it.
    """
    with contextlib.ExitStack() as stack:
        folder = None if workdir is None else workdir / "checkpoints" / name
        yield Journal(stack.enter_context(open_records(workdir)), name, folder, stack)
