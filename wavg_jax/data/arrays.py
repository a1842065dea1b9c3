"""Data sets as numpy arrays, checked once when they come in."""

import warnings
import zipfile
import zlib
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from wavg_jax.arguments import as_whole
from wavg_jax.base import DataError, SettingsError, WavgWarning

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

_UNSEEN = 1_000_000
"""How many more classes than training samples there may be: more than any data set has, and less than takes an hour to
find out that no machine can hold the last layer."""


class Split(NamedTuple):
    """One part of a data set.

    Attributes:
      x: inputs [N, ...], uint8 or float32, as stored: not yet standardised.
      y: labels [N], int32.
    """

    x: np.ndarray
    y: np.ndarray


class Dataset(NamedTuple):
    """A data set for classification.

    Attributes:
      name: what rows and reports call it.
      train: training split.
      test: test split, never used in training or scoring.
      classes: number of classes; labels lie in [0, classes).
      class_names: what reports call the classes, one name for each; None where only their numbers are known.
    """

    name: str
    train: Split
    test: Split
    classes: int
    class_names: tuple[str, ...] | None = None


def generator(seed: int, purpose: str, *which: int) -> np.random.Generator:
    """A numpy generator (PCG64) of its own for each purpose, so that no two uses of one seed share random numbers.

    Args:
      seed: not negative.
      purpose: name of the use.
      which: further numbers that tell streams of one purpose apart, such as the shard.

    Returns:
      The generator; the same arguments always give the same one.

    Raises:
      SettingsError: the seed is not a whole number, 0 or more.
    """
    seed = as_whole("--seed", seed, 0)
    # A spawn key is padded apart from the seed; plain [seed, 0] would be the same stream as [seed].
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(*purpose.encode(), *which)))


def from_arrays(
    x_train: ArrayLike,
    y_train: ArrayLike,
    x_test: ArrayLike,
    y_test: ArrayLike,
    *,
    name: str = "arrays",
    classes: int | None = None,
) -> Dataset:
    """Builds a data set from arrays and checks all of it.

    Args:
      x_train: inputs [N, ...]: feature vectors [N, F], images [N, H, W] or [N, H, W, C]. uint8 is kept, which takes a
        quarter of the memory; every other number type becomes float32.
      y_train: labels [N], whole numbers in [0, classes).
      x_test: inputs [M, ...] with the sample shape and type of `x_train`.
      y_test: labels [M].
      name: what rows and reports call the data set.
      classes: number of classes, 2 or more; by default the largest label plus one, all of which must occur in training.

    Returns:
      The data set. A `WavgWarning` is given if all training labels are the same.

    Raises:
      DataError: lengths, shapes or types do not fit, an array is empty, an input is NaN or infinite, a label is
        not a whole number in [0, classes), or the number of classes cannot be right.

    >>> import numpy as np
    >>> data = from_arrays(np.zeros((3, 2)), [0, 1, 1], np.zeros((1, 2)), [0])
    >>> data.classes, data.train.x.dtype.name, data.train.y.dtype.name
    (2, 'float32', 'int32')
    """
    splits = {"train": (x_train, y_train), "test": (x_test, y_test)}
    train, test = (Split(_inputs(part, x), _labels(part, y)) for part, (x, y) in splits.items())
    for part, split in (("train", train), ("test", test)):
        if len(split.x) != len(split.y):
            raise DataError(f"{name}: {len(split.x)} {part} inputs but {len(split.y)} labels: give one label per input")
    if test.x.shape[1:] != train.x.shape[1:] or test.x.dtype != train.x.dtype:
        raise DataError(
            f"{name}: a test sample is {test.x.dtype}{test.x.shape[1:]}, a training sample "
            f"{train.x.dtype}{train.x.shape[1:]}: give both in one shape and type"
        )
    classes = _classes(name, train.y, test.y, classes)
    for part, split in (("train", train), ("test", test)):
        wrong = np.flatnonzero((split.y < 0) | (split.y >= classes))
        if len(wrong):
            raise DataError(
                f"{name}: {len(wrong)} {part} labels are not in [0, {classes}), the first at index {wrong[0]} is "
                f"{split.y[wrong[0]]}: number the classes from 0"
            )
    return Dataset(name, train, test, classes)


def _classes(name: str, train: np.ndarray, test: np.ndarray, classes: Any) -> int:
    """The number of classes, from the labels if it is not given."""
    seen = np.unique(train)
    if classes is None:
        classes = int(max(seen[-1], test.max())) + 1
        # Compared with what occurs: a label of 1e9 must not make an array of as many numbers.
        gap = np.flatnonzero(np.append(seen, -1) != np.arange(len(seen) + 1))[0]
        if gap < classes and min(seen[0], test.min()) >= 0:
            raise DataError(
                f"{name}: the largest label is {classes - 1}, but no training sample has label {gap}: fix the labels, "
                "or say how many classes there are (classes)"
            )
    number = np.asarray(classes)
    if number.size != 1 or number.dtype.kind not in "uif" or not float(number.item()).is_integer():
        raise DataError(f"{name}: the number of classes is {classes!r}: give a whole number (classes)")
    classes, most = int(number.item()), len(train) + _UNSEEN
    if not 2 <= classes <= most:
        raise DataError(
            f"{name}: {classes} classes for {len(train)} training samples: give labels of at least 2 classes, and of "
            f"{most} at most (classes)"
        )
    if len(seen) == 1:
        said = f"{name}: every training sample has label {seen[0]}, so there is nothing to tell apart"
        warnings.warn(said, WavgWarning, stacklevel=3)
    return classes


