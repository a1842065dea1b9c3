"""Checkpoints of a `TrainState` with Orbax: one tree, saved asynchronously, whole or not at all.

Once a checkpoint is on disk, the SHA-256 of each of its files is written beside them, last of all, as `sha256sum`
writes it. Only what agrees with these sums is given to Orbax again: a checkpoint without them was never finished, one
that disagrees is damaged, and neither is resumed from.
"""

import contextlib
import functools
import gc
import hashlib
import logging
import os
import pathlib
import re
import shutil
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from wavg_jax.base import MissingExtra, PyTree, ResumeError, TrainState, WorkdirError
from wavg_jax.extras import need
from wavg_jax.storage.rows import FILE, write_atomically
from wavg_jax.tree import is_key

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp

SUMS = "SHA256SUMS"


def _without_keys(tree: PyTree) -> PyTree:
    """Typed random keys as the integers they are made of, which is what can be stored."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def _with_keys(stored: PyTree, like: PyTree) -> PyTree:
    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(x, impl=str(jax.random.key_impl(y))) if is_key(y) else x

    return jax.tree.map(leaf, stored, like)


class Found(NamedTuple):
    """What a folder of checkpoints holds.

    Attributes:
      whole: rounds done at the newest checkpoint that is as it was written; None if there is none.
      damaged: what is wrong with those after it, by rounds done.
      unfinished: rounds done at what was never finished.
    """

    whole: int | None
    damaged: dict[int, str]
    unfinished: tuple[int, ...]


class Checkpoints:
    """The checkpoints of one run, numbered by rounds done. Use `open_checkpoints`."""

    def __init__(self, folder: pathlib.Path, keep: int):
        self._folder, self._keep = folder, keep
        self._unsealed: int | None = None

    @functools.cached_property
    def _checkpointer(self) -> "ocp.training.Checkpointer":
        ocp = _orbax()
        # Opened at the first save, when what is damaged is out of its way.
        return ocp.training.Checkpointer(
            self._folder.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
        )

    def find(self) -> Found:
        """Looks for the newest whole checkpoint; what is older is not read. Nothing is changed."""
        names = [path.name for path in self._folder.iterdir() if path.name.isascii() and path.name.isdecimal()]
        steps = {int(name): self._folder / name for name in names}
        unfinished = tuple(step for step, path in steps.items() if not (path / SUMS).exists())
        damaged: dict[int, str] = {}
        for step in sorted(steps.keys() - set(unfinished), reverse=True):
            wrong = _damage(steps[step])
            if wrong is None:
                return Found(step, damaged, unfinished)
            damaged[step] = wrong
        return Found(None, damaged, unfinished)

    def set_aside(self, step: int, rows: bytes) -> None:
        """Moves a checkpoint that cannot be used into `damaged-N`, so that its round can be saved again, beside the
        rows that go with it."""
        with _writing(self._folder):
            aside = self._folder / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            if rows:
                write_atomically(aside / FILE, rows)
            (self._folder / str(step)).rename(aside / str(step))  # last: what was cut short before is done again

    def save(self, state: TrainState) -> None:
        """Starts saving; returns once the state may be donated."""
        self.wait()
        with _writing(self._folder):
            tree, step = _without_keys(state), int(state.round)
            with _failing():
                self._checkpointer.save_async(step, tree, force=True, custom_metadata={"leaves": _leaves(tree)})
            self._unsealed = step  # only now is there something to seal

    def wait(self) -> None:
        """Blocks until every save is on disk."""
        if self._unsealed is None:
            return
        step, self._unsealed = self._unsealed, None
        with _writing(self._folder):
            with _failing():
                self._checkpointer.wait()
            try:
                _seal(self._folder / str(step))
            except OSError:
                shutil.rmtree(self._folder / str(step), ignore_errors=True)
                raise

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        try:
            self.wait()
        finally:
            if "_checkpointer" in self.__dict__:
                with _writing(self._folder), _failing():
                    self._checkpointer.close()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Returns a whole checkpoint with the structure, shapes, dtypes and shardings of `like`.

        Raises:
          ResumeError: it belongs to another network, optimizer or averager, or cannot be read.
        """
        ocp = _orbax()
        path, tree = self._folder.absolute() / str(step), _without_keys(like)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        try:
            then, now = ocp.metadata(path).custom_metadata["leaves"], _leaves(tree)
            # Compared here, because orbax would convert dtypes in silence.
            if differing := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
                name = differing[0]
                raise ResumeError(
                    f"the checkpoint {path} is of another network, optimizer or averager: {name} was "
                    f"{then.get(name, 'missing')}, now it is {now.get(name, 'missing')}; repeat what it was started "
                    "with, or choose another workdir (--workdir)"
                )
            restored = _with_keys(ocp.load(path, abstract), like)
        except ResumeError:
            raise
        except Exception as error:  # orbax raises many types
            raise ResumeError(f"the checkpoint {path} cannot be read: {_first_line(error)}") from error
        if int(restored.round) != step:
            raise ResumeError(f"the checkpoint {path} is that of round {int(restored.round)}, whatever its name says")
        return restored


