"""The reductions over the replica axis: the only code that sums over replicas."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from wavg_jax import checks
from wavg_jax.base import PyTree
from wavg_jax.devices.collectives import sum_trees
from wavg_jax.tree import accumulator_dtype


class Reduction(Protocol):
    """`reduce(stacked, weights, *, sum_over=None) -> tree`; see `weighted_mean` for the shapes.

    When replicas are spread over several devices, each device calls it on its own replicas, and it must add up the
    devices' sums with `jax.lax.psum` over the mapped axis `sum_over`.
    """

    def __call__(self, stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree: ...


def _added(total: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
    """`total + w * x`, or `total` where the weight is 0."""
    # Skip a zero instead of adding it: how XLA rounds a sum of products depends on their number.
    return jnp.where(w != 0, total + w * x, total)


def _over_devices(total: jax.Array, sum_over: str | None) -> jax.Array:
    return total if sum_over is None else jax.lax.psum(total, sum_over)


@jax.custom_vjp
def _sum(w: jax.Array, x: jax.Array) -> jax.Array:
    """`sum_k w_k * x_k` of one leaf [K, ...], with `w` [K] or like `x`, in the leaf's accumulator dtype."""
    dtype = accumulator_dtype(x.dtype)
    if x.dtype != dtype:  # otherwise a search's loop would keep a wide copy of all K replicas
        w, x = jax.lax.optimization_barrier((w, x))
    w = w.astype(dtype)
    # Unrolled over K: XLA fuses it into one pass at copy speed; `(w * x).sum(0)` runs at a thirtieth of that.
    # w - w is a zero opaque to XLA. Starting from a literal 0, it would add the first two products directly and choose
    # by K which of them to round first.
    total = jnp.zeros(x.shape[1:], dtype) + (w[0] - w[0])
    for k in range(x.shape[0]):
        total = _added(total, w[k], x[k].astype(dtype))
    return total


