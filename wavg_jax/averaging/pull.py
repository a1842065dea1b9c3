"""Pulls: whether the new global parameters replace the replicas, or only pull them toward a centre.

A pull is a function `(replica, old, new) -> replica` of one leaf: the replica's parameters, and the global parameters
before and after the round, all in float32. `averager(pull=...)` takes one, or a number for `toward_new`. bfloat16
replicas lose a small pull to rounding: store replicas in float32 when the factor is small.
"""

from collections.abc import Callable

import jax

from wavg_jax.arguments import check, number

Pull = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


_FACTOR = number(0, 1)  # 0 leaves the replicas apart, 1 replaces them


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
    check("the pull's factor", factor, _FACTOR)
    factor = float(factor)
    # 1 is exact: x + 1 * (new - x) would round.
    return lambda x, old, new: new if factor == 1 else x + factor * (new - x)


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
    check("the pull's factor", factor, _FACTOR)
    factor = float(factor)
    return lambda x, old, new: x + factor * (old - x)
