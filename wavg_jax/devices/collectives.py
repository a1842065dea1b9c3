"""What devices say to one another inside `jax.shard_map`: one exchange of whole replicas, and sums over samples."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wavg_jax.base import PyTree
from wavg_jax.tree import floats, is_float, is_key, on_cpu

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


# One exchange at a time: XLA's CPU runs exchanges that do not depend on one another at once, in any order, and gloo
# takes one's numbers for another's. So what travels together travels as one array.
def gather_rows(axis: str, stacked: PyTree) -> PyTree:
    """Gathers the replicas of all devices on every device: [K/D, ...] -> [K, ...], bit for bit, in one exchange.

    Args:
      axis: name of the mapped axis.
      stacked: this device's replicas, leaves [K/D, ...] of any dtype, random keys too.
    """
    leaves, structure = jax.tree.flatten(stacked)
    plain = [_plain(x) for x in leaves]
    # As words of the narrowest kind, which cuts up only the scores beside an int8 payload.
    width = min(x.dtype.itemsize for x in plain)
    rows = [jax.lax.bitcast_convert_type(x, _WORDS[width]).reshape(x.shape[0], -1) for x in plain]
    together = jax.lax.all_gather(jnp.concatenate(rows, axis=1), axis, axis=0, tiled=True)
    parts = _cut(together, [row.shape[1] for row in rows])
    return jax.tree.unflatten(structure, [_restored(row, x) for row, x in zip(parts, leaves, strict=True)])


def _cut(rows: jax.Array, widths: list[int]) -> list[jax.Array]:
    """Cuts the last axis into parts of these widths."""
    ends = list(itertools.accumulate(widths, initial=0))
    return [rows[..., a:b] for a, b in itertools.pairwise(ends)]


def _plain(x: jax.Array) -> jax.Array:
    """Random keys as their integers, and flags in four bytes, as scores have."""
    if is_key(x):
        return jax.random.key_data(x)
    return x.astype(jnp.uint32) if x.dtype == jnp.bool_ else x


def _restored(row: jax.Array, like: jax.Array) -> jax.Array:
    plain = jax.eval_shape(_plain, like)
    words = plain.dtype.itemsize // row.dtype.itemsize
    shaped = row.reshape(row.shape[0], *plain.shape[1:], *([words] if words > 1 else []))
    numbers = jax.lax.bitcast_convert_type(shaped, plain.dtype)
    if is_key(like):
        return jax.random.wrap_key_data(numbers, impl=str(jax.random.key_impl(like)))
    return numbers != 0 if like.dtype == jnp.bool_ else numbers


def sum_trees(axis: str, tree: PyTree) -> PyTree:
    """Adds up the trees of all devices, in one exchange for each dtype, one after another.

    On CPU devices of one process, large leaves are summed in shares instead, where they lie.
    """
    leaves, structure = jax.tree.flatten(tree)
    summed: list[Any] = [_sum_in_shares(axis, x) if _shares_pay(axis, x) else None for x in leaves]
    together = [i for i, x in enumerate(summed) if x is None]
    last = None
    for dtype in sorted({leaves[i].dtype for i in together}, key=str):
        chosen = [i for i in together if leaves[i].dtype == dtype]
        flat = jnp.concatenate([leaves[i].reshape(-1) for i in chosen])
        total = jax.lax.psum(flat if last is None else after(flat, last), axis)
        for i, part in zip(chosen, _cut(total, [leaves[i].size for i in chosen]), strict=True):
            summed[i] = part.reshape(leaves[i].shape)
        last = total
    return jax.tree.unflatten(structure, summed)


_LARGE = 2**18
"""Numbers of a leaf from which adding it up in shares is faster than in one array with the others."""


def _shares_pay(axis: str, x: jax.Array) -> bool:
    return on_cpu() and jax.process_count() == 1 and x.size >= _LARGE and x.size % jax.lax.axis_size(axis) == 0


def _sum_in_shares(axis: str, x: jax.Array) -> jax.Array:
    """Every device adds up a share of the numbers, then all gather the shares.

    XLA's all-reduce between threads of one process has each of them read what all have. This is two to three times as
    fast for millions of numbers, and leaves out the copies into one array and out of it.
    """
    share = jax.lax.psum_scatter(x.reshape(-1), axis, tiled=True)
    return jax.lax.all_gather(share, axis, tiled=True).reshape(x.shape)


def after(x: PyTree, first: PyTree) -> PyTree:
    """`x`, available only once the floating-point leaves of `first` are: for exchanges that must follow one another.

    XLA drops barriers before it schedules, so this is arithmetic that it cannot foresee.
    """
    numbers = [leaf.reshape(-1)[:1].astype(jnp.float32) for leaf in floats(first) if leaf.size]
    if not numbers:
        return x
    never = (jnp.concatenate(numbers) * 0 == 1).any()
    return jax.tree.map(lambda leaf: jnp.where(never, jnp.zeros_like(leaf), leaf), x)


# The two ends of a computation that devices share, for autodiff: what goes in is the same everywhere, and its gradient
# is the sum of the devices' parts; what comes out is a sum, and every part of it gets the whole gradient. Left to
# itself inside shard_map, JAX would take the gradient of a psum to be a psum, and count every device D times.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enter(axis: str, given: list[jax.Array]) -> list[jax.Array]:
    return given


_enter.defvjp(lambda axis, given: (given, None), lambda axis, _, slopes: (sum_trees(axis, slopes),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _leave(axis: str, parts: PyTree) -> PyTree:
    return sum_trees(axis, parts)


_leave.defvjp(lambda axis, parts: (sum_trees(axis, parts), None), lambda axis, _, slope: (slope,))


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
        leaves, structure = jax.tree.flatten(given)
        entered = iter(_enter(axis, [x for x in leaves if is_float(x)]))
        inside = jax.tree.unflatten(structure, [next(entered) if is_float(x) else x for x in leaves])
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
