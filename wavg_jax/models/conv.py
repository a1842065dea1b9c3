"""Forms of `lax.conv_general_dilated` that stay fast inside a compiled loop on XLA's CPU backend.

On that backend, the gradient of a stock convolution runs up to 37 times slower inside `lax.scan` than outside
(https://github.com/jax-ml/jax/issues/12868); `jax.vmap` over kernels turns every convolution into a grouped one, 3 to 4
times slower; and grouped convolutions, depthwise ones above all, miss the fast kernel everywhere. A gradient of a
convolution is a convolution too, with axes swapped, so the forms below serve both.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wavg_jax import tree


class Geometry(NamedTuple):
    """How windows lie on the inputs, per spatial axis, and how products are summed.

    Attributes:
      strides: between neighbouring windows.
      pads: (low, high), which may be negative.
      spread: between neighbouring inputs, with zeros in between (`lhs_dilation`).
      dilation: between neighbouring entries of a window (`rhs_dilation`).
      precision: of the products.
      dtype: of the outputs.
    """

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    spread: tuple[int, ...]
    dilation: tuple[int, ...]
    precision: Any
    dtype: Any


def covers(lhs: Any, rhs: Any, out: Any, **params: Any) -> bool:
    """Whether `convolve` has a form for a convolution of these shapes and dtypes.

    Left alone are integers and complex numbers, mixed dtypes, arrays of size 0, convolutions without a spatial axis,
    outputs laid out over a mesh, and whatever parameters later versions of JAX add.
    """
    known = {*_PARAMS, *(name for name, value in params.items() if value is None)}
    # Where a mesh is in use, a gradient's convolutions may name a layout that lays nothing out.
    if not any(getattr(params.get("out_sharding"), "spec", ("?",))):
        known.add("out_sharding")
    floats = jnp.issubdtype(lhs.dtype, jnp.floating) and lhs.dtype == rhs.dtype
    return set(params) <= known and floats and lhs.ndim > 2 and 0 not in (*lhs.shape, *rhs.shape, *out.shape)


_PARAMS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
    "preferred_element_type",
)


def convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    **unset: Any,
) -> jax.Array:
    """Convolves as `lax.conv_general_dilated` does, in the form that XLA runs fastest on a CPU.

        y[n, o, f] = sum_{w, c} x[n, strides o + dilation w - low, c] kernel[w, c, f]

    Axes are moved to the one layout with a fast kernel, NHWC and HWIO. Where windows are larger than the output, as in
    the gradient of a kernel, the sum is a product over the patches of a few images at a time, which stay in the cache.
    Groups of a few channels are sums of shifted inputs, other groups one convolution after another. Under `jax.vmap`,
    so are the replicas' convolutions.

    Args:
      lhs: inputs, with the axes that `dimension_numbers` says.
      rhs: kernels, of the dtype of `lhs`.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count,
        precision, preferred_element_type: parameters of the primitive, in full.
      **unset: further ones, all None; see `covers`.

    Returns:
      The outputs, with the axes that `dimension_numbers` says.

    Example:
      >>> names = lax.conv_dimension_numbers((1, 1, 4), (1, 1, 2), ("NCW", "OIW", "NCW"))
      >>> x, kernel = jnp.arange(4.0).reshape(1, 1, 4), jnp.array([[[1.0, 10.0]]])
      >>> convolve(x, kernel, window_strides=(1,), padding=((0, 0),), lhs_dilation=(1,), rhs_dilation=(1,),
      ...          dimension_numbers=names)[0, 0]
      Array([10., 21., 32.], dtype=float32)

    References: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document
    Processing", 2006, for products over patches.
    """
    del out_sharding  # `covers` says that it lays nothing out
    assert not any(value is not None for value in unset.values())
    layout, ndim = dimension_numbers, lhs.ndim
    geometry = Geometry(
        tuple(window_strides),
        tuple((int(low), int(high)) for low, high in padding),
        tuple(lhs_dilation),
        tuple(rhs_dilation),
        precision,
        preferred_element_type or lhs.dtype,
    )
    x = lhs.transpose(layout.lhs_spec[0], *layout.lhs_spec[2:], layout.lhs_spec[1])
    kernel = rhs.transpose(*layout.rhs_spec[2:], layout.rhs_spec[1], layout.rhs_spec[0])
    y = _grouped(x, kernel, feature_group_count, batch_group_count, geometry)
    back = [0] * ndim
    for axis, place in enumerate((layout.out_spec[0], *layout.out_spec[2:], layout.out_spec[1])):
        back[place] = axis
    return y.transpose(back)


_SHORT = 128
"""Most terms that are written out as shifted products."""


def _grouped(x: jax.Array, kernel: jax.Array, features: int, batches: int, geometry: Geometry) -> jax.Array:
    """`convolve` in one layout: inputs [N, *spatial, C], kernels [*window, I, O] -> [N / batches, *out, O].

    Group g of the outputs' features sees group g of the inputs' features, or of their batches.
    """
    *window, inputs, outputs = kernel.shape
    if features == batches == 1:
        # One replica after another: batched, they would become one grouped convolution.
        return jax.custom_batching.sequential_vmap(functools.partial(_dense, geometry=geometry))(x, kernel)
    if batches == 1 and inputs <= 4 and math.prod(window) * inputs <= _SHORT:
        return _shifted(x, kernel, features, geometry)
    if batches == len(x) and math.prod(_out(x, kernel, geometry)) <= _SHORT:
        return _each_position(x, kernel, geometry)
    groups = max(features, batches)
    axis = 0 if batches > 1 else x.ndim - 1
    xs = jnp.moveaxis(_split(x, axis, groups), axis, 0)
    kernels = jnp.moveaxis(_split(kernel, kernel.ndim - 1, groups), -2, 0)
    ys = lax.map(lambda pair: _grouped(pair[0], pair[1], 1, 1, geometry), (xs, kernels))
    return jnp.moveaxis(ys, 0, -2).reshape(*ys.shape[1:-1], outputs)


def _split(x: jax.Array, axis: int, groups: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])


def _dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Inputs [N, *spatial, C] and kernels [*window, C, O] -> [N, *out, O]."""
    window, out = kernel.shape[:-2], _out(x, kernel, geometry)
    # Unless the kernel is dilated: then its gradient as a convolution took half as long (14 x 14 x 64, 3 x 3).
    if math.prod(window) > math.prod(out) and set(geometry.strides) == {1}:
        total = _over_patches(x.swapaxes(0, -1), jnp.moveaxis(kernel, -2, 0), out, geometry)
        return jnp.moveaxis(total, -2, 0).astype(geometry.dtype)
    # Names for any number of axes: numbers would do, but names say it.
    axes = "".join(chr(ord("a") + axis) for axis in range(len(window)))
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.pads,
        lhs_dilation=geometry.spread,
        rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        precision=geometry.precision,
        preferred_element_type=geometry.dtype,
    )


