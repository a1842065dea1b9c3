"""A network that learns CIFAR-10 in few epochs: a fixed whitening layer, then convolutions that start as identities."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from wavg_jax.arguments import check, each, number, whole
from wavg_jax.base import DataError, SettingsError

_SIDE = 2
"""Of a whitened patch, in pixels."""
_AT_ONCE = 256
"""Images whose patches are in memory at a time: for CIFAR-10, 12 MB."""


def whitening(images: ArrayLike, epsilon: float = 5e-4) -> np.ndarray:
    """The kernel that whitens the 2x2 patches of images: `Airbench`'s first layer, computed on the host.

    With the second moments of the patches `E[p p^T] = V diag(l) V^T`, feature j is `v_j^T p / sqrt(l_j + epsilon)`.
    Over these patches the features' second moments are the identity, but for `epsilon`: `diag(l / (l + epsilon))`.

    Args:
      images: prepared training images [N, H, W, C], of at least 2x2 pixels; some thousands are enough.
      epsilon: added to the eigenvalues, 0 or more, so that patches that hardly vary are not blown up.

    Returns:
      float32 [2, 2, C, 4 C], the features with the largest eigenvalues first. The sign of each makes its largest entry
      positive, so that every machine finds the same features.

    Raises:
      DataError: `images` are no finite floating-point images of that shape, or some direction never varies and
        `epsilon` is 0.
      SettingsError: `epsilon` is out of range.

    Example:
      >>> images = np.random.default_rng(0).normal(size=(50, 8, 8, 1)).astype(np.float32)
      >>> whitening(images).shape
      (2, 2, 1, 4)

    References: Page, "How to Train Your ResNet 8: Bag of Tricks", 2018; Jordan, "94% on CIFAR-10 in 3.29 Seconds on a
    Single GPU", 2024, section 3.2 (arXiv:2404.00498).
    """
    check("epsilon", epsilon, number(0))
    x = np.asarray(images)
    if x.ndim != 4 or 0 in x.shape or min(x.shape[1:3]) < _SIDE or x.dtype.kind != "f" or not np.isfinite(x).all():
        raise DataError(
            f"whitening got {x.dtype} of shape {x.shape}; it takes finite floating-point images [N, H, W, C] of at "
            "least 2x2 pixels, as data.make_prepare(dataset) makes them"
        )
    size = _SIDE**2 * x.shape[-1]
    moments, count = np.zeros((size, size)), 0
    for some in np.array_split(x, math.ceil(len(x) / _AT_ONCE)):
        patches = _patches(some).reshape(-1, size)
        moments, count = moments + patches.T @ patches, count + len(patches)
    values, vectors = np.linalg.eigh(moments / count)
    values, vectors = values[::-1].clip(0) + epsilon, vectors[:, ::-1]
    if values.min() <= 0:
        raise DataError("whitening: some direction of the patches never varies; give epsilon a positive value")
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return (vectors * np.sign(largest) / np.sqrt(values)).reshape(_SIDE, _SIDE, -1, size).astype(np.float32)


def _patches(x: np.ndarray) -> np.ndarray:
    """All patches of images [N, H, W, C]: [N, H - 1, W - 1, 2, 2, C]."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (_SIDE, _SIDE), (1, 2))
    return windows.transpose(0, 1, 2, 4, 5, 3)


