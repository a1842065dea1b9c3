"""Distances between replicas, and medians and places among the living, rounded the same for any number of dead.

Distances are Euclidean over all tensors together, in float32, one replica or pair at a time: XLA's rounding of several
at once would depend on K.
"""

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax import tree
from wavg_jax.base import PyTree


def _squares(difference: PyTree) -> jax.Array:
    """Sum of squares of the differences [...], in float32."""
    return sum(
        (jnp.square(d.astype(jnp.float32)).sum() for d in jax.tree.leaves(difference)), start=jnp.zeros((), jnp.float32)
    )


def _difference(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, tree.as_accumulators(a), tree.as_accumulators(b))


def from_centre(stacked: PyTree, centre: PyTree) -> jax.Array:
    """Distance of every replica from `centre`: [K]."""
    return jax.lax.map(lambda x: jnp.sqrt(_squares(_difference(x, centre))), stacked)


def per_tensor(stacked: PyTree, centre: PyTree) -> PyTree:
    """Distance of every replica from `centre` in each tensor: a tree with leaves [K]."""
    return jax.lax.map(lambda x: jax.tree.map(lambda d: jnp.sqrt(_squares(d)), _difference(x, centre)), stacked)


def pairwise_squares(stacked: PyTree) -> jax.Array:
    """Squared distances between the replicas, [K, K], with infinity on the diagonal.

    Takes differences directly, one pair at a time, to hold only one: `|a|^2 + |b|^2 - 2ab` loses small distances
    between nearly equal replicas.
    """
    replicas = tree.count_replicas(stacked)
    i, j = (jnp.asarray(index, jnp.int32) for index in np.triu_indices(replicas, 1))
    squares = jax.lax.map(
        lambda pair: _squares(_difference(tree.replica(stacked, pair[0]), tree.replica(stacked, pair[1]))), (i, j)
    )
    return jnp.full((replicas, replicas), jnp.inf, jnp.float32).at[i, j].set(squares).at[j, i].set(squares)


def over(mask: jax.Array, values: jax.Array) -> jax.Array:
    """Reshapes a number per replica [K] to broadcast against values [K, ...]."""
    return mask.reshape(mask.shape + (1,) * (values.ndim - 1))


def ranks(values: jax.Array, alive: jax.Array) -> jax.Array:
    """How many living values come before each of the values [K, ...], ties in the order of the replicas: int32."""
    index = over(jnp.arange(values.shape[0]), values)
    rank = jnp.zeros(values.shape, jnp.int32)
    for j in range(values.shape[0]):
        before = (values[j][None] < values) | ((values[j][None] == values) & (j < index))
        rank = rank + (before & alive[j]).astype(jnp.int32)
    return rank


def median(values: jax.Array, alive: jax.Array) -> jax.Array:
    """Median of values [K, ...] over the living replicas: [...], 0 if there are none."""
    rank, n = ranks(values, alive), alive.sum(dtype=jnp.int32)

    def at(place: jax.Array) -> jax.Array:
        found = jnp.zeros(values.shape[1:], values.dtype)
        for k in range(values.shape[0]):
            found = jnp.where(alive[k] & (rank[k] == place), values[k], found)
        return found

    return at((n - 1) // 2) / 2 + at(n // 2) / 2


def places(values: jax.Array, keep: jax.Array | int, alive: jax.Array) -> jax.Array:
    """Gives the `keep` smallest living values [K, ...] a place each: 1, or a share where values tie for the last.

    >>> places(jnp.array([3.0, 1.0, 3.0, 9.0]), 2, jnp.ones(4, bool)).tolist()
    [0.5, 1.0, 0.5, 0.0]
    """
    smaller, equal = (jnp.zeros(values.shape, jnp.int32) for _ in range(2))
    for j in range(values.shape[0]):
        one = values[j][None]
        smaller = smaller + (alive[j] & (one < values)).astype(jnp.int32)
        equal = equal + (alive[j] & (one == values)).astype(jnp.int32)
    free = jnp.clip(keep - smaller, 0, equal).astype(jnp.float32)
    return jnp.where(over(alive, values), free / jnp.maximum(equal, 1).astype(jnp.float32), 0)
