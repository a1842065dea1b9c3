"""Pull forms: whether the replicas are replaced by the new global parameters or only pulled toward a centre.

A pull is a function `(replica, old, new) -> replica` of one leaf of one replica's parameters and of the global ones
before and after the round, all in float32. `averager(pull=...)` takes one, or a number, which means `toward_new`.
"""

from collections.abc import Callable

import jax

from wavg_jax.base import SettingsError

Pull = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _checked(factor: float) -> float:
    if not 0 <= factor <= 1:
        raise SettingsError(f"a pull of {factor} is not between 0 (replicas stay apart) and 1 (they are replaced)")
    return float(factor)


def toward_new(factor: float = 1.0) -> Pull:
    """Pulls every replica toward the new global parameters: `x_k <- x_k + factor * (new - x_k)`.

    1 replaces the replicas, as plain averaging does. With equal weights it is PAPA's averaging step, whose
    `x_k <- alpha x_k + (1 - alpha) mean` has factor 1 - alpha (Jolicoeur-Martineau et al. 2023, arXiv:2304.03094);
    with the best replica as centre it is LSGD's pull to the leader (Teng et al. 2019, arXiv:1905.10395); with weights
    by inverse gradient norm GRAWA's (Dimlioglu and Choromanska 2024, arXiv:2403.04206).

    Args:
      factor: between 0 and 1.

    Raises:
      SettingsError: the factor is not.

    >>> toward_new(0.25)(8.0, 0.0, 4.0)
    7.0
    """
    factor = _checked(factor)
    # 1 is exact: x + 1 * (new - x) would round.
    return lambda x, old, new: new if factor == 1 else x + factor * (new - x)


def toward_old(factor: float) -> Pull:
    """Pulls every replica toward the global parameters before the round: `x_k <- x_k + factor * (old - x_k)`.

    With the outer optimizer `optax.sgd(K * factor)` and equal weights this is synchronous EASGD, in which replicas and
    centre both move by what they were (Zhang, Choromanska and LeCun 2015, arXiv:1412.6651):
    `x_k <- x_k - a (x_k - c)`, `c <- c + a sum_k (x_k - c)`.

    Args:
      factor: a, between 0 and 1.

    Raises:
      SettingsError: the factor is not.

    >>> toward_old(0.25)(8.0, 0.0, 4.0)
    6.0
    """
    factor = _checked(factor)
    return lambda x, old, new: x + factor * (old - x)
