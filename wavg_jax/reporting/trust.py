"""Whom the scores and weights of a run trust, beside what each replica was worth to the blend."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from wavg_jax.reporting.runs import RecordedRun
from wavg_jax.reporting.statistic import Floats, Statistic

LOWER_IS_BETTER = frozenset({"loss", "absolute_error", "ece", "grad_norm", "distance", "train_loss"})
"""As in `wavg_jax.weighting.signals`, which a report need not import, and JAX with it."""


class Trust(NamedTuple):
    """What the logits of scored rounds say, over an arm's rounds and seeds; see `wavg_jax.rounds.diagnosis`.

    Attributes:
      gain: mean loss, in nats, that the weights save beside equal ones, by the pooled logits.
      beyond_chance: share of the rounds in which that is more than twice its standard error.
      agreement: of the weights and of every recorded score, the mean rank correlation (Spearman's) with what leaving a
        replica out costs: 1 if it trusts those most without whom equal weights would do worst, 0 if it does not know.
        nan where it never told the replicas apart.
      worth: of each replica, the mean loss in nats that leaving it out costs equal weights [K]; nan if never scored.
      rounds: how many.
    """

    gain: float
    beyond_chance: float
    agreement: dict[str, float]
    worth: Floats
    rounds: int

    @classmethod
    def over(cls, runs: Sequence[RecordedRun]) -> Self | None:
        """Summarises the runs of an arm; None if none of its rounds has a diagnosis."""
        found = [run.diagnosis for run in runs if run.diagnosis]
        if not found:
            return None
        gain, error = (np.concatenate([one[name] for one in found]) for name in ("gain", "gain_error"))
        scored = np.isfinite(gain)
        judges = dict.fromkeys(("weights", *(name for run in runs for name in run.scores)))
        return cls(
            gain=Statistic.of(gain).mean,
            beyond_chance=float(np.mean((gain > 2 * error)[scored])) if scored.any() else float("nan"),
            agreement={name: Statistic.of(_agreement(name, runs)).mean for name in judges},
            worth=_worth(runs),
            rounds=int(scored.sum()),
        )


def _worth(runs: Sequence[RecordedRun]) -> Floats:
    """Of each replica [K], over the scored rounds in which it was alive."""
    found = [np.where(run.alive, run.diagnosis["leave_one_out"], np.nan) for run in runs if run.diagnosis]
    return np.array([Statistic.of(replica).mean for replica in np.concatenate(found).T], np.float64)


def _agreement(name: str, runs: Sequence[RecordedRun]) -> Floats:
    """The rank correlation of a score, or of the weights, with what replicas are worth, for every round of every run
    that has both; nan where either is the same for all."""
    values = []
    for run in runs:
        given = run.weights if name == "weights" else run.scores.get(name)
        if run.diagnosis and given is not None:
            sign = -1.0 if name in LOWER_IS_BETTER else 1.0
            worth = np.where(run.alive, run.diagnosis["leave_one_out"], np.nan)  # nobody weighs the dead
            values += [_spearman(sign * a, b) for a, b in zip(given, worth, strict=True)]
    return np.array(values, np.float64)


def _spearman(a: Floats, b: Floats) -> float:
    from scipy.stats import rankdata

    both = np.isfinite(a) & np.isfinite(b)
    if len(np.unique(a[both])) < 2 or len(np.unique(b[both])) < 2:
        return float("nan")
    return float(np.corrcoef(rankdata(a[both]), rankdata(b[both]))[0, 1])
