"""Statistics and verdicts of a scenario matrix, with numbers worked by hand, and its report."""

import io
import json
import re
import struct

import pytest
from PIL import Image
from rich.console import Console

from wavg_jax.base import DataError
from wavg_jax.reporting import canvas, matrix, summarise, write_report
from wavg_jax.reporting.heatmap import draw_matrix
from wavg_jax.reporting.matrix_report import MatrixReport, matrix_sentences, matrix_tables
from wavg_jax.reporting.terminal import terminal_block

# Accuracy in 1/10,000, three seeds each.
PLAIN = {"a": (8000, 8200, 8400), "b": (6000, 6000, 6600)}  # sd 200, and 600 / sqrt 3 = 346
GOOD = {"a": (100, 200, 300), "b": (1000, 1100, 1200)}  # minus plain
BAD = {"a": (-300, -300, -400), "b": (-200, -300, -400)}
TITLES = {"a": "IID", "b": "4 of 8 noisy", "c": "never run"}


def header(**settings):
    given = {"dataset": "digits", "replicas": 2, "rounds": 4, "local_steps": 5, "batch_size": 16} | settings
    return json.loads("""{"kind": "matrix", "run": "matrix", "dataset": "digits", "train_samples": 1200,
      "heldout_samples": 200, "test_samples": 397, "parameters": 650, "hardware": {"device": "cpu"},
      "versions": {"jax": "0.10.2"}}""") | {"scenarios": TITLES, "reference": "plain", "settings": given}


def cell(scenario, weighting, seed, accuracy, **other):
    return {
        **{"kind": "cell", "run": f"{scenario}/{weighting}/{seed}", "scenario": scenario, "weighting": weighting},
        **{"seed": seed, "rate": {"a": 0.1, "b": 0.05}[scenario], "test_accuracy": accuracy / 10000},
        **{"test_loss": 0.5, "test_ece": 0.02, "test_macro_f1": 0.8, "weights": [0.25, 0.75]},
        **{"effective_replicas": 1.6, "alive_rounds": [4, 4], "seconds": 0.2 if weighting == "good" else 0.1},
    } | other


def cells(weighting, differences):
    return [
        cell(scenario, weighting, seed, PLAIN[scenario][seed] + difference)
        for scenario, own in differences.items()
        for seed, difference in enumerate(own)
    ]


def rows():
    zero = {"a": (0, 0, 0), "b": (0, 0, 0)}
    return [header(), *cells("plain", zero), *cells("good", GOOD), *cells("bad", BAD)]


def test_means_differences_and_marks():
    found = matrix.tabulate(rows())
    assert found.titles == {"a": "IID", "b": "4 of 8 noisy"}  # what no cell has is left out
    assert (found.seeds, found.rates, found.lacking) == ((0, 1, 2), {"a": (0.1,), "b": (0.05,)}, 0)
    entry = found.entries["a", "good"]
    assert entry.accuracy == pytest.approx((0.84, 0.03, 3))
    assert entry.versus == pytest.approx((0.02, 0.01, 3))
    # t = 4.303 for 3 seeds: the half width is 4.303 * 0.01 / sqrt 3 = 0.0248, more than 0.02.
    assert not entry.versus.shown
    assert found.entries["b", "good"].versus.shown  # 0.11 +- 0.0248
    assert found.entries["a", "bad"].versus.shown  # -0.0333 +- 4.303 * 0.00577 / sqrt 3 = 0.0143
    assert found.entries["b", "bad"].versus.shown  # -0.03 +- 0.0248
    assert not found.entries["a", "plain"].versus.shown
    assert entry.weights.tolist() == [0.25, 0.75]


def test_differences_are_paired_by_seed_and_not_by_position():
    # Plain has the seeds 0 to 2, the other 3 to 1; by position the differences would be 200, -300 and -600.
    made = [header(), *cells("plain", {"a": (0, 0, 0)})]
    made += [cell("a", "other", seed, value) for seed, value in ((3, 8200), (2, 8500), (1, 8000))]
    assert matrix.tabulate(made).entries["a", "other"].versus == pytest.approx((-0.005, 0.0212132, 2))


def test_verdicts_and_ranks():
    found = matrix.tabulate(rows())
    assert found.best == {"a": "good", "b": "good"}
    assert found.weightings == ("plain", "good", "bad")
    assert found.recommended == ("good",)
    good, plain, bad = (found.verdicts[name] for name in ("good", "plain", "bad"))
    assert good == matrix.Verdict((), (), (), 0.0, "a", 0.0, "")
    assert (plain.worse, plain.below, plain.gap_in) == ((), (), "b")
    assert plain.gap == pytest.approx(0.11)
    assert plain.shortfall == pytest.approx(0.10)  # all but one point of the gap
    assert (bad.worse, bad.below) == (("a", "b"), ("a",))  # in b plain's own seeds differ by more than 0.03
    assert bad.gap == pytest.approx(0.14)  # 0.11 + 0.03
    assert (bad.shortfall, bad.shortfall_in) == (pytest.approx(0.13), "b")


