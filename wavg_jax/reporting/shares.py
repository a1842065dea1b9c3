"""How much the replicas of an arm counted, over its rounds and seeds."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wavg_jax.reporting.statistic import Floats, statistic

# A larger share of K than this is what a coefficient of variation of the weights under about 10 % gives.
UNIFORM_SHARE = 0.99


class Weights(NamedTuple):
    """How an arm of K replicas weighted them, over its rounds and seeds.

    Attributes:
      effective_mean: mean effective number of replicas.
      effective_min: the smallest of any round.
      share: mean of the effective number over the number of live replicas: 1 when all count the same.
      mean: mean weight of each replica over the rounds in which it was alive [K].
      dead: rounds in which each replica was not alive while another was [K].
      lost: rounds in which none was alive, and which are in nothing else here.
      rounds: all of them.
    """

    effective_mean: float
    effective_min: float
    share: float
    mean: Floats
    dead: NDArray[np.int64]
    lost: int
    rounds: int

    @property
    def uniform(self) -> bool:
        return self.share > UNIFORM_SHARE

    @property
    def down_weighted(self) -> tuple[int, ...]:
        """Replicas whose mean weight is less than half of 1/K."""
        return tuple(int(k) for k in np.flatnonzero(self.mean < 0.5 / len(self.mean)))


def weights_over(weights: Floats, alive: NDArray[np.bool_], effective: Floats) -> Weights:
    """Puts rounds together.

    Args:
      weights: [R, K].
      alive: [R, K].
      effective: number of replicas [R].
    """
    kept = np.asarray(alive.any(axis=1))  # the weights of a round in which all are dead say nothing
    lost, rounds = int((~kept).sum()), len(kept)
    weights, alive, effective = weights[kept], alive[kept], effective[kept]
    finite = effective[np.isfinite(effective)]
    # A dead replica's zero weight is not the weighting's doing, so it must not count as down-weighting.
    weighed = alive & np.isfinite(weights)
    counts = weighed.sum(axis=0)
    totals = np.where(weighed, weights, 0.0).sum(axis=0)
    return Weights(
        effective_mean=statistic(effective).mean,
        effective_min=float(finite.min()) if finite.size else float("nan"),
        share=statistic(effective / np.maximum(alive.sum(axis=1), 1)).mean,
        mean=np.where(counts > 0, totals / np.maximum(counts, 1), np.nan),
        dead=(~alive).sum(axis=0).astype(np.int64),
        lost=lost,
        rounds=rounds,
    )
