"""Pull forms: whether the replicas are replaced by the new global parameters or only pulled toward a centre.

A pull is a function `(replica, old, new) -> replica` of one leaf of one replica's parameters and of the global ones
before and after the round, all in float32. `averager(pull=...)` takes one, or a number, which means `toward_new`.
Replicas whose parameters are stored in bfloat16 round a small pull away: use float32 ones where the factor is small.
"""

from collections.abc import Callable

import jax

from wavg_jax.arguments import check, number

Pull = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


_FACTOR = number(0, 1)  # 0: the replicas stay apart, 1: they are replaced


def toward_new(factor: float = 1.0) -> Pull:
    """Pulls every replica toward the new global parameters: `x_k <- x_k + factor * (new - x_k)`.

    1 replaces the replicas, as plain averaging does. Which published rule a smaller factor is depends on the centre:

    - equal weights: PAPA's `x_k <- alpha x_k + (1 - alpha) mean` with factor 1 - alpha (Jolicoeur-Martineau et al.
      2023, arXiv:2304.03094, whose code takes alpha = 0.99 every 10 steps);
    - all weight on the best replica: the pull to the global leader of LSGD, `x_k <- x_k + c (leader - x_k)` (Teng et
      al. 2019, arXiv:1905.10395, whose leader has the least training loss). The global parameters are then the
      leader's, where the authors' code evaluates the mean of the replicas;
    - weights by inverse gradient norm: GRAWA (Dimlioglu and Choromanska 2024, arXiv:2403.04206).

    Args:
      factor: between 0 and 1.

    Raises:
      SettingsError: the factor is not.

    >>> toward_new(0.25)(8.0, 0.0, 4.0)
    7.0
    """
    check("the pull's factor", factor, _FACTOR)
    factor = float(factor)
    # 1 is exact: x + 1 * (new - x) would round.
    return lambda x, old, new: new if factor == 1 else x + factor * (new - x)


def toward_old(factor: float) -> Pull:
    """Pulls every replica toward the global parameters before the round: `x_k <- x_k + factor * (old - x_k)`.

    With the outer optimizer `optax.sgd(K * factor)` and equal weights this is the exchange of synchronous EASGD, in
    which replicas and centre both move by what they were (Zhang, Choromanska and LeCun 2015, arXiv:1412.6651,
    equations 5 and 6; the paper's beta is K a):

        x_k <- x_k - a (x_k - c),    c <- c + a sum_k (x_k - c).

    The equations take the gradient at x_k before the exchange and apply it with it. `fit` exchanges after H local
    steps, as the code of LSGD's authors does for EASGD. Where n of K replicas live, the centre moves by K / n times
    their sum, so that deaths do not slow it.

    Args:
      factor: a, between 0 and 1.

    Raises:
      SettingsError: the factor is not.

    >>> toward_old(0.25)(8.0, 0.0, 4.0)
    6.0
    """
    check("the pull's factor", factor, _FACTOR)
    factor = float(factor)
    return lambda x, old, new: x + factor * (old - x)
