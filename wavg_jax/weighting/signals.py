"""The signals that a weighting can ask for: their names, which way is better, and their shapes.

A signal is one number per replica [K], or a tree like the parameters with one number per tensor (leaves [K]) or per
element (leaves [K, *shape]). `wavg_jax.rounds.score` measures them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.base import PyTree, SettingsError

HIGHER_IS_BETTER = {
    "accuracy": True,
    "loss": False,
    "absolute_error": False,
    "macro_f1": True,
    "ece": False,
    "grad_norm": False,
    "layer_grad_norm": False,
    "fisher": True,
    "distance": False,
    "train_loss": False,
    "samples": True,
    "steps": True,
}
"""Every signal that `fit` can measure, and which way is better."""

FREE = ("train_loss", "samples", "steps")
"""Signals that need no pass: the mean loss over the round's local steps (nats), the samples in the replica's shard, and
the local steps it did."""


_PER_TENSOR: dict[str, Callable[[jax.Array], tuple[int, ...]]] = {
    "layer_grad_norm": lambda leaf: (),
    "fisher": lambda leaf: leaf.shape,
}
"""Signals that are trees like the parameters, and the shape of what they tell of one tensor of one replica."""


def zeros(name: str, params: PyTree, replicas: int) -> PyTree:
    """A signal of 0 in the shape in which `fit` measures it: [K], or a tree with leaves [K] or [K, *shape]; float32.

    Signals that the library does not know are taken for [K].

    >>> zeros("layer_grad_norm", {"w": jnp.ones((2, 3))}, 4)["w"].shape, zeros("loss", None, 4).shape
    ((4,), (4,))
    """
    if name not in _PER_TENSOR:
        return jnp.zeros(replicas, jnp.float32)
    return tree.replicate(jax.tree.map(lambda x: jnp.zeros(_PER_TENSOR[name](x), jnp.float32), params), replicas)


def direction(signal: str, higher_is_better: bool | None = None) -> float:
    """1 where more of a signal is better, -1 where less is; what is not said is looked up in `HIGHER_IS_BETTER`.

    Raises:
      SettingsError: neither said nor known, or not said by True or False.

    >>> direction("loss"), direction("accuracy"), direction("profit", higher_is_better=True)
    (-1.0, 1.0, 1.0)
    """
    known = HIGHER_IS_BETTER.get(signal) if higher_is_better is None else higher_is_better
    if known is None:
        raise SettingsError(f"whether more of {signal!r} is better is not known; say higher_is_better=True or False")
    if not isinstance(known, bool):
        raise SettingsError(f"higher_is_better is {known!r}; say True or False")
    return 1.0 if known else -1.0


def values_of(signal: str, signals: Mapping[str, Any], alive: jax.Array) -> PyTree:
    """One of the signals that `update` was given, in float32, with its shape checked; a list of numbers is an array."""
    given = signals[signal]
    if isinstance(given, list | tuple) and all(jnp.isscalar(x) or getattr(x, "ndim", None) == 0 for x in given):
        given = jnp.asarray(given, jnp.float32)

    def leaf(values: jax.Array) -> jax.Array:
        values = jnp.asarray(values, jnp.float32)
        if values.shape[:1] != alive.shape:
            raise SettingsError(
                f"the signal {signal!r} has an entry of shape {values.shape}; it must be an array with one entry per "
                f"replica, [{alive.shape[0]}, ...], or a tree of them like the parameters"
            )
        return values

    return jax.tree.map(leaf, given)
