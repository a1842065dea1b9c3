"""What K checkpoints hold, before anything is averaged: whether they fit together, and what there is to average."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from wavg_jax import tree
from wavg_jax.base import DataError, WavgWarning
from wavg_jax.storage.tensors import Spec, Tensors


class Survey(NamedTuple):
    """What there is to average.

    Attributes:
      averaged: names of the floating-point tensors that differ between checkpoints.
      kept: names of those that are taken from the first: all checkpoints hold the same, or they are no floats.
      alive: bool [K], whose floating-point tensors that differ are all finite.
    """

    averaged: tuple[str, ...]
    kept: tuple[str, ...]
    alive: np.ndarray


def check_alike(checkpoints: Sequence[Tensors]) -> None:
    """Raises DataError unless all checkpoints have the same tensors, in name, shape and dtype."""
    first, *others = checkpoints
    for other in others:
        fewer, more = first.specs.keys() - other.specs.keys(), other.specs.keys() - first.specs.keys()
        if fewer or more:
            told = [_told(side, names) for side, names in ((first, fewer), (other, more)) if names]
            raise DataError(
                f"{first.path} and {other.path} are not checkpoints of one network: {'; '.join(told)}. Average "
                "checkpoints of the same architecture, saved by the same program"
            )
        for name, spec in first.specs.items():
            if spec != other.specs[name]:
                remedy = "average checkpoints of the same architecture"
                if spec.shape == other.specs[name].shape:
                    remedy = "save all checkpoints in one dtype"
                raise DataError(
                    f"{name!r} is {spec} in {first.path}, but {other.specs[name]} in {other.path}: {remedy}"
                )


def _told(side: Tensors, names: set[str]) -> str:
    one = min(names)
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"only {side.path} has {one!r}, {side.specs[one]}{rest}"


def stacked(checkpoints: Sequence[Tensors], name: str) -> np.ndarray:
    """One tensor of all checkpoints, [K, ...]."""
    return np.stack([one.read(name) for one in checkpoints])


def surveyed(checkpoints: Sequence[Tensors]) -> Survey:
    """Reads all checkpoints once, one tensor of all at a time, and warns of what the average leaves out.

    Raises:
      DataError: the checkpoints do not fit together, or none of them is finite.
    """
    check_alike(checkpoints)
    specs: Mapping[str, Spec] = checkpoints[0].specs
    averaged, differing = [], []
    alive = np.ones(len(checkpoints), bool)
    for name, spec in specs.items():
        values = stacked(checkpoints, name)
        if _equal(values):
            continue
        if not jnp.issubdtype(spec.dtype, jnp.floating):
            differing.append(name)
            continue
        averaged.append(name)
        alive &= np.asarray(tree.all_finite(jnp.asarray(values)))
    _warn(checkpoints, differing, alive)
    return Survey(tuple(averaged), tuple(name for name in specs if name not in set(averaged)), alive)


def _equal(values: np.ndarray) -> bool:
    """Whether all rows [K, ...] are equal bit by bit: NaNs too, and masks of infinities need no mean."""
    rows = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    return bool((rows == rows[:1]).all())


def _warn(checkpoints: Sequence[Tensors], differing: Sequence[str], alive: np.ndarray) -> None:
    if differing:
        warnings.warn(
            f"{len(differing)} tensors are no floating-point numbers and differ between the checkpoints, such as "
            f"{differing[0]!r}: taken from {checkpoints[0].path}",
            WavgWarning,
            stacklevel=4,
        )
    broken = [str(one.path) for one, fine in zip(checkpoints, alive, strict=True) if not fine]
    if len(broken) == len(checkpoints):
        raise DataError(f"all {len(broken)} checkpoints hold NaNs or infinities: there is nothing to average")
    if broken:
        warnings.warn(f"{', '.join(broken)} holds NaNs or infinities and has weight 0", WavgWarning, stacklevel=4)
