"""Rows of a scenario matrix -> statistics over seeds, and a verdict on each weighting.

`wavg_jax.storage.schema` describes the rows of a matrix.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from wavg_jax.base import DataError
from wavg_jax.reporting.recovery import Recovery, Roles, is_control, recovered, roles_of
from wavg_jax.reporting.statistic import Floats, Statistic, as_float
from wavg_jax.reporting.wording import distinct, seeds
from wavg_jax.storage.sanity import check_numbers
from wavg_jax.storage.schema import Row

CELL_METRICS = ("test_accuracy", "test_loss", "test_ece", "seconds")
AIMED = "attack_success"
"""A metric of the cells of a scenario with an attack that has a target."""
HEADER = (
    *("scenarios", "settings", "dataset", "train_samples", "heldout_samples", "test_samples", "parameters"),
    *("hardware", "versions"),
)
"""Fields that the first row must have."""
MARGIN = 0.01
"""How far a recommended weighting may be from the best one of any scenario, in test accuracy."""


class Entry(NamedTuple):
    """One weighting in one scenario, over the seeds recorded.

    Attributes:
      metrics: each of `CELL_METRICS`, and `AIMED` where it is recorded.
      differences: minus the reference, paired by seed, over the seeds that both have.
      gap: test accuracy of the best weighting of the scenario minus this one's, over the seeds that both have.
      weights: mean weight of each replica over rounds and seeds [K].
    """

    metrics: Mapping[str, Statistic]
    differences: Mapping[str, Statistic]
    gap: Statistic
    weights: Floats

    @property
    def accuracy(self) -> Statistic:
        return self.metrics["test_accuracy"]

    @property
    def versus(self) -> Statistic:
        """Test accuracy minus the reference's."""
        return self.differences["test_accuracy"]


class Verdict(NamedTuple):
    """One weighting over all scenarios.

    Attributes:
      missing: scenarios in which it cannot be judged, having fewer than two seeds in common with the reference.
      worse: scenarios in which the 95 % interval of its difference from the reference lies below 0.
      below: scenarios in which it trails the reference by more than the reference's standard deviation over seeds.
      gap: its largest distance from the best weighting of a scenario, in test accuracy; nan if never judged.
      gap_in: that scenario; "" if never judged.
      shortfall: how far it misses what a recommended weighting must meet, at worst: no scenario in `below`, and none
        further than `MARGIN` from the best. 0 if it meets both.
      shortfall_in: the scenario where that is worst; "" if the shortfall is 0.
    """

    missing: tuple[str, ...]
    worse: tuple[str, ...]
    below: tuple[str, ...]
    gap: float
    gap_in: str
    shortfall: float
    shortfall_in: str

    @property
    def recommended(self) -> bool:
        return not self.missing and self.shortfall == 0


class Matrix(NamedTuple):
    """Every weighting in every scenario, as far as recorded.

    Attributes:
      titles: {scenario: title}, in the order of recording.
      reference: the weighting that others are compared with.
      weightings: the reference first, then by largest gap, those with missing scenarios last.
      entries: by scenario and weighting; absent if no cell is recorded.
      verdicts: by weighting.
      best: {scenario: weighting with the highest mean test accuracy}.
      rates: {scenario: the learning rates there}, one unless every weighting was tuned.
      seeds: the seeds of all cells.
      headers: the rows of kind "matrix".
      recommend: whether the report recommends weightings.
      roles: which weightings the share of the oracle's gap is told of, if any.
      recovered: that share, by scenario.
      left: `ours` minus every other row, by scenario and name: each of `CELL_METRICS`, paired by seed.
      controls: further rows, which are none to choose: oracles, and what else could be made of a training.
    """

    titles: Mapping[str, str]
    reference: str
    weightings: tuple[str, ...]
    entries: Mapping[tuple[str, str], Entry]
    verdicts: Mapping[str, Verdict]
    best: Mapping[str, str]
    rates: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    headers: tuple[Row, ...]
    recommend: bool = True
    roles: Roles | None = None
    recovered: Mapping[str, Recovery] = MappingProxyType({})
    left: Mapping[tuple[str, str], Mapping[str, Statistic]] = MappingProxyType({})
    controls: tuple[str, ...] = ()

    @property
    def recommended(self) -> tuple[str, ...]:
        """The weightings fit for a default; none if the report recommends none."""
        return tuple(name for name in self.weightings if self.recommend and self.verdicts[name].recommended)

    @property
    def lacking(self) -> int:
        """How many cells of all scenarios, weightings and seeds are missing."""
        found = sum(entry.accuracy.n for (_, name), entry in self.entries.items() if name in self.weightings)
        return len(self.weightings) * sum(map(self.repeats, self.titles)) - found

    def repeats(self, scenario: str) -> int:
        """Seeds of a scenario: as many as its most repeated weighting has, since scenarios may differ on purpose."""
        own = (self.entries.get((scenario, name)) for name in self.weightings)
        return max((entry.accuracy.n for entry in own if entry is not None), default=0)

    @property
    def repeated(self) -> str:
        """How many seeds, in words: "5 seeds", or "5 to 10 seeds"."""
        counts = {self.repeats(scenario) for scenario in self.titles}
        return seeds(max(counts)) if len(counts) == 1 else f"{min(counts)} to {seeds(max(counts))}"


