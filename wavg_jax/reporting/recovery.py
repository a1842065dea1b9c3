"""What bad shards and faults cost plain averaging, and how much of that a weighting wins back.

The oracle is plain averaging without what is wrong. Of a weighting, the share recovered is

    (its accuracy - plain's) / (the oracle's - plain's)

over seeds: 0 for plain, 1 for the oracle.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from wavg_jax.base import DataError
from wavg_jax.reporting.statistic import Statistic, as_float
from wavg_jax.storage.schema import Row

Cells = Mapping[tuple[str, str], Mapping[int, Row]]
"""(scenario, weighting) -> seed -> row."""


class Roles(NamedTuple):
    """Which weightings are compared.

    Attributes:
      oracle: plain averaging without what is wrong.
      ours: the one recommended.
      published: those among which the best is looked for.
    """

    oracle: str
    ours: str
    published: tuple[str, ...]


class Share(NamedTuple):
    """A ratio of two means over the same seeds, with its 95 % interval; nan where that is unbounded."""

    mean: float
    low: float
    high: float


class Recovery(NamedTuple):
    """One scenario.

    Attributes:
      gap: the oracle's test accuracy minus plain's, paired by seed.
      best: the published weighting that was best on the tuning seeds; "" if none is recorded.
      shares: by weighting, the best published one and ours, over the seeds that they have; empty where no gap is shown.
    """

    gap: Statistic
    best: str
    shares: Mapping[str, Share]


def roles_of(headers: Sequence[Row]) -> Roles | None:
    """The roles that the first rows of a recording name, if any; those published are all that one of them names."""
    given = [header["roles"] for header in headers if header.get("roles")]
    if not given:
        return None
    published = dict.fromkeys(str(name) for one in given for name in one["published"])
    return Roles(str(given[0]["oracle"]), str(given[0]["ours"]), tuple(published))


def is_control(name: str, roles: Roles | None) -> bool:
    """Whether a row is none to choose: an oracle, or a control of another row, such as `sequential+temperature`."""
    return roles is not None and ("+" in name or name.startswith(roles.oracle))


def recovered(cells: Cells, scenario: str, roles: Roles, reference: str) -> Recovery | None:
    """What a scenario's rows say; None without rows of the oracle and the reference for two seeds or more."""
    base, oracle = cells.get((scenario, reference), {}), cells.get((scenario, roles.oracle), {})
    seeds = [seed for seed in base if seed in oracle]
    if len(seeds) < 2:
        return None
    best = _best(cells, scenario, roles.published)
    found = {name: cells.get((scenario, name), {}) for name in (best, roles.ours)}
    gap = Statistic.of(_minus(oracle, base, seeds))
    shares = {}
    for name, own in found.items():
        common = [seed for seed in seeds if seed in own]
        if gap.shown and gap.mean > 0 and len(common) > 2:
            shares[name] = ratio(_minus(own, base, common), _minus(oracle, base, common))
    return Recovery(gap, best, shares)


def _minus(a: Mapping[int, Row], b: Mapping[int, Row], seeds: Sequence[int]) -> list[float]:
    return [as_float(a[seed]["test_accuracy"]) - as_float(b[seed]["test_accuracy"]) for seed in seeds]


def _best(cells: Cells, scenario: str, names: Sequence[str]) -> str:
    """The one with the highest accuracy on the tuning split, whose seeds are not reported."""
    tuned = {}
    for name in names:
        own = cells.get((scenario, name), {})
        if any("tuned_accuracy" not in row for row in own.values()):
            raise DataError(f"a row of {scenario}/{name} lacks tuned_accuracy; put the row back from a copy")
        values = [as_float(row["tuned_accuracy"]) for row in own.values()]
        if values and math.isfinite(values[0]):  # else it diverged wherever it was tried
            tuned[name] = values[0]
    return max(tuned, key=lambda name: tuned[name], default="")


def ratio(above: Sequence[float], below: Sequence[float]) -> Share:
    """Mean of `above` [n] over mean of `below` [n], paired, with the 95 % interval of Fieller (1954), "Some problems in
    interval estimation": exact where both are normal.

    >>> share = ratio([1.0, 2.0, 3.0, 2.0], [4.0, 4.0, 4.0, 4.0])  # a sure denominator: Student's t over 4
    >>> [round(value, 3) for value in share]
    [0.5, 0.175, 0.825]
    """
    a, b = np.asarray(above, np.float64), np.asarray(below, np.float64)
    n, mean = len(a), float(a.mean() / b.mean())
    (v11, v12), (_, v22) = np.cov(a, b) / n
    t = float(scipy.stats.t.ppf(0.975, n - 1))
    g = t**2 * v22 / b.mean() ** 2
    inside = v11 - 2 * mean * v12 + mean**2 * v22 - g * (v11 - (v12**2 / v22 if v22 else 0.0))
    if g >= 1 or inside < 0:
        return Share(mean, math.nan, math.nan)
    middle = (mean - g * (v12 / v22 if v22 else 0.0)) / (1 - g)
    half = t / abs(b.mean()) / (1 - g) * math.sqrt(inside)
    return Share(mean, float(middle - half), float(middle + half))
