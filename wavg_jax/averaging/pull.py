"""Pulls: whether the new global parameters replace the replicas, or only pull them toward a centre.

A pull is a function `(replica, old, new) -> replica` of one leaf: the replica's parameters, and the global parameters
before and after the round, all in float32. `averager(pull=...)` takes one, a number for `toward_new`, or a `scheduled`
one, which changes over rounds. bfloat16 replicas lose a small pull to rounding: store replicas in float32 when the
factor is small.

`AtSync(stats=wavg_jax.policy.pull)` pulls statistics, such as BatchNorm's, as the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax.arguments import FUNCTION, check, number

__all__ = ["Pull", "scheduled", "toward_new", "toward_old"]


def __dir__() -> list[str]:
    return __all__


Pull = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class OverRounds(NamedTuple):
    """A pull that changes over rounds.

    Attributes:
      at: `round -> Pull`; `round` counts the rounds before this one, an int32 scalar, 0 in the first.
    """

    at: Callable[[jax.Array], Pull]


_FACTOR = number(0, 1)  # 0 leaves the replicas apart, 1 replaces them


def _factor(given: Any) -> Any:
    """A float, or the array of a schedule.

    Raises:
      SettingsError: it is not between 0 and 1, or no number. Of a traced one only the shape is known.
    """
    check("the pull's factor", given, _FACTOR)
    return given if isinstance(given, jax.Array) else float(given)


def _toward(x: jax.Array, factor: Any, centre: jax.Array) -> jax.Array:
    return x + (factor.astype(x.dtype) if isinstance(factor, jax.Array) else factor) * (centre - x)


def toward_new(factor: float = 1.0) -> Pull:
    """Pulls every replica toward the new global parameters: `x_k <- x_k + factor * (new - x_k)`.

    A factor of 1 replaces the replicas, as plain averaging does. A smaller factor gives, depending on the centre:

    - equal weights: PAPA's `x_k <- alpha x_k + (1 - alpha) mean` with factor 1 - alpha (Jolicoeur-Martineau et al.
      2023, arXiv:2304.03094, whose code uses alpha = 0.99 every 10 steps);
    - all weight on the best replica: the pull to the global leader of LSGD, `x_k <- x_k + c (leader - x_k)` (Teng et
      al. 2019, arXiv:1905.10395, whose leader has the lowest training loss). The global parameters are then the
      leader's; the authors' code evaluates the mean of the replicas instead;
    - weights by inverse gradient norm: GRAWA (Dimlioglu and Choromanska 2024, arXiv:2403.04206).

    Args:
      factor: between 0 and 1.

    Raises:
      SettingsError: the factor is not between 0 and 1.

    >>> toward_new(0.25)(8.0, 0.0, 4.0)
    7.0
    """
    share = _factor(factor)
    # 1 is exact: x + 1 * (new - x) would round.
    if isinstance(share, jax.Array):
        return lambda x, old, new: jnp.where(share == 1, new, _toward(x, share, new))
    return lambda x, old, new: new if share == 1 else _toward(x, share, new)


def toward_old(factor: float) -> Pull:
    """Pulls every replica toward the global parameters before the round: `x_k <- x_k + factor * (old - x_k)`.

    With the outer optimizer `optax.sgd(K * factor)` and equal weights this is the exchange of synchronous EASGD, where
    replicas and centre are both updated from their previous values (Zhang, Choromanska and LeCun 2015,
    arXiv:1412.6651, equations 5 and 6; the paper's beta is K a):

        x_k <- x_k - a (x_k - c),    c <- c + a sum_k (x_k - c).

    The paper takes the gradient at x_k before the exchange and applies both together. `fit` exchanges after H local
    steps, as the LSGD authors' code does for EASGD. With n of K replicas alive, the centre moves by K / n times their
    sum, so that deaths do not slow it down.

    Args:
      factor: a, between 0 and 1.

    Raises:
      SettingsError: the factor is not between 0 and 1.

    >>> toward_old(0.25)(8.0, 0.0, 4.0)
    6.0
    """
    share = _factor(factor)
    return lambda x, old, new: _toward(x, share, old)


def scheduled(factor: Callable[[Any], Any], toward: Callable[[Any], Pull] = toward_new) -> OverRounds:
    """A pull whose factor changes over rounds: in round r, counted from 0, `toward(factor(r))`.

    PAPA scales its pull with the learning rate: with alpha and a schedule `rate` of the local step,

        scheduled(lambda r: (1 - alpha) * rate(r * H) / rate(0)).

    Args:
      factor: a schedule `round -> factor`, such as optax's, with factors between 0 and 1, which are not checked inside
        jit.
      toward: `toward_new`, `toward_old` or a function of your own.

    Raises:
      SettingsError: `factor` or `toward` is not a function.

    >>> halved = scheduled(lambda r: 0.5 * 0.5**r)
    >>> halved.at(0)(8.0, 0.0, 4.0), halved.at(1)(8.0, 0.0, 4.0)
    (6.0, 7.0)
    """
    check("factor", factor, FUNCTION)
    check("toward", toward, FUNCTION)

    def at(round: Any) -> Pull:
        # As a float, schedules such as optax's compute with it under strict dtype promotion too.
        return toward(factor(round.astype(jnp.float32) if isinstance(round, jax.Array) else round))

    return OverRounds(at)
