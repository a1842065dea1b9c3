"""Pytree arithmetic over the replica axis; everything that does not touch that axis is `optax.tree`'s business."""

import functools
import math
import operator

import jax
import jax.numpy as jnp

from wavg_jax import checks
from wavg_jax.arguments import as_whole
from wavg_jax.base import PyTree, SettingsError


def replicate(tree: PyTree, replicas: int) -> PyTree:
    """Copies every leaf K times: [...] -> [K, ...], each replica with memory of its own, so that it can be donated.

    Raises:
      SettingsError: `replicas` is not a whole number of at least 1.

    >>> import jax.numpy as jnp
    >>> replicate({"w": jnp.ones((2, 3))}, 4)["w"].shape
    (4, 2, 3)
    """
    replicas = as_whole("replicas", replicas, 1)
    return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], replicas, axis=0), tree)


def replica(stacked: PyTree, k: int | jax.Array) -> PyTree:
    """Takes replica `k` out of a stacked tree: [K, ...] -> [...].

    Args:
      stacked: tree with leaves [K, ...].
      k: 0 to K - 1. A traced `k` cannot be checked, and is clamped as JAX clamps indices.

    Raises:
      SettingsError: there is no such replica, or the leaves do not have one K.
    """
    if not isinstance(k, jax.core.Tracer):
        replicas = checks.replicas(stacked)
        if isinstance(k, jax.Array) and not k.ndim and jnp.issubdtype(k.dtype, jnp.integer):
            k = int(k)
        if as_whole("the replica", k) not in range(replicas):
            raise SettingsError(f"there is no replica {k} of {replicas}; they are numbered from 0 to {replicas - 1}")
    return jax.tree.map(lambda x: x[k], stacked)


def count_replicas(stacked: PyTree) -> int:
    """Returns K, the length of the leading axis of a stacked tree's leaves; SettingsError if they differ in it."""
    return checks.replicas(stacked)


def on_cpu() -> bool:
    """Whether programs run on the host's processor."""
    return jax.default_backend() == "cpu"


def all_finite(stacked: PyTree) -> jax.Array:
    """Says for each replica whether all its floating-point numbers are finite: bool [K].

    >>> import jax.numpy as jnp
    >>> all_finite({"w": jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])}).tolist()
    [True, False]
    """
    floats = [x for x in jax.tree.leaves(stacked) if jnp.issubdtype(x.dtype, jnp.inexact)]
    check = _zeros_out if on_cpu() else _each_finite
    finite = [check(x.reshape(x.shape[0], -1)) for x in floats]
    return functools.reduce(operator.and_, finite, jnp.ones(count_replicas(stacked), bool))


def _each_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all(axis=1)


def _zeros_out(x: jax.Array) -> jax.Array:
    """Whether x[k] . 0 = 0 for each row of `x` [K, n], which it is not if a number is infinite or NaN."""
    # On CPU a product with a vector runs at the speed of a copy, the reduction of `isfinite` at a fifth of it.
    # Elsewhere the product is another library's, which may skip zeros. The compiler must not know them, or it would
    # know the result.
    zeros = jax.lax.optimization_barrier(jnp.zeros(x.shape[1], x.dtype))
    return x @ zeros == 0


def ordered_sum(values: jax.Array) -> jax.Array:
    """Sums [K] numbers one after another.

    XLA's own sum groups them by K, so that zeros for dead replicas would change the last bit of what the others sum to.
    """
    return functools.reduce(operator.add, [values[k] for k in range(values.shape[0])])


def equal_weights(alive: jax.Array) -> jax.Array:
    """Weights of 1 / n for the n living replicas and 0 for the dead; all 0 if none lives.

    Args:
      alive: bool [K].

    Returns:
      float32 [K].

    >>> equal_weights(jnp.array([True, False, True])).tolist()
    [0.5, 0.0, 0.5]
    """
    living = alive.astype(jnp.float32)
    return living / jnp.maximum(living.sum(), 1)


def select_replicas(mask: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    """Takes replica k from stacked tree `yes` where `mask[k]`, else from stacked tree `no`; `mask` is bool [K]."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b), yes, no)


def is_key(x: jax.Array) -> bool:
    """Whether `x` holds typed random keys. A raw uint32 key cannot be told from integers."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_float(x: jax.Array) -> bool:
    """Whether `x` holds floating-point numbers, which can be averaged; counts, flags and random keys cannot."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def floats(tree: PyTree) -> list[jax.Array]:
    """The floating-point leaves of a tree, which are what is averaged and exchanged."""
    return [x for x in jax.tree.leaves(tree) if is_float(x)]


def with_floats(stacked: PyTree, one: PyTree) -> PyTree:
    """Gives every replica the floating-point leaves of `one`: [K, ...], [...] -> [K, ...]; it keeps its other leaves.

    >>> stacked = {"moment": jnp.array([1.0, 2.0]), "count": jnp.array([7, 8])}
    >>> {name: x.tolist() for name, x in with_floats(stacked, {"moment": jnp.array(0.0), "count": 0}).items()}
    {'count': [7, 8], 'moment': [0.0, 0.0]}
    """
    return jax.tree.map(lambda x, y: jnp.broadcast_to(y, x.shape).astype(x.dtype) if is_float(x) else x, stacked, one)


def select(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    """Takes the whole tree `yes` if the bool scalar `condition` holds, else `no`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which values of `dtype` are summed and updated: at least float32."""
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if wide else jnp.dtype(jnp.float32)


def as_accumulators(tree: PyTree) -> PyTree:
    """Casts every leaf to its accumulator dtype."""
    return jax.tree.map(lambda x: x.astype(accumulator_dtype(x.dtype)), tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Casts every leaf to the dtype of its counterpart in `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def count(tree: PyTree) -> int:
    """Returns how many numbers a tree holds."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Returns how many bytes a tree holds."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
