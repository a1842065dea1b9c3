"""The reductions over the replica axis: the only code that sums over replicas."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from wavg_jax import checks
from wavg_jax.base import PyTree
from wavg_jax.tree import accumulator_dtype


class Reduction(Protocol):
    """`reduce(stacked, weights, *, sum_over=None) -> tree`; see `weighted_mean` for the shapes.

    With replicas on several devices it is called on each device's own, and `sum_over` names the mapped axis over which
    it has to add up, with `jax.lax.psum`, what each has summed.
    """

    def __call__(self, stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree: ...


def _added(total: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
    """`total + w * x`, or `total` where the weight is 0."""
    # Skipped, not added as 0: the compiler rounds a sum of products by how many there are.
    return jnp.where(w != 0, total + w * x, total)


def _over_devices(total: jax.Array, sum_over: str | None) -> jax.Array:
    return total if sum_over is None else jax.lax.psum(total, sum_over)


@jax.custom_vjp
def _sum(w: jax.Array, x: jax.Array) -> jax.Array:
    """`sum_k w_k * x_k` of one leaf [K, ...], with `w` [K] or like `x`, in the leaf's accumulator dtype."""
    dtype = accumulator_dtype(x.dtype)
    if x.dtype != dtype:  # or a search's loop would keep a wide copy of all K
        w, x = jax.lax.optimization_barrier((w, x))
    w = w.astype(dtype)
    # Unrolled over K: XLA fuses it into one pass at copy speed, where `(w * x).sum(0)` reaches a thirtieth of it.
    # w - w is a zero that the compiler cannot see through. After a plain 0 the first two terms are two products, and it
    # chooses by K which of them it rounds before it adds them.
    total = jnp.zeros(x.shape[1:], dtype) + (w[0] - w[0])
    for k in range(x.shape[0]):
        total = _added(total, w[k], x[k].astype(dtype))
    return total


def _sum_forward(w: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum(w, x), (w, x)


def _sum_backward(operands: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    # Derived, the gradient of the unrolled sum would hold 2 K arrays as large as the blend; this loop holds none.
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
    """Applies `leaf(weights, stacked)` to every leaf of `stacked`, of which `weights` is a prefix tree."""
    checks.weights(weights, stacked)
    return jax.tree.map(lambda w, sub: jax.tree.map(lambda x: leaf(w, x), sub), weights, stacked)


def weighted_mean(stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree:
    """Blends K stacked trees: `sum_k w_k * x_k`, summed in float32 whatever the dtype of the leaves.

    A replica whose weight is 0 does not enter the sum at all, so that its NaN or infinity cannot: a dead replica
    equals a run of the survivors.

    Args:
      stacked: tree with leaves [K, ...].
      weights: a prefix tree of `stacked` whose leaves are [K] or [K, ...] like the leaf; they sum to 1 over K.
      sum_over: name of a mapped axis over which the replicas are spread further; each member sums its own, then the
        sums are added up.

    Returns:
      A tree with leaves [...] in their accumulator dtype (float32, or float64 for float64 leaves);
      `wavg_jax.tree.cast_like` brings them back.

    Raises:
      SettingsError: the weights are not such a tree.

    >>> import jax.numpy as jnp
    >>> stacked = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "b": jnp.array([1.0, jnp.nan])}
    >>> blend = weighted_mean(stacked, {"w": jnp.array([0.25, 0.75]), "b": jnp.array([1.0, 0.0])})
    >>> blend["w"].tolist(), blend["b"].tolist()
    ([2.5, 5.0], 1.0)
    """
    return _leafwise(lambda w, x: _weighted_sum(w, x, sum_over), stacked, weights)


_VANISHED = 1e-5
"""Length of a mean of unit vectors below which it is rounding and no direction: float32 resolves 1e-7."""


def norm_preserving(stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree:
    """Blends magnitude and direction of every output unit apart, so that diverged replicas do not blend to short ones.

    With the vector x_k of the weights into one output unit of replica k, written `g v / |v|` as in weight
    normalization (Salimans and Kingma 2016, arXiv:1602.07868), magnitudes and directions are averaged:

        g = sum_k w_k |x_k|,    v = sum_k w_k x_k / |x_k|,    blend = g v / |v|.

    The plain mean of K orthogonal vectors of equal length is shorter than they are by sqrt(K); this one is as long.
    A zero vector has no direction: it shortens g and leaves v alone. Where the directions cancel (|v| = 0), or a
    magnitude overflows, the plain mean is taken. After the title of Ramroach and Joshi (2021), whose formula is not
    public: this is a reading of it.

    Args:
      stacked: tree with leaves [K, ...]. The units are the last axis of leaves [K, ..., inputs, units], as in flax
        kernels; leaves with fewer dimensions (biases, scales) get the plain weighted mean.
      weights: as for `weighted_mean`. Weights per element enter v element by element, and g by their mean over the
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

        # One replica at a time: a sum over the elements of all of them at once is rounded by how many there are.
        g, lengths = jax.lax.scan(measured, jnp.zeros((1,) * len(inputs) + x.shape[-1:], x.dtype), (w, x))
        g = _over_devices(g, sum_over)
        v = _weighted_sum(w, x / jnp.where(lengths > 0, lengths, 1), sum_over)

        def combined(g: jax.Array, v: jax.Array, plain: jax.Array) -> jax.Array:
            squared = (v * v).sum(inputs, keepdims=True)
            usable = (squared > _VANISHED**2) & jnp.isfinite(g)
            # The root of 0 has an infinite slope, and searches differentiate through the blend.
            length = jnp.sqrt(jnp.where(usable, squared, 1))
            return jnp.where(usable, jnp.where(usable, g, 0) * v / length, plain)

        # A branch is compiled by itself: fused with the sums over K, its rounding would depend on K.
        return jax.lax.cond((v != 0).any(), combined, lambda g, v, plain: plain, g, v, plain)

    return _leafwise(leaf, stacked, weights)
