"""Data sets as NumPy arrays, checked once, on the way in."""

import warnings
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from wavg_jax.arguments import INT32, YES_OR_NO, as_whole, check, fits_memory, shown
from wavg_jax.base import DataError, SettingsError, WavgWarning

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

_UNSEEN = 1_000_000
"""The most classes allowed beyond one per training sample: more than any data set has, yet few enough that a wrong
number fails here and not after an hour, when no machine can hold the last layer."""


class Split(NamedTuple):
    """The inputs and targets of one part of a data set.

    Attributes:
      x: inputs [N, ...] as stored, before standardisation: uint8 or float32, or tokens [N, T] of an integer type.
      y: targets [N, ...]: classes [N] or tokens [N, T], int32, or float32 numbers of any shape.
    """

    x: np.ndarray
    y: np.ndarray


class Dataset(NamedTuple):
    """A data set for classification, regression or language modelling.

    Attributes:
      name: its name in rows and reports.
      train: training split.
      test: test split, never used for training or scoring.
      classes: number of classes, or size of the vocabulary; targets lie in [0, classes). None for regression.
      class_names: one name per class, for reports; None if the classes have numbers alone.
      bytes_per_token: of a text, whose samples are windows in its order, how many bytes a token of the test split has
        on average; None if the samples are no text.
    """

    name: str
    train: Split
    test: Split
    classes: int | None
    class_names: tuple[str, ...] | None = None
    bytes_per_token: float | None = None


def generator(seed: int, purpose: str, *which: int) -> np.random.Generator:
    """Makes a NumPy generator (PCG64) for one purpose; no two purposes share random numbers under the same seed.

    Args:
      seed: a whole number, 0 or more.
      purpose: what the numbers are for.
      which: numbers that tell the streams of one purpose apart, such as the shard's.

    Returns:
      The generator; the same arguments always give the same one.

    Raises:
      SettingsError: `seed` is not a whole number, 0 or more.
    """
    seed = as_whole("seed", seed, 0)
    # A spawn key stays apart from the seed; plain [seed, 0] would give the same stream as [seed].
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(*purpose.encode(), *which)))


@fits_memory
def from_arrays(
    x_train: ArrayLike,
    y_train: ArrayLike,
    x_test: ArrayLike,
    y_test: ArrayLike,
    *,
    name: str = "arrays",
    classes: int | None = None,
) -> Dataset:
    """Builds a data set from arrays, all of them checked.

    The type and shape of the targets decide the kind of task:

      integers [N]       classification: one class per sample
      floats [N, ...]    regression: `classes` is None
      integers [N, T]    tokens, one per position: `classes` is the size of the vocabulary

    With integer targets [N, T], integer inputs [N, T] are tokens too, uint8 included: they are neither standardised nor
    converted to floating point. With one class per sample, integer inputs are features; if yours are tokens, pass
    `shard(scale=None)` and cast them in the network.

    Args:
      x_train: inputs [N, ...]: feature vectors [N, F], images [N, H, W] or [N, H, W, C], or tokens [N, T]. uint8
        stays uint8, at a quarter of the memory of float32; tokens stay integers; every other type becomes float32.
      y_train: targets [N, ...]; integers lie in [0, classes).
      x_test: inputs [M, ...] with the sample shape and type of `x_train`.
      y_test: targets [M, ...] with the sample shape and type of `y_train`.
      name: the data set's name in rows and reports.
      classes: number of classes, or size of the vocabulary, 2 or more. By default one more than the largest label, if
        every smaller label occurs in training, or than the largest token in inputs and targets.

    Returns:
      The data set. A `WavgWarning` warns if all training labels are equal.

    Raises:
      DataError: lengths, shapes or types do not match, an array is empty, a number is NaN or infinite, a label or token
        lies outside [0, classes), or the number of classes cannot be right.

    >>> import numpy as np
    >>> data = from_arrays(np.zeros((3, 2)), [0, 1, 1], np.zeros((1, 2)), [0])
    >>> data.classes, data.train.x.dtype.name, data.train.y.dtype.name
    (2, 'float32', 'int32')
    >>> from_arrays(np.zeros((3, 2)), [0.5, 1.0, 1.5], np.zeros((1, 2)), [0.0]).classes is None
    True
    >>> text = np.frombuffer(b"wavgwavg", np.uint8).reshape(2, 4)
    >>> data = from_arrays(text[:, :-1], text[:, 1:], text[:1, :-1], text[:1, 1:], classes=128)
    >>> data.train.x.tolist()[0], data.train.y.tolist()[0]
    ([119, 97, 118], [97, 118, 103])
    """
    train, test = _split("train", x_train, y_train), _split("test", x_test, y_test)
    for part, split in (("train", train), ("test", test)):
        if len(split.x) != len(split.y):
            raise DataError(f"{name}: {len(split.x)} {part} inputs but {len(split.y)} targets: give one each")
    for what, a, b in (("sample", test.x, train.x), ("target", test.y, train.y)):
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise DataError(
                f"{name}: a test {what} is {a.dtype}{a.shape[1:]}, a training {what} {b.dtype}{b.shape[1:]}: "
                "give both the same shape and type"
            )
    if train.y.dtype.kind == "f":
        if classes is not None:
            raise DataError(f"{name}: float targets have no classes: give integers, or leave out classes=")
        return Dataset(name, train, test, None)
    classes = _vocabulary(name, train, test, classes) if train.y.ndim > 1 else _classes(name, train.y, test.y, classes)
    for part, split in (("train", train), ("test", test)):
        _check_range(f"{name}: {{}} {part} labels", split.y, classes)
        if holds_tokens(split):
            _check_range(f"{name}: {{}} {part} input tokens", split.x, classes)
    return Dataset(name, train, test, classes)


