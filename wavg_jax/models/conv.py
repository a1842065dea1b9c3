"""Convolution and pooling that stay fast inside a compiled loop on XLA's CPU backend.

On that backend, the gradient of a stock convolution runs up to 37 times slower inside `lax.scan` than outside
(https://github.com/jax-ml/jax/issues/12868); `jax.vmap` over kernels turns every convolution into a grouped one, 3 to 4
times slower; and the gradient of `nn.max_pool` is 15 times slower than the one below.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wavg_jax import tree
from wavg_jax.base import SettingsError


def fast_conv() -> Callable[..., jax.Array]:
    """Picks the convolution for the default backend: `cpu_conv` on CPU, `lax.conv_general_dilated` elsewhere.

    Returns:
      The argument `conv_general_dilated` for `flax.linen.Conv` or `flax.nnx.Conv`.

    Example:
      >>> import flax.linen as nn
      >>> layer = nn.Conv(8, (3, 3), conv_general_dilated=fast_conv())
    """
    # Not at import: asking for the backend starts it, and then jax.distributed can no longer be set up.
    return cpu_conv if jax.default_backend() == "cpu" else lax.conv_general_dilated


def cpu_conv(
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
    """Convolves like `lax.conv_general_dilated`, with gradients in forms that XLA runs fast on a CPU.

    The output and the gradient of the input are convolutions in the one layout with a fast kernel, NHWC and HWIO. The
    gradient of the kernel is a sum of products over the patches of a few images at a time, so the patches stay in the
    cache. Under `jax.vmap`, the replicas' convolutions run one after another.

    Everything else falls back to `lax.conv_general_dilated`: dilation, feature groups, layouts other than channels last
    (NHWC inputs and outputs, HWIO kernels), arrays of size 0, and any of `others` that is not None.

    Args:
      lhs: inputs [B, *spatial, C_in].
      rhs: kernels [*window, C_in, C_out], of the dtype of `lhs`.
      window_strides: one stride per spatial axis.
      padding: "SAME", "VALID", "SAME_LOWER", or one pair (low, high) per spatial axis.
      lhs_dilation: None or ones; anything else falls back.
      rhs_dilation: None or ones; anything else falls back.
      dimension_numbers: as in `lax.conv_general_dilated`.
      feature_group_count: 1; anything else falls back.
      precision: precision of the products.
      **others: further arguments of `lax.conv_general_dilated`.

    Returns:
      [B, *out, C_out].

    Raises:
      TypeError: when differentiated in forward mode (`jax.jvp`, `jax.jacfwd`) or twice; only one derivative in reverse
        mode works. For more, give the layer `lax.conv_general_dilated`.

    References: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document
    Processing", 2006, for products over patches.
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
    empty = min(out) < 1 or 0 in (*lhs.shape, *rhs.shape)
    if dilated or feature_group_count != 1 or set_others or empty or not _channels_last(layout):
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
    return _conv(tuple(window_strides), tuple(map(tuple, pads)), precision)(lhs, rhs)


@functools.cache
def _conv(strides: tuple[int, ...], pads: tuple[tuple[int, int], ...], precision: Any) -> Callable:
    """The convolution of inputs [B, *spatial, C_in] with kernels [*window, C_in, C_out]."""

    def channels_last(x: jax.Array, kernel: jax.Array, pads: Sequence[tuple[int, int]], **options: Any) -> jax.Array:
        axes = "DHW"[-len(strides) :]
        names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        return lax.conv_general_dilated(
            x, kernel, padding=pads, dimension_numbers=names, precision=precision, **options
        )

    # One replica after another: batched, they would become one grouped convolution.
    one_by_one = jax.custom_batching.sequential_vmap

    @one_by_one
    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return channels_last(x, kernel, pads, window_strides=strides)

    @one_by_one
    def to_input(x: jax.Array, kernel: jax.Array, slope: jax.Array) -> jax.Array:
        # Autodiff swaps the kernel's axes in the layout instead, which misses the fast kernel.
        flipped = lax.rev(kernel, range(len(strides))).swapaxes(-1, -2)
        ones, ends = (1,) * len(strides), []
        for size, width, out, stride, (low, _) in zip(
            x.shape[1:-1], kernel.shape[:-2], slope.shape[1:-1], strides, pads, strict=True
        ):
            before = width - 1 - low
            ends.append((before, size + width - 1 - before - ((out - 1) * stride + 1)))
        return channels_last(slope, flipped, ends, window_strides=ones, lhs_dilation=strides)

    @one_by_one
    def to_kernel(x: jax.Array, kernel: jax.Array, slope: jax.Array) -> jax.Array:
        return _kernel_gradient(x, kernel, slope, strides, pads, precision)

    @jax.custom_vjp
    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return forward(x, kernel)

    def backward(operands: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array]:
        return to_input(*operands, slope), to_kernel(*operands, slope)

    conv.defvjp(lambda x, kernel: (forward(x, kernel), (x, kernel)), backward)
    return conv


