"""How much each replica of an arm counted, over the arm's rounds and seeds."""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from wavg_jax.reporting.statistic import Floats, Statistic

# An effective number above this share of K corresponds to a coefficient of variation of the weights below about 10 %.
UNIFORM_SHARE = 0.99


class Shares(NamedTuple):
    """How an arm of K replicas weighted them, over its rounds and seeds.

    Attributes:
      effective_mean: mean effective number of replicas.
      effective_min: the smallest of any round.
      share: mean ratio of the effective number to the number of live replicas: 1 if all count the same.
      mean: mean weight of each replica over the rounds in which it was alive [K].
      dead: rounds in which each replica was dead while another was alive [K].
      lost: rounds in which all were dead; nothing else here counts them.
      rounds: all rounds.
    """

    effective_mean: float
    effective_min: float
    share: float
    mean: Floats
    dead: NDArray[np.int64]
    lost: int
    rounds: int

    @classmethod
    def over(cls, weights: Floats, alive: NDArray[np.bool_], effective: Floats) -> Self:
        """Summarises rounds.

        Args:
          weights: [R, K].
          alive: [R, K].
          effective: effective number of replicas [R].
        """
        kept = np.asarray(alive.any(axis=1))  # the weights of a round in which all are dead mean nothing
        lost, rounds = int((~kept).sum()), len(kept)
        weights, alive, effective = weights[kept], alive[kept], effective[kept]
        finite = effective[np.isfinite(effective)]
        # A dead replica has weight 0 whatever the weighting, so that must not count as down-weighting.
        weighed = alive & np.isfinite(weights)
        counts = weighed.sum(axis=0)
        totals = np.where(weighed, weights, 0.0).sum(axis=0)
        return cls(
            effective_mean=Statistic.of(effective).mean,
            effective_min=float(finite.min()) if finite.size else float("nan"),
            share=Statistic.of(effective / np.maximum(alive.sum(axis=1), 1)).mean,
            mean=np.where(counts > 0, totals / np.maximum(counts, 1), np.nan),
            dead=(~alive).sum(axis=0).astype(np.int64),
            lost=lost,
            rounds=rounds,
        )

    @property
    def uniform(self) -> bool:
        return self.share > UNIFORM_SHARE

    @property
    def down_weighted(self) -> tuple[int, ...]:
        """Replicas with a mean weight below half of 1/K."""
        return tuple(int(k) for k in np.flatnonzero(self.mean < 0.5 / len(self.mean)))
