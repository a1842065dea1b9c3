"""Random keys: one tree of them, so that no two uses ever share a key.

In JAX `fold_in(key, i)` is `split(key, n)[i]`. So keys differ by their place in a tree, in which every key is either
split, in one place alone, or handed to one consumer:

    key(seed)           init | replicas | states | gradient | fisher          `roots`
      replicas          one key for each of the K
        local step      next step's | fetch | loss                  `wavg_jax.rounds.local`
        sync            next round's | statistics | smoothing | wire | lie      `at_sync`
          re-estimation keys that a state holds | batches, each fetch | loss
      states            one for each of the K, from which the keys inside a state are made     `own`

`Task.init`, `Task.loss` and `augment` are consumers: they may split, fold or draw from the key they get.
"""

import functools
from typing import NamedTuple

import jax

from wavg_jax.base import PyTree
from wavg_jax.tree import is_key


class Roots(NamedTuple):
    """The keys that the key of a run splits into.

    Attributes:
      init: for `Task.init`.
      replicas: parent of every replica's key.
      states: parent of the keys inside optimizer states and mutable collections.
      gradient, fisher: for the signals of these names, which use those of seed 0 in every run.
    """

    init: jax.Array
    replicas: jax.Array
    states: jax.Array
    gradient: jax.Array
    fisher: jax.Array


def roots(rng: jax.Array) -> Roots:
    """Splits the key of a run."""
    return Roots(*jax.random.split(rng, len(Roots._fields)))


class AtSyncKeys(NamedTuple):
    """The keys [K] that the replicas' keys split into at the sync: for the next round, for re-estimating statistics and
    those of smoothed parameters, for the stochastic rounding of a narrow wire, and for simulated noise."""

    following: jax.Array
    statistics: jax.Array
    smoothing: jax.Array
    wire: jax.Array
    lie: jax.Array


def at_sync(rng: jax.Array) -> AtSyncKeys:
    """Splits the replicas' keys [K] at the sync."""
    return AtSyncKeys(*split_each(rng, len(AtSyncKeys._fields)))


def split_each(rng: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """Splits every replica's key into `count`: [K] -> `count` times [K].

    >>> [keys.shape for keys in split_each(jax.random.split(jax.random.key(0), 4), 3)]
    [(4,), (4,), (4,)]
    """
    return tuple(jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(rng))


def own(state: PyTree, rng: jax.Array) -> PyTree:
    """Replaces every typed key in a tree by one that depends on it and on `rng`, of the same shape and kind.

    So replicas that start from copies of one state draw different numbers. A raw uint32 key looks like a count and
    stays the same in every replica; make keys with `jax.random.key`.

    >>> state = {"key": jax.random.key(0), "count": 3}
    >>> a, b = (own(state, rng)["key"] for rng in jax.random.split(jax.random.key(1)))
    >>> a.dtype == state["key"].dtype, bool(a == b), own(state, jax.random.key(1))["count"]
    (True, False, 3)
    """
    leaves, structure = jax.tree.flatten(state)
    held = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and is_key(x)]
    for i, child in zip(held, jax.random.split(rng, len(held)), strict=True):
        each = jax.random.split(child, leaves[i].size)
        leaves[i] = jax.vmap(_made_of)(each, leaves[i].reshape(-1)).reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, leaves)


def _made_of(rng: jax.Array, key: jax.Array) -> jax.Array:
    """A key of the kind of `key` that depends on both."""
    words = jax.random.key_data(key)  # and no draw from it, since it may be split elsewhere
    bits = jax.random.bits(functools.reduce(jax.random.fold_in, words, rng), words.shape)
    return jax.random.wrap_key_data(bits, impl=str(jax.random.key_impl(key)))
