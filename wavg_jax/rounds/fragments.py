"""Fragments: the parameters in groups of whole tensors, which replicas send in turn."""

import math

import jax

from wavg_jax.base import PyTree, SettingsError

Group = tuple[int, ...]
"""The leaves of a fragment, by their place among those of the tree."""


def groups(params: PyTree, count: int) -> tuple[Group, ...]:
    """Groups the leaves of a tree into fragments of about equal size in bytes: the largest leaf goes first, each to the
    smallest fragment so far. No leaf is split, so that one with most of the bytes makes a fragment of its own.

    Raises:
      SettingsError: there are fewer leaves than fragments.

    >>> import jax.numpy as jnp
    >>> groups({"a": jnp.zeros(5), "b": jnp.zeros(2), "c": jnp.zeros(4)}, 2)
    ((0,), (1, 2))
    """
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params)]
    if count > len(sizes):
        raise SettingsError(
            f"AtSync: fragments={count}: the network has {len(sizes)} tensors, and a fragment is at least one; set "
            f"fragments= to {len(sizes)} or less"
        )
    made: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        # Of equal fragments the one with the fewest leaves, so that none stays empty beside empty leaves.
        min(made, key=lambda group: (sum(sizes[j] for j in group), len(group))).append(i)
    return tuple(sorted(tuple(sorted(group)) for group in made))


def take(tree: PyTree, group: Group) -> PyTree:
    """The fragment of a tree: the tree itself, with None in place of all other leaves.

    >>> take({"a": 1, "b": 2, "c": 3}, (0, 2))
    {'a': 1, 'b': None, 'c': 3}
    """
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [x if i in group else None for i, x in enumerate(leaves)])


def put(tree: PyTree, group: Group, fragment: PyTree) -> PyTree:
    """The tree with the leaves of a fragment in their places.

    >>> put({"a": 1, "b": 2, "c": 3}, (0, 2), {"a": 7, "b": None, "c": 9})
    {'a': 7, 'b': 2, 'c': 9}
    """
    leaves, structure = jax.tree.flatten(tree)
    for i, x in zip(group, jax.tree.leaves(fragment), strict=True):
        leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def spread(weights: PyTree, params: PyTree) -> PyTree:
    """A prefix tree of weights with a leaf for every leaf of `params`.

    >>> spread(0.5, {"a": 1, "b": 2})
    {'a': 0.5, 'b': 0.5}
    """
    return jax.tree.map(lambda w, below: jax.tree.map(lambda _: w, below), weights, params)