class Airbench(nn.Module):
    """airbench94's network: whitened 2x2 patches, then stages that halve the image, global max pooling and the logits.

    The first layer computes the whitened features of each patch, and their negatives, plus a bias that is learnt, and
    GELU. A stage is a 3x3 convolution, 2x2 max pooling, BatchNorm, GELU, and the same again without pooling.
    Convolutions start as the identity in as many outputs as they have inputs; BatchNorm has no scale; logits are a
    ninth of the last layer's outputs. With the default widths there are 1.97 million parameters for CIFAR-10.

    The kernel is a constant of the network, not a parameter: no gradient and no weight decay moves it, it is neither
    sent nor averaged, and a checkpoint does not hold it. Whoever loads one makes it again, with `whitening` and the
    same images. It is an array, so the network has no hash and cannot be a static argument of `jax.jit`.

    Attributes:
      kernel: what `whitening` returned for training images, [2, 2, C, 4 C].
      widths: channels of each stage, at least 1.
      classes: number of logits.
      dtype: dtype of the computation and of the logits; parameters are float32 unless cast.

    Raises:
      SettingsError: when called, if an attribute is out of range, or the input is not [B, H, W, C] with the kernel's
        channels and one pixel left after the last stage: 9x9 pixels for three stages.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = np.random.default_rng(0).normal(size=(50, 9, 9, 1)).astype(np.float32)
      >>> net = Airbench(whitening(images), widths=(4, 8, 8), classes=3)
      >>> logits, _ = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), images[:5], train=False))
      >>> logits.shape
      (5, 3)

    Reference: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024 (arXiv:2404.00498). Not here: its
    lookahead over steps, freezing of the first bias, flips that alternate by epoch, and shifted views in tests.
    BatchNorm's statistics move by a tenth a step, as there without lookahead, and its epsilon is flax's.
    """

    kernel: ArrayLike
    widths: Sequence[int] = (64, 256, 256)
    classes: int = 10
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes logits [B, classes] of images [B, H, W, C]; `train` turns on batch statistics."""
        self._check(x)
        x = nn.gelu(self._whitened(x), approximate=False)
        for width in self.widths:
            x = nn.max_pool(_conv(x, width, self.dtype), (2, 2), (2, 2))
            x = nn.gelu(_norm(x, train, self.dtype), approximate=False)
            x = nn.gelu(_norm(_conv(x, width, self.dtype), train, self.dtype), approximate=False)
        x = nn.max_pool(x, x.shape[1:3])[:, 0, 0]
        return nn.Dense(self.classes, use_bias=False, dtype=self.dtype, kernel_init=_uniform)(x) / 9

    def _whitened(self, x: jax.Array) -> jax.Array:
        bias = self.param("whitening_bias", nn.initializers.zeros, (2 * np.shape(self.kernel)[-1],), jnp.float32)
        x, kernel, bias = promote_dtype(x, jnp.asarray(self.kernel), bias, dtype=self.dtype)
        features = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.concatenate([features, -features], axis=-1) + bias[None, None, None]

    def _check(self, x: jax.Array) -> None:
        check("widths", self.widths, each(whole(1), "the channels of each stage, such as (64, 256, 256)", 1))
        check("classes", self.classes, whole(1))
        least = 2 ** len(self.widths) + 1
        channels = x.shape[-1]
        if x.ndim != 4 or min(x.shape[1:3]) < least:
            raise SettingsError(
                f"an Airbench with {len(self.widths)} stages needs images [B, H, W, C] of at least {least}x{least} "
                f"pixels, got {x.shape}; give it fewer widths"
            )
        if np.shape(self.kernel) != (_SIDE, _SIDE, channels, _SIDE**2 * channels):
            raise SettingsError(
                f"the kernel has shape {np.shape(self.kernel)}; images of {channels} channels need what "
                "models.whitening(images) returns for them"
            )


_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform within 1 / sqrt(inputs)."""


def _identity(rng: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """3x3 kernels [3, 3, I, O] whose first outputs, as many as there are inputs, copy the inputs."""
    copied = min(shape[-2:])
    copies = jnp.zeros((*shape[:-1], copied), dtype).at[1, 1].set(jnp.eye(shape[-2], copied, dtype=dtype))
    return _uniform(rng, shape, dtype).at[..., :copied].set(copies)


def _conv(x: jax.Array, width: int, dtype: DTypeLike) -> jax.Array:
    # BatchNorm would subtract a bias again.
    return nn.Conv(width, (3, 3), use_bias=False, dtype=dtype, kernel_init=_identity)(x)


def _norm(x: jax.Array, train: bool, dtype: DTypeLike) -> jax.Array:
    # Flax keeps the statistics in float32 and promotes to it on purpose, in any compute dtype.
    with jax.numpy_dtype_promotion("standard"):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, use_scale=False, dtype=dtype)(x)