Cells = dict[tuple[str, str], dict[int, Row]]  # (scenario, weighting) -> seed -> row


def is_matrix(rows: Iterable[Row]) -> bool:
    """Whether rows record a matrix."""
    return any(row.get("kind") in ("matrix", "cell") for row in rows)


def tabulate(rows: Sequence[Row], reference: str | None = None) -> Matrix:
    """Puts the rows of one matrix together, which may come from several folders.

    Args:
      rows: in the order of recording; of several folders, one folder after the other.
      reference: the weighting that others are compared with; by default the one that the rows name.

    Raises:
      DataError: no cell is recorded, a row lacks a field, a cell occurs twice, or the rows are not of one matrix.
    """
    try:
        return _tabulate(rows, reference)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"a row of the matrix lacks a field, or holds something odd in it: {error}; put the row back from a copy"
        ) from error


def _tabulate(rows: Sequence[Row], reference: str | None) -> Matrix:
    check_numbers(rows)
    headers, cells = _headers(rows), _cells(rows)
    base, roles = reference or _reference(headers, cells), roles_of(headers)
    titles = {name: str(title) for header in headers for name, title in header["scenarios"].items()}
    rates = _rates(cells, tuned=roles is not None)
    names = tuple(dict.fromkeys(w for _, w in cells))
    chosen = [name for name in names if not is_control(name, roles)]
    judged = {scenario for scenario, name in cells if name in chosen}
    if not judged:
        raise DataError("every row recorded so far is a control or an oracle; report when a weighting is done too")
    cells = {key: own for key, own in cells.items() if key[0] in judged}
    order = {name: title for name, title in titles.items() if name in judged}
    best = {s: _best(cells, s, chosen) for s in order}
    entries = {key: _entry(cells, key, best, base) for key in cells}
    verdicts = {w: _verdict(entries, w, tuple(order), base) for w in chosen}
    return Matrix(
        titles=order,
        reference=base,
        weightings=tuple(sorted(verdicts, key=lambda name: _rank(name, verdicts[name], base))),
        entries=entries,
        verdicts=verdicts,
        best=best,
        rates=rates,
        seeds=tuple(sorted({seed for own in cells.values() for seed in own})),
        headers=headers,
        recommend=all(header.get("recommend", True) for header in headers),
        roles=roles,
        recovered={} if roles is None else _recovered(cells, order, roles, base),
        left={} if roles is None else _left(cells, roles.ours),
        controls=tuple(name for name in names if name not in chosen),
    )


def _recovered(cells: Cells, scenarios: Iterable[str], roles: Roles, reference: str) -> dict[str, Recovery]:
    found = {scenario: recovered(cells, scenario, roles, reference) for scenario in scenarios}
    return {scenario: one for scenario, one in found.items() if one is not None}


def _left(cells: Cells, ours: str) -> dict[tuple[str, str], Mapping[str, Statistic]]:
    """What is left of the gain of `ours` beside every other row."""
    return {
        (scenario, name): {metric: _minus(cells[scenario, ours], own, metric) for metric in CELL_METRICS}
        for (scenario, name), own in cells.items()
        if name != ours and (scenario, ours) in cells
    }


def _headers(rows: Sequence[Row]) -> tuple[Row, ...]:
    headers = tuple(row for row in rows if row.get("kind") == "matrix")
    if not headers:
        raise DataError("the rows hold no row of kind 'matrix'; give the whole recording, its first row included")
    for header in headers:
        for field in HEADER:
            header[field]
    first = headers[0]["settings"]
    for header in headers[1:]:
        for name in sorted({*first, *header["settings"]}):
            if first.get(name) != header["settings"].get(name):
                raise DataError(
                    f"the rows are of different matrices: {name}={first.get(name)} in one and "
                    f"{name}={header['settings'].get(name)} in another; report on them apart"
                )
    return headers