def _orbax() -> Any:
    """Imported late: it takes half a second, which a run without a folder need not wait for."""
    return need("orbax.checkpoint", extra="run", why="workdir=").v1


def _leaves(tree: PyTree) -> dict[str, str]:
    """Path, dtype and shape of every leaf."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{[*x.shape]}" for path, x in leaves}


def _sum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(step: pathlib.Path) -> list[str]:
    """The files of a checkpoint, but for the sums and what file managers and network file systems hide there."""
    paths = (path.relative_to(step) for path in step.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.name != SUMS and not path.name.startswith("."))


def _seal(step: pathlib.Path) -> None:
    """Writes the sums of a checkpoint's files, if it has any; from now on it is whole."""
    if lines := [f"{_sum(step / name)}  {name}\n" for name in _files(step)]:
        write_atomically(step / SUMS, "".join(lines).encode())


def _damage(step: pathlib.Path) -> str | None:
    """What is wrong with a finished checkpoint; None if it is as it was written."""
    name = SUMS
    try:
        lines = [line.split("  ", 1) for line in (step / SUMS).read_text().splitlines()]
        sums = {name: digest for digest, name in lines}
        for name in sorted({*_files(step), *sums}):
            if not (step / name).exists():
                return f"{name} is missing"
            if name not in sums or _sum(step / name) != sums[name]:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        return f"{name}: {_first_line(error)}"
    return None if sums else f"{SUMS} is empty"


def _first_line(error: BaseException) -> str:
    """What went wrong, without the whole tree that some errors of orbax quote."""
    return textwrap.shorten((str(error).strip() or type(error).__name__).splitlines()[0], 300, placeholder=" ...")


def _let_go(error: BaseException) -> None:
    """Lets what a failed save has left complain now, while `_quiet` hears it: futures that nobody will await, which
    the error's frames hold, and the other writes of the save, which have nowhere to report to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        time.sleep(_STRAY_WRITES)
        gc.collect()


_STRAY_WRITES = 0.2
"""Seconds given to the writes of a save that has failed; there is no handle to wait for."""


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """Around what orbax writes: a failure lets go of what is still under way."""
    try:
        yield
    except (OSError, ValueError) as error:
        _let_go(error)
        raise


def _remove_unfinished(folder: pathlib.Path) -> None:
    for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write into one clear line."""
    try:
        yield
    except (MissingExtra, WorkdirError):
        raise
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"no checkpoint can be written to {folder} ({_first_line(error)}): free the disk and go on with "
            "resume=True (--resume), or choose another workdir (--workdir)",
            folder,
            _as_os_error(error),
        ) from error


def _as_os_error(error: OSError | ValueError) -> OSError | None:
    """The OSError behind a failed write; orbax's own writer names its number in the text of a ValueError."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what orbax and the reads and writes it leaves behind say to themselves off the terminal.

    It logs every save, and the tracebacks of what it raises anyway; and when one write of a save fails, each of those
    still under way complains that the event loop it belongs to is closed.
    """

    def not_of_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    logger = logging.getLogger("absl")
    logger.addFilter(not_of_orbax)
    before, sys.unraisablehook = sys.unraisablehook, hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        logger.removeFilter(not_of_orbax)


@contextlib.contextmanager
def open_checkpoints(folder: pathlib.Path, keep: int = 2) -> Iterator[Checkpoints]:
    """Opens (and makes) the folder of one run's checkpoints; leaving the block waits for the last save.

    The caller holds the folder (`storage.lock`), so what a process that was killed has left half written is removed.

    Args:
      folder: where they are; each is a sub-folder named after the rounds done.
      keep: how many of the newest stay.

    Raises:
      WorkdirError: the folder cannot be made, or a save failed.
    """
    with _quiet():
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(folder)
        checkpoints = Checkpoints(folder, keep)
        try:
            yield checkpoints
        finally:
            try:
                checkpoints.close()
            finally:
                _remove_unfinished(folder)
