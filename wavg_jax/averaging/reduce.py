"""The reductions over the replica axis: the only code that sums over replicas."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from wavg_jax import checks
from wavg_jax.base import PyTree
from wavg_jax.devices.collectives import sum_trees
from wavg_jax.tree import accumulator_dtype


class Reduction(Protocol):
    """`reduce(stacked, weights, *, sum_over=None) -> tree`; see `weighted_mean` for the shapes.

    `stacked` are the replicas' parameters or, with `averager(deltas=True)`, how far they moved in the round.

    When replicas are spread over several devices, each device calls it on its own replicas, and it must add up the
    devices' sums with `jax.lax.psum` over the mapped axis `sum_over`.
    """

    def __call__(self, stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree: ...


def _added(total: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
    """`total + w * x`, or `total` where the weight is 0."""
    # Skip a zero instead of adding it: how XLA rounds a sum of products depends on their number.
    return jnp.where(w != 0, total + w * x, total)


def _added_up(total: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
    """`total + sum_k w_k * x_k`, one after another."""
    # Unrolled over K: XLA fuses it into one pass at copy speed; `(w * x).sum(0)` runs at a thirtieth of that.
    for k in range(x.shape[0]):
        total = _added(total, w[k], x[k].astype(total.dtype))
    return total


def _over_devices(total: jax.Array, sum_over: str | None) -> jax.Array:
    return total if sum_over is None else jax.lax.psum(total, sum_over)


_UNROLLED = 64
"""Replicas up to which a sum is written out."""

_BLOCK = 16
"""Replicas in a block of longer sums."""


@jax.custom_vjp
def _sum(w: jax.Array, x: jax.Array) -> jax.Array:
    """`sum_k w_k * x_k` of one leaf [K, ...], with `w` [K] or like `x`, in the leaf's accumulator dtype."""
    dtype = accumulator_dtype(x.dtype)
    if x.dtype != dtype:  # otherwise a search's loop would keep a wide copy of all K replicas
        w, x = jax.lax.optimization_barrier((w, x))
    w = w.astype(dtype)
    # w - w is a zero opaque to XLA. Starting from a literal 0, it would add the first two products directly and choose
    # by K which of them to round first.
    total = jnp.zeros(x.shape[1:], dtype) + (w[0] - w[0])
    if x.shape[0] <= _UNROLLED:
        return _added_up(total, w, x)
    # Unrolled, 256 replicas take ten times as long to compile, and to run. Blocks add in the same order.
    whole = x.shape[0] // _BLOCK

    def block(i: jax.Array, total: jax.Array) -> jax.Array:
        return _added_up(total, *(jax.lax.dynamic_slice_in_dim(y, i * _BLOCK, _BLOCK) for y in (w, x)))

    return _added_up(jax.lax.fori_loop(0, whole, block, total), w[whole * _BLOCK :], x[whole * _BLOCK :])


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


class _Apart(NamedTuple):
    """Sums over K vectors x_k that lie along some axes of a stacked leaf; [...] with 1 in place of the axes, if not v.

    Attributes:
      v: `sum_k w_k x_k / |x_k|`, [...]; a zero vector has no direction.
      length: `sum_k m_k |x_k|`, where m_k is the mean of w_k over the vector.
      squares: `sum_k m_k^2`.
      moved: the same over the vectors that are not zero.
    """

    v: jax.Array
    length: jax.Array
    squares: jax.Array
    moved: jax.Array


