"""What all figures share: two themes, sizes, axes, and the images they become.

Every figure is painted twice, for light and for dark pages, so that heat maps too have colours made for their
background and look the same in every browser. Nothing here touches pyplot, so there is no global state and no figure
to close.
"""

import io
import textwrap
import warnings
from collections.abc import Callable
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

WIDTH = 5.6  # inches; a page shows 100 pixels per inch
DPI = 150
TEXT, SMALL = 11.5, 10.5  # points: 10.5 and 9.6 pixels on a page 400 pixels wide, which leaves 370 for a figure


class Theme(NamedTuple):
    """The colours of a page.

    Attributes:
      paper, ink, faint: background; text and axes; grid lines.
      colours: of lines: Okabe and Ito's palette, which colour-blind readers can tell apart; lighter on dark paper.
      diverging: colour map for less and more than something; its middle is like the paper.
      strong: last colour of the map of shares, which starts at the paper's.
    """

    paper: str
    ink: str
    faint: str
    colours: tuple[str, ...]
    diverging: str
    strong: str

    @property
    def shares(self) -> Colormap:
        return LinearSegmentedColormap.from_list("shares", [self.paper, self.strong])

    def on(self, red: float, green: float, blue: float) -> str:
        """The ink that reads best on a colour."""
        return "#1c1c1c" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"


LIGHT = Theme(
    paper="#ffffff",
    ink="#333333",
    faint="#dddddd",
    colours=("#7F7F7F", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000"),
    diverging="RdBu",
    strong="#0a4a80",
)
DARK = Theme(
    paper="#17181a",
    ink="#e6e6e6",
    faint="#3c3f43",
    colours=("#a8a8a8", "#f0b429", "#56a8e0", "#ff8a4c", "#35c797", "#e39cc4", "#9ad4f5", "#ffffff"),
    diverging="berlin_r",
    strong="#8cc4f0",
)
# Dashes and markers tell lines apart where colours do not, as in a grey print. Line and arm i have the i-th of each.
DASHES = ("-.", (0, (2, 1.3)), (0, (6, 2)), "-", (0, (3, 1, 1, 1, 1, 1)), (0, (9, 1, 1, 1)), (0, (1, 1)), (0, (4, 4)))
MARKERS = ("s", "^", "o", "D", "v", "P", "X", "*")


class Plot(NamedTuple):
    """A drawn figure; a notebook shows it.

    Attributes:
      name: of the file, without ending.
      title: what it shows, in a few words.
      caption: how to read it.
      png: the image.
      dark: the image for a dark page.
      width: inches; a narrow page scrolls what is wider than `WIDTH`.
    """

    name: str
    title: str
    caption: str
    png: bytes
    dark: bytes
    width: float = WIDTH

    def _repr_png_(self) -> bytes:
        return self.png


def make_plot(name: str, title: str, caption: str, paint: Callable[[Theme], Figure]) -> Plot:
    """Paints a figure in both themes."""
    light, dark = paint(LIGHT), paint(DARK)
    return Plot(name, title, caption, _png(light), _png(dark), light.get_figwidth())


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    # Unlike savefig this draws once; without the writer's version in it, the same rows give the same bytes.
    with warnings.catch_warnings():
        # Labels may be so long that no room is left; no reader of the report can do anything about it.
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
    return image.getvalue()


def make_axes(theme: Theme, title: str, subtitle: str, height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with a title, below that what it was drawn from, and empty axes."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.paper, layout="constrained")
    below = textwrap.wrap(subtitle, int(12 * width))
    # Blank lines in the title make room for the subtitle, which has another weight.
    top = figure.suptitle(
        title + "\n " * len(below), x=0.012, ha="left", fontsize=TEXT + 0.5, fontweight="bold", color=theme.ink
    )
    ax = figure.add_subplot(facecolor=theme.paper)
    lines = ax.annotate("\n".join(below), (0, 0), xycoords=top, va="bottom", fontsize=TEXT, color=theme.ink)
    lines.set_in_layout(False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(theme.ink)
    ax.tick_params(labelsize=TEXT, colors=theme.ink)
    ax.xaxis.label.set(size=TEXT, color=theme.ink)
    ax.yaxis.label.set(size=TEXT, color=theme.ink)
    return figure, ax


def legend(theme: Theme, ax: Axes) -> None:
    """Names the lines, above the axes, where the names cover nothing; fewer in a row where a name is long."""
    _, names = ax.get_legend_handles_labels()
    longest = max(map(len, names), default=0)
    columns = 4 if longest <= len("sequential") else 3 if longest <= len("weighted_diloco") else 2
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        borderpad=0,
        ncols=columns,
        handlelength=2.8,
        handletextpad=0.4,
        columnspacing=0.9,
        frameon=False,
        fontsize=SMALL,
        labelcolor=theme.ink,
    )


def colour_bar(theme: Theme, figure: Figure, ax: Axes, image: object, label: str) -> None:
    """Shows beside an image what its colours stand for."""
    bar = figure.colorbar(image, ax=ax, pad=0.015)  # type: ignore[arg-type]
    bar.set_label(label, size=TEXT, color=theme.ink)
    bar.ax.tick_params(labelsize=SMALL, colors=theme.ink)
    bar.outline.set_visible(False)
