"""A residual network for small images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from wavg_jax.arguments import check, whole
from wavg_jax.base import SettingsError


class ResNet(nn.Module):
    """A 3x3 stem, three stages of basic blocks with 1, 2 and 4 times `width` channels, mean pooling and the logits.

    A block is `relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))`, with 3x3 convolutions. The first block of the
    second and third stages halves the image: its shortcut takes every other pixel and fills the new channels with
    zeros, so no shortcut has parameters (option A, the paper's choice for CIFAR-10). The network has `6 * blocks + 2`
    layers: 3 blocks make ResNet-20, with 0.27 million parameters for CIFAR-10.

    Attributes:
      classes: number of logits.
      blocks: blocks per stage, at least 1.
      width: channels of the stem and of the first stage, at least 1.
      dtype: dtype of the computation and of the logits; parameters are float32 unless cast.

    Raises:
      SettingsError: when called, if `blocks` or `width` is below 1 or the input is not [B, H, W, C] of at least 4x4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = ResNet(classes=3, blocks=1, width=4)
      >>> images = jnp.ones((5, 8, 8, 1))
      >>> logits, params = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), images, train=False))
      >>> logits.shape
      (5, 3)

    Reference: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2
    (arXiv:1512.03385).
    """

    classes: int = 10
    blocks: int = 3
    width: int = 16
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes logits [B, classes] of images [B, H, W, C]; `train` turns on batch statistics."""
        if x.ndim != 4 or min(x.shape[1:3]) < 4:
            raise SettingsError(f"a ResNet needs images [B, H, W, C] of at least 4x4 pixels, got {x.shape}")
        check("blocks", self.blocks, whole(1))
        check("width", self.width, whole(1))
        x = nn.relu(_conv_norm(x, self.width, 1, train, self.dtype))
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                x = _block(x, 2**stage * self.width, stride, train, self.dtype)
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2)))


def _block(x: jax.Array, channels: int, stride: int, train: bool, dtype: DTypeLike) -> jax.Array:
    y = nn.relu(_conv_norm(x, channels, stride, train, dtype))
    y = _conv_norm(y, channels, 1, train, dtype)
    shortcut = x[:, ::stride, ::stride]
    return nn.relu(y + jnp.pad(shortcut, [(0, 0)] * 3 + [(0, channels - x.shape[-1])]))


def _conv_norm(x: jax.Array, channels: int, stride: int, train: bool, dtype: DTypeLike) -> jax.Array:
    x = nn.Conv(
        channels,
        (3, 3),
        strides=stride,
        # Not "SAME": with stride 2 it centres the windows on odd pixels, while the shortcut takes the even ones.
        padding=1,
        use_bias=False,  # BatchNorm would subtract it again
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
    )(x)
    # Flax keeps the statistics in float32 and promotes to it on purpose, in any compute dtype.
    with jax.numpy_dtype_promotion("standard"):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)(x)