def _apart(w: jax.Array, x: jax.Array, axes: tuple[int, ...], sum_over: str | None) -> _Apart:
    """Takes magnitude and direction apart; `axes` are those of one replica's leaf, and w and x have one dtype."""

    def measured(sums: tuple[jax.Array, ...], one: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
        w, x = one
        length = jnp.sqrt((x * x).sum(axes, keepdims=True))
        m = jnp.broadcast_to(w if w.ndim == 0 else w.mean(axes, keepdims=True), length.shape)
        terms = (length, m, jnp.where(length > 0, m, 0))
        return tuple(_added(total, m, term) for total, term in zip(sums, terms, strict=True)), length

    # One replica at a time: rounding of a sum over all replicas' elements at once depends on K.
    shape = tuple(1 if axis in axes else n for axis, n in enumerate(x.shape[1:]))
    sums, lengths = jax.lax.scan(measured, (jnp.zeros(shape, x.dtype),) * 3, (w, x))
    v = _weighted_sum(w, x / jnp.where(lengths > 0, lengths, 1), sum_over)
    return _Apart(v, *(_over_devices(total, sum_over) for total in sums))


def _wide(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = accumulator_dtype(x.dtype)
    return w.astype(dtype), x.astype(dtype)


def _recombined(w: jax.Array, x: jax.Array, axes: tuple[int, ...], sum_over: str | None) -> jax.Array:
    """The mean length in the direction of the mean direction; the plain mean where there is none."""
    w, x = _wide(w, x)
    plain = _weighted_sum(w, x, sum_over)
    parts = _apart(w, x, axes, sum_over)

    def combined(g: jax.Array, v: jax.Array, plain: jax.Array) -> jax.Array:
        squared = (v * v).sum(axes, keepdims=True)
        usable = (squared > _VANISHED**2) & jnp.isfinite(g)
        # sqrt has an infinite slope at 0, and searches differentiate through the blend.
        length = jnp.sqrt(jnp.where(usable, squared, 1))
        return jnp.where(usable, jnp.where(usable, g, 0) * v / length, plain)

    # XLA compiles a branch separately; fused with the sums over K, its rounding would depend on K.
    branches = combined, lambda g, v, plain: plain
    return jax.lax.cond((parts.v != 0).any(), *branches, parts.length, parts.v, plain)


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
        return _weighted_sum(w, x, sum_over) if x.ndim < 3 else _recombined(w, x, tuple(range(x.ndim - 2)), sum_over)

    return _leafwise(leaf, stacked, weights)


def radial_directional(stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree:
    """Averages magnitude and direction of every tensor separately: radial-directional averaging, for deltas.

        sum_k w_k |d_k| * v / |v|,    v = sum_k w_k d_k / |d_k|

    Replicas move in nearly orthogonal directions, so the plain mean of K deltas shrinks with sqrt(K), and the outer
    learning rate would have to grow with it. A zero delta has no direction; where the directions cancel (|v| = 0), or a
    magnitude overflows, the result is the plain mean. Douillard et al. 2026 ("Decoupled DiLoCo", arXiv:2604.21428),
    who average embeddings plainly, weigh with `token_weighted` and step with `outer.nesterov`. The formula is that of
    public reimplementations.

    Args:
      stacked: the deltas [K, ...]: `averager(reduce=radial_directional, deltas=True)`.
      weights: as for `weighted_mean`; weights per element as for `norm_preserving`.
      sum_over: as for `weighted_mean`.

    Returns:
      A tree with leaves [...] in their accumulator dtype.

    >>> import jax.numpy as jnp
    >>> deltas = {"w": jnp.array([[4.0, 0.0], [0.0, 4.0]])}
    >>> blend = radial_directional(deltas, jnp.array([0.5, 0.5]))["w"]  # the plain mean is (2, 2), of length 2.83
    >>> round(float(jnp.linalg.norm(blend)), 4)
    4.0
    """
    return _leafwise(lambda w, x: _recombined(w, x, tuple(range(x.ndim - 1)), sum_over), stacked, weights)


def disjoint_mean(stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree:
    """Averages, element by element, the deltas whose sign is that of their weighted sum: TIES's last two steps.

        s = sign(sum_k w_k d_k),    sum_{k: sign(d_k) = s} w_k d_k / sum_{k: sign(d_k) = s} w_k

    0 where the sum is 0. With `transforms.trim_deltas` before it this is TIES-Merging (Yadav et al. 2023,
    arXiv:2306.01708), whose scale lambda is an outer step, `outer.lookahead(lambda)`.

    Args:
      stacked: the deltas [K, ...]: `averager(reduce=disjoint_mean, deltas=True)`.
      weights: as for `weighted_mean`; the paper's are equal.
      sum_over: as for `weighted_mean`.

    Returns:
      A tree with leaves [...] in their accumulator dtype.

    >>> import jax.numpy as jnp
    >>> deltas = {"w": jnp.array([[1.0, 1.0], [3.0, -3.0], [-2.0, 0.0]])}
    >>> disjoint_mean(deltas, jnp.full(3, 1 / 3))["w"].round(4).tolist()  # signs + and -
    [2.0, -3.0]
    """

    def leaf(w: jax.Array, x: jax.Array) -> jax.Array:
        w, x = _wide(w, x)
        elected = jnp.sign(_weighted_sum(w, x, sum_over))
        agrees = (jnp.sign(x) == elected[None]) & (x != 0)
        total = _weighted_sum(w, jnp.where(agrees, x, 0), sum_over)
        share = _weighted_sum(w, agrees.astype(x.dtype), sum_over)
        return jnp.where(share > 0, total / jnp.where(share > 0, share, 1), 0)

    return _leafwise(leaf, stacked, weights)


def model_stock(stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree:
    """Shrinks the mean of the deltas by how much they agree, tensor by tensor: Model Stock, for deltas.

        t * sum_k w_k d_k,    t = N c / (1 + (N - 1) c)

    c is the mean cosine between the deltas of two replicas, at least 0, and N their number. The result is the point
    next to the centre of all possible replicas that lies in the plane of these and the start, if they lie on a sphere
    around that centre (Jang, Yun and Han 2024, arXiv:2403.19522). Replicas that agree are averaged (t = 1), and
    orthogonal ones have learned nothing in common (t = 0). The paper anchors the angles at one pretrained network;
    here the anchor is the round's start, as if each round fine-tuned the last blend.

    With unequal weights c weighs a pair by the product of its weights, and N is the effective number `1 / sum_k w_k^2`
    (`effective_replicas`). A replica that did not move has a cosine of 0 with every other; one alone has t = 1.

    Args:
      stacked: the deltas [K, ...]: `averager(reduce=model_stock, deltas=True)`.
      weights: as for `weighted_mean`; the paper's are equal. Weights per element enter c element by element, and N by
        their mean.
      sum_over: as for `weighted_mean`.

    Returns:
      A tree with leaves [...] in their accumulator dtype.

    >>> import jax.numpy as jnp
    >>> deltas = {"w": jnp.array([[5.0, 0.0], [3.0, 4.0]])}  # mean (4, 2), cosine 0.6: t = 1.2 / 1.6
    >>> model_stock(deltas, jnp.array([0.5, 0.5]))["w"].round(4).tolist()
    [3.0, 1.5]
    """

    def leaf(w: jax.Array, x: jax.Array) -> jax.Array:
        w, x = _wide(w, x)
        mean = _weighted_sum(w, x, sum_over)
        parts = _apart(w, x, tuple(range(x.ndim - 1)), sum_over)

        def shrunk(mean: jax.Array, v: jax.Array, squares: jax.Array, moved: jax.Array) -> jax.Array:
            # |v|^2 sums w_j w_k cos_jk over all pairs, those of a replica with itself included; squares are 1 / N.
            several = 1 - squares > _VANISHED
            cosine = jnp.clip(((v * v).sum() - moved) / jnp.where(several, 1 - squares, 1), 0, 1)
            t = jnp.where(several, cosine / (squares + (1 - squares) * cosine), 1)
            return t * mean

        # As in `_recombined`. Where all directions cancel, there is nothing in common.
        branches = shrunk, lambda mean, v, squares, moved: jnp.zeros_like(mean)
        return jax.lax.cond((parts.v != 0).any(), *branches, mean, parts.v, parts.squares, parts.moved)

    return _leafwise(leaf, stacked, weights)
