"""The figures of what averaging and weighting can be expected to gain."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from experiments.setup.overlay import Point
from wavg_jax.reporting import canvas
from wavg_jax.reporting.canvas import DASHES, MARKERS, Plot, Theme

HEIGHT = 3.9
Lines = Mapping[str, Sequence[float]]
"""Name -> values."""


def draw_lines(
    name: str, title: str, subtitle: str, caption: str, x: Sequence[float], lines: Lines, *, of: str, log: bool = False
) -> Plot:
    """Draws losses against a few numbers.

    Args:
      name: of the file.
      title: what the figure shows.
      subtitle: what it was computed with.
      caption: how to read it.
      x: the numbers, all of them named on the axis, which is logarithmic unless they begin with 0.
      lines: losses in nats.
      of: what the numbers are.
      log: whether losses have a logarithmic axis too.
    """

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.make_axes(theme, title, subtitle, HEIGHT)
        for i, (label, values) in enumerate(lines.items()):
            _line(theme, axes, i, x, values, label)
        if x[0] > 0:
            axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        _finish(theme, axes, of, "loss above the best (nats)")
        return figure

    return canvas.make_plot(name, title, caption, paint)


def draw_share(shares: Sequence[float], lines: Lines, points: Sequence[Point], fitted: Point | None) -> Plot:
    """Draws what weighting gains against the share of bad shards, computed and measured.

    Args:
      shares: of the lines.
      lines: gains in nats.
      points: what was measured.
      fitted: the point that the quadratic model was fitted to.
    """
    title = "What weighting gains where labels are random"
    subtitle = "test loss of plain averaging minus that of fitted weights"
    most = max((point.gain.mean for point in points), default=0.0)

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.make_axes(theme, title, subtitle, HEIGHT)
        for i, (label, values) in enumerate(lines.items()):
            _line(theme, axes, i, shares, values, label, marked=False)
        judged_well = [point for point in points if not point.wrong]
        for i, recording in enumerate(dict.fromkeys(point.recording for point in judged_well)):
            own = [point for point in judged_well if point.recording == recording]
            _measured(theme, axes, i, own, f"measured: {recording}")
        if fitted is not None:
            at = (fitted.share, fitted.gain.mean)
            line = {"arrowstyle": "-", "color": theme.ink}
            note = axes.annotate("fitted here", at, (-52, 34), textcoords="offset points", arrowprops=line)
            note.set(fontsize=canvas.SMALL, color=theme.ink)
        axes.set_ylim(min(0.0, *(point.gain.mean - 0.03 for point in points), 0.0), max(1.0, 1.6 * most))
        axes.set_xlim(-0.02, 1.0)
        _finish(theme, axes, "share of random labels in all shards", "gain (nats)")
        return figure

    caption = (
        "Lines are computed: the quadratic model goes through one point, the mixture of labels has nothing fitted. "
        "Points: means over seeds with 95 % intervals, recordings side by side."
    )
    return canvas.make_plot("share", title, caption, paint)


def _measured(theme: Theme, axes: Axes, number: int, points: Sequence[Point], label: str) -> None:
    place = 0.012 * number
    axes.errorbar(
        [point.share + place for point in points],
        [point.gain.mean for point in points],
        [np.nan_to_num(point.gain.half_width) for point in points],
        fmt=MARKERS[(number + 2) % len(MARKERS)],
        color=theme.colours[(number + 3) % len(theme.colours)],
        capsize=3,
        label=label,
    )


def _line(
    theme: Theme, axes: Axes, i: int, x: Sequence[float], values: Sequence[float], label: str, marked: bool = True
) -> None:
    axes.plot(
        x,
        values,
        color=theme.colours[i % len(theme.colours)],
        linestyle=DASHES[i % len(DASHES)],
        marker=MARKERS[i % len(MARKERS)] if marked else None,
        markersize=5,
        linewidth=1.8,
        label=label,
    )


def _finish(theme: Theme, axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color=theme.faint, linewidth=0.8)
    canvas.legend(theme, axes)
