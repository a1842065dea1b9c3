"""How long a round waits for its workers, and what a result that comes too late still counts."""

import statistics
from collections.abc import Callable, Sequence

from wavg_jax.arguments import check, number

__all__ = ["Deadline", "Discount", "fixed", "median_mad", "polynomial", "quantile", "wait_for_all"]


def __dir__() -> list[str]:
    return __all__


Deadline = Callable[[Sequence[float]], float | None]
"""`seconds -> seconds`: from what workers took for their part of the past rounds, the latest last, each scaled to the
local steps of the next, how long that one waits after its orders went out; None waits for all."""

Discount = Callable[[int], float]
"""`staleness -> factor`: what the change of a replica still counts that started that many blends ago, from 1 on."""

_SECONDS = number(above=0)
_FACTOR = number(least=1)


def wait_for_all(seconds: Sequence[float]) -> None:
    """Waits for every worker, as far as `Workers.patience` goes."""
    del seconds


def fixed(seconds: float) -> Deadline:
    """Waits that many seconds in every round, the first included.

    >>> fixed(2.5)([])
    2.5
    """
    check("fixed: seconds", seconds, _SECONDS)
    return lambda past: float(seconds)


def quantile(q: float = 0.9, factor: float = 2.0) -> Deadline:
    """Waits `factor` times a quantile of what workers took; the first round waits for all.

    Args:
      q: from 0 to 1.
      factor: at least 1.

    >>> quantile(0.5, 2.0)([1.0, 2.0, 30.0])
    4.0
    """
    check("quantile: q", q, number(least=0, most=1))
    check("quantile: factor", factor, _FACTOR)

    def deadline(past: Sequence[float]) -> float | None:
        return factor * sorted(past)[round(q * (len(past) - 1))] if past else None

    return deadline


def median_mad(k: float = 6.0, factor: float = 2.0, least: float = 1.0) -> Deadline:
    """Waits for the median of what workers took, and k times their median absolute deviation longer.

        max(median + k * MAD, factor * median, least)

    The median ignores the stragglers themselves. The first round waits for all. The rule is the one proposed in
    hivemind's issue 676; `factor` and `least` keep workers of equal speed, whose deviation is nearly 0, from being
    dropped for a hiccup.

    Args:
      k: at least 0.
      factor: at least 1.
      least: seconds.

    >>> median_mad(k=2.0, factor=1.0)([1.0, 2.0, 3.0, 90.0])  # the median is 2.5, deviations 1.5, 0.5, 0.5, 87.5
    4.5
    """
    check("median_mad: k", k, number(least=0))
    check("median_mad: factor", factor, _FACTOR)
    check("median_mad: least", least, number(least=0))

    def deadline(past: Sequence[float]) -> float | None:
        if not past:
            return None
        median = statistics.median(past)
        return max(median + k * statistics.median(abs(x - median) for x in past), factor * median, least)

    return deadline


def polynomial(power: float = 0.5) -> Discount:
    """Counts a late change `(1 + staleness)^-power` (Xie, Koyejo and Gupta 2019, Asynchronous Federated Optimization);
    power 1/2 is that of FedBuff (Nguyen et al. 2022).

    >>> polynomial(1.0)(3)
    0.25
    """
    check("polynomial: power", power, number(least=0))
    return lambda staleness: float((1 + staleness) ** -power)
