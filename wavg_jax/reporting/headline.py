"""The figure at the top of a report: how well every arm ended, in every scenario."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wavg_jax.reporting import canvas, summary
from wavg_jax.reporting.canvas import MARKERS, SMALL, TEXT, Plot, Theme
from wavg_jax.reporting.plots import index
from wavg_jax.reporting.statistic import MINUS, Statistic, interval, seeds, signed
from wavg_jax.reporting.summary import REFERENCE, Arm, Summary

TITLE = "Final test accuracy"
HEAD = 1.1  # rows that the name of a scenario takes
ROW = 0.27  # inches


def draw(summaries: Sequence[Summary]) -> Plot:
    """Draws the final test accuracy of every arm, scenario by scenario, with a point for each seed.

    Args:
      summaries: of the scenarios of a report.
    """
    names = [textwrap.wrap(name, 58) for name in summary.names(summaries)]
    rows = sum(len(one.arms) + HEAD + len(name) + 0.5 for one, name in zip(summaries, names, strict=True))

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.axes(theme, TITLE, _made_from(summaries), 1.35 + ROW * rows)
        ticks: list[tuple[float, str]] = []
        y = -0.9
        for one, name in zip(summaries, names, strict=True):
            y += 0.5
            _text(axes, theme, y + 0.5 * (len(name) - 1), "\n".join(name), bold=True)
            _text(axes, theme, y + len(name), _difference(one))
            y += len(name) + HEAD
            for arm in one.arms:
                _arm(axes, theme, arm, y, index(one, arm))
                ticks.append((y, arm.name))
                y += 1
        axes.set_ylim(y - 0.3, -1.0)
        axes.set_xlim(*_limits(summaries))
        axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x", color=theme.faint, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("test accuracy (%)")
        return figure

    caption = (
        "A small mark for each seed; the large one and the number are their mean; the bar is its 95 % interval "
        "(Student's t), from three seeds on. Differences are paired by seed, in points."
    )
    return canvas.plot("headline", TITLE, caption, paint)


def _made_from(summaries: Sequence[Summary]) -> str:
    counts = [len(arm.runs) for one in summaries for arm in one.arms]
    fewest = f"{min(counts)} to " if min(counts) < max(counts) else ""
    data = ", ".join(map(str, summary.distinct(one.header["dataset"] for one in summaries)))
    return f"{data}, {fewest}{seeds(max(counts))}"


def _text(axes: Axes, theme: Theme, y: float, text: str, *, bold: bool = False) -> None:
    """A line of text across the figure; x is measured from the left of the axes."""
    axes.annotate(
        text,
        (0, y),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=TEXT if bold else SMALL,
        fontweight="bold" if bold else "normal",
        color=theme.ink,
        bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1},
    )


def _difference(one: Summary) -> str:
    d = one.focus.differences.get("accuracy")
    if d is None or not d.n:
        return f"no comparison with {REFERENCE}"
    line = f"{one.focus.name} {MINUS} {REFERENCE}: {signed(100 * d.mean, 2)} points"
    return f"{line} (too few seeds to tell)" if d.too_few else f"{line}, 95 % interval {interval(d)}"


def _arm(axes: Axes, theme: Theme, arm: Arm, y: float, place: int) -> None:
    value, ink, marker = arm.metrics["accuracy"], theme.colours[place], MARKERS[place]
    every = [100 * run.accuracy[-1] for run in arm.runs]
    axes.plot(
        every, [y] * len(every), linestyle="", marker=marker, color=ink, markersize=4.5, fillstyle="none", alpha=0.8
    )
    if value.n:
        if value.n > 2:
            axes.plot(_ends(value), [y, y], color=ink, linewidth=2.5, alpha=0.5, solid_capstyle="butt")
        axes.plot(100 * value.mean, y, marker=marker, color=ink, markersize=8)
    shown = f"{100 * value.mean:.2f}" if value.n else "not finite"
    shown += f" ({value.n} of {len(arm.runs)})" if 0 < value.n < len(arm.runs) else ""
    axes.annotate(shown, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=TEXT, color=theme.ink)


def _ends(value: Statistic) -> tuple[float, float]:
    return 100 * (value.mean - value.half_width), 100 * (value.mean + value.half_width)


def _limits(summaries: Sequence[Summary]) -> tuple[float, float]:
    arms = [arm for one in summaries for arm in one.arms]
    found = np.array([100 * run.accuracy[-1] for arm in arms for run in arm.runs])
    if not np.isfinite(found).any():
        return 0.0, 100.0
    low, high = float(np.nanmin(found)), float(np.nanmax(found))
    span = max(high - low, 2.0)
    ends = np.array([_ends(arm.metrics["accuracy"]) for arm in arms if arm.metrics["accuracy"].n > 2]).reshape(-1, 2)
    # The bars of few seeds may be so long that they would squash all else; those are cut.
    bottom, top = max(min([low, *ends[:, 0]]), low - span / 2), min(max([high, *ends[:, 1]]), high + span / 2)
    return max(bottom - 0.05 * span, -1.0), min(top + 0.05 * span, 101.0)
