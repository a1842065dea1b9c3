"""Turns stored inputs into the network's: standardised on the device, by the training split's means and deviations."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax.arguments import shown
from wavg_jax.base import SettingsError
from wavg_jax.data.arrays import Dataset, holds_tokens

Scale = Callable[[tuple[int, ...]], int]
"""`shape of a stored sample -> number of means`; number i of a sample uses mean i modulo their number."""


def per_channel(shape: tuple[int, ...]) -> int:
    """One mean and deviation per entry of the last axis: per feature of vectors [F], per channel of images [H, W, C].
    Images [H, W] have one channel."""
    return 1 if len(shape) == 2 else shape[-1]


def per_feature(shape: tuple[int, ...]) -> int:
    """One mean and deviation per number of a sample; in images, per pixel and channel."""
    return math.prod(shape)


def overall(shape: tuple[int, ...]) -> int:
    """One mean and deviation for all numbers; their units must be comparable."""
    del shape
    return 1


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Maps stored inputs to the network's; compares by value, so that equal data share compiled programs.

    Attributes:
      mean: one for the whole sample, one per entry of its last axis, or one per number; for uint8, in units of 255.
      std: likewise; 1 where the values are constant.
      add_channel: whether samples are images [H, W] that lack a channel axis.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    add_channel: bool

    def __call__(self, x: jax.Array) -> jax.Array:
        """Standardises a batch: `(x - mean) / std`, after `x / 255` for uint8.

        Args:
          x: stored inputs [B, ...].

        Returns:
          Inputs [B, ...], float32; images [B, H, W] become [B, H, W, 1].
        """
        x = jnp.asarray(x)
        scale = 1 / 255 if x.dtype == jnp.uint8 else 1.0
        if self.add_channel:
            x = x[..., None]
        sample = x.shape[1:]
        if len(self.mean) != math.prod(sample):
            sample = (1,) * (len(sample) - 1) + (-1,)
        mean, std = (np.asarray(v, np.float32).reshape(1, *sample) for v in (self.mean, self.std))
        return (x.astype(jnp.float32) * scale - mean) / std


def as_tokens(x: jax.Array) -> jax.Array:
    """Casts stored tokens to int32, the type that embeddings take."""
    return jnp.asarray(x, jnp.int32)


def make_prepare(dataset: Dataset, scale: Scale | None = per_channel) -> Callable[[jax.Array], jax.Array]:
    """Measures the training split and makes the function that standardises inputs by it, on the device.

    Args:
      dataset: the data set; its training split is measured in float64.
      scale: which numbers share a mean and a deviation: `per_channel`, per feature for vectors [N, F] and per channel
        for images [N, H, W] and [N, H, W, C]; `per_feature`; `overall`; or None, which leaves floats unchanged and
        divides uint8 by 255. Numbers that are constant in the training split get the deviation 1. Tokens ignore it:
        they are only cast to int32.

    Returns:
      `x [B, ...] -> float32 [B, ...]`, or `as_tokens`, `x [B, T] -> int32 [B, T]`; call either inside jit.

    Raises:
      SettingsError: `scale` is none of these, or `dataset` no data set.

    >>> from wavg_jax.data import from_arrays
    >>> data = from_arrays(np.array([[0.0, 20.0], [4.0, 60.0]]), [0, 1], np.zeros((1, 2)), [0])
    >>> make_prepare(data)
    Prepare(mean=(2.0, 40.0), std=(2.0, 20.0), add_channel=False)
    >>> make_prepare(data, overall).mean
    (21.0,)
    """
    if not isinstance(dataset, Dataset):
        raise SettingsError(f"the data set is a {type(dataset).__name__}: give a data.Dataset, such as data.load makes")
    if not any(scale is known for known in (None, per_channel, per_feature, overall)):
        raise SettingsError(f"scale is {shown(scale)}: give data.per_channel, data.per_feature, data.overall or None")
    if holds_tokens(dataset.train):
        return as_tokens
    x = dataset.train.x
    if scale is None:
        return Prepare((0.0,), (1.0,), add_channel=x.ndim == 3)
    means = scale(x.shape[1:])
    rows = x.reshape(len(x), -1)
    # In pieces, to keep the float64 copies small, and per position first, which NumPy sums fastest.
    pieces = [rows[i : i + 1000] for i in range(0, len(rows), 1000)]
    per_position = sum(p.sum(0, dtype=np.float64) for p in pieces) / len(rows)
    mean = per_position.reshape(-1, means).mean(0)
    centre = np.tile(mean, rows.shape[1] // means)
    square = sum(np.square(p - centre).sum(0) for p in pieces) / len(rows)
    std = np.sqrt(square.reshape(-1, means).mean(0))
    # The rounding error of a constant channel must not be scaled up to noise.
    constant = std <= np.maximum(np.finfo(np.float32).eps * np.abs(mean), np.finfo(np.float32).tiny)
    std = np.where(constant, 255.0 if x.dtype == np.uint8 else 1.0, std)
    if x.dtype == np.uint8:
        mean, std = mean / 255, std / 255
    return Prepare(tuple(mean.tolist()), tuple(std.tolist()), add_channel=x.ndim == 3)