def holds_tokens(split: Split) -> bool:
    """Whether the inputs are tokens: integers [N, T] beside integer targets [N, T].

    >>> text = np.zeros((2, 3), np.uint8)
    >>> holds_tokens(Split(text, text)), holds_tokens(Split(text, text[:, 0])), holds_tokens(Split(text, text / 2))
    (True, False, False)
    """
    return all(part.ndim == 2 and part.dtype.kind in "ui" for part in split)


def _check_range(what: str, values: np.ndarray, classes: int) -> None:
    """Raises DataError if a label or token is not in [0, classes); `{}` in `what` stands for their number."""
    wrong = np.argwhere((values < 0) | (values >= classes))
    if len(wrong):
        first = wrong[0]
        raise DataError(
            f"{what.format(len(wrong))} are not in [0, {classes}), the first at index "
            f"{', '.join(map(str, first))} is {values[tuple(first)]}: number them from 0, or raise classes="
        )


def _vocabulary(name: str, train: Split, test: Split, classes: Any) -> int:
    """The size of the vocabulary; by default, one more than the largest token."""
    if classes is None:
        tokens = [train.y, test.y, *(split.x for split in (train, test) if holds_tokens(split))]
        classes = max(int(part.max()) for part in tokens) + 1
    return _as_number(name, classes, len(train.y))


def _classes(name: str, train: np.ndarray, test: np.ndarray, classes: Any) -> int:
    """The number of classes; by default, counted from the labels."""
    seen = np.unique(train)
    if classes is None:
        classes = int(max(seen[-1], test.max())) + 1
        # Only labels that occur are compared, so that a label of 1e9 allocates no array of that length.
        gap = np.flatnonzero(np.append(seen, -1) != np.arange(len(seen) + 1))[0]
        if gap < classes and min(seen[0], test.min()) >= 0:
            raise DataError(
                f"{name}: the largest label is {classes - 1}, but no training sample has label {gap}: fix the labels, "
                "or set classes= to their number"
            )
    classes = _as_number(name, classes, len(train))
    if len(seen) == 1:
        said = f"{name}: every training sample has label {seen[0]}, so there is nothing to learn"
        warnings.warn(said, WavgWarning, stacklevel=4)  # whoever calls from_arrays, which is wrapped
    return classes


def _as_number(name: str, classes: Any, samples: int) -> int:
    """The number of classes as an int; DataError if it cannot be right."""
    number = np.asarray(classes)
    if number.size != 1 or number.dtype.kind not in "uif" or not float(number.item()).is_integer():
        raise DataError(f"{name}: classes={shown(classes)} is no number of classes: set classes= to a whole number")
    classes, most = int(number.item()), samples + _UNSEEN
    if not 2 <= classes <= most:
        raise DataError(
            f"{name}: {classes} classes for {samples} training samples: give labels of at least 2 classes, and set "
            f"classes= to {most} or less"
        )
    return classes


def as_array(what: str, values: ArrayLike) -> np.ndarray:
    """Converts to an array; DataError if the parts differ in shape, or are more than indices can count."""
    if np.ma.is_masked(values):
        raise DataError(f"{what} are masked in part: drop those samples, or fill them (np.ma.filled)")
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{what} do not form an array ({_one_line(error)}): give every sample the same shape") from None
    if array.ndim and len(array) > INT32:  # a broadcast array of such a length takes no memory, but hours
        raise DataError(f"{what} are {len(array)}: give {INT32} at most")
    return array


def _split(part: str, x: ArrayLike, y: ArrayLike) -> Split:
    targets = _targets(part, y)
    inputs = as_array(f"{part} inputs", x)
    if inputs.dtype.kind not in "buif":
        raise DataError(f"{part} inputs are of type {inputs.dtype}: give uint8 or floating-point numbers")
    if inputs.ndim < 2 or not inputs.size:
        raise DataError(
            f"{part} inputs have shape {inputs.shape}: give [N, ...] with at least one sample and one feature"
        )
    if holds_tokens(Split(inputs, targets)):
        inputs = inputs if inputs.dtype.itemsize < 4 else _as_int32(f"{part} input tokens", inputs)
    elif inputs.dtype != np.uint8:
        inputs = _as_float32(f"{part} inputs", inputs)
    return Split(inputs, targets)


