"""Where a run's rows and checkpoints go, kept in step with each other: a folder, or memory alone."""

import contextlib
import pathlib
from collections.abc import Iterator

from wavg_jax.base import ResumeError, SettingsError, TrainState
from wavg_jax.checkpoint import Checkpoints, open_checkpoints
from wavg_jax.records import Records, Row, check_settings


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
                f"the folder already holds the run {self._name!r}; go on with --resume (resume=True), or choose "
                "another --workdir"
            )
        if before:
            check_settings(before[0], first)
            if self._folder is not None and not self._folder.exists():
                raise ResumeError(
                    f"{self._name!r} has rows but no checkpoints ({self._folder} is not there); put them back, or "
                    "start over in another --workdir"
                )
        done = 0
        if self._folder is not None:
            self._checkpoints = self._stack.enter_context(open_checkpoints(self._folder))
            done = self._checkpoints.latest() or 0
        if done > first["rounds"]:
            raise ResumeError(f"{self._name!r} has done {done} rounds already, more than --rounds={first['rounds']}")
        # Read before the rows are touched: if it cannot be read, nothing is lost.
        state = self._checkpoints.restore(initial) if self._checkpoints is not None and done else initial
        self._records.rewind(self._name, done, first["rounds"])
        if not done:
            self._records.append(first)
        return state

    def append(self, row: Row) -> None:
        """Adds the row of a round."""
        self._records.append(self._identity | row)

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
      WorkdirError: the folder cannot be made or written.
    """
    with contextlib.ExitStack() as stack:
        folder = None if workdir is None else workdir / "checkpoints" / name
        yield Journal(Records(workdir), name, folder, stack)