def test_exactly_one_point_from_the_best_is_within_a_point():
    near = {"a": (0, 100, 200), "b": (900, 1000, 1100)}
    found = matrix.tabulate([*rows(), *cells("near", near)])
    assert found.verdicts["near"].gap == pytest.approx(0.01)
    assert found.recommended == ("good", "near")


def test_below_by_more_than_the_spread_is_a_shortfall_even_within_a_point():
    steady = {"a": (8000, 8001, 8002)}  # a standard deviation of 1
    low = {"a": (-2, -3, -4)}
    made = [header()] + [cell("a", "plain", seed, value) for seed, value in enumerate(steady["a"])]
    made += [cell("a", "low", seed, steady["a"][seed] + d) for seed, d in enumerate(low["a"])]
    verdict = matrix.tabulate(made).verdicts["low"]
    assert verdict.below == ("a",)
    assert verdict.shortfall == pytest.approx(0.0002)  # 3 below, of which 1 is spread
    assert not verdict.recommended


def test_missing_cells():
    part = [row for row in rows() if row["run"] not in ("b/good/0", "b/good/1", "a/bad/2")]
    found = matrix.tabulate(part)
    assert found.lacking == 3
    assert found.best["b"] == "plain"  # one seed of good is not compared with three of others
    assert found.verdicts["good"].missing == ("b",)
    assert not found.verdicts["good"].recommended
    assert found.weightings == ("plain", "bad", "good")  # the unjudged last
    assert found.entries["a", "bad"].versus == pytest.approx((-0.03, 0.0, 2))
    text = MatrixReport(found).markdown()
    assert "3 cells of the matrix are not recorded" in text
    assert "72.00 ± n/a (1 of 3)" not in text
    assert "78.00 ± n/a (1 of 3)" in text  # 6600 + 1200
    assert "| good | 0 | 0 | 0.00 | IID | 1 missing |" in text


def test_a_matrix_without_plain_or_with_one_seed_is_shown_but_not_judged():
    for keep in (lambda row: row.get("weighting") != "plain", lambda row: row.get("seed", 0) == 0):
        found = matrix.tabulate([row for row in rows() if keep(row)])
        assert found.recommended == ()
        assert set(found.verdicts["good"].missing) == {"a", "b"}
        assert "none can be recommended" in matrix_sentences(found)[0]
        draw_matrix(found)
        seeds = {1: "1 seed", 3: "3 seeds"}[len(found.seeds)]
        assert f"in 2 scenarios: digits, {seeds}\n" in MatrixReport(found).markdown()
        assert "| good | 0 | 0 | n/a | n/a | 2 missing |" in MatrixReport(found).markdown()


def test_a_number_that_is_not_finite_is_left_out_and_said():
    made = [row | {"test_loss": None} if row.get("weighting") == "bad" else row for row in rows()]
    text = MatrixReport(matrix.tabulate(made)).markdown()
    assert "| bad | not finite | not finite |" in text


BAD_ROWS = {
    "hold no row of kind 'matrix'": rows()[1:],
    "no cell": [header()],
    "occurs twice": [*rows(), rows()[1]],
    "replicas=2 in one and replicas=4": [*rows(), header(replicas=4)],
    "several rates": [*rows(), cell("a", "other", 0, 8000, rate=0.2)],
    "lacks a field": [*rows(), {k: v for k, v in cell("a", "other", 0, 8000).items() if k != "seconds"}],
    "odd in it: could not convert": [*rows(), cell("a", "other", 0, 8000, rate="fast")],
    "odd in it: '<' not supported": [*rows(), cell("a", "other", "first", 8000)],
    "lacks a field, or holds something odd in it: 'versions'": [
        {k: v for k, v in header().items() if k != "versions"},
        *rows()[1:],
    ],
    "something odd": [*rows(), cell("a", "other", 0, 8000, weights="none")],
}


@pytest.mark.parametrize("says", BAD_ROWS)
def test_rows_that_are_not_of_one_matrix_are_refused(says):
    with pytest.raises(DataError, match=says) as raised:
        matrix.tabulate(BAD_ROWS[says])
    assert "\n" not in str(raised.value)


