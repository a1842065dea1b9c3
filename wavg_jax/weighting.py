"""Weightings: from what was measured of K replicas to weights that sum to 1.

Each is a function that returns a `Weighting`. All of them give weight 0 to dead replicas, survive scores that are zero,
negative, NaN or infinite, and fall back to equal weights over the living when no score is usable.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.base import PyTree, SettingsError, Weighting
from wavg_jax.signals import HIGHER_IS_BETTER


def normalise(scores: jax.Array, alive: jax.Array) -> jax.Array:
    """Turns scores into weights: `w_k = s_k / sum_j s_j` over the living.

    Args:
      scores: [K]; larger is better. Zero, negative, NaN and infinite scores get weight 0.
      alive: bool [K].

    Returns:
      Weights [K] float32 that sum to 1; equal over the living if no score is usable; all 0 if none is alive.

    >>> import jax.numpy as jnp
    >>> normalise(jnp.array([3.0, 1.0, jnp.nan, 9.0]), jnp.array([True, True, True, False])).round(4).tolist()
    [0.75, 0.25, 0.0, 0.0]
    >>> normalise(jnp.array([0.0, -1.0, 5.0]), jnp.array([True, True, False])).tolist()
    [0.5, 0.5, 0.0]
    """
    scores = jnp.asarray(scores, jnp.float32)
    usable = alive & jnp.isfinite(scores) & (scores > 0)
    kept = jnp.where(usable, scores, 0)
    kept = kept / jnp.maximum(kept.max(), jnp.finfo(jnp.float32).tiny)  # the sum of huge scores would overflow
    total = tree.ordered_sum(kept)
    equal = alive.astype(jnp.float32) / jnp.maximum(alive.sum(dtype=jnp.float32), 1)
    return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), equal)


def per_replica(weights: PyTree) -> jax.Array:
    """Sums a weighting's weights up as one number per replica: [K], the mean over layers and elements."""
    means = [w.reshape(w.shape[0], -1).mean(axis=1) for w in jax.tree.leaves(weights)]
    return jnp.stack(means).mean(axis=0)


def effective_replicas(weights: jax.Array) -> jax.Array:
    """Kish's effective number of replicas, `1 / sum_k w_k^2`: K for equal weights, 1 when one replica has it all.

    >>> import jax.numpy as jnp
    >>> round(float(effective_replicas(jnp.array([0.5, 0.5, 0.0, 0.0]))), 3)
    2.0
    """
    squares = jnp.sum(weights * weights)
    return jnp.where(squares > 0, 1 / jnp.where(squares > 0, squares, 1), 0)


def _from_scores(scores: Callable[..., jax.Array], needs: tuple[str, ...]) -> Weighting:
    """The weighting without state whose weights are `scores(alive, **signals)`, normalised."""

    def update(
        stacked: PyTree, state: PyTree, params: PyTree, *, alive: jax.Array, **signals: Any
    ) -> tuple[jax.Array, PyTree]:
        del stacked, params
        return normalise(scores(alive, **{name: signals[name] for name in needs}), alive), state

    return Weighting(lambda params, replicas=None: (), update, needs)


def _check_direction(signal: str, higher_is_better: bool, instead: str) -> None:
    if HIGHER_IS_BETTER.get(signal, higher_is_better) != higher_is_better:
        raise SettingsError(f"this would trust the replica with the worst {signal} most; use {instead}({signal!r})")


def uniform() -> Weighting:
    """Equal weights, `w_k = 1 / K` over the living: conventional averaging (McMahan et al. 2017; Stich 2019)."""
    return _from_scores(lambda alive: jnp.ones(alive.shape, jnp.float32), ())


def proportional(signal: str = "accuracy") -> Weighting:
    """Weights in proportion to a score where more is better, `w_k = s_k / sum_j s_j`.

    With held-out accuracy this is the weighting that Ramroach and Joshi (2021) describe in words: sub-networks are not
    equal, so they are not treated as equals when the weights are averaged.

    Args:
      signal: name of a signal [K] that is not negative.

    Raises:
      SettingsError: less is better of this signal.
    """
    _check_direction(signal, higher_is_better=True, instead="inverse")
    return _from_scores(lambda alive, **signals: signals[signal], (signal,))


def inverse(signal: str = "loss") -> Weighting:
    """Weights in inverse proportion to a score where less is better, `w_k = (1/s_k) / sum_j (1/s_j)`.

    With `grad_norm` this is the model-level form of GRAWA (Dimlioglu and Choromanska, 2024). A score of 0 counts as
    1e-12 of the unit; negative scores get weight 0.

    Args:
      signal: name of a signal [K] that is not negative.

    Raises:
      SettingsError: more is better of this signal.
    """
    _check_direction(signal, higher_is_better=False, instead="proportional")

    def scores(alive: jax.Array, **signals: jax.Array) -> jax.Array:
        s = jnp.asarray(signals[signal], jnp.float32)
        usable = alive & jnp.isfinite(s) & (s >= 0)
        s = jnp.maximum(s, 1e-12)
        best = jnp.where(usable, s, jnp.inf).min()  # relative to the best, so that nothing overflows
        return jnp.where(usable, best / s, 0)

    return _from_scores(scores, (signal,))


def softmax(signal: str = "loss", temperature: float = 1.0, *, higher_is_better: bool | None = None) -> Weighting:
    """Weights by a softmax, `w_k ~ exp(s_k / T)` where more is better, `exp(-s_k / T)` where less is.

    Args:
      signal: name of a signal [K].
      temperature: T, in units of the signal; small T trusts the best replica alone, large T weighs all equally.
      higher_is_better: which way the signal goes; may be left out for the signals that the library measures.

    Raises:
      SettingsError: the temperature is not positive, or the direction of an unknown signal is not given.
    """
    if not temperature > 0:
        raise SettingsError(f"the softmax temperature is {temperature}; it must be greater than 0 (--temperature)")
    if higher_is_better is None and signal not in HIGHER_IS_BETTER:
        raise SettingsError(f"say whether more of {signal!r} is better: softmax({signal!r}, higher_is_better=...)")
    sign = 1.0 if (HIGHER_IS_BETTER[signal] if higher_is_better is None else higher_is_better) else -1.0

    def scores(alive: jax.Array, **signals: jax.Array) -> jax.Array:
        s = sign * jnp.asarray(signals[signal], jnp.float32)
        usable = alive & jnp.isfinite(s)
        best = jnp.where(usable, s, -jnp.inf).max()
        return jnp.where(usable, jnp.exp((s - best) / temperature), 0)

    return _from_scores(scores, (signal,))
