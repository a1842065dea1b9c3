"""Trace-time checks of structure, shape and dtype; they cost the compiled program nothing."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax.base import PyTree, SettingsError


def _named(name: str, tree: PyTree) -> dict[str, Any]:
    """Maps each leaf's expression, such as `params['dense']['bias']`, to the leaf."""
    return {name + jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def _leaves(name: str, tree: PyTree) -> dict[str, Any]:
    """Like `_named`, but raises SettingsError for a leaf that is not an array."""
    leaves = _named(name, tree)
    for where, x in leaves.items():
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise SettingsError(f"{where} is a {type(x).__name__}; it must be an array, e.g. jnp.asarray(...)")
    return leaves


def arrays(name: str, tree: PyTree) -> None:
    """Raises SettingsError if a tree has no leaves or a leaf is not an array."""
    if not _leaves(name, tree):
        raise SettingsError(f"{name} is {tree!r}, which holds no arrays; give a tree of arrays")


def parameters(name: str, tree: PyTree) -> None:
    """Raises SettingsError if a tree has no leaves or a leaf is not a floating-point array."""
    arrays(name, tree)
    for where, x in _named(name, tree).items():
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise SettingsError(
                f"{where} is {x.dtype}; only floating-point numbers are trained and averaged: keep counts, flags and "
                "random keys out of the parameters (in fit, put them in the mutable collections)"
            )


def _same_tree(name: str, tree: PyTree, of: str, like: PyTree, fix: str) -> None:
    structures: list[Any] = [jax.tree.structure(t) for t in (tree, like)]
    if structures[0] == structures[1]:
        return
    ours, theirs = ([jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(t)] for t in (tree, like))
    more, fewer = [p for p in ours if p not in theirs], [p for p in theirs if p not in ours]
    if fewer:
        difference = f"there is no {name}{fewer[0]}" + (f", but {name}{more[0]}" if more else "")
    elif more:
        difference = f"{name}{more[0]} is not in {of}"
    else:
        difference = (
            f"one is a {type(tree).__name__}, the other a {type(like).__name__}, or their nested containers differ"
        )
    raise SettingsError(f"{name} is not a tree like {of}: {difference}; {fix}")


def alike(name: str, tree: PyTree, of: str, like: PyTree, fix: str) -> None:
    """Raises a SettingsError that ends in `fix` unless two trees have the same structure and shapes."""
    _same_tree(name, tree, of, like, fix)
    for (where, x), y in zip(_named(name, tree).items(), jax.tree.leaves(like), strict=True):
        if np.shape(x) != np.shape(y):
            raise SettingsError(f"{where} has shape {np.shape(x)} where {of} has {np.shape(y)}; {fix}")


_REPLICATE = "use wavg.replicate(params, K)"


def stacked(tree: PyTree, like: PyTree, name: str = "stacked", of: str = "params") -> int:
    """Checks that each leaf of `tree` is [K, *shape] for a leaf [*shape] of `like`, with the same dtype.

    Returns:
      K, the number of replicas.

    Raises:
      SettingsError: the structure, a shape or a dtype differs, or K is 0. The message names the leaf.
    """
    arrays(of, like)
    _same_tree(name, tree, of, like, _REPLICATE)
    pairs = [(where, x, y) for (where, x), y in zip(_leaves(name, tree).items(), jax.tree.leaves(like), strict=True)]
    fitting = [x.shape[0] for _, x, y in pairs if x.ndim and x.shape[1:] == y.shape]
    replicas = fitting[0] if fitting else None
    for where, x, y in pairs:
        if not x.ndim or x.shape != (replicas, *y.shape):
            wanted = ", ".join(map(str, ("K" if replicas is None else replicas, *y.shape)))
            raise SettingsError(
                f"{where} has shape {x.shape}; with {of}{where.removeprefix(name)} of shape {y.shape} it must be "
                f"[{wanted}], with a leading axis of K replicas; {_REPLICATE}"
            )
        if jnp.result_type(x) != jnp.result_type(y):
            raise SettingsError(
                f"{where} is {x.dtype}, {of}{where.removeprefix(name)} {y.dtype}; give both the same dtype (x.astype)"
            )
    if not replicas:
        raise SettingsError(f"{name} holds 0 replicas; {_REPLICATE} with K of at least 1")
    return replicas


def replicas(tree: PyTree) -> int:
    """Returns K, the length of the leading axis that all leaves of a stacked tree share.

    Raises:
      SettingsError: the leaves differ in it, or there are none.
    """
    leaves = _leaves("stacked", tree)
    if not leaves:
        raise SettingsError("stacked holds no arrays, so the number of replicas is unknown")
    (first, x), *_ = leaves.items()
    for where, y in leaves.items():
        if not y.ndim or y.shape[:1] != x.shape[:1]:
            raise SettingsError(
                f"{first} has shape {x.shape} and {where} {y.shape}: the leading axis of every leaf must be the "
                f"replica axis; {_REPLICATE}"
            )
    return int(x.shape[0])


def _as_counted(given: Any) -> Any:
    """Whole numbers that int32 cannot hold, which JAX wraps without a word, as float32."""
    whole = isinstance(given, np.ndarray) and given.dtype.kind in "iu" and given.dtype.itemsize > 4
    return given.astype(np.float32) if whole and np.abs(given.astype(np.float64)).max(initial=0) >= 2**31 else given


def as_array(name: str, given: Any) -> jax.Array:
    """Returns `given` as an array; raises SettingsError if it makes none of real numbers."""
    try:
        made = jnp.asarray(_as_counted(given))
    except (TypeError, ValueError, OverflowError):
        made = None
    if made is None or jnp.issubdtype(made.dtype, jnp.complexfloating):
        raise SettingsError(f"{name} is a {type(given).__name__}; it must be an array of real numbers")
    return made


def mask(alive: Any, replicas: int | None = None) -> jax.Array:
    """Returns `alive` as an array; raises SettingsError unless it is bool [K], with K = `replicas` if given."""
    if alive is None:
        raise SettingsError("alive= is missing; it must be a bool for each replica, [K]")
    alive = as_array("alive", alive)
    fits = alive.ndim == 1 if replicas is None else alive.shape == (replicas,)
    if not fits or alive.dtype != bool:
        wanted = "K" if replicas is None else replicas
        raise SettingsError(
            f"alive is {alive.dtype} of shape {alive.shape}; it must be a bool for each replica, [{wanted}]"
        )
    return alive


def signals(needs: Iterable[str], given: Mapping[str, Any]) -> None:
    """Raises SettingsError if a signal that a weighting needs is missing."""
    missing = sorted(set(needs) - set(given))
    if missing:
        what = "one number per replica [K], which fit and make_rounds measure themselves"
        if missing[0] == "evaluate":
            what = "a function (params, weights) -> {'loss': ..., 'accuracy': ...} of a blend on held-out data"
        if missing[0] in ("logits", "labels"):
            what = "logits of every replica on held-out samples [K, S, C], or the samples' labels [S]"
        raise SettingsError(f"the weighting needs the signal {missing[0]!r}: pass {missing[0]}= to update, {what}")


def weights(given: PyTree, stacked: PyTree) -> None:
    """Raises SettingsError unless weights are a prefix tree of a stacked tree, with leaves [K] or one per element."""
    try:
        wide = jax.tree.leaves(jax.tree.broadcast(given, stacked))
    except ValueError:
        raise SettingsError(
            f"the weights, a {type(given).__name__}, are not a prefix of the parameter tree; give one array "
            "[K] for the whole tree, or one for each branch or leaf"
        ) from None
    for (where, x), w in zip(_leaves("stacked", stacked).items(), wide, strict=True):
        if not x.ndim or jnp.shape(w) not in (x.shape[:1], x.shape):
            raise SettingsError(
                f"the weights of {where} have shape {jnp.shape(w)}; for a leaf of shape {x.shape} they must be "
                f"[K], {x.shape[:1]}, or one per element, {x.shape}"
            )


def pair(name: str, given: Any, of: str) -> tuple[Any, Any]:
    """Returns `given`, the result of the function `name`; raises SettingsError unless it is the pair `of`."""
    if not isinstance(given, tuple) or len(given) != 2:
        raise SettingsError(f"{name} returns {_kind(given)}; it must return a pair, {of}")
    return given


def _kind(given: Any) -> str:
    return f"a tuple of {len(given)}" if isinstance(given, tuple) else f"a {type(given).__name__}"


def broadcasts(name: str, given: Any, shape: tuple[int, ...], fix: str) -> None:
    """Raises a SettingsError that ends in `fix` unless `given` is an array that broadcasts to `shape`."""
    arrays(name, given)
    try:
        fits = np.broadcast_shapes(given.shape, shape) == shape
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        found = f"has shape {given.shape}" if hasattr(given, "shape") else f"is a {type(given).__name__}"
        raise SettingsError(f"{name} {found} for a leaf of shape {shape}; {fix}")
