"""The figure at the top of a report: how well every arm ended, in every scenario."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wavg_jax.reporting import canvas
from wavg_jax.reporting.canvas import MARKERS, SMALL, TEXT, Plot, Theme
from wavg_jax.reporting.measures import Measure, judged_by
from wavg_jax.reporting.statistic import Statistic
from wavg_jax.reporting.summary import ArmSummary, Summary, scenario_names
from wavg_jax.reporting.wording import MINUS, common_decimals, distinct, interval, seeds, signed

HEAD = 1.1  # rows that the name of a scenario takes
ROW = 0.27  # inches


def draw_headline(summaries: Sequence[Summary], places: Mapping[str, int]) -> Plot:
    """Draws the final test accuracy (or loss) of every arm, scenario by scenario, with a point for each seed.

    Args:
      summaries: the scenarios of a report.
      places: the place of each arm among colours and markers.
    """
    measure = _common_measure(summaries)
    title = f"Final {measure.words}"
    names = [textwrap.wrap(name, 58) for name in scenario_names(summaries)]
    rows = sum(len(one.arms) + HEAD + len(name) + 0.5 for one, name in zip(summaries, names, strict=True))

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.make_axes(theme, title, _made_from(summaries), 1.35 + ROW * rows)
        ticks: list[tuple[float, str]] = []
        y = -0.9
        for one, name in zip(summaries, names, strict=True):
            y += 0.5
            _text(axes, theme, y + 0.5 * (len(name) - 1), "\n".join(name), bold=True)
            _text(axes, theme, y + len(name), _difference(one, measure))
            y += len(name) + HEAD
            for arm in one.arms:
                _arm(axes, theme, arm, measure, y, places[arm.name])
                ticks.append((y, arm.name))
                y += 1
        axes.set_ylim(y - 0.3, -1.0)
        axes.set_xlim(*_limits(summaries, measure))
        axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x", color=theme.faint, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"test {measure.title}")
        return figure

    unit = f", in {measure.unit}" if measure.unit else ""
    caption = (
        "Small marks: seeds; large mark and number: their mean; bar: its 95 % interval (Student's t), from three seeds "
        f"on. Differences are paired by seed{unit}."
    )
    return canvas.make_plot("headline", title, caption, paint)


def _common_measure(summaries: Sequence[Summary]) -> Measure:
    """What all scenarios can be drawn by: accuracy if all have it."""
    shared = set.intersection(*({measure.metric for measure in one.measures} for one in summaries))
    return judged_by(shared)


def _made_from(summaries: Sequence[Summary]) -> str:
    counts = [len(arm.runs) for one in summaries for arm in one.arms]
    fewest = f"{min(counts)} to " if min(counts) < max(counts) else ""
    data = ", ".join(map(str, distinct(one.header["dataset"] for one in summaries)))
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


def _difference(one: Summary, measure: Measure) -> str:
    d = one.focus.differences.get(measure.metric)
    if d is None or not d.n:
        return f"no comparison with {one.reference}" if one.reference else "no reference to compare with"
    decimals = common_decimals([d.mean, d.sd]) if measure.decimals is None else measure.decimals
    unit = f" {measure.unit}" if measure.unit else ""
    line = f"{one.focus.name} {MINUS} {one.reference}: {signed(measure.scale * d.mean, decimals)}{unit}"
    if d.too_few:
        return f"{line} (too few seeds to tell)"
    return f"{line} (95 %: {interval(d, measure.scale, decimals)})"


def _arm(axes: Axes, theme: Theme, arm: ArmSummary, measure: Measure, y: float, place: int) -> None:
    value, ink, marker = arm.metrics[measure.metric], theme.colours[place], MARKERS[place]
    every = _finals(arm, measure)
    axes.plot(
        every, [y] * len(every), linestyle="", marker=marker, color=ink, markersize=4.5, fillstyle="none", alpha=0.8
    )
    mean = measure.scale * value.mean
    if value.n:
        if value.n > 2:
            axes.plot(_ends(value, measure), [y, y], color=ink, linewidth=2.5, alpha=0.5, solid_capstyle="butt")
        axes.plot(mean, y, marker=marker, color=ink, markersize=8)
    decimals = common_decimals([mean]) if measure.decimals is None else measure.decimals
    shown = f"{mean:.{decimals}f}" if value.n else "not finite"
    shown += f" ({value.n} of {len(arm.runs)})" if 0 < value.n < len(arm.runs) else ""
    axes.annotate(shown, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=TEXT, color=theme.ink)


def _finals(arm: ArmSummary, measure: Measure) -> list[float]:
    return [measure.scale * run.final(measure.metric) for run in arm.runs]


def _ends(value: Statistic, measure: Measure) -> tuple[float, float]:
    """Both ends of the 95 % interval."""
    return measure.scale * (value.mean - value.half_width), measure.scale * (value.mean + value.half_width)


def _limits(summaries: Sequence[Summary], measure: Measure) -> tuple[float, float]:
    arms = [arm for one in summaries for arm in one.arms]
    found = np.array([value for arm in arms for value in _finals(arm, measure)])
    if not np.isfinite(found).any():
        return 0.0, 100.0 if measure.percent else 1.0
    low, high = float(np.nanmin(found)), float(np.nanmax(found))
    span = max(high - low, 2.0 if measure.percent else 0.02 * max(abs(low), abs(high)), 1e-9)
    values = [arm.metrics[measure.metric] for arm in arms]
    ends = np.array([_ends(value, measure) for value in values if value.n > 2]).reshape(-1, 2)
    # The intervals of few seeds may be so long that they would squash all else; those are cut.
    bottom, top = max(min([low, *ends[:, 0]]), low - span / 2), min(max([high, *ends[:, 1]]), high + span / 2)
    bottom, top = bottom - 0.05 * span, top + 0.05 * span
    return (max(bottom, -1.0), min(top, 101.0)) if measure.percent else (bottom, top)
