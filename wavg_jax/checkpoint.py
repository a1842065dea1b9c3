"""Checkpoints of a `TrainState` with Orbax: one tree, saved asynchronously, whole or not at all."""

import contextlib
import logging
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from wavg_jax.base import PyTree, ResumeError, TrainState, WorkdirError

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp


def _is_key(x: jax.Array) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    """Typed random keys as the integers they are made of, which is what can be stored."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _with_keys(stored: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jax.random.wrap_key_data(x) if _is_key(y) else x, stored, like)


class Checkpoints:
    """The checkpoints of one run, numbered by rounds done. Use `open_checkpoints`."""

    def __init__(self, checkpointer: "ocp.training.Checkpointer"):
        self._checkpointer = checkpointer

    def latest(self) -> int | None:
        """Rounds done at the newest whole checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState) -> None:
        """Starts saving; returns once the state may be donated. A round that is saved already is left alone."""
        step = int(state.round)
        if self.latest() == step:
            return
        with _writing(pathlib.Path(self._checkpointer.directory)):
            self._checkpointer.wait()
            self._checkpointer.save_async(step, _without_keys(state), force=True)

    def wait(self) -> None:
        """Blocks until every save is on disk."""
        with _writing(pathlib.Path(self._checkpointer.directory)):
            self._checkpointer.wait()

    def restore(self, like: TrainState) -> TrainState:
        """Returns the newest checkpoint with the structure, shapes, dtypes and shardings of `like`.

        Raises:
          ResumeError: there is none, it cannot be read, or it belongs to another network.
        """
        directory = self._checkpointer.directory
        if self.latest() is None:
            raise ResumeError(f"no whole checkpoint in {directory}; start without --resume")
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _without_keys(like)
        )
        before, sys.unraisablehook = sys.unraisablehook, _without_closed_loops(sys.unraisablehook)
        asyncio_log = logging.getLogger("asyncio")
        asyncio_log.addFilter(_without_lost_reads)
        try:
            restored = _with_keys(self._checkpointer.load(self.latest(), abstract), like)
        except Exception as error:  # orbax raises many types for a damaged or foreign checkpoint
            raise ResumeError(
                f"the checkpoint {directory}/{self.latest()} cannot be read as this run's: {_first_line(error)}"
            ) from error
        sys.unraisablehook = before
        asyncio_log.removeFilter(_without_lost_reads)
        return restored


def _without_closed_loops(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """Wraps `sys.unraisablehook`: when a load fails, the reads still under way each complain, as long as the process
    lives, that the event loop they belong to is closed; the one clear error would drown in their tracebacks."""

    def wrapped(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return wrapped


def _without_lost_reads(record: logging.LogRecord) -> bool:
    """For the log of asyncio: when one read fails, the other failed ones complain too, whenever they are collected."""
    return "exception was never retrieved" not in record.getMessage()


def _first_line(error: BaseException) -> str:
    """What went wrong, without the whole tree that some errors of orbax quote."""
    return textwrap.shorten((str(error).strip() or type(error).__name__).splitlines()[0], 300, placeholder=" ...")


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write into one clear line, and removes what is half written."""
    try:
        yield
    except (OSError, ValueError) as error:
        for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise WorkdirError(
            f"no checkpoint can be written to {folder} ({_first_line(error)}): free the disk and --resume, or choose "
            "another --workdir"
        ) from error


@contextlib.contextmanager
def open_checkpoints(folder: pathlib.Path, keep: int = 2) -> Iterator[Checkpoints]:
    """Opens (and makes) the folder of one run's checkpoints; leaving the block waits for the last save.

    Args:
      folder: where they are; each is a sub-folder named after the rounds done.
      keep: how many of the newest stay.

    Raises:
      WorkdirError: the folder cannot be made, or a save failed.
    """
    from orbax.checkpoint import v1 as ocp  # half a second, which a run without a folder need not wait for

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # orbax logs every save, and the traceback of what is raised here anyway
    try:
        with _writing(folder):
            policy = ocp.training.preservation_policies.LatestN(keep)
            checkpointer = ocp.training.Checkpointer(folder.absolute(), preservation_policy=policy)
        try:
            yield Checkpoints(checkpointer)
        finally:
            with _writing(folder):
                checkpointer.close()
    finally:
        logger.setLevel(level)