_CACHED = 2**18
"""Most bytes of patches at a time, unless one image has more. With 0.1 to 0.6 MB, the gradient of a 3x3 kernel took
half as long as with the patches of all images, on a CPU with 0.5 MB of second-level cache per core."""

_WIDE = 96
"""Patches this long grow no further: beyond it, copying them costs more than products with short ones."""


def _over_patches(x: jax.Array, slope: jax.Array, few: Sequence[int], geometry: Geometry) -> jax.Array:
    """A convolution with `few` outputs: the sum over images of `patches^T slope`, a few images at a time.

    Patches span only the last axes of the output; along the other axes, each position takes a product of its own.

    Args:
      x: [images, *spatial, inputs].
      slope: [images, *window, outputs].
      few: sizes of the output.
      geometry: of the convolution.

    Returns:
      [*few, inputs, outputs], in the dtype of the sums.
    """
    window, (inputs, outputs) = slope.shape[1:-1], (x.shape[-1], slope.shape[-1])
    apart = len(few)
    while apart and math.prod(few[apart:]) * inputs < _WIDE:
        apart -= 1
    columns = math.prod(few[apart:]) * inputs
    together = _divisor(x.shape[0], _CACHED // (math.prod(window) * columns * x.dtype.itemsize))

    def shifted(x: jax.Array, axis: int, position: int) -> jax.Array:
        return _shift(x, axis + 1, position * geometry.strides[axis], geometry.dilation[axis], window[axis])

    def add(i: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        patches = _padded(x.reshape(-1, together, *x.shape[1:])[i], geometry)
        for axis in reversed(range(apart, len(few))):
            patches = jnp.concatenate([shifted(patches, axis, o) for o in range(few[axis])], axis=-1)
        slopes = slope.reshape(-1, together * math.prod(window), outputs)[i]
        sums = []
        for total, positions in zip(totals, itertools.product(*map(range, few[:apart])), strict=True):
            part = patches
            for axis, position in enumerate(positions):
                part = shifted(part, axis, position)
            product = lax.dot_general(
                part.reshape(-1, columns),
                slopes,
                (((0,), (0,)), ((), ())),
                precision=geometry.precision,
                preferred_element_type=total.dtype,
            )
            sums.append(total + product)
        return sums

    zeros = jnp.zeros((columns, outputs), tree.accumulator_dtype(x.dtype))
    totals = lax.fori_loop(0, x.shape[0] // together, add, [zeros] * math.prod(few[:apart]))
    return jnp.stack(totals).reshape(*few, inputs, outputs)


def _shifted(x: jax.Array, kernel: jax.Array, groups: int, geometry: Geometry) -> jax.Array:
    """Groups of a few channels, such as depthwise convolutions: a sum of shifted inputs, without products of matrices.

    Args:
      x: [N, *spatial, groups * inputs].
      kernel: [*window, inputs, groups * outputs].
      groups: their number.
      geometry: of the convolution.

    Returns:
      [N, *out, groups * outputs].
    """
    (*window, inputs, features), out = kernel.shape, _out(x, kernel, geometry)
    dtype = tree.accumulator_dtype(x.dtype)
    padded = _split(_padded(x, geometry), x.ndim - 1, groups)
    channels = [jnp.repeat(padded[..., i], features // groups, axis=-1) for i in range(inputs)]
    terms = []
    for *offsets, i in itertools.product(*map(range, (*window, inputs))):
        part = channels[i]
        for axis, (offset, dilation) in enumerate(zip(offsets, geometry.dilation, strict=True)):
            part = _shift(part, axis + 1, offset * dilation, geometry.strides[axis], out[axis])
        factor = kernel[(*offsets, i)].reshape((1,) * (x.ndim - 1) + (-1,))
        terms.append(part.astype(dtype) * factor.astype(dtype))
    return functools.reduce(jnp.add, terms).astype(geometry.dtype)


_ROWS = 8
"""Products summed by additions before the rest is summed by a product with ones, since XLA reduces slowly."""


def _each_position(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A convolution in which every input has a group of its own, as in the gradient of a depthwise kernel.

    Args:
      x: [groups, *spatial, C].
      kernel: [*window, C, groups * outputs].
      geometry: of the convolution.

    Returns:
      [1, *out, groups * outputs].
    """
    (*window, images, features), out = kernel.shape, _out(x, kernel, geometry)
    dtype, rows = tree.accumulator_dtype(x.dtype), min(_ROWS, window[0])
    more = -window[0] % rows
    window[0] += more
    slope = _longer(jnp.moveaxis(kernel, -2, 0), more)
    seen = _padded(jnp.repeat(x.swapaxes(0, -1), features // len(x), axis=-1), geometry)
    seen = _longer(seen, more * geometry.dilation[0])
    spans = [(width - 1) * dilation + 1 for width, dilation in zip(window, geometry.dilation, strict=True)]

    def one(position: jax.Array) -> jax.Array:
        starts: list[jax.Array] = []
        for size, stride in zip(reversed(out), reversed(geometry.strides), strict=True):
            starts.insert(0, position % size * stride)
            position = position // size
        first = jnp.zeros((), position.dtype)
        part = lax.dynamic_slice(seen, (first, *starts, first), (images, *spans, features))
        part = lax.slice(part, [0] * x.ndim, part.shape, (1, *geometry.dilation, 1))
        pairs = zip(jnp.split(part, rows, 1), jnp.split(slope, rows, 1), strict=True)
        total = functools.reduce(jnp.add, (a.astype(dtype) * b.astype(dtype) for a, b in pairs)).reshape(-1, features)
        return jnp.ones(len(total), dtype) @ total

    sums = lax.map(one, jnp.arange(math.prod(out), dtype=jnp.int32))
    return sums.reshape(1, *out, features).astype(geometry.dtype)


def _longer(x: jax.Array, more: int) -> jax.Array:
    """`x` with zeros after the end of its first spatial axis."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, more if axis == 1 else 0, 0) for axis in range(x.ndim)])


def _out(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> tuple[int, ...]:
    """Sizes of the output along the spatial axes."""
    sizes = zip(x.shape[1:-1], kernel.shape[:-2], *geometry[:4], strict=True)
    return tuple(
        ((size - 1) * spread + 1 + low + high - (width - 1) * dilation - 1) // stride + 1
        for size, width, stride, (low, high), spread, dilation in sizes
    )


def _padded(x: jax.Array, geometry: Geometry) -> jax.Array:
    """The inputs with what their padding and spread add: zeros."""
    around = [(low, high, spread - 1) for (low, high), spread in zip(geometry.pads, geometry.spread, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *around, (0, 0, 0)])


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`, or 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(most, 1))


def _shift(x: jax.Array, axis: int, offset: int, stride: int, out: int) -> jax.Array:
    """The `out` entries of `x` along `axis` from `offset` on, `stride` apart."""
    return lax.slice_in_dim(x, offset, offset + (out - 1) * stride + 1, stride, axis)
