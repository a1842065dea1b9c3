"""The tables of a scenario, as text, and as Markdown."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wavg_jax.reporting.shares import Weights
from wavg_jax.reporting.statistic import MINUS, Statistic, clock_unit, number
from wavg_jax.reporting.summary import REFERENCE, Arm, Summary

TIMES = "\N{MULTIPLICATION SIGN}"


class Column(NamedTuple):
    """A column of statistics.

    Attributes:
      title: heading, with the unit; of a time with `{}` in its place.
      metric: a name in `wavg_jax.reporting.summary.METRICS`.
      scale: what the metric is multiplied by.
      decimals: None for three significant digits.
      exact: counted, or taken once for all seeds, and so without a spread.
    """

    title: str
    metric: str
    scale: float = 1.0
    decimals: int | None = None
    exact: bool = False


class Table(NamedTuple):
    """A table as text: first the arms, then their differences from the reference.

    Attributes:
      title: heading.
      note: how to read it.
      columns: headings; the first column holds names.
      sections: rows of cells, in groups.
      spare: columns that a terminal leaves out where all are too wide for it.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    sections: tuple[tuple[tuple[str, ...], ...], ...]
    spare: Collection[str] = ()


QUALITY = (
    Column("accuracy (%)", "accuracy", 100, 2),
    Column("loss", "loss", decimals=3),
    Column("macro-F1 (%)", "macro_f1", 100, 2),
    Column("ECE (%)", "ece", 100, 2),
)
TARGET = (
    Column("samples", "samples_to_target", decimals=0),
    Column("measured ({})", "measured_to_target"),
    Column("computed ({})", "critical_to_target"),
)
COST = (
    Column("compiling ({})", "compile_seconds", exact=True),
    Column("round, measured ({})", "seconds_per_round"),
    Column("round, computed ({})", "critical_round", exact=True),
    Column("sent (MB/round)", "bytes_per_round", 1e-6, exact=True),
)


def tables(one: Summary) -> list[Table]:
    """The tables of a scenario, as text."""
    target = f"{100 * one.target:.4g} %" if math.isfinite(one.target) else "the target (none was set)"
    spread = "Mean ± sample standard deviation over seeds."
    if any(arm.differences for arm in one.arms):
        spread += f" Below: differences from {REFERENCE}, paired by seed, over the seeds that both have."
    result = [
        _table(
            one,
            "Final quality on the test split",
            f"{spread} ECE: expected calibration error.",
            QUALITY,
            spare=("macro-F1 (%)",),
        ),
        _table(
            one,
            f"To {target} test accuracy",
            "Up to the first round that reaches it; means over the seeds that do. Computed, not measured: rounds to "
            f"target {TIMES} the measured time of one replica's local phase, scoring and blend.",
            TARGET,
            reached=True,
        ),
        _table(
            one,
            "Cost",
            "Compiling is measured, and in no other column. What is taken once for all seeds has no spread. Sent: by "
            "all replicas together, and received.",
            COST,
        ),
    ]
    weighted = [(arm.name, arm.weights) for arm in one.arms if arm.weights is not None]
    if weighted:
        note = (
            "Effective number of replicas: 1 / sum of squared weights, K when all count the same. Lightest and "
            f"heaviest: mean weight of a replica over its rounds and seeds {TIMES} K, so 1 is an equal share."
        )
        heads = ("arm", "K", "effective, mean", "effective, lowest", "lightest", "heaviest")
        result.append(Table("Weights", note, heads, (tuple(_weights_row(*row) for row in weighted),)))
    return result


def _table(
    one: Summary,
    title: str,
    note: str,
    columns: Sequence[Column],
    *,
    reached: bool = False,
    spare: Collection[str] = (),
) -> Table:
    columns = [_in_its_unit(one.arms, column) for column in columns]
    arms, differences = [], []
    for arm in one.arms:
        seeds, count = len(arm.runs), arm.metrics["rounds_to_target"].n
        # An arm that never gets there differs from one whose clock was not measured.
        missing = ("not reached" if math.isfinite(one.target) else "no target") if reached and not count else None
        cells = [missing or _cell(column, arm.metrics, count if reached else seeds) for column in columns]
        arms.append((arm.name, f"{count} of {seeds}" if reached else str(seeds), *cells))
        pairs = len(arm.pairs)
        if reached and arm.differences:
            pairs = arm.differences["rounds_to_target"].n
        if pairs and arm.differences:
            cells = [_cell(column, arm.differences, pairs, "+") for column in columns]
            differences.append((f"{arm.name} {MINUS} {REFERENCE}", str(pairs), *cells))
    heads = ("arm", "reached by" if reached else "seeds", *(column.title for column in columns))
    return Table(title, note, heads, tuple(tuple(rows) for rows in (arms, differences) if rows), spare)


def _in_its_unit(arms: Sequence[Arm], column: Column) -> Column:
    """Gives a column of times one unit for all its cells."""
    if "{}" not in column.title:
        return column
    unit, scale = clock_unit([arm.metrics[column.metric].mean for arm in arms])
    return column._replace(title=column.title.format(unit), scale=scale)


def _cell(column: Column, metrics: Mapping[str, Statistic], expected: int, sign: str = "") -> str:
    value = metrics[column.metric]
    if value.n == 0:
        return "not finite" if column.metric in {c.metric for c in QUALITY} else "not measured"
    shown = number(column.scale, column.decimals, exact=column.exact)(value, sign)
    return shown + (f" ({value.n} of {expected})" if value.n < expected else "")


def _weights_row(arm: str, w: Weights) -> tuple[str, ...]:
    k = len(w.mean)
    if w.lost == w.rounds:
        return (arm, str(k), *["all dead"] * 4)
    order = np.argsort(w.mean)[: max(np.isfinite(w.mean).sum(), 1)]  # a replica that was never alive sorts last
    ends = [f"{k * w.mean[i]:.2f} (replica {i})" for i in (order[0], order[-1])]
    return (arm, str(k), f"{w.effective_mean:.2f}", f"{w.effective_min:.2f}", *ends)


def escape(text: str) -> str:
    """Text as it stands, where Markdown would see markup."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))


def markdown_table(table: Table, *, numbers: bool = True) -> str:
    """A table as Markdown; without `numbers` all columns are flush left."""
    align = "|:--" + ("|--:" if numbers else "|:--") * (len(table.columns) - 1)
    lines = ["| " + " | ".join(map(escape, table.columns)) + " |", align + "|"]
    for index, section in enumerate(table.sections):
        for name, *cells in section:
            first = f"*{escape(name)}*" if index else escape(name)
            lines.append(f"| {first} | " + " | ".join(map(escape, cells)) + " |")
    return "\n".join(lines)