_CACHED = 2**18
"""Most bytes of patches at a time, unless one image has more. With 0.1 to 0.6 MB, the gradient of a 3x3 kernel took
half as long as with the patches of all images, on a CPU with 0.5 MB of second-level cache per core."""

_WIDE = 96
"""Patches this long grow no further: beyond it, copying them costs more than products with short ones."""


def _kernel_gradient(
    x: jax.Array, kernel: jax.Array, slope: jax.Array, strides: Sequence[int], pads: Sequence, precision: Any
) -> jax.Array:
    """The sum over images of `patches^T slope`, a few images at a time.

    Patches span only the last axes of the window; along the other axes, each offset takes a product of its own.
    """
    window, (inputs, outputs), out = kernel.shape[:-2], kernel.shape[-2:], slope.shape[1:-1]
    apart = len(window)
    while apart and math.prod(window[apart:]) * inputs < _WIDE:
        apart -= 1
    columns = math.prod(window[apart:]) * inputs
    together = _divisor(x.shape[0], _CACHED // (math.prod(out) * columns * x.dtype.itemsize))

    def add(i: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        some = x.reshape(-1, together, *x.shape[1:])[i]
        patches = lax.pad(some, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])
        for axis in reversed(range(apart, len(window))):
            patches = _unfold(patches, axis + 1, window[axis], strides[axis], out[axis])
        slopes = slope.reshape(-1, together * math.prod(out), outputs)[i]
        sums = []
        for total, offsets in zip(totals, itertools.product(*map(range, window[:apart])), strict=True):
            shifted = patches
            for axis, offset in enumerate(offsets):
                shifted = _shift(shifted, axis + 1, offset, strides[axis], out[axis])
            product = lax.dot_general(
                shifted.reshape(-1, columns),
                slopes,
                (((0,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=total.dtype,
            )
            sums.append(total + product)
        return sums

    zeros = jnp.zeros((columns, outputs), tree.accumulator_dtype(x.dtype))
    totals = lax.fori_loop(0, x.shape[0] // together, add, [zeros] * math.prod(window[:apart]))
    return jnp.stack(totals).reshape(kernel.shape).astype(kernel.dtype)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`, or 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(most, 1))


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Takes the maximum of each `window` x `window` block and drops leftover rows and columns.

    The values equal those of `nn.max_pool(x, (window, window), (window, window))`. If a block has several maxima, as
    after a ReLU, the maximum of two equal numbers passes half of the gradient to each; `nn.max_pool` passes all of it
    to the first.

    Args:
      x: [B, H, W, C], with H and W at least `window`.
      window: side of a block, in pixels.

    Returns:
      [B, H // window, W // window, C].

    Raises:
      SettingsError: `window` is below 1 or above H or W.

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
      Array([[ 5.,  7.],
             [13., 15.]], dtype=float32)
    """
    if not 1 <= window <= min(x.shape[1:3]):
        raise SettingsError(
            f"max_pool over blocks of {window} x {window} does not fit inputs of shape {x.shape}: set window= between "
            f"1 and {min(x.shape[1:3])}"
        )
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
    return jnp.concatenate([_shift(x, axis, i, stride, out) for i in range(width)], axis=-1)


def _shift(x: jax.Array, axis: int, offset: int, stride: int, out: int) -> jax.Array:
    """The `out` entries of `x` along `axis` from `offset` on, `stride` apart."""
    return lax.slice_in_dim(x, offset, offset + (out - 1) * stride + 1, stride, axis)