def test_the_report_says_who_can_be_recommended_and_needs_no_other_file(tmp_path):
    files = write_report(tmp_path, rows())
    assert [str(path.relative_to(tmp_path)) for path in files] == ["plots/matrix.png", "report.md", "report.html"]
    text = (tmp_path / "report.md").read_text()
    assert "- Recommended: good, never behind plain by more than" in text
    # 70, 71 and 78: deviations of -3, -2 and 5, whose sd is the root of 38 / 2.
    assert "| 4 of 8 noisy | 0.05 | 62.00 ± 3.46 | good | 73.00 ± 4.36 | +11.00 (+8.52 to +13.48) |" in text
    assert "| bad | 2 | 1 | 14.00 | 4 of 8 noisy | misses by 13.00 | 1.00 |" in text
    assert "| good | 0 | 0 | 0.00 | IID | yes | 2.00 |" in text
    assert "4 differences from plain are tested one by one at 95 %: if there were none at all, about 0.2 of" in text
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "plots/matrix.png" not in page
    assert "http" not in page
    said = io.StringIO()
    Console(file=said, width=100).print(summarise(rows()))
    assert max(map(len, said.getvalue().splitlines())) <= 100
    before = {path: path.read_bytes() for path in files}
    write_report(tmp_path, rows())
    assert {path: path.read_bytes() for path in files} == before


def test_the_report_is_dated_by_its_rows():
    assert "The rows do not say when the runs were made." in MatrixReport(matrix.tabulate(rows())).markdown()
    made = [header() | {"started": f"2026-0{month}-02T03:04:05Z"} for month in (5, 3)] + rows()[1:]
    text = MatrixReport(matrix.tabulate(made)).markdown()
    assert "The runs were started from 2026-03-02 to 2026-05-02 (UTC).\n" in text


def test_two_seeds_are_called_too_few():
    found = matrix.tabulate([row for row in rows() if row.get("seed", 0) < 2])
    text = MatrixReport(found).markdown()
    assert "2 seeds are too few seeds to show a difference: what is not marked may still differ." in text
    # Nothing is shown by two, not even by differences of 1000 and 1100, whose interval would leave 0 out.
    assert "| good | 82.50 ± 2.12 | +1.50 (too few seeds) |" in text
    assert "+10.50 (too few seeds)" in text
    assert "are tested" not in text
    assert not any(verdict.worse for verdict in found.verdicts.values())


def test_minus_signs_are_all_alike_and_what_is_missing_has_none():
    found = matrix.tabulate([row for row in rows() if row["run"] != "a/bad/2" and row.get("weighting") != "plain"])
    text = MatrixReport(matrix.tabulate(rows())).markdown() + MatrixReport(found).markdown()
    assert "n/a" in text
    assert not re.search(r"[| (]-(\d|[ |])", text)


def test_the_figure_is_drawn_for_light_and_dark_pages_and_scrolls_on_narrow_ones(tmp_path):
    plot = draw_matrix(matrix.tabulate(rows()))
    for png, theme in ((plot.png, canvas.LIGHT), (plot.dark, canvas.DARK)):
        corner = Image.open(io.BytesIO(png)).convert("RGB").getpixel((0, 0))
        assert "#" + bytes(corner).hex() == theme.paper
    write_report(tmp_path, rows())
    page = (tmp_path / "report.html").read_text()
    assert re.search('<span class="hint">.{0,99}<span class="scroll" tabindex="0"><picture>', page)
    assert '<a href="#the-scenarios">' in page


@pytest.mark.parametrize("width", [80, 100])
def test_the_tables_fit_a_terminal_unfolded(width):
    said = io.StringIO()
    found = matrix.tabulate(rows())
    tables = matrix_tables(found)
    Console(file=said, width=width).print(terminal_block("", tables, matrix_sentences(found)))
    text = said.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for cell in (cell for table in tables for section in table.sections for row in section for cell in row[:-1]):
        assert cell in text


def test_without_a_weighting_that_meets_it_the_nearest_is_named():
    short = {"a": (-300, -300, -300), "b": (2000, 2000, 2000)}  # the best in b, 3 points below plain in a
    found = matrix.tabulate([row for row in rows() if row.get("weighting") != "bad"] + cells("short", short))
    line = matrix_sentences(found)[0]
    assert "The nearest is short, which misses that by 4.00 points in the scenario IID" in line  # a gap of 5


def test_the_figure_is_as_wide_as_a_report_and_grows_with_the_rows():
    def size(made):
        return struct.unpack(">II", draw_matrix(matrix.tabulate(made)).png[16:24])

    (width, height), (wider, higher) = size(rows()), size([*rows(), *cells("more", GOOD), *cells("yet more", GOOD)])
    assert width == wider == 9 * 150
    assert higher > height
