"""The figure of a scenario matrix: how far every weighting is from plain averaging, scenario by scenario."""

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator

from wavg_jax.matrix import MARGIN, Entry, Matrix
from wavg_jax.plots import DPI, INK, SIZE, Plot, render
from wavg_jax.summary import REFERENCE

MINUS = "\N{MINUS SIGN}"
APART = 0.22  # of a cell: what keeps the reference row and the column of gaps from the rest
BLANK, NEUTRAL = "#F4F4F2", "#E4E4E1"


def signed(value: float, decimals: int) -> str:
    """A difference as a reader reads it.

    >>> signed(1.26, 1), signed(-0.04, 1)
    ('+1.3', '0.0')
    """
    shown = f"{value:+z.{decimals}f}"
    return shown.replace("-", MINUS) if float(shown) else shown[1:]


def draw(matrix: Matrix) -> Plot:
    """Draws the heat map: weightings by scenarios, plain averaging on top, and each one's largest gap to the best."""
    rows, columns = len(matrix.weightings), len(matrix.titles)
    figure = Figure(figsize=(SIZE[0], 2.1 + 0.31 * rows), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    limit = _limit(matrix)
    # Linear within a point, logarithmic beyond: rescues of 10 points must not hide differences of 1.
    colours = ScalarMappable(SymLogNorm(linthresh=1.0, linscale=1.0, vmin=-limit, vmax=limit, base=10), "RdBu")
    heights = [row + (APART if row and matrix.weightings[0] == REFERENCE else 0) for row in range(rows)]
    for y, weighting in zip(heights, matrix.weightings, strict=True):
        for x, scenario in enumerate(matrix.titles):
            _cell(axes, x, y, matrix.entries.get((scenario, weighting)), weighting, colours)
        verdict = matrix.verdicts[weighting]
        within = not verdict.missing and verdict.gap <= MARGIN
        shown = "-" if math.isnan(verdict.gap) else f"{100 * verdict.gap:.1f}" + ("*" if verdict.missing else "")
        _box(axes, columns + APART, y, NEUTRAL if within else BLANK, shown, INK, bold=within)
    _label(axes, matrix, heights)
    bar = figure.colorbar(colours, ax=axes, orientation="horizontal", aspect=60, shrink=0.75, pad=0.015)
    bar.ax.xaxis.set_minor_locator(NullLocator())
    ticks = [t for t in (-30, -10, -3, -1, 0, 1, 3, 10, 30) if abs(t) <= limit]
    bar.ax.xaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.xaxis.set_major_formatter(lambda x, _: signed(x, 0))
    bar.set_label(f"points of test accuracy above {REFERENCE} averaging", size=10, color=INK)
    bar.ax.tick_params(labelsize=9, colors=INK)
    bar.outline.set_visible(False)
    caption = (
        f"Test accuracy minus {REFERENCE} averaging's, in points, mean over seeds; in the row {REFERENCE}: in %. "
        "Bold with a dot: the 95 % interval over seeds (paired, Student's t) leaves 0 out. Last column: points "
        "from the best weighting, in the scenario where that is most; bold if within "
        f"{100 * MARGIN:g} point, with a star if scenarios are missing. Rows are in its order"
        f"{'; a name in bold can be recommended' if matrix.recommend else ''}. -: not recorded."
    )
    return render(figure, "matrix", "Every weighting in every scenario", caption)


def _limit(matrix: Matrix) -> float:
    """The largest difference in points, at least 3."""
    sizes = [abs(100 * entry.versus.mean) for entry in matrix.entries.values()]
    return max([3.0, *(size for size in sizes if math.isfinite(size))])


def _cell(axes: Axes, x: float, y: float, entry: Entry | None, weighting: str, colours: ScalarMappable) -> None:
    if entry is None:
        _box(axes, x, y, BLANK, "-", INK)
    elif weighting == REFERENCE:
        _box(axes, x, y, NEUTRAL, f"{100 * entry.accuracy.mean:.1f}", INK)
    elif not entry.versus.n:
        _box(axes, x, y, BLANK, f"({100 * entry.accuracy.mean:.1f})", INK)
    else:
        red, green, blue, _ = map(float, colours.to_rgba(np.array([100 * entry.versus.mean]))[0])
        ink = INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
        _box(axes, x, y, (red, green, blue), signed(100 * entry.versus.mean, 1), ink, bold=entry.marked)
        if entry.marked:
            axes.plot(x + 0.4, y - 0.28, marker="o", markersize=2.6, color=ink, markeredgewidth=0)


def _box(
    axes: Axes, x: float, y: float, fill: str | tuple[float, ...], shown: str, ink: str, bold: bool = False
) -> None:
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=fill, edgecolor="white", linewidth=1.5))
    weight = "bold" if bold else "normal"
    axes.text(x, y, shown, ha="center", va="center_baseline", fontsize=9.5, color=ink, fontweight=weight)


def _label(axes: Axes, matrix: Matrix, heights: list[float]) -> None:
    columns = len(matrix.titles)
    axes.set_xlim(-0.5, columns + APART + 0.5)
    axes.set_ylim(heights[-1] + 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    heads = [*("\n".join(textwrap.wrap(title, 10)) for title in matrix.titles.values()), "largest\ngap to\nbest"]
    axes.set_xticks([*range(columns), columns + APART], heads)
    axes.set_yticks(heights, list(matrix.weightings))
    axes.tick_params(length=0, labelsize=9.5, colors=INK)
    for label, name in zip(axes.get_yticklabels(), matrix.weightings, strict=True):
        label.set_fontweight("bold" if name in matrix.recommended else "normal")
