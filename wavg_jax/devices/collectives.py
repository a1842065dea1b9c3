"""What devices say to one another inside `jax.shard_map`: one exchange of whole replicas, and sums over samples."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wavg_jax.base import PyTree
from wavg_jax.tree import is_float, is_key

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def gather_rows(axis: str, stacked: PyTree) -> PyTree:
    """Gathers the replicas of all devices on every device: [K/D, ...] -> [K, ...], bit for bit.

    All leaves of one width travel as one array, so that parameters and scores cost one exchange and not one each; on a
    slow link every exchange waits for its own latency.

    Args:
      axis: name of the mapped axis.
      stacked: this device's replicas, leaves [K/D, ...] of any dtype, random keys too.
    """
    leaves, structure = jax.tree.flatten(stacked)
    rows = [_words(x) for x in leaves]
    every = list(rows)
    for width in sorted({row.dtype.itemsize for row in rows}):
        chosen = [i for i, row in enumerate(rows) if row.dtype.itemsize == width]
        together = jax.lax.all_gather(jnp.concatenate([rows[i] for i in chosen], axis=1), axis, axis=0, tiled=True)
        ends = [0]
        for i in chosen:
            ends.append(ends[-1] + rows[i].shape[1])
            every[i] = together[:, ends[-2] : ends[-1]]
    return jax.tree.unflatten(structure, [_restored(row, x) for row, x in zip(every, leaves, strict=True)])


def _words(x: jax.Array) -> jax.Array:
    """A leaf [k, ...] as unsigned words [k, n] of its own width; flags and keys have four bytes, as scores do."""
    if is_key(x):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).reshape(x.shape[0], -1)


def _restored(row: jax.Array, like: jax.Array) -> jax.Array:
    if is_key(like):
        data = row.reshape(row.shape[0], *jax.random.key_data(like).shape[1:])
        return jax.random.wrap_key_data(data, impl=str(jax.random.key_impl(like)))
    shaped = row.reshape(row.shape[0], *like.shape[1:])
    return shaped != 0 if like.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(shaped, like.dtype)


# The two ends of a computation that devices share, for autodiff: what goes in is the same everywhere, and its gradient
# is the sum of the devices' parts; what comes out is a sum, and every part of it gets the whole gradient. Left to
# itself inside shard_map, JAX would take the gradient of a psum to be a psum, and count every device D times.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enter(axis: str, x: jax.Array) -> jax.Array:
    return x


_enter.defvjp(lambda axis, x: (x, None), lambda axis, _, slope: (jax.lax.psum(slope, axis),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _leave(axis: str, parts: PyTree) -> PyTree:
    return jax.lax.psum(parts, axis)


_leave.defvjp(lambda axis, parts: (jax.lax.psum(parts, axis), None), lambda axis, _, slope: (slope,))


def sum_over_samples(axis: str, devices: int, function: Callable[[PyTree, PyTree], PyTree]) -> Callable:
    """Spreads `function(given, samples [N, ...]) -> sums over the samples` over the devices of a mapped axis.

    The gradient with respect to `given` is exchanged in the size of `given`: to differentiate with respect to K
    weights, make the blend of N parameters inside `function`.

    Args:
      axis: name of the mapped axis.
      devices: D, the devices on it.
      function: adds up over the samples it gets.

    Returns:
      The same function, to be called by every device with the same arguments; it returns the same sums on each.
    """

    def run(given: PyTree, samples: PyTree) -> PyTree:
        inside = jax.tree.map(lambda x: _enter(axis, x) if is_float(jnp.asarray(x)) else x, given)
        here = jax.lax.axis_index(axis)
        each, rest = divmod(len(jax.tree.leaves(samples)[0]), devices)
        parts: list[Any] = []
        if each:
            own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, here * each, each), samples)
            parts.append(function(inside, own))
        if rest:  # the few that are left run on every device and count on one
            left = function(inside, jax.tree.map(lambda a: a[-rest:], samples))
            parts.append(jax.tree.map(lambda x: jnp.where(here == 0, x, jnp.zeros_like(x)), left))
        return _leave(axis, functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts))

    return run
