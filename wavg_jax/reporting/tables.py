"""The tables of a scenario as text, and text tables as Markdown."""

import math
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from wavg_jax.reporting.measures import Measure
from wavg_jax.reporting.runs import links_in_words
from wavg_jax.reporting.shares import Shares
from wavg_jax.reporting.statistic import Statistic
from wavg_jax.reporting.summary import ArmSummary, Summary
from wavg_jax.reporting.trust import Trust
from wavg_jax.reporting.wording import MINUS, TIMES, clock_unit, common_decimals, mean_sd


class TextTable(NamedTuple):
    """A table of text.

    Attributes:
      title: heading.
      note: how to read it.
      columns: headings; the first column holds names.
      sections: groups of rows, in a comparison the arms and then their differences from the reference.
      spare: columns that a narrow terminal leaves out.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    sections: tuple[tuple[tuple[str, ...], ...], ...]
    spare: Collection[str] = ()


class Column(NamedTuple):
    """A column of statistics.

    Attributes:
      title: heading, with the unit; `{}` stands for the unit of a time.
      metric: a name in `ArmSummary.metrics`.
      scale: factor from recorded to shown values.
      decimals: None for three significant digits.
      exact: counted, or taken once for all seeds, and so without a spread.
      clock: "measured" or "computed" for a time, which compares only between like machines.
      absent: what a cell without a finite value says.
    """

    title: str
    metric: str
    scale: float = 1.0
    decimals: int | None = None
    exact: bool = False
    clock: str = ""
    absent: str = "not measured"


TARGET = (
    Column("samples", "samples_to_target", decimals=0),
    Column("measured ({})", "measured_to_target", clock="measured"),
    Column("computed ({})", "critical_to_target", clock="computed"),
)
COST = (
    Column("compiling ({})", "compile_seconds", exact=True, clock="measured"),
    Column("round, measured ({})", "seconds_per_round", clock="measured"),
    Column("round, computed ({})", "critical_round", exact=True, clock="computed"),
    Column("sent (MB/round)", "bytes_per_round", 1e-6, exact=True),
)


def comparison_tables(one: Summary) -> list[TextTable]:
    """The tables of a scenario: final quality, time to target, cost, weights."""
    spread = "Mean ± sample standard deviation over seeds."
    if any(arm.differences for arm in one.arms):
        spread += f" Below: differences from {one.reference}, paired by seed, over the seeds that both have."
    ece = " ECE: expected calibration error." if any(measure.metric == "ece" for measure in one.measures) else ""
    quality = [_quality(one, measure) for measure in one.measures]
    result = [_table(one, "Final quality on the test split", spread + ece, quality, spare=("macro-F1 (%)",))]
    if math.isfinite(one.target):
        note = (
            "Up to the first round that reaches it; means over the seeds that do. Computed, not measured: rounds to "
            f"target {TIMES} the measured time of one replica's local phase, scoring and blend, with one device for "
            f"each replica {links_in_words(one.runs)}."
        )
        result.append(_table(one, f"To {100 * one.target:.4g} % test accuracy", note, TARGET, reached=True))
    note = (
        "Compiling is measured, and part of no other column. Values taken once for all seeds have no spread. Sent: to "
        "and from all replicas together."
    )
    result.append(_table(one, "Cost", note, COST))
    weighted = [(arm.name, arm.shares) for arm in one.arms if arm.shares is not None]
    if weighted:
        note = (
            "Effective number of replicas: 1 / sum of squared weights; K if all count the same. Lightest and "
            f"heaviest: a replica's mean weight over its rounds and seeds {TIMES} K; 1 is an equal share."
        )
        heads = ("arm", "K", "effective, mean", "effective, lowest", "lightest", "heaviest")
        result.append(TextTable("Weights", note, heads, (tuple(_weights_row(*row) for row in weighted),)))
    trusting = [(arm.name, arm.trust) for arm in one.arms if arm.trust is not None]
    return [*result, _trust_table(trusting)] if trusting else result


def _trust_table(arms: Sequence[tuple[str, Trust]]) -> TextTable:
    """What the weights gain, and whether weights and scores know whom to trust."""
    note = (
        "From the logits of scored rounds, on the samples scored. Gain: loss that the weights save beside equal ones, "
        "in nats; beyond chance: in how many rounds it is more than twice its standard error. Worth: what leaving a "
        "replica out costs equal weights, the mean in nats; below 0 they do better without it. Then the mean rank "
        "correlation of weights and scores with that: 1 if they trust those most that are worth most."
    )
    judges = list(dict.fromkeys(name for _, trust in arms for name in trust.agreement))

    def row(name: str, trust: Trust) -> tuple[str, ...]:
        found = [trust.agreement.get(judge, math.nan) for judge in judges]
        agreement = [f"{x:+.2f}".replace("-", MINUS) if math.isfinite(x) else "\N{EN DASH}" for x in found]
        if not np.isfinite(trust.worth).any():
            return (name, str(trust.rounds), *["all dead" if trust.rounds else "not scored"] * 4, *agreement)
        gain, beyond = f"{trust.gain:+.3f}".replace("-", MINUS), f"{100 * trust.beyond_chance:.0f}"
        ends = (np.nanargmin(trust.worth), np.nanargmax(trust.worth))
        worth = [f"{trust.worth[k]:+.3f} (replica {k})".replace("-", MINUS) for k in ends]
        return (name, str(trust.rounds), gain, beyond, *worth, *agreement)

    heads = ("arm", "rounds", "gain (nats)", "beyond chance (%)", "worth least", "worth most", *judges)
    return TextTable("Whom weights and scores trust", note, heads, (tuple(row(*arm) for arm in arms),))


def _quality(one: Summary, measure: Measure) -> Column:
    decimals = measure.decimals
    if decimals is None:
        decimals = common_decimals([measure.scale * arm.metrics[measure.metric].mean for arm in one.arms])
    return Column(measure.title, measure.metric, measure.scale, decimals, absent="not finite")


def _table(
    one: Summary,
    title: str,
    note: str,
    columns: Sequence[Column],
    *,
    reached: bool = False,
    spare: Collection[str] = (),
) -> TextTable:
    columns = [_with_unit(one.arms, column) for column in columns]
    arms, differences = [], []
    for arm in one.arms:
        seeds, count = len(arm.runs), arm.metrics["rounds_to_target"].n
        # An arm that never reaches the target is not one whose clock was not measured.
        missing = "not reached" if reached and not count else None
        cells = [
            missing or _cell(column, arm.metrics[column.metric], count if reached else seeds) for column in columns
        ]
        arms.append((arm.name, f"{count} of {seeds}" if reached else str(seeds), *cells))
        pairs = len(arm.pairs)
        if reached and arm.differences:
            pairs = arm.differences["rounds_to_target"].n
        if pairs and arm.differences:
            cells = [_difference(column, arm, pairs) for column in columns]
            differences.append((f"{arm.name} {MINUS} {one.reference}", str(pairs), *cells))
    heads = ("arm", "reached by" if reached else "seeds", *(column.title for column in columns))
    return TextTable(title, note, heads, tuple(tuple(rows) for rows in (arms, differences) if rows), spare)


def _with_unit(arms: Sequence[ArmSummary], column: Column) -> Column:
    """Gives all cells of a column of times one unit."""
    if not column.clock:
        return column
    unit, scale = clock_unit([arm.metrics[column.metric].mean for arm in arms])
    return column._replace(title=column.title.format(unit), scale=scale)


def _difference(column: Column, arm: ArmSummary, pairs: int) -> str:
    comparable = {"measured": arm.same_devices, "computed": arm.same_hardware}.get(column.clock, True)
    return _cell(column, arm.differences[column.metric], pairs, "+") if comparable else "not comparable"


def _cell(column: Column, value: Statistic, expected: int, sign: str = "") -> str:
    if value.n == 0:
        return column.absent
    shown = mean_sd(value, column.scale, column.decimals, sign=sign, exact=column.exact)
    return shown + (f" ({value.n} of {expected})" if value.n < expected else "")


def _weights_row(arm: str, shares: Shares) -> tuple[str, ...]:
    k = len(shares.mean)
    if shares.lost == shares.rounds:
        return (arm, str(k), *["all dead"] * 4)
    order = np.argsort(shares.mean)[: max(np.isfinite(shares.mean).sum(), 1)]  # one that was never alive sorts last
    ends = [f"{k * shares.mean[i]:.2f} (replica {i})" for i in (order[0], order[-1])]
    return (arm, str(k), f"{shares.effective_mean:.2f}", f"{shares.effective_min:.2f}", *ends)


def escape(text: str) -> str:
    """Text in one line, with a backslash before what Markdown would read as markup."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))


def markdown_table(table: TextTable, *, numbers: bool = True) -> str:
    """A table as Markdown; without `numbers` all columns are flush left."""
    align = "|:--" + ("|--:" if numbers else "|:--") * (len(table.columns) - 1)
    lines = ["| " + " | ".join(map(escape, table.columns)) + " |", align + "|"]
    for index, section in enumerate(table.sections):
        for name, *cells in section:
            first = f"*{escape(name)}*" if index else escape(name)
            lines.append(f"| {first} | " + " | ".join(map(escape, cells)) + " |")
    return "\n".join(lines)
