"""The reductions over the replica axis: the only code that sums over replicas."""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from wavg_jax.base import PyTree
from wavg_jax.tree import accumulator_dtype


class Reduction(Protocol):
    """`reduce(stacked, weights, *, sum_over=None) -> tree`; see `weighted_mean` for the shapes.

    With replicas on several devices it is called on each device's own, and `sum_over` names the mapped axis over which
    it has to add up, with `jax.lax.psum`, what each has summed.
    """

    def __call__(self, stacked: PyTree, weights: PyTree, *, sum_over: str | None = None) -> PyTree: ...


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

    >>> import jax.numpy as jnp
    >>> stacked = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "b": jnp.array([1.0, jnp.nan])}
    >>> blend = weighted_mean(stacked, {"w": jnp.array([0.25, 0.75]), "b": jnp.array([1.0, 0.0])})
    >>> blend["w"].tolist(), blend["b"].tolist()
    ([2.5, 5.0], 1.0)
    """

    def leaf(w: jax.Array, x: jax.Array) -> jax.Array:
        dtype = accumulator_dtype(x.dtype)
        w = w.astype(dtype)
        # Unrolled over K: XLA fuses it into one pass at copy speed, where `(w * x).sum(0)` reaches a thirtieth of it.
        total = jnp.zeros(x.shape[1:], dtype)
        for k in range(x.shape[0]):
            # Skipped, not added as 0: the compiler rounds a sum of products by how many there are.
            total = jnp.where(w[k] != 0, total + w[k] * x[k].astype(dtype), total)
        return total if sum_over is None else jax.lax.psum(total, sum_over)

    return jax.tree.map(lambda w, sub: jax.tree.map(functools.partial(leaf, w), sub), weights, stacked)
