"""Tuning by climbing: the same rule, and so the same effort, for every arm."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Setting(NamedTuple):
    """The peak learning rate of an arm, and its weight decay."""

    rate: float
    decay: float


DECAYS = (0.0, 1.25e-4, 5e-4, 2e-3, 8e-3, 3.2e-2)
START = Setting(0.05, 5e-4)
_SWEEPS = 2


def climb(value: Callable[[Setting], float], start: Setting = START) -> Setting:
    """The setting from which no neighbour is better, first along the rate, then along the decay, twice over.

    Neighbours are rates half and twice as high, and the decays of `DECAYS`. Of equal ones the lower rate is better,
    which leads away from rates at which nothing is learnt. A rate is climbed from at most 12 steps.

    Args:
      value: what to maximise, asked once for every setting tried; NaN, for a run that diverged, is worst.
      start: where to begin, such as the best setting of a similar scenario.

    Returns:
      The best setting found.

    >>> climb(lambda s: -abs(s.rate - 0.2) - s.decay)
    Setting(rate=0.2, decay=0.0)
    """
    known: dict[Setting, float] = {}

    def of(setting: Setting) -> tuple[float, float]:
        if setting not in known:
            found = value(setting)
            known[setting] = -math.inf if math.isnan(found) else found
        return known[setting], -setting.rate

    best = start
    for _ in range(_SWEEPS):
        before = best
        best = _along([best._replace(rate=best.rate * 2.0**n) for n in range(-12, 13)], best, of)
        best = _along([best._replace(decay=decay) for decay in DECAYS], best, of)
        if best == before:
            break
    return best


def _along(line: Sequence[Setting], best: Setting, of: Callable[[Setting], tuple[float, float]]) -> Setting:
    place = line.index(best)
    for step in (1, -1):
        while 0 <= place + step < len(line) and of(line[place + step]) > of(line[place]):
            place += step
    return line[place]
