"""How a device runs its replicas: all at once by `vmap`, in turn by a loop, or unrolled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.arguments import shown
from wavg_jax.base import PyTree, SettingsError

Mapped = Callable[[PyTree, PyTree], PyTree]
"""`(stacked, shared) -> stacked out`, made from `f(one, shared) -> out` for one replica."""


def _together(function: Callable) -> Mapped:
    def mapped(stacked: PyTree, shared: PyTree) -> PyTree:
        return jax.vmap(function, in_axes=(0, None))(stacked, shared)

    return mapped


def _in_turn(function: Callable) -> Mapped:
    def mapped(stacked: PyTree, shared: PyTree) -> PyTree:
        def one(k: jax.Array | int) -> PyTree:
            return function(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), stacked), shared)

        def write(k: jax.Array, outs: PyTree) -> PyTree:
            return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, k, 0), outs, one(k))

        replicas = tree.count_replicas(stacked)
        # Zeros of what is given, else XLA sets their buffers aside before what comes before the loop has run.
        zero = next((x.ravel()[0] * 0 for x in jax.tree.leaves(stacked) if tree.is_float(x) and x.size), 0)

        def zeros(x: Any) -> jax.Array:
            if tree.is_key(x):
                return jax.lax.full((replicas, *x.shape), 0, x.dtype)
            return jnp.broadcast_to(jnp.asarray(zero, x.dtype), (replicas, *x.shape))

        return jax.lax.fori_loop(0, replicas, write, jax.tree.map(zeros, jax.eval_shape(one, 0)))

    return mapped


def _written_out(function: Callable) -> Mapped:
    def mapped(stacked: PyTree, shared: PyTree) -> PyTree:
        outs = [function(tree.replica(stacked, k), shared) for k in range(tree.count_replicas(stacked))]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *outs)

    return mapped


def _in_place(function: Callable) -> Mapped:
    def mapped(stacked: PyTree, shared: PyTree) -> PyTree:
        held, given = stacked

        def body(held: PyTree, item: PyTree) -> tuple[PyTree, PyTree]:
            k, given = item
            one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), held)
            new, out = function((one, given), shared)
            return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, k, 0), held, new), out

        return jax.lax.scan(body, held, (jnp.arange(tree.count_replicas(held)), given))

    return mapped


MAPS: dict[str, Callable[[Callable], Mapped]] = {"vmap": _together, "map": _in_turn, "unroll": _written_out}
"""The results agree up to rounding; which is fastest depends on the network and the backend, see
`wavg_jax.training.automap`. `vmap` batches all replicas into each operation and holds the activations of all at once;
`map` loops over the replicas; `unroll` repeats the program for each replica, so compiling takes K times as long."""


def mapped(name: str, function: Callable, *, in_place: bool = False) -> Mapped:
    """Maps a function of one replica over stacked replicas.

    Args:
      name: a name in `MAPS`.
      function: `(one, shared) -> out` for one replica.
      in_place: it is `((held, given), shared) -> (held, out)`, and what is held may be overwritten: the loop of `map`
        then keeps one copy of it instead of two.

    Returns:
      `(stacked, shared) -> out`, leaves [K, ...].

    Raises:
      SettingsError: there is no such mapping.

    >>> import jax.numpy as jnp
    >>> mapped("map", lambda x, shared: x + shared)(jnp.arange(3.0), jnp.float32(1)).tolist()
    [1.0, 2.0, 3.0]
    """
    check(name)

    def run(stacked: PyTree, shared: PyTree) -> PyTree:
        if tree.count_replicas(stacked) == 1:  # without vmap, one replica runs 1.3 times faster on CPU
            return jax.tree.map(lambda x: x[None], function(tree.replica(stacked, 0), shared))
        make = _in_place if in_place and name == "map" else MAPS[name]
        return make(function)(stacked, shared)

    return run


def check(name: Any, *more: str) -> None:
    """Raises SettingsError if `name` is neither a mapping nor one of `more`."""
    if not isinstance(name, str) or name not in (*MAPS, *more):
        raise SettingsError(f"replica_map={shown(name)}: set replica_map= to one of {', '.join((*more, *MAPS))}")
