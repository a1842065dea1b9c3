"""What a search asks of blended networks: their scores on held-out data, and the slope of their loss in the weights."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.arguments import Rule, check, takes
from wavg_jax.base import PyTree
from wavg_jax.models.rewrite import fast
from wavg_jax.weighting.scores import per_replica


class Held(NamedTuple):
    """Blends on held-out data.

    Attributes:
      scores: `weights -> {"loss", "accuracy"}` of the blended network, float32 scalars.
      loss_and_slope: `weights -> (loss, slope in the weights)`.
    """

    scores: Callable[[PyTree], Mapping[str, jax.Array]]
    loss_and_slope: Callable[[PyTree], tuple[jax.Array, PyTree]]


def _scalars(scores: Any) -> bool:
    """Whether `scores` is a mapping of floating-point scalars; a missing key raises its own KeyError later."""
    return isinstance(scores, Mapping) and all(
        jnp.ndim(score) == 0 and jnp.issubdtype(jnp.result_type(score), jnp.floating) for score in scores.values()
    )


_WANTED = '{"loss": ..., "accuracy": ...}, floating-point scalars'
_EVALUATE, _SCORES = takes(2, f"a function (params, weights [K]) that returns {_WANTED}"), Rule(_scalars, _WANTED)


def blended(evaluate: Callable, blend: Callable[[PyTree], PyTree], params: PyTree) -> Held:
    """Evaluates blends, cast to the parameters' dtypes.

    Args:
      evaluate: the signal, `(params, weights [K]) -> {"loss", "accuracy"}`.
      blend: `weights -> tree`, the reduction in use.
      params: the last global parameters.

    Returns:
      The scores of a blend, and the slope of its loss.

    Raises:
      SettingsError: `evaluate` is no such function; when called, if it returns no such scores.

    >>> loss = lambda params, weights: {"loss": (params - 1.0) ** 2, "accuracy": params}
    >>> held_out = blended(loss, lambda weights: weights @ jnp.array([0.0, 2.0]), jnp.float32(0))
    >>> [x.tolist() for x in held_out.loss_and_slope(jnp.array([0.25, 0.75]))]  # the blend is 1.5
    [0.25, [0.0, 2.0]]
    """
    check("evaluate", evaluate, _EVALUATE)

    # A round's devices exchange the slope of K weights alone: `rounds.score.Evaluate.of_blend`.
    of_blend = getattr(evaluate, "of_blend", lambda make, weights: evaluate(make(weights), per_replica(weights)))

    def scores(weights: PyTree) -> Mapping[str, jax.Array]:
        found = of_blend(lambda weights: tree.cast_like(blend(weights), params), weights)
        check("the result of evaluate", found, _SCORES)
        return found

    # Not evaluate itself: the gradient of a network is made fast as a whole, or not at all.
    slope = fast(jax.value_and_grad(lambda weights: scores(weights)["loss"]), getattr(evaluate, "cpu_forms", True))
    return Held(scores, slope)
