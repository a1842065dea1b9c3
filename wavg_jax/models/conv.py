"""Convolution and pooling that stay fast inside a compiled loop on XLA's CPU backend.

There the gradient of a stock convolution inside `lax.scan` runs up to 37 times slower than outside
(https://github.com/jax-ml/jax/issues/12868), and that of `nn.max_pool` 15 times slower than the one below.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wavg_jax.base import SettingsError


def fast_conv() -> Callable[..., jax.Array]:
    """Picks the convolution for the default backend: `im2col_conv` on CPU, `lax.conv_general_dilated` elsewhere.

    Returns:
      What the argument `conv_general_dilated` of `flax.linen.Conv` and `flax.nnx.Conv` takes.

    Example:
      >>> import flax.linen as nn
      >>> layer = nn.Conv(8, (3, 3), conv_general_dilated=fast_conv())
    """
    # Not at import: asking for the backend starts it, and then jax.distributed could not be set up any more.
    return im2col_conv if jax.default_backend() == "cpu" else lax.conv_general_dilated


def im2col_conv(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    **others: Any,
) -> jax.Array:
    """Convolves as `lax.conv_general_dilated` does, by one matrix product over the patches of the input.

    The patches [B, *out, prod(window) * C_in] are put together by slices, first along the last spatial axis, so that
    three slices and three more make a 3x3 window, not nine. It needs `prod(window)` times the memory of the input.
    It stays one (batched) product under `jax.vmap` over kernels, where a convolution becomes a grouped one.

    What it does not do goes to `lax.conv_general_dilated` itself: dilation, feature groups, layouts other than
    channels last (NHWC inputs and outputs, HWIO kernels), outputs of size 0, and any of `others` that is not None.

    Args:
      lhs: inputs [B, *spatial, C_in].
      rhs: kernels [*window, C_in, C_out], of the dtype of `lhs`.
      window_strides: one stride for each spatial axis.
      padding: "SAME", "VALID", "SAME_LOWER" or (low, high) for each spatial axis.
      lhs_dilation: None or ones, else see above.
      rhs_dilation: None or ones, else see above.
      dimension_numbers: as in `lax.conv_general_dilated`.
      feature_group_count: 1, else see above.
      precision: of the matrix product.
      **others: further arguments of `lax.conv_general_dilated`.

    Returns:
      [B, *out, C_out].

    Reference: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document
    Processing", 2006.
    """
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    window = [rhs.shape[axis] for axis in layout.rhs_spec[2:]]
    spatial = [lhs.shape[axis] for axis in layout.lhs_spec[2:]]
    pads = lax.padtype_to_pads(spatial, window, window_strides, padding) if isinstance(padding, str) else padding
    out = [
        (size + low + high - width) // stride + 1
        for size, (low, high), width, stride in zip(spatial, pads, window, window_strides, strict=True)
    ]
    dilated = {*(lhs_dilation or ()), *(rhs_dilation or ())} - {1}
    set_others = {name: value for name, value in others.items() if value is not None}
    if dilated or feature_group_count != 1 or set_others or min(out) < 1 or not _channels_last(layout):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            **set_others,
        )

    zero = jnp.zeros((), lhs.dtype)
    patches = lax.pad(lhs, zero, [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])
    for axis in reversed(range(len(window))):
        patches = _unfold(patches, axis + 1, window[axis], window_strides[axis], out[axis])
    # Two axes, not lhs.ndim: with the product over [B, H, W, C] a train step took 1.5 to 2.2 times as long on CPU.
    product = lax.dot(patches.reshape(-1, patches.shape[-1]), rhs.reshape(-1, rhs.shape[-1]), precision=precision)
    return product.reshape(lhs.shape[0], *out, rhs.shape[-1])


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Takes the maximum of each `window` x `window` block; rows and columns left over are dropped.

    Same values as `nn.max_pool(x, (window, window), (window, window))`. Where a block has several maxima, as after a
    ReLU, each maximum of two equal numbers gives half of the gradient to either; `nn.max_pool` gives all to the first.

    Args:
      x: [B, H, W, C], with H and W at least `window`.
      window: side of a block, in pixels.

    Returns:
      [B, H // window, W // window, C].

    Raises:
      SettingsError: if `window` is below 1 or above H or W.

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
      Array([[ 5.,  7.],
             [13., 15.]], dtype=float32)
    """
    if not 1 <= window <= min(x.shape[1:3]):
        raise SettingsError(f"max_pool over blocks of {window} x {window} needs inputs of that size, got {x.shape}")
    for axis in (1, 2):
        end = x.shape[axis] // window * window
        x = reduce(jnp.maximum, (lax.slice_in_dim(x, i, end, window, axis) for i in range(window)))
    return x


def _channels_last(layout: lax.ConvDimensionNumbers) -> bool:
    ndim = len(layout.lhs_spec)
    inputs = (0, ndim - 1, *range(1, ndim - 1))
    kernels = (ndim - 1, ndim - 2, *range(ndim - 2))
    return (tuple(layout.lhs_spec), tuple(layout.rhs_spec), tuple(layout.out_spec)) == (inputs, kernels, inputs)


def _unfold(x: jax.Array, axis: int, width: int, stride: int, out: int) -> jax.Array:
    """Stacks the `width` shifted views of `x` along `axis` on the channel axis, the first shift outermost."""
    span = (out - 1) * stride + 1
    return jnp.concatenate([lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(width)], axis=-1)
