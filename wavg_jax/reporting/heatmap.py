"""The figure of a scenario matrix: how far every weighting is from the reference, scenario by scenario."""

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator

from wavg_jax.reporting import canvas
from wavg_jax.reporting.canvas import DARK, LIGHT, SMALL, Plot, Theme
from wavg_jax.reporting.matrix import MARGIN, Entry, Matrix
from wavg_jax.reporting.wording import signed

WIDTH = 9.0  # inches: ten columns of numbers need them, so a narrow page scrolls; more need more
APART = 0.22  # of a cell: space beside the row of the reference and the column of gaps
NONE = "n/a"
TITLE = "Every weighting in every scenario"


def draw_matrix(matrix: Matrix) -> Plot:
    """Draws the heat map: weightings by scenarios, the reference on top, and each one's largest gap to the best."""
    reference = matrix.reference
    caption = (
        f"Test accuracy minus that of {reference}, in points, mean over seeds; in the row {reference}: in %. Bold with "
        "a dot: the 95 % interval over seeds (paired, Student's t) excludes 0. Last column: points behind the best "
        f"weighting, in the scenario where they are most; bold if within {100 * MARGIN:g} point, with a star if "
        "scenarios are missing. Rows are in the order of that column"
        f"{'; a name in bold is recommended' if matrix.recommend else ''}. {NONE}: not recorded."
    )
    return canvas.make_plot("matrix", TITLE, caption, lambda theme: _paint(matrix, theme))


def _paint(matrix: Matrix, theme: Theme) -> Figure:
    rows, columns = len(matrix.weightings), len(matrix.titles)
    made_from = f"{matrix.headers[0]['dataset']}, {matrix.repeated}"
    figure, axes = canvas.make_axes(theme, TITLE, made_from, 2.7 + 0.31 * rows, max(WIDTH, 3.0 + 0.65 * columns))
    limit = _limit(matrix)
    # Linear within a point, logarithmic beyond: rescues of 10 points must not hide differences of 1.
    norm = SymLogNorm(linthresh=1.0, linscale=1.0, vmin=-limit, vmax=limit, base=10)
    cells = _Cells(axes, theme, ScalarMappable(norm, theme.diverging))
    heights = [row + (APART if row and matrix.weightings[0] == matrix.reference else 0) for row in range(rows)]
    for y, weighting in zip(heights, matrix.weightings, strict=True):
        for x, scenario in enumerate(matrix.titles):
            cells.entry(x, y, matrix.entries.get((scenario, weighting)), weighting == matrix.reference)
        verdict = matrix.verdicts[weighting]
        within = not verdict.missing and verdict.gap <= MARGIN
        shown = NONE if math.isnan(verdict.gap) else f"{100 * verdict.gap:.1f}" + ("*" if verdict.missing else "")
        cells.box(columns + APART, y, NEUTRAL[theme] if within else BLANK[theme], shown, bold=within)
    _label(axes, matrix, heights, theme)
    bar = figure.colorbar(cells.colours, ax=axes, orientation="horizontal", aspect=60, shrink=0.75, pad=0.015)
    bar.ax.xaxis.set_minor_locator(NullLocator())
    ticks = [t for t in (-30, -10, -3, -1, 0, 1, 3, 10, 30) if abs(t) <= limit]
    bar.ax.xaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.xaxis.set_major_formatter(lambda x, _: signed(x, 0))
    bar.set_label(f"points of test accuracy above {matrix.reference}", size=SMALL, color=theme.ink)
    bar.ax.tick_params(labelsize=9, colors=theme.ink)
    bar.outline.set_visible(False)
    return figure


BLANK = {LIGHT: "#f4f4f2", DARK: "#222427"}
NEUTRAL = {LIGHT: "#e4e4e1", DARK: "#3c3f43"}


def _limit(matrix: Matrix) -> float:
    """The largest difference in points, at least 3."""
    sizes = [abs(100 * entry.versus.mean) for entry in matrix.entries.values()]
    return max([3.0, *(size for size in sizes if math.isfinite(size))])


class _Cells:
    """Draws cells, in the colours of a theme."""

    def __init__(self, axes: Axes, theme: Theme, colours: ScalarMappable):
        self._axes, self._theme, self.colours = axes, theme, colours

    def entry(self, x: float, y: float, entry: Entry | None, is_reference: bool) -> None:
        """One weighting in one scenario."""
        theme = self._theme
        if entry is None:
            self.box(x, y, BLANK[theme], NONE)
        elif is_reference:
            self.box(x, y, NEUTRAL[theme], f"{100 * entry.accuracy.mean:.1f}")
        elif not entry.versus.n:
            self.box(x, y, BLANK[theme], f"({100 * entry.accuracy.mean:.1f})")
        else:
            red, green, blue, _ = map(float, self.colours.to_rgba(np.array([100 * entry.versus.mean]))[0])
            ink, shown = theme.on(red, green, blue), entry.versus.shown
            self.box(x, y, (red, green, blue), signed(100 * entry.versus.mean, 1), ink, bold=shown)
            if shown:
                self._axes.plot(x + 0.4, y - 0.28, marker="o", markersize=2.6, color=ink, markeredgewidth=0)

    def box(
        self, x: float, y: float, fill: str | tuple[float, ...], shown: str, ink: str = "", bold: bool = False
    ) -> None:
        """A filled cell with text, in the page's ink by default."""
        paper, ink = self._theme.paper, ink or self._theme.ink
        self._axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=fill, edgecolor=paper, linewidth=1.5))
        weight = "bold" if bold else "normal"
        self._axes.text(x, y, shown, ha="center", va="center_baseline", fontsize=9.5, color=ink, fontweight=weight)


def _label(axes: Axes, matrix: Matrix, heights: list[float], theme: Theme) -> None:
    columns = len(matrix.titles)
    axes.set_xlim(-0.5, columns + APART + 0.5)
    axes.set_ylim(heights[-1] + 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    heads = [*("\n".join(textwrap.wrap(title, 10)) for title in matrix.titles.values()), "largest\ngap to\nbest"]
    axes.set_xticks([*range(columns), columns + APART], heads)
    axes.set_yticks(heights, list(matrix.weightings))
    axes.tick_params(length=0, labelsize=9.5, colors=theme.ink)
    for label, name in zip(axes.get_yticklabels(), matrix.weightings, strict=True):
        label.set_fontweight("bold" if name in matrix.recommended else "normal")
