"""Data sets from what yields samples or batches: loaders of PyTorch and grain, Hugging Face's data sets, generators."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from wavg_jax.arguments import INT32, YES_OR_NO, as_whole, check, either, instance, shown
from wavg_jax.base import DataError, SettingsError
from wavg_jax.data.arrays import Dataset, as_array, from_arrays

_KEYS = either(
    instance(tuple, "a pair of names, such as ('image', 'label')"),
    instance(list, "a list of two names"),
)


def from_iterable(
    train: Iterable[Any],
    test: Iterable[Any],
    *,
    batched: bool,
    keys: tuple[Any, Any] = (0, 1),
    samples: int | None = None,
    name: str = "iterable",
    classes: int | None = None,
) -> Dataset:
    """Reads a data set from two iterables, once, into memory.

    A `torch.utils.data.DataLoader` yields batches of tensors, a `datasets.Dataset` of Hugging Face samples as dicts, a
    `grain.DataLoader` or `grain.MapDataset` whatever its transformations make. Torch's tensors, PIL's images and all
    else that NumPy makes arrays of will do. What the loader draws at random, such as augmented images, is drawn once
    here: `shard(augment=)` draws anew in every epoch.

    Args:
      train: yields samples, or batches of them, as pairs or as mappings; finite unless `samples` is given.
      test: likewise.
      batched: whether they yield batches, whose first axis is that of the samples, rather than single samples.
      keys: which two entries of what they yield are inputs and targets.
      samples: read at most so many of each; None reads all.
      name, classes: as for `from_arrays`.

    Returns:
      The data set, checked as by `from_arrays`.

    Raises:
      SettingsError: an argument has the wrong type.
      DataError: an iterable yields nothing, or no such entries, or samples of different shapes, or what `from_arrays`
        refuses.

    >>> import numpy as np
    >>> loader = [(np.zeros((2, 4, 4)), np.array([0, 1])), (np.ones((1, 4, 4)), np.array([1]))]
    >>> data = from_iterable(loader, loader, batched=True)
    >>> data.train.x.shape, data.train.y.tolist()
    ((3, 4, 4), [0, 1, 1])
    >>> rows = [{"image": [[0, 255]], "label": 0}, {"image": [[9, 9]], "label": 1}]
    >>> from_iterable(rows, rows, batched=False, keys=("image", "label")).train.x.shape
    (2, 1, 2)
    """
    check("from_iterable: batched", batched, YES_OR_NO)
    check("from_iterable: keys", keys, _KEYS)
    if len(keys) != 2:
        raise SettingsError(f"from_iterable: keys is {shown(keys)}; give two, of the inputs and of the targets")
    most = None if samples is None else as_whole("from_iterable: samples", samples, 1, INT32)
    splits = [_read(part, given, batched, keys, most) for part, given in (("train", train), ("test", test))]
    return from_arrays(*splits[0], *splits[1], name=name, classes=classes)


def _read(part: str, given: Iterable[Any], batched: bool, keys: Any, most: int | None) -> list[np.ndarray]:
    """Inputs and targets of everything that an iterable yields."""
    try:
        items = iter(given)
    except TypeError:
        raise SettingsError(
            f"the {part} data are a {type(given).__name__}, which yields nothing: give an iterable of samples or "
            "batches"
        ) from None
    read, found = 0, []
    for item in items if batched else islice(items, most):
        pair = [_entry(part, item, key) for key in keys]
        if batched:
            _check_batch(part, pair)
        found.append(pair)
        read += len(pair[0]) if batched else 1
        if most is not None and read >= most:
            break
    if not found:
        raise DataError(f"the {part} data yield nothing: give an iterable that has not been used up")
    inputs, targets = zip(*found, strict=True)
    return [_joined(f"{part} inputs", inputs, batched)[:most], _joined(f"{part} targets", targets, batched)[:most]]


def _entry(part: str, item: Any, key: Any) -> np.ndarray:
    try:
        return np.array(item[key])  # a copy: the loader may fill the same memory again
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        has = f"the entries {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
        said = " ".join(str(error).split())
        raise DataError(
            f"the {part} data yield {has}, of which keys={key!r} makes no array ({said}): name the entries of inputs "
            "and targets in keys="
        ) from None


def _check_batch(part: str, pair: list[np.ndarray]) -> None:
    shapes = [array.shape for array in pair]
    if not all(shapes) or shapes[0][0] != shapes[1][0]:
        raise DataError(
            f"the {part} data yield inputs of shape {shapes[0]} and targets of shape {shapes[1]}, which are no batch: "
            "give both an axis of samples, or set batched=False"
        )


def _joined(what: str, arrays: Any, batched: bool) -> np.ndarray:
    shapes = {array.shape[1:] if batched else array.shape for array in arrays}
    if len(shapes) > 1:
        two = sorted(shapes, key=str)[:2]
        raise DataError(f"the {what} have shapes {two[0]} and {two[1]}: give every sample the same shape")
    return as_array(what, np.concatenate(arrays) if batched else np.stack(arrays))
