"""The share of the oracle's gap that weightings recover, and what controls leave of a gain, as tables and a figure."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from wavg_jax.reporting import canvas
from wavg_jax.reporting.canvas import SMALL, Plot, Theme
from wavg_jax.reporting.matrix import Matrix
from wavg_jax.reporting.recovery import Recovery
from wavg_jax.reporting.statistic import Statistic
from wavg_jax.reporting.tables import TextTable
from wavg_jax.reporting.wording import interval, mean_sd, signed

NONE = "n/a"
TITLE = "What bad shards and faults cost, and what is recovered"
_OURS, _BEST = 3, 1
"""Places among the colours."""


def recovery_tables(matrix: Matrix) -> list[TextTable]:
    """The share of the oracle's gap that each weighting recovers, by scenario; none without roles."""
    if matrix.roles is None or not matrix.recovered:
        return []
    ours = matrix.roles.ours
    rows = [
        (
            matrix.titles[scenario],
            *(mean_sd(matrix.entries[scenario, name].accuracy, 100, 2) for name in _ends(matrix)),
            _difference(one.gap, 100, 2),
            one.best or NONE,
            *(_share(one, name) for name in (one.best, ours)),
        )
        for scenario, one in matrix.recovered.items()
    ]
    note = (
        f"{matrix.roles.oracle}: {matrix.reference} averaging without what is wrong. Share recovered: accuracy above "
        f"{matrix.reference}'s as a share of the gap, with Fieller's 95 % interval; {NONE} where no gap is shown. The "
        "best published weighting of a scenario is the one that was best on the tuning seeds, which are not reported."
    )
    heads = ("scenario", *(f"{name} (%)" for name in _ends(matrix)), "gap (points)")
    return [
        TextTable(
            "Share of the oracle's gap recovered", note, (*heads, "best published", "its share", ours), (tuple(rows),)
        )
    ]


def _ends(matrix: Matrix) -> tuple[str, str]:
    assert matrix.roles is not None
    return matrix.reference, matrix.roles.oracle


def _share(one: Recovery, name: str) -> str:
    share = one.shares.get(name)
    if share is None:
        return NONE
    spread = "" if math.isnan(share.low) else f" ({signed(100 * share.low, 0)} to {signed(100 * share.high, 0)})"
    return f"{100 * share.mean:.0f} %{spread}"


def left_tables(matrix: Matrix) -> list[TextTable]:
    """What is left of the gain beside every other row: accuracy, and loss; none without roles."""
    if matrix.roles is None or not matrix.left:
        return []
    ours = matrix.roles.ours
    names = [name for name in (*matrix.weightings, *matrix.controls) if name != ours]

    def table(title: str, note: str, metric: str, scale: float, decimals: int) -> TextTable:
        def shown(scenario: str, name: str) -> str:
            found = matrix.left.get((scenario, name))
            return NONE if found is None else _difference(found[metric], scale, decimals)

        rows = [(name, *(shown(scenario, name) for scenario in matrix.titles)) for name in names]
        return TextTable(title, note, ("minus", *matrix.titles.values()), (tuple(rows),))

    paired = "Means over seeds, with 95 % intervals, paired by seed."
    return [
        table(
            f"{ours} minus every other row: points of test accuracy",
            f"{paired} Above 0 {ours} is better.",
            "test_accuracy",
            100,
            2,
        ),
        table(
            f"{ours} minus every other row: test loss",
            f"{paired} In nats; below 0 {ours} is better.",
            "test_loss",
            1,
            3,
        ),
    ]


def _difference(d: Statistic, scale: float, decimals: int) -> str:
    if not d.n:
        return NONE
    shown = signed(scale * d.mean, decimals)
    return f"{shown} (too few seeds)" if d.too_few else f"{shown} ({interval(d, scale, decimals)})"


def draw_recovery(matrix: Matrix) -> Plot:
    """Draws the share of the oracle's gap that the best published weighting and ours recover, by scenario."""
    assert matrix.roles is not None
    hidden = [matrix.titles[s] for s, one in matrix.recovered.items() if not (one.gap.shown and one.gap.mean > 0)]
    caption = (
        f"0 %: {matrix.reference} averaging; 100 %: the same without what is wrong (no bad shards, no faults). Bars: "
        "mean over seeds; lines: Fieller's 95 % interval, with an arrow where cut. "
        "In brackets: the gap in points of test accuracy. Beside the "
        "upper bar: the published weighting that was best on other seeds."
        + (f" No gap is shown for: {', '.join(hidden)}." if hidden else "")
    )
    return canvas.make_plot("recovered", TITLE, caption, lambda theme: _paint(matrix, theme))


def _paint(matrix: Matrix, theme: Theme) -> Figure:
    assert matrix.roles is not None
    shown = {scenario: one for scenario, one in matrix.recovered.items() if one.shares}
    made_from = f"{matrix.headers[0]['dataset']}, {matrix.repeated}"
    figure, axes = canvas.make_axes(theme, TITLE, made_from, 1.7 + 0.62 * len(shown), 7.0)
    for place, one in enumerate(shown.values()):
        _bars(theme, axes, place, one, matrix.roles.ours)
    axes.axvline(0, color=theme.ink, linewidth=0.8)
    axes.axvline(1, color=theme.ink, linewidth=0.8, linestyle=(0, (2, 2)))
    ends = [share.low for one in shown.values() for share in one.shares.values() if share.low < 0]
    axes.set_xlim(max(min(ends, default=0.0), -0.5) - 0.05, 1.35)
    axes.set_ylim(len(shown) - 0.45, -0.55)
    titles = [f"{matrix.titles[s]}\n({100 * one.gap.mean:.1f})" for s, one in shown.items()]
    axes.set_yticks(np.arange(len(shown)), titles, fontsize=SMALL)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of the gap between plain averaging and the oracle")
    axes.tick_params(axis="y", length=0)
    for name, place in (("best published", _BEST), (matrix.roles.ours, _OURS)):
        axes.barh(np.nan, np.nan, color=theme.colours[place], label=name)
    canvas.legend(theme, axes)
    return figure


_LEAST, _MOST = -0.5, 1.3
"""Shares at which bars and lines are cut."""


def _bars(theme: Theme, axes: Axes, place: int, one: Recovery, ours: str) -> None:
    for name, colour, off in ((one.best, _BEST, -0.2), (ours, _OURS, 0.2)):
        share = one.shares.get(name)
        if share is None:
            continue
        y = place + off
        axes.barh(y, _within(share.mean), 0.36, color=theme.colours[colour])
        low, high = (share.mean if math.isnan(end) else end for end in (share.low, share.high))
        axes.plot([_within(low), _within(high)], [y, y], color=theme.ink, linewidth=1.1)
        for end, marker in ((low, "<"), (high, ">")):
            if _within(end) != end:
                axes.plot(_within(end), y, marker=marker, color=theme.ink, markersize=4)
        cut = "" if _within(share.mean) == share.mean else f"{100 * share.mean:.0f} %"
        words = " ".join(part for part in (name if name == one.best else "", cut) if part)
        axes.annotate(
            words,
            (_within(max(high, 0.0)), y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL - 1.5,
            color=theme.ink,
            annotation_clip=False,
        )


def _within(share: float) -> float:
    return max(min(share, _MOST), _LEAST)
