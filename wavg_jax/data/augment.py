"""Random augmentation of training images, inside the compiled training step."""

from typing import Literal

import jax
import jax.numpy as jnp

from wavg_jax.arguments import as_whole
from wavg_jax.base import DataError, SettingsError


def crop_flip(rng: jax.Array, x: jax.Array, padding: int = 4, fill: Literal["zeros", "reflect"] = "zeros") -> jax.Array:
    """Shifts every image by a random offset and mirrors half of them, the usual augmentation for CIFAR-10.

    Pads each image on all sides, crops it back to its size at a random place, then flips it left to right
    with probability 1/2. After `prepare`, zero is the mean of the training data.

    Args:
      rng: a key; one per replica and step.
      x: prepared images [B, H, W, C], float.
      padding: rows and columns added on each side; offsets lie in [-padding, padding].
      fill: what they hold: zeros, or the image mirrored at its edge.

    Returns:
      Images [B, H, W, C] in the dtype of `x`.

    Raises:
      DataError: `x` is not images [B, H, W, C].
      SettingsError: `padding` is not a whole number, 0 or more, or `fill` is another.

    Reference: He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385), section 4.2.
    """
    if x.ndim != 4:
        raise DataError(f"crop_flip got inputs of shape {x.shape}: it takes images [B, H, W, C]; leave out augment=")
    padding = as_whole("crop_flip: padding", padding, 0)
    if fill not in ("zeros", "reflect"):
        raise SettingsError(f"crop_flip: fill is {fill!r}; it must be zeros or reflect")
    batch, *image = x.shape
    crop_rng, flip_rng = jax.random.split(rng)
    offsets = jax.random.randint(crop_rng, (batch, 2), 0, 2 * padding + 1)
    flips = jax.random.bernoulli(flip_rng, shape=(batch, 1, 1, 1))
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(x, around, mode="constant" if fill == "zeros" else "reflect")

    def crop(sample: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(sample, (offset[0], offset[1], jnp.zeros_like(offset[0])), image)

    cropped = jax.vmap(crop)(padded, offsets)
    return jnp.where(flips, cropped[:, :, ::-1], cropped)
