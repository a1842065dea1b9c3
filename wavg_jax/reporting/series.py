"""The figure of a matrix whose scenarios are values of one quantity: accuracy of every weighting along it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from wavg_jax.reporting import canvas
from wavg_jax.reporting.canvas import DASHES, MARKERS, Plot, Theme
from wavg_jax.reporting.matrix import Matrix
from wavg_jax.reporting.plots import FOCUS_PLACE, REFERENCE_PLACE
from wavg_jax.storage.schema import Row

_SPAN = 20
"""Largest value over smallest from which the axis is logarithmic."""


class Series(NamedTuple):
    """A quantity, and its value in each scenario that has one."""

    title: str
    at: Mapping[str, float]


def series_of(headers: Sequence[Row]) -> Series | None:
    """The series that the first rows of a recording name, if they name one."""
    given = [header["series"] for header in headers if header.get("series")]
    if not given or len({one["title"] for one in given}) > 1:
        return None
    return Series(str(given[0]["title"]), {str(name): float(x) for one in given for name, x in one["at"].items()})


def draw_series(matrix: Matrix, series: Series) -> Plot:
    """Draws test accuracy against the quantity: a line for every weighting, and for the oracle."""
    caption = "Lines: mean over seeds; bands: ± 1 standard deviation."
    return canvas.make_plot("series", _title(series), caption, lambda theme: _paint(matrix, series, theme))


def _title(series: Series) -> str:
    return f"Test accuracy against {series.title}"


def _paint(matrix: Matrix, series: Series, theme: Theme) -> Figure:
    made_from = f"{matrix.headers[0]['dataset']}, {matrix.repeated}"
    figure, axes = canvas.make_axes(theme, _title(series), made_from, 4.6, 6.4)
    names = [*matrix.weightings, *([matrix.roles.oracle] if matrix.roles else [])]
    places = sorted((value, scenario) for scenario, value in series.at.items() if scenario in matrix.titles)
    shown = [name for name in names if any((s, name) in matrix.entries for _, s in places)]
    styles = _styles(shown, matrix)
    for name in shown:
        found = [(x, matrix.entries[s, name].accuracy) for x, s in places if (s, name) in matrix.entries]
        xs, means = np.array([x for x, _ in found]), 100 * np.array([one.mean for _, one in found])
        spread = 100 * np.nan_to_num([one.sd for _, one in found])
        style = styles[name]
        colour = theme.colours[style]
        axes.plot(xs, means, color=colour, linestyle=DASHES[style], marker=MARKERS[style], markersize=4.5, label=name)
        axes.fill_between(xs, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
    values = [x for x, _ in places]
    if min(values) > 0 and max(values) / min(values) > _SPAN:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.grid(axis="y", color=theme.faint, linewidth=0.8)
    axes.set_xlabel(series.title)
    axes.set_ylabel("test accuracy (%)")
    canvas.legend(theme, axes)
    return figure


def _styles(names: Sequence[str], matrix: Matrix) -> dict[str, int]:
    """The place of each line among colours, dashes and markers: the reference's and ours are those of other figures."""
    fixed = {matrix.reference: REFERENCE_PLACE} | ({matrix.roles.ours: FOCUS_PLACE} if matrix.roles else {})
    free = [place for place in range(len(MARKERS)) if place not in fixed.values()]
    others = [name for name in names if name not in fixed]
    return fixed | {name: free[number % len(free)] for number, name in enumerate(others)}
