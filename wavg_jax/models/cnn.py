"""A small convolutional network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from wavg_jax.base import SettingsError
from wavg_jax.models.mlp import MLP


class CNN(nn.Module):
    """Two 3x3 convolutions with 32 and 64 channels, each with ReLU and 2x2 pooling, then a dense layer of width 128.

    Attributes:
      classes: number of logits.
      batch_norm: whether BatchNorm follows each convolution.
      dropout: dropout rate of the dense layer, in [0, 1).
      dtype: dtype of the computation and of the logits; parameters are float32 unless cast.

    Raises:
      SettingsError: when called, if `dropout` is out of range or the input is not [B, H, W, C] of at least 4x4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = CNN(classes=3)
      >>> images = jnp.ones((5, 8, 8, 1))
      >>> logits, params = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), images, train=False))
      >>> logits.shape
      (5, 3)
    """

    classes: int = 10
    batch_norm: bool = False
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes logits [B, classes] of images [B, H, W, C]; `train` turns on dropout and batch statistics."""
        if x.ndim != 4 or min(x.shape[1:3]) < 4:
            raise SettingsError(f"a CNN needs images [B, H, W, C] of at least 4x4 pixels, got {x.shape}")
        for channels in (32, 64):
            # BatchNorm subtracts the mean, so a bias before it would learn nothing.
            x = nn.Conv(channels, (3, 3), use_bias=not self.batch_norm, dtype=self.dtype)(x)
            if self.batch_norm:
                # Flax keeps the statistics in float32 and promotes to it on purpose, in any compute dtype.
                with jax.numpy_dtype_promotion("standard"):
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
            # Pooling first gives the same, and ReLU sees a quarter of the pixels.
            x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        return MLP((128,), self.classes, self.dropout, self.dtype, name="head")(x, train)
