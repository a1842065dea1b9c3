"""Checkpoints of a `TrainState` with Orbax: one tree, saved by a thread, whole or not at all.

Once a checkpoint is on disk, a last file with the SHA-256 of each of its files joins them, in the format of
`sha256sum`. Orbax reads only checkpoints that match their sums: one without sums was never finished, one that differs
is damaged, and a run resumes from neither.

Several processes save and restore together, each its part of the arrays. Process 0 alone looks for checkpoints, writes
the sums and tidies up. The folder is one that all processes share.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib
import os
import pathlib
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax.base import DataError, MissingExtra, PyTree, ResumeError, TrainState, WorkdirError
from wavg_jax.devices import processes
from wavg_jax.extras import need
from wavg_jax.storage.noise import failing, quiet
from wavg_jax.storage.rows import write_atomically
from wavg_jax.storage.schema import FILE
from wavg_jax.tree import is_key, tree_name

SUMS = "SHA256SUMS"


def _without_keys(tree: PyTree) -> PyTree:
    """Replaces typed random keys by their integers, which Orbax can store."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def snapshot(state: TrainState, *, copy: bool = True) -> PyTree:
    """What a checkpoint holds of a state.

    Args:
      state: to save.
      copy: launches a copy on the devices, so that the state may be donated at once; else nobody may donate it before
        the checkpoint is on disk.
    """
    return _copied(state) if copy else _without_keys(state)


@jax.jit
def _copied(state: TrainState) -> PyTree:
    return jax.tree.map(jnp.copy, _without_keys(state))


def _with_keys(stored: PyTree, like: PyTree) -> PyTree:
    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(x, impl=str(jax.random.key_impl(y))) if is_key(y) else x

    return jax.tree.map(leaf, stored, like)


class Found(NamedTuple):
    """What a folder of checkpoints holds, each numbered by rounds done.

    Attributes:
      whole: the newest undamaged checkpoint; None if there is none.
      damaged: number -> what is wrong, for the damaged checkpoints after it.
      unfinished: the checkpoints that were never finished.
    """

    whole: int | None
    damaged: dict[int, str]
    unfinished: tuple[int, ...]


class Checkpoints:
    """The checkpoints of one run, numbered by rounds done. Use `open_checkpoints`."""

    def __init__(self, folder: pathlib.Path, keep: int, pool: concurrent.futures.Executor):
        self._folder, self._keep, self._pool = folder, keep, pool
        self._saving: concurrent.futures.Future[None] | None = None

    def find(self) -> Found:
        """Looks for the newest whole checkpoint. Reads no older one, and changes nothing. Process 0 looks for all."""
        return processes.decided(self._find)

    def _find(self) -> Found:
        steps = _steps(self._folder)
        unfinished = tuple(step for step, path in steps.items() if not (path / SUMS).exists())
        damaged: dict[int, str] = {}
        for step in sorted(steps.keys() - set(unfinished), reverse=True):
            wrong = _damage(steps[step])
            if wrong is None:
                return Found(step, damaged, unfinished)
            damaged[step] = wrong
        return Found(None, damaged, unfinished)

    def set_aside(self, step: int, rows: bytes) -> None:
        """Moves an unusable checkpoint into `damaged-N`, beside its rows, so that its round can be saved again.

        For process 0.
        """
        with _writing(self._folder):
            aside = self._folder / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            if rows:
                write_atomically(aside / FILE, rows)
            (self._folder / str(step)).rename(aside / str(step))  # last, so that a call cut short can be repeated

    def save(self, kept: PyTree) -> None:
        """Starts saving a `snapshot`, once the save before is on disk. All processes save together."""
        self.wait()
        self._saving = self._pool.submit(self._save, kept)

    def wait(self) -> None:
        """Blocks until every save is on disk; raises what went wrong. All processes wait together."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _save(self, kept: PyTree) -> None:
        """Writes a checkpoint and its sums, and removes old ones."""
        with _writing(self._folder):
            step = int(kept.round)
            path, leaves = self._folder.absolute() / str(step), _leaves(kept)
            with failing(), _context(), _without_collectives():
                _orbax().save(path, kept, custom_metadata={"leaves": leaves})  # returns when all processes are done
            if not processes.first():
                return
            try:
                _seal(path)
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                raise
            for old in sorted(_steps(self._folder))[: -self._keep]:
                _remove(self._folder / str(old))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Returns a whole checkpoint with the structure, shapes, dtypes and shardings of `like`, in all processes.

        Raises:
          ResumeError: the checkpoint belongs to another network, optimizer or averager, or cannot be read.
        """
        ocp = _orbax()
        path, tree = self._folder.absolute() / str(step), _without_keys(like)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        try:
            then, now = ocp.metadata(path).custom_metadata["leaves"], _leaves(tree)
            # Compared here because Orbax would silently convert dtypes.
            if differing := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
                name = differing[0]
                raise ResumeError(
                    f"the checkpoint {path} is of another network, optimizer, averager or version: {name} was "
                    f"{then.get(name, 'missing')}, now it is {now.get(name, 'missing')}; repeat what it was started "
                    "with, or choose another workdir="
                )
            with _context():
                restored = _with_keys(ocp.load(path, abstract), like)
        except ResumeError:
            raise
        except Exception as error:  # Orbax raises many types
            raise ResumeError(
                f"the checkpoint {path} cannot be read: {_first_line(error)}; choose another workdir="
            ) from error
        if int(restored.round) != step:
            raise ResumeError(f"the checkpoint {path} is that of round {int(restored.round)}: rename it, or remove it")
        return restored


