"""Names, directions and shapes of the signals that a weighting can request.

A signal is one number per replica [K], or a tree like the parameters with one number per tensor (leaves [K]) or per
element (leaves [K, *shape]). `wavg_jax.rounds.score` measures them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wavg_jax import checks, tree
from wavg_jax.base import PyTree, SettingsError

__all__ = ["FREE", "HIGHER_IS_BETTER", "OF_SAMPLES", "direction", "values_of", "zeros"]


def __dir__() -> list[str]:
    return __all__


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
"""Every signal that `fit` can measure, and whether higher is better."""

FREE = ("train_loss", "samples", "steps")
"""Signals that need no extra pass. They are the mean loss over the round's local steps (nats), the number of samples in
the replica's shard, and the number of local steps it took."""

OF_SAMPLES = ("logits", "labels", "evaluate")
"""Signals that are no scores. They are the replicas' logits on held-out samples [K, S, C], float32; the samples' labels
[S], integers; and the metrics of a blend, a function `(params, weights [K]) -> {metric: scalar}`."""


_PER_TENSOR: dict[str, Callable[[jax.Array], tuple[int, ...]]] = {
    "layer_grad_norm": lambda leaf: (),
    "fisher": lambda leaf: leaf.shape,
}
"""Tree-shaped signals: maps a tensor of one replica to the shape of its signal."""


def zeros(name: str, params: PyTree, replicas: int) -> PyTree:
    """Returns a zero signal in the shape that `fit` measures: [K], or a tree with leaves [K] or [K, *shape]; float32.
    Logits and labels are those of one sample and two classes.

    Signals unknown to the library are assumed to be [K].

    >>> zeros("layer_grad_norm", {"w": jnp.ones((2, 3))}, 4)["w"].shape, zeros("loss", None, 4).shape
    ((4,), (4,))
    """
    if name == "labels":
        return jnp.zeros(1, jnp.int32)
    if name == "logits":
        return jnp.zeros((replicas, 1, 2), jnp.float32)
    if name not in _PER_TENSOR:
        return jnp.zeros(replicas, jnp.float32)
    return tree.replicate(jax.tree.map(lambda x: jnp.zeros(_PER_TENSOR[name](x), jnp.float32), params), replicas)


def direction(signal: str, higher_is_better: bool | None = None) -> float:
    """Returns 1 if higher values of a signal are better, -1 if lower ones are; `HIGHER_IS_BETTER` is the default.

    Raises:
      SettingsError: the direction of an unknown signal is missing, or `higher_is_better` is not a bool.

    >>> direction("loss"), direction("accuracy"), direction("profit", higher_is_better=True)
    (-1.0, 1.0, 1.0)
    """
    known = HIGHER_IS_BETTER.get(signal) if higher_is_better is None else higher_is_better
    if known is None:
        raise SettingsError(f"the direction of {signal!r} is unknown; pass higher_is_better=True or False")
    if not isinstance(known, bool):
        raise SettingsError(f"higher_is_better is {known!r}; it must be True or False")
    return 1.0 if known else -1.0


def values_of(signal: str, signals: Mapping[str, Any], alive: jax.Array) -> PyTree:
    """Returns the named signal from `update`'s arguments as float32 and checks its shape; a list becomes an array."""
    given = signals[signal]
    if isinstance(given, list | tuple) and all(jnp.isscalar(x) or getattr(x, "ndim", None) == 0 for x in given):
        given = jnp.asarray(given, jnp.float32)

    def leaf(values: jax.Array) -> jax.Array:
        values = checks.as_array(f"the signal {signal!r}", values).astype(jnp.float32)
        if values.shape[:1] != alive.shape:
            raise SettingsError(
                f"the signal {signal!r} has an entry of shape {values.shape}; it must be an array with one entry per "
                f"replica, [{alive.shape[0]}, ...], or a tree of them like the parameters"
            )
        return values

    return jax.tree.map(leaf, given)