def _targets(part: str, y: ArrayLike) -> np.ndarray:
    y = as_array(f"{part} targets", y)
    if y.dtype.kind not in "buif":
        raise DataError(f"{part} targets are of type {y.dtype}: give integers from 0, or floating-point numbers")
    if not y.ndim or (len(y) and not y.size):
        raise DataError(f"{part} targets have shape {y.shape}: give one per sample, [N] or [N, ...]")
    return _as_float32(f"{part} targets", y) if y.dtype.kind == "f" else _as_int32(f"{part} targets", y)


def _as_float32(what: str, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        first = ", ".join(str(i) for i in np.unravel_index(int(np.argmin(finite)), values.shape))
        raise DataError(
            f"{what} hold {values.size - np.count_nonzero(finite)} values that are NaN or infinite in float32, "
            f"the first at index [{first}]: fix or drop those samples"
        )
    return values


def _as_int32(what: str, values: np.ndarray) -> np.ndarray:
    whole = values.astype(np.int32)
    wrong = np.argwhere(whole != values)
    if len(wrong):
        first = ", ".join(map(str, wrong[0]))
        raise DataError(
            f"{what} hold {len(wrong)} numbers beyond int32, the first at index [{first}]: number them from 0"
        )
    return whole


def from_npz(path: str | PathLike[str]) -> Dataset:
    """Reads your own data set from an `.npz` file with the arrays x_train, y_train, x_test and y_test and,
    if not all classes or tokens occur in training, the number `classes`.

    `numpy.savez("mine.npz", x_train=..., y_train=..., x_test=..., y_test=...)` writes one; `from_arrays`
    says what the arrays may hold.

    Args:
      path: the file; its name without the suffix names the data set.

    Returns:
      The data set.

    Raises:
      DataError: the file is missing, is not an npz file, lacks an array, or holds what `from_arrays` refuses.
    """
    path = as_path("the path of an npz file", path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
            stored = {key: loaded[key] for key in (*NPZ_KEYS, "classes") if key in loaded}
    except FileNotFoundError:
        raise DataError(f"there is no file {path}: set dataset= to the path of an .npz file") from None
    except Exception as error:  # zipfile, zlib and NumPy raise many types, MemoryError for a size in a header included
        raise DataError(
            f"{path} cannot be read as an npz file of number arrays ({_one_line(error)}): write it with numpy.savez"
        ) from None
    if missing := [key for key in NPZ_KEYS if key not in stored]:
        raise DataError(f"{path} lacks {', '.join(missing)}: write {', '.join(NPZ_KEYS)} with numpy.savez")
    return from_arrays(**stored, name=path.stem)


def as_path(name: str, path: str | PathLike[str]) -> Path:
    """Converts to a path and expands "~"; SettingsError if that fails."""
    try:
        return Path(path).expanduser()
    except (TypeError, RuntimeError) as error:
        raise SettingsError(
            f"{name} is {shown(path)} ({_one_line(error)}): give a name or path, such as data/mine.npz"
        ) from None


_SAID = 300
"""Characters of what others say that an error of ours repeats."""


def _one_line(error: Exception) -> str:
    # zipfile quotes whatever stands where a name should.
    return " ".join(str(error).split())[:_SAID] or type(error).__name__


@fits_memory
def hold_out(split: Split, n: int, seed: int, *, last: bool = False) -> tuple[Split, Split]:
    """Holds out n training samples, on which replicas and blends are scored.

    Args:
      split: training split of N samples.
      n: number of samples to hold out, 0 <= n < N.
      seed: decides which samples, and their order.
      last: hold out the last n, a contiguous part of a text, rather than random ones.

    Returns:
      The N - n samples left to train on, in their old order, and the n held-out ones in random order, so that the
      first few are a fair sample too.

    Raises:
      SettingsError: `n` is not a whole number, 0 or more, or leaves nothing to train on, or the split is none.
    """
    if not isinstance(split, Split):
        raise SettingsError(f"the samples are a {type(split).__name__}: give a data.Split, such as dataset.train")
    if not all(isinstance(part, np.ndarray) and part.ndim for part in split) or len(split.x) != len(split.y):
        raise SettingsError("the samples are no arrays of as many inputs as targets: give what data.from_arrays makes")
    n = as_whole("heldout", n, 0)
    check("last", last, YES_OR_NO)
    if n >= len(split.y):
        raise SettingsError(
            f"heldout={n} leaves nothing of {len(split.y)} training samples to train on: set heldout= between 0 and "
            f"{len(split.y) - 1}"
        )
    rng = generator(seed, "hold_out")
    held = len(split.y) - n + rng.permutation(n) if last else rng.permutation(len(split.y))[:n]
    left = np.ones(len(split.y), bool)
    left[held] = False
    return Split(split.x[left], split.y[left]), Split(split.x[held], split.y[held])