def orbax_arrays(path: pathlib.Path) -> tuple[dict[str, Any], Callable[[str], np.ndarray]] | None:
    """The arrays of anyone's Orbax checkpoint of a tree; of a run's, those of its global parameters and collections.

    Args:
      path: the folder of one checkpoint.

    Returns:
      {name: what has a shape and a dtype}, with the keys on the way to a leaf joined by dots, and a function that reads
      one array by its name; None if the folder is no such checkpoint.
    """
    ocp = _orbax("Orbax checkpoints")
    if not ocp.is_orbax_checkpoint(path):
        return None
    stored = ocp.metadata(path.absolute()).metadata
    ours = isinstance(stored, dict) and {"params", "replicas", "averager"} <= stored.keys()
    parts = [("params",), ("mutable",)] if ours else [()]
    found = [
        (tree_name(keys[len(part) :]), keys)
        for keys, _ in jax.tree.leaves_with_path(stored)
        for part in parts
        if tuple(str(getattr(key, "key", key)) for key in keys[: len(part)]) == part
    ]
    places = dict(found)
    if len(places) < len(found):
        twice = next(name for name, _ in found if sum(name == other for other, _ in found) > 1)
        raise DataError(f"{path} has two arrays of the name {twice!r}: rename one, a parameter or a collection's entry")
    leaves = {keys: leaf for keys, leaf in jax.tree.leaves_with_path(stored) if hasattr(leaf, "shape")}

    def read(name: str) -> np.ndarray:
        wanted, leaf = places[name], leaves[places[name]]

        def placeholder(keys: Any, _: Any) -> Any:
            return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if keys == wanted else ...

        with _context():
            loaded = ocp.load(path.absolute(), jax.tree.map_with_path(placeholder, stored))
        return np.asarray(dict(jax.tree.leaves_with_path(loaded))[wanted])

    return {name: leaves[keys] for name, keys in places.items() if keys in leaves}, read


def _orbax(why: str = "workdir=") -> Any:
    """Imported late: it takes half a second, which a run without a folder need not wait for."""
    return need("orbax.checkpoint", extra="run", why=why).v1


def _context() -> Any:
    """Orbax's processes meet at the coordination service, since a save's thread must not use the devices.

    Trained floats shrink by a twelfth under zstd, which takes more time than all else.
    """
    ocp = _orbax()
    active = set(range(processes.count())) if processes.count() > 1 else None
    return ocp.Context(
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=active),
        array_options=ocp.options.ArrayOptions(saving=ocp.options.ArrayOptions.Saving(use_compression=False)),
    )


