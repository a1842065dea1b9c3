"""The figures of a report: two themes, what tells arms apart, and whether they can be read on a narrow page."""

import io
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from reports import DEAD, PAIRS, Row, make_rows, make_run, small

from wavg_jax.reporting import canvas
from wavg_jax.reporting.headline import draw_headline
from wavg_jax.reporting.plots import arm_places, draw_scenario
from wavg_jax.reporting.summary import summarise_scenarios
from wavg_jax.reporting.wording import MINUS

NARROW = 370  # pixels that a figure has on a page of 400


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The light figures by name, once drawn; nothing is rendered."""
    found: dict[str, Figure] = {}

    def plot(name: str, title: str, caption: str, paint: Any) -> canvas.Plot:
        found[name] = paint(canvas.LIGHT)
        FigureCanvasAgg(found[name])
        found[name].draw_without_rendering()
        return canvas.Plot(name, title, caption, b"", b"", found[name].get_figwidth())

    monkeypatch.setattr(canvas, "make_plot", plot)
    return found


def draw(rows: list[Row]) -> None:
    every = summarise_scenarios(rows)
    places = arm_places(every)
    draw_headline(every, places)
    for one in every:
        draw_scenario(one, places)


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


@pytest.fixture
def few_dots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "DPI", 30)
        yield


@pytest.mark.usefixtures("few_dots")
def test_plots_leave_no_figure_behind_and_show_what_was_recorded() -> None:
    (one,) = summarise_scenarios(make_rows())
    drawn = {plot.name: plot for plot in draw_scenario(one, arm_places([one]))}
    assert list(drawn) == [
        "accuracy_measured",
        "accuracy_critical_path",
        "accuracy_samples",
        "effective_replicas",
        "weights",
        "confusion",
    ]
    assert "seed 0" in drawn["weights"].caption
    assert "summed over seeds 0, 1, 2" in drawn["confusion"].caption
    assert not Gcf.figs


def test_focus_and_reference_look_the_same_in_every_report_and_others_keep_their_colours_in_every_scenario(
    painted: dict[str, Figure],
) -> None:
    rows = [*make_rows(seeds=1, arms=("weighted", "sync")), *make_rows(noisy=(), seeds=1)]
    every = summarise_scenarios(rows)
    places = arm_places(every)
    assert places == {"weighted": 3, "sync": 0, "sequential": 1, "plain": 2}
    assert arm_places(summarise_scenarios(make_rows(seeds=1, arms=("weighted",)))) == {"weighted": 3}
    for one in every:
        draw_scenario(one, places)
        (axes,) = painted["accuracy_samples"].axes
        colours = {line.get_label(): line.get_color() for line in axes.lines}
        for arm in one.arms:
            assert colours[arm.name] == canvas.LIGHT.colours[places[arm.name]]


def test_arms_are_told_apart_without_colours() -> None:
    for theme in (canvas.LIGHT, canvas.DARK):
        assert len(theme.colours) == len(set(theme.colours)) == len(canvas.DASHES)
    assert len(set(canvas.DASHES)) == len(set(canvas.MARKERS)) == len(canvas.DASHES) == len(canvas.MARKERS)


@pytest.mark.usefixtures("few_dots")
def test_every_figure_is_drawn_for_light_and_for_dark_pages() -> None:
    every = summarise_scenarios(make_rows(seeds=1))
    for plot in (draw_headline(every, arm_places(every)), *draw_scenario(every[0], arm_places(every))):
        for png, theme in ((plot.png, canvas.LIGHT), (plot.dark, canvas.DARK)):
            image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            assert "#" + bytes(image[0, 0].tolist()).hex() == theme.paper, plot.name


def test_figures_can_be_read_on_a_narrow_page(painted: dict[str, Figure]) -> None:
    draw(make_rows())
    assert len(painted) == 7
    for name, figure in painted.items():
        pixels_per_point = NARROW / figure.get_figwidth() / 72
        sizes = [text.get_fontsize() * pixels_per_point for text in texts(figure)]
        assert min(sizes) > 9, name
        inches = figure.get_tightbbox()
        assert min(inches.x0, inches.y0) > -0.02, name
        assert inches.x1 < figure.get_figwidth() + 0.02, name
        assert inches.y1 < figure.get_figheight() + 0.02, name
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                labels = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
                straight = all(label.get_rotation() == 0 for label in axis.get_ticklabels())
                pairs = itertools.pairwise(labels)
                assert not (straight and any(a.overlaps(b) for a, b in pairs)), name


def test_a_legend_covers_no_line(painted: dict[str, Figure]) -> None:
    draw(make_rows())
    legends = [(axes, axes.get_legend()) for figure in painted.values() for axes in figure.axes if axes.get_legend()]
    assert len(legends) == 4
    for axes, legend in legends:
        assert legend.get_window_extent().y0 >= axes.bbox.y1


def test_a_figure_says_what_it_shows_of_which_arm_and_data(painted: dict[str, Figure]) -> None:
    draw(make_rows())
    for name, figure in painted.items():
        words = " ".join(text.get_text() for text in texts(figure))
        assert figure.get_suptitle(), name
        assert "2 of 8 shards with random labels" in words, name
        assert "weighted" in words, name


def test_classes_have_their_names_where_they_were_recorded(painted: dict[str, Figure]) -> None:
    names = ["T-shirt/top", *"bcdefghi", "a very long name of a class"]
    for given, first in ((names, "T-shirt/top"), (None, "0"), (names[:3], "0")):
        draw([row | {"class_names": given} if row["kind"] == "run" else row for row in make_rows(seeds=1)])
        axes = painted["confusion"].axes[0]
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label.get_text() for label in axis.get_ticklabels()]
            assert labels[0] == first
            assert len(labels) == 10
            assert max(map(len, labels)) <= 14


def test_axes_of_short_times_are_in_milliseconds(painted: dict[str, Figure]) -> None:
    draw(PAIRS)  # to 1 s, and to 0.2 s on the critical path
    (measured,), (computed,) = (painted[name].axes for name in ("accuracy_measured", "accuracy_critical_path"))
    assert measured.get_xlabel().endswith("(s)")
    assert measured.get_xlim()[1] == pytest.approx(1.025)
    assert computed.get_xlabel().endswith("(ms)")
    assert computed.get_xlim()[1] == pytest.approx(205)


def test_a_line_ends_where_an_arm_diverges_and_dead_rounds_have_no_weights(painted: dict[str, Figure]) -> None:
    rows = make_run("weighted", 0, ())
    for row in rows[8:]:
        row.update(DEAD | {"test_loss": None})
    draw(rows)
    for name in ("accuracy_samples", "effective_replicas"):
        (line,) = (line for line in painted[name].axes[0].lines if len(line.get_ydata()) == 12)
        assert np.isfinite(np.asarray(line.get_ydata(), float)).tolist() == [True] * 7 + [False] * 5, name
    assert np.ma.getmaskarray(painted["weights"].axes[0].images[0].get_array())[:, 7:].all()
    assert "not finite" in [text.get_text() for text in texts(painted["headline"])]


def test_the_headline_shows_every_seed_of_every_arm_and_scenario(painted: dict[str, Figure]) -> None:
    draw([*make_rows(), *make_rows(noisy=())])
    (axes,) = painted["headline"].axes
    assert sum(len(line.get_xdata()) == 3 for line in axes.lines) == 8
    words = [text.get_text() for text in texts(painted["headline"])]
    assert [word for word in words if word in ("weighted", "plain")] == ["plain", "weighted"] * 2
    assert sum(word.startswith(f"weighted {MINUS} plain: ") for word in words) == 2
    assert {"clean shards", "2 of 8 shards with random labels"} <= set(words)
    draw(PAIRS)
    (said,) = (text.get_text() for text in texts(painted["headline"]) if "plain:" in text.get_text())
    assert said == f"weighted {MINUS} plain: +13.00 points (too few seeds to tell)"


def test_the_headline_says_of_how_many_seeds_a_mean_is_where_some_diverged(painted: dict[str, Figure]) -> None:
    values = {(arm, seed): [0.5 + 0.125 * seed] for arm in ("plain", "weighted") for seed in range(3)}
    rows = small(values, rounds=1)
    draw(
        [
            row | {"test_loss": None} if row["kind"] == "round" and row["run"] == "weighted-seed2" else row
            for row in rows
        ]
    )
    words = [text.get_text() for text in texts(painted["headline"])]
    assert "56.25 (2 of 3)" in words
    assert "62.50" in words
    inches = painted["headline"].get_tightbbox()
    assert inches.x1 < painted["headline"].get_figwidth() + 0.02


def test_bars_are_intervals_of_the_mean_and_bands_standard_deviations(painted: dict[str, Figure]) -> None:
    draw(small({("weighted", seed): [0.5 + 0.1 * seed] * 2 for seed in range(3)}))  # a mean of 60, with an sd of 10
    (bar,) = (line.get_xdata() for line in painted["headline"].axes[0].lines if len(line.get_xdata()) == 2)
    assert bar == pytest.approx([60 - 24.84, 60 + 24.84], abs=0.01)  # t = 4.303: 10 * 4.303 / sqrt 3
    (band,) = painted["accuracy_samples"].axes[0].collections
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((50, 70))