def _reference(headers: Sequence[Row], cells: Cells) -> str:
    named = [str(header["reference"]) for header in headers if header.get("reference")]
    return named[0] if named else next(weighting for _, weighting in cells)


def _cells(rows: Sequence[Row]) -> Cells:
    cells: Cells = {}
    for row in rows:
        if row.get("kind") == "cell":
            own = cells.setdefault((str(row["scenario"]), str(row["weighting"])), {})
            if row["seed"] in own:
                raise DataError(f"the cell {row['run']!r} occurs twice; give each recording once")
            own[row["seed"]] = row
    if not cells:
        raise DataError("no cell is recorded yet; report when at least one is done")
    return cells


def _rates(cells: Cells, *, tuned: bool) -> dict[str, tuple[float, ...]]:
    found: dict[str, list[float]] = {}
    for (scenario, _), own in cells.items():
        found.setdefault(scenario, []).extend(float(row["rate"]) for row in own.values())
    for scenario, rates in found.items():
        if len(distinct(rates)) > 1 and not tuned:
            raise DataError(
                f"scenario {scenario!r} was trained at several rates {distinct(rates)}; report on them apart"
            )
    return {scenario: tuple(sorted(set(rates))) for scenario, rates in found.items()}


def _over(own: Mapping[int, Row], metric: str) -> Statistic:
    return Statistic.of([as_float(row[metric]) for row in own.values()])


def _minus(a: Mapping[int, Row], b: Mapping[int, Row], metric: str) -> Statistic:
    return Statistic.of([as_float(a[seed][metric]) - as_float(b[seed][metric]) for seed in a if seed in b])


def _best(cells: Cells, scenario: str, chosen: Sequence[str]) -> str:
    """The best weighting with the most seeds: a mean over fewer may be high because those are easy."""
    own = {w: _over(seeds, "test_accuracy") for (s, w), seeds in cells.items() if s == scenario and w in chosen}
    return max(own, key=lambda w: (own[w].n, own[w].mean))


def _entry(cells: Cells, key: tuple[str, str], best: Mapping[str, str], reference: str) -> Entry:
    scenario, _ = key
    own, base, top = cells[key], cells.get((scenario, reference), {}), cells[scenario, best[scenario]]
    metrics = (*CELL_METRICS, *([AIMED] if all(AIMED in row for row in own.values()) else []))
    return Entry(
        metrics={metric: _over(own, metric) for metric in metrics},
        differences={metric: _minus(own, base, metric) for metric in CELL_METRICS},
        gap=_minus(top, own, "test_accuracy"),
        weights=np.stack([np.array(row["weights"], np.float64).reshape(-1) for row in own.values()]).mean(axis=0),
    )


def _verdict(
    entries: Mapping[tuple[str, str], Entry], weighting: str, scenarios: Sequence[str], reference: str
) -> Verdict:
    own = {s: entries[s, weighting] for s in scenarios if (s, weighting) in entries}
    judged = {s: entry for s, entry in own.items() if entry.versus.n > 1}
    spread = {s: entries[s, reference].accuracy.sd for s in judged}
    gaps = {s: entry.gap.mean for s, entry in judged.items()}
    short = {s: max(-entry.versus.mean - spread[s], gaps[s] - MARGIN, 0.0) for s, entry in judged.items()}
    short = {s: round(value, 9) for s, value in short.items()}  # so that exactly one point counts as within a point
    gap_in = max(gaps, key=lambda s: gaps[s], default="")
    shortfall_in = max(short, key=lambda s: short[s], default="")
    shortfall = short.get(shortfall_in, math.nan)
    return Verdict(
        missing=tuple(s for s in scenarios if s not in judged),
        worse=tuple(s for s, entry in judged.items() if entry.versus.shown and entry.versus.mean < 0),
        below=tuple(s for s, entry in judged.items() if entry.versus.mean < -spread[s]),
        gap=gaps.get(gap_in, math.nan),
        gap_in=gap_in,
        shortfall=shortfall,
        shortfall_in=shortfall_in if shortfall > 0 else "",
    )


def _rank(name: str, verdict: Verdict, reference: str) -> tuple[Any, ...]:
    return (name != reference, bool(verdict.missing), math.isnan(verdict.gap), verdict.gap, name)