def as_array(what: str, values: ArrayLike) -> np.ndarray:
    """An array of what was given; DataError if its parts differ in shape."""
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(f"{what} do not form an array ({_one_line(error)}): give samples of one shape") from None


def _inputs(part: str, x: ArrayLike) -> np.ndarray:
    x = as_array(f"{part} inputs", x)
    if x.dtype.kind not in "buif":
        raise DataError(f"{part} inputs are of type {x.dtype}: give uint8 or floating-point numbers")
    if x.ndim < 2 or not x.size:
        raise DataError(f"{part} inputs have shape {x.shape}: give [N, ...] with at least one sample and one feature")
    if x.dtype == np.uint8:
        return x
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    finite = np.isfinite(x)
    if not finite.all():
        first = ", ".join(str(i) for i in np.unravel_index(int(np.argmin(finite)), x.shape))
        raise DataError(
            f"{part} inputs hold {x.size - np.count_nonzero(finite)} values that are NaN or infinite in float32, "
            f"the first at index [{first}]: fix or drop those samples"
        )
    return x


def _labels(part: str, y: ArrayLike) -> np.ndarray:
    y = as_array(f"{part} labels", y)
    if y.ndim != 1:
        raise DataError(f"{part} labels have shape {y.shape}: give one class number per sample, [N]")
    if y.dtype.kind not in "buif":
        raise DataError(f"{part} labels are of type {y.dtype}: give whole numbers from 0")
    with np.errstate(invalid="ignore", over="ignore"):
        whole = y.astype(np.int32)
    wrong = np.flatnonzero(whole != y)
    if len(wrong):
        raise DataError(
            f"{part} labels hold {len(wrong)} values that are not class numbers, the first at index {wrong[0]} is "
            f"{y[wrong[0]]}: give whole numbers from 0"
        )
    return whole


def from_npz(path: str | PathLike[str]) -> Dataset:
    """Reads a data set of your own from a `.npz` file with the arrays x_train, y_train, x_test and y_test,
    and, if not all classes occur in training, the number `classes`.

    `numpy.savez("mine.npz", x_train=..., y_train=..., x_test=..., y_test=...)` writes one; see `from_arrays` for what
    the arrays may be.

    Args:
      path: the file; the data set gets its name without the ending.

    Returns:
      The data set.

    Raises:
      DataError: the file is missing, is not an npz file, lacks an array, or `from_arrays` refuses what it holds.
    """
    path = as_path("the path of an npz file", path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
            stored = {key: loaded[key] for key in (*NPZ_KEYS, "classes") if key in loaded}
    except FileNotFoundError:
        raise DataError(f"there is no file {path}: check the path (--dataset)") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # TypeError: a lone .npy array is not a context manager.
        raise DataError(
            f"{path} cannot be read as an npz file of number arrays ({_one_line(error)}): write it with numpy.savez"
        ) from None
    if missing := [key for key in NPZ_KEYS if key not in stored]:
        raise DataError(f"{path} lacks {', '.join(missing)}: write {', '.join(NPZ_KEYS)} with numpy.savez")
    return from_arrays(**stored, name=path.stem)


def as_path(name: str, path: str | PathLike[str]) -> Path:
    """A path, with "~" for the home folder; SettingsError if it is something else."""
    try:
        return Path(path).expanduser()
    except (TypeError, RuntimeError) as error:
        raise SettingsError(
            f"{name} is {path!r} ({_one_line(error)}): give a name or path, such as data/mine.npz"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def hold_out(split: Split, n: int, seed: int) -> tuple[Split, Split]:
    """Splits n random samples off the training data, on which replicas and blends are scored.

    Args:
      split: training split of N samples.
      n: number of samples to hold out, 0 <= n < N.
      seed: decides which.

    Returns:
      The N - n samples left to train on, in their old order, and the n held-out ones in random order, so that the
      first of them are a fair sample too.

    Raises:
      SettingsError: n is not a whole number, 0 or more, or leaves nothing to train on.
    """
    if not isinstance(split, Split):
        raise SettingsError(f"the samples are a {type(split).__name__}: give a data.Split, such as dataset.train")
    n = as_whole("--heldout", n, 0)
    if n >= len(split.y):
        raise SettingsError(
            f"{n} held-out samples asked for, out of {len(split.y)} training samples: "
            f"set --heldout between 0 and {len(split.y) - 1}"
        )
    held = generator(seed, "hold_out").permutation(len(split.y))[:n]
    left = np.ones(len(split.y), bool)
    left[held] = False
    return Split(split.x[left], split.y[left]), Split(split.x[held], split.y[held])