@contextlib.contextmanager
def _without_collectives() -> Iterator[None]:
    """Keeps Orbax from comparing its folder over the devices, where nothing asks it not to (0.12.8).

    Its numbers would meet those of the round under way: gloo ends the process, or takes one's for the other's. All
    processes have the same folder: `storage.lock` has looked.
    """
    name = "_check_directory_consistency"
    try:
        execution = importlib.import_module("orbax.checkpoint.experimental.v1._src.saving.execution")
    except ImportError:
        execution = None
    if processes.count() == 1 or not hasattr(execution, name):  # another version of Orbax may compare otherwise
        yield
        return
    before = getattr(execution, name)
    setattr(execution, name, lambda directory: None)
    try:
        yield
    finally:
        setattr(execution, name, before)


def _leaves(tree: PyTree) -> dict[str, str]:
    """Path -> dtype and shape, for every leaf."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{[*x.shape]}" for path, x in leaves}


def _sum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(step: pathlib.Path) -> list[str]:
    """The files of a checkpoint, without the sums and the hidden files of file managers and network file systems."""
    paths = (path.relative_to(step) for path in step.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.name != SUMS and not path.name.startswith("."))


def _seal(step: pathlib.Path) -> None:
    """Writes the sums of a checkpoint's files, if it has any, which makes it whole."""
    if lines := [f"{_sum(step / name)}  {name}\n" for name in _files(step)]:
        write_atomically(step / SUMS, "".join(lines).encode())


def _damage(step: pathlib.Path) -> str | None:
    """What is wrong with a finished checkpoint; None if nothing is."""
    name = SUMS
    try:
        lines = [line.split("  ", 1) for line in (step / SUMS).read_text().splitlines()]
        sums = {name: digest for digest, name in lines}
        for name in sorted({*_files(step), *sums}):
            if not (step / name).exists():
                return f"{name} is missing"
            if name not in sums or _sum(step / name) != sums[name]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError) as error:
        return f"{name}: {_first_line(error)}"
    return None if sums else f"{SUMS} is empty"


def _first_line(error: BaseException) -> str:
    """The first line of an error, without the whole tree that some Orbax errors quote."""
    return textwrap.shorten((str(error).strip() or type(error).__name__).splitlines()[0], 300, placeholder=" ...")


def _steps(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Rounds done -> checkpoint, whole or not."""
    paths = folder.iterdir()
    return {int(path.name): path for path in paths if path.name.isascii() and path.name.isdecimal()}


def _remove(step: pathlib.Path) -> None:
    """Removes a checkpoint whole, under a name that `_remove_unfinished` knows in case a kill cuts it short."""
    step = step.rename(step.with_name(f"{step.name}.orbax-checkpoint-tmp-old"))
    shutil.rmtree(step, ignore_errors=True)


def _remove_unfinished(folder: pathlib.Path) -> None:
    for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _prepare(folder: pathlib.Path) -> None:
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    """Turns a failed write into one clear line."""
    try:
        yield
    except (MissingExtra, WorkdirError):
        raise
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"no checkpoint can be written to {folder} ({_first_line(error)}): free the disk and use "
            "resume=True, or choose another workdir=",
            folder,
            _as_os_error(error),
        ) from error


def _as_os_error(error: OSError | ValueError) -> OSError | None:
    """The OSError behind a failed write; Orbax's own writer gives its number in the text of a ValueError."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


@contextlib.contextmanager
def open_checkpoints(folder: pathlib.Path, keep: int = 2) -> Iterator[Checkpoints]:
    """Opens the folder of one run's checkpoints, and makes it if need be; leaving the block waits for the last save.

    All processes open it together. Removes what a killed process left half written: the caller holds the folder
    (`storage.lock`).

    Args:
      folder: holds each checkpoint in a sub-folder named after the rounds done.
      keep: how many of the newest checkpoints stay.

    Raises:
      WorkdirError: the folder cannot be made, or a save failed.
    """
    with quiet(), contextlib.ExitStack() as stack:
        processes.decided(lambda: _prepare(folder))
        if processes.first():
            stack.callback(_remove_unfinished, folder)
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint"))
        checkpoints = Checkpoints(folder, keep, pool)
        stack.callback(checkpoints.wait)
        yield checkpoints