def _sum_forward(w: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum(w, x), (w, x)


def _sum_backward(operands: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    # Autodiff of the unrolled sum would hold 2 K arrays of the blend's size; this loop holds none.
    w, x = operands

    def to_weight(one: jax.Array) -> jax.Array:
        return jnp.vdot(slope, one.astype(slope.dtype), precision="highest")

    by_weight = jax.lax.map(to_weight, x) if w.ndim == 1 else slope[None] * x.astype(slope.dtype)
    by_replica = None
    if jnp.issubdtype(x.dtype, jnp.inexact):
        by_replica = jax.lax.map(lambda one: (one.astype(slope.dtype) * slope).astype(x.dtype), w)
    return jnp.where(w != 0, by_weight, 0).astype(w.dtype), by_replica


_sum.defvjp(_sum_forward, _sum_backward)


def _weighted_sum(w: jax.Array, x: jax.Array, sum_over: str | None) -> jax.Array:
    return _over_devices(_sum(w, x), sum_over)


def _leafwise(leaf: Callable[[jax.Array, jax.Array], jax.Array], stacked: PyTree, weights: PyTree) -> PyTree:
    """Applies `leaf(weights, stacked)` to every leaf of `stacked`; `weights` is a prefix tree."""
    checks.weights(weights, stacked)
    return jax.tree.map(lambda w, sub: jax.tree.map(lambda x: leaf(w, x), sub), weights, stacked)


def weighted_mean(stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree:
    """Blends K stacked trees: `sum_k w_k * x_k`, accumulated in at least float32.

    The sum skips replicas of weight 0, and with them any NaN or infinity: a run with a dead replica equals a run of the
    survivors.

    Args:
      stacked: tree with leaves [K, ...].
      weights: a prefix tree of `stacked` with leaves [K], or [K, ...] like the stacked leaf; they sum to 1 over K.
      sum_over: name of the mapped axis that replicas are spread over; each member sums its own replicas, then `psum`
        adds up the sums.

    Returns:
      A tree with leaves [...] in their accumulator dtype (float32, or float64 for float64 leaves); cast it back with
      `wavg_jax.tree.cast_like`.

    Raises:
      SettingsError: the weights are not such a tree.

    >>> import jax.numpy as jnp
    >>> stacked = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "b": jnp.array([1.0, jnp.nan])}
    >>> blend = weighted_mean(stacked, {"w": jnp.array([0.25, 0.75]), "b": jnp.array([1.0, 0.0])})
    >>> blend["w"].tolist(), blend["b"].tolist()
    ([2.5, 5.0], 1.0)
    """
    sums = _leafwise(_sum, stacked, weights)
    return sums if sum_over is None else sum_trees(sum_over, sums)


_VANISHED = 1e-5
"""A mean of unit vectors shorter than this is rounding error and has no direction; float32 resolves 1e-7."""


def norm_preserving(stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree:
    """Blends magnitude and direction of every output unit separately, so that diverged replicas keep their norm.

    Let x_k be replica k's vector of weights into one output unit, written `g v / |v|` as in weight normalization
    (Salimans and Kingma 2016, arXiv:1602.07868). Magnitudes and directions are averaged separately:

        g = sum_k w_k |x_k|,    v = sum_k w_k x_k / |x_k|,    blend = g v / |v|.

    The plain mean of K orthogonal vectors of equal length shrinks by a factor of sqrt(K); this one keeps the length. A
    zero vector has no direction: it shortens g and leaves v unchanged. Where the directions cancel (|v| = 0), or a
    magnitude overflows, the blend is the plain mean. This is one reading of the title of Ramroach and Joshi (2021),
    whose formula is not public.

    Args:
      stacked: tree with leaves [K, ...]. Output units are the last axis of leaves [K, ..., inputs, units], as in flax
        kernels; leaves with fewer dimensions (biases, scales) get the plain weighted mean.
      weights: as for `weighted_mean`. Weights per element apply to v element by element; g takes their mean over the
        unit.
      sum_over: as for `weighted_mean`.

    Returns:
      A tree with leaves [...] in their accumulator dtype.

    >>> import jax.numpy as jnp
    >>> stacked = {"kernel": jnp.array([[[4.0], [0.0]], [[0.0], [4.0]]])}  # two orthogonal vectors of length 4
    >>> blend = norm_preserving(stacked, jnp.array([0.5, 0.5]))["kernel"]
    >>> round(float(jnp.linalg.norm(blend)), 4)
    4.0
    """

    def leaf(w: jax.Array, x: jax.Array) -> jax.Array:
        plain = _weighted_sum(w, x, sum_over)
        if x.ndim < 3:
            return plain
        w, x = w.astype(plain.dtype), x.astype(plain.dtype)
        inputs = tuple(range(x.ndim - 2))

        def measured(g: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            w, x = one
            length = jnp.sqrt((x * x).sum(inputs, keepdims=True))
            return _added(g, w if w.ndim == 0 else w.mean(inputs, keepdims=True), length), length

        # One replica at a time: rounding of a sum over all replicas' elements at once depends on K.
        g, lengths = jax.lax.scan(measured, jnp.zeros((1,) * len(inputs) + x.shape[-1:], x.dtype), (w, x))
        g = _over_devices(g, sum_over)
        v = _weighted_sum(w, x / jnp.where(lengths > 0, lengths, 1), sum_over)

        def combined(g: jax.Array, v: jax.Array, plain: jax.Array) -> jax.Array:
            squared = (v * v).sum(inputs, keepdims=True)
            usable = (squared > _VANISHED**2) & jnp.isfinite(g)
            # sqrt has an infinite slope at 0, and searches differentiate through the blend.
            length = jnp.sqrt(jnp.where(usable, squared, 1))
            return jnp.where(usable, jnp.where(usable, g, 0) * v / length, plain)

        # XLA compiles a branch separately; fused with the sums over K, its rounding would depend on K.
        return jax.lax.cond((v != 0).any(), combined, lambda g, v, plain: plain, g, v, plain)

    return _leafwise(leaf, stacked, weights)
