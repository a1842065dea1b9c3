"""Pytree arithmetic over the replica axis, and other tree helpers that `optax.tree` lacks."""

import functools
import math
import operator

import jax
import jax.numpy as jnp

from wavg_jax import checks
from wavg_jax.arguments import as_whole
from wavg_jax.base import PyTree, SettingsError


def replicate(tree: PyTree, replicas: int) -> PyTree:
    """Copies every leaf K times: [...] -> [K, ...]; each replica has its own memory, so the result can be donated.

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
      k: 0 to K - 1. A traced `k` is not checked; JAX clamps it.

    Raises:
      SettingsError: there is no such replica, or the leaves differ in K.
    """
    if not isinstance(k, jax.core.Tracer):
        replicas = checks.replicas(stacked)
        if isinstance(k, jax.Array) and not k.ndim and jnp.issubdtype(k.dtype, jnp.integer):
            k = int(k)
        if as_whole("the replica", k) not in range(replicas):
            raise SettingsError(f"there is no replica {k} of {replicas}; they are numbered from 0 to {replicas - 1}")
    return jax.tree.map(lambda x: x[k], stacked)


def count_replicas(stacked: PyTree) -> int:
    """Returns K, the length of a stacked tree's leading axis; raises SettingsError if the leaves differ in it."""
    return checks.replicas(stacked)


def on_cpu() -> bool:
    """Returns whether CPU is JAX's default backend."""
    return jax.default_backend() == "cpu"


def all_finite(stacked: PyTree) -> jax.Array:
    """Returns for each replica whether all its floating-point numbers are finite: bool [K].

    >>> import jax.numpy as jnp
    >>> all_finite({"w": jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])}).tolist()
    [True, False]
    """
    check = _zeros_out if on_cpu() else _each_finite
    return all_of([check(x) for x in floats(stacked)], count_replicas(stacked))


def is_finite(one: PyTree) -> jax.Array:
    """Returns whether all floating-point numbers of a tree are finite: a bool scalar.

    >>> import jax.numpy as jnp
    >>> bool(is_finite({"w": jnp.array([1.0, jnp.inf])}))
    False
    """
    return all_finite([jnp.zeros(1), *(x[None] for x in floats(one))])[0]


def all_of(flags: list[jax.Array], *shape: int) -> jax.Array:
    """Returns where all of some bool arrays [*shape] are true; everywhere, if there are none.

    One reduction instead of a chain of `&`: XLA would repeat the chain in every operation that reads its result, so
    that a program of n leaves had n^2 of them.
    """
    return jax.lax.optimization_barrier(jnp.stack([jnp.ones(shape, bool), *flags])).all(0)


def _each_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)


def _zeros_out(x: jax.Array) -> jax.Array:
    """Returns whether x[k] . 0 == 0 along the last axis of `x` [K, ...]; an infinity or NaN makes the product NaN."""
    # On CPU a matrix-vector product runs at the speed of a copy, reducing `isfinite` at a fifth of it. Other backends
    # call libraries that may skip zeros. The barrier hides the zeros from the compiler, which would fold the product.
    last = x.shape[-1] if x.ndim > 1 else 1
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), last)
    zeros = jax.lax.optimization_barrier(jnp.zeros(rows.shape[-1], x.dtype))
    return (rows @ zeros == 0).all(axis=1)


def tree_name(path: tuple) -> str:
    """The name of a leaf: the keys on the way to it, joined by dots.

    >>> [tree_name(path) for path, _ in jax.tree.leaves_with_path({"dense": [{"bias": 1.0}]})]
    ['dense.0.bias']
    """
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named(*trees: PyTree) -> dict[str, jax.Array]:
    """The leaves of trees by their names.

    Raises:
      SettingsError: two leaves have the same name.

    >>> named({"dense": {"bias": 1.0}}, {"stats": {"mean": 2.0}})
    {'dense.bias': 1.0, 'stats.mean': 2.0}
    """
    found: dict[str, jax.Array] = {}
    for tree in trees:
        for path, x in jax.tree.leaves_with_path(tree):
            name = tree_name(path)
            if name in found:
                raise SettingsError(f"two tensors have the name {name!r}: rename one, or keep dots out of the keys")
            found[name] = x
    return found


def ordered_sum(values: jax.Array) -> jax.Array:
    """Sums values [K, ...] over K, one replica after another.

    The grouping in XLA's own sum depends on K, so the zeros of dead replicas would change the last bit of the total.
    """
    return functools.reduce(operator.add, [values[k] for k in range(values.shape[0])])


def equal_weights(alive: jax.Array) -> jax.Array:
    """Returns weights 1 / n for the n living replicas and 0 for the dead; all 0 if none is alive.

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
    """Takes replica k from the stacked tree `yes` where `mask[k]`, else from `no`; `mask` is bool [K]."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b), yes, no)


def is_key(x: jax.Array) -> bool:
    """Returns whether `x` holds typed random keys; raw uint32 keys look like integers."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_float(x: jax.Array) -> bool:
    """Returns whether `x` holds floating-point numbers, which can be averaged; counts, flags and keys cannot."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def floats(tree: PyTree) -> list[jax.Array]:
    """Returns a tree's floating-point leaves; only these are averaged and exchanged."""
    return [x for x in jax.tree.leaves(tree) if is_float(x)]


def put_floats(tree: PyTree, floats: list[jax.Array]) -> PyTree:
    """Returns the tree with its floating-point leaves replaced by these, which come in the order of `floats(tree)`."""
    leaves, structure = jax.tree.flatten(tree)
    new = iter(floats)
    return jax.tree.unflatten(structure, [next(new) if is_float(x) else x for x in leaves])


def with_floats(stacked: PyTree, one: PyTree) -> PyTree:
    """Gives every replica the floating-point leaves of `one`: [K, ...], [...] -> [K, ...]; other leaves stay.

    >>> stacked = {"moment": jnp.array([1.0, 2.0]), "count": jnp.array([7, 8])}
    >>> {name: x.tolist() for name, x in with_floats(stacked, {"moment": jnp.array(0.0), "count": 0}).items()}
    {'count': [7, 8], 'moment': [0.0, 0.0]}
    """
    return jax.tree.map(lambda x, y: jnp.broadcast_to(y, x.shape).astype(x.dtype) if is_float(x) else x, stacked, one)


def select(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    """Returns the tree `yes` if the bool scalar `condition` is true, else `no`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype for sums and updates of values of `dtype`: at least float32."""
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if wide else jnp.dtype(jnp.float32)


def as_accumulators(tree: PyTree) -> PyTree:
    """Casts every leaf to its accumulator dtype."""
    return jax.tree.map(lambda x: x.astype(accumulator_dtype(x.dtype)), tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Casts every leaf to the dtype of the matching leaf in `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def count(tree: PyTree) -> int:
    """Returns the number of scalars in a tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Returns the size of a tree in bytes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
