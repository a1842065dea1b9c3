"""The share of the oracle's gap that weightings recover, what controls leave of a gain, and figures over a quantity."""

import math

import pytest
from test_matrix import cell, header

from wavg_jax.base import DataError
from wavg_jax.reporting.matrix import tabulate
from wavg_jax.reporting.matrix_report import MatrixReport
from wavg_jax.reporting.recovery import ratio
from wavg_jax.reporting.series import Series, draw_series, series_of

ROLES = {"oracle": "oracle", "ours": "pool", "published": ["mean", "median"]}
PLAIN = (8000, 8100, 8200)


def row(name, differences, tuned=0.5, scenario="b", **other):
    return [
        cell(scenario, name, seed, PLAIN[seed] + difference, tuned_accuracy=tuned, **other)
        for seed, difference in enumerate(differences)
    ]


def recorded(**changes):
    """Of a gap of 10, 10 and 13 points the pool recovers about half; the median was better on the tuning seeds."""
    rows = {
        "plain": row("plain", (0, 0, 0)),
        "oracle": row("oracle", (1000, 1000, 1300)),
        "pool": row("pool", (500, 550, 600), tuned=0.9),
        "mean": row("mean", (900, 950, 1200), tuned=0.6),
        "median": row("median", (200, 250, 300), tuned=0.7),
        "control": row("pool+swa", (400, 550, 700)),
    } | changes
    return [header() | {"roles": ROLES}, *(one for own in rows.values() for one in own)]


def test_the_share_is_that_of_the_rule_chosen_on_other_seeds_and_of_ours():
    one = tabulate(recorded()).recovered["b"]
    assert (one.best, list(one.shares)) == ("median", ["median", "pool"])
    assert one.gap.mean == pytest.approx(0.11)
    assert one.shares["pool"].mean == pytest.approx(0.5)
    assert one.shares["pool"].low < 0.5 < one.shares["pool"].high
    assert one.shares["median"].mean == pytest.approx(0.025 / 0.11)


def test_oracles_and_controls_are_none_to_choose():
    made = tabulate(recorded())
    assert (set(made.weightings), made.controls) == ({"plain", "pool", "mean", "median"}, ("oracle", "pool+swa"))
    assert made.best["b"] == "mean"
    assert made.left["b", "pool+swa"]["test_accuracy"].mean == pytest.approx(0.0, abs=1e-9)
    assert made.left["b", "plain"]["test_accuracy"].mean == pytest.approx(0.055)


def test_no_share_is_told_of_a_gap_that_is_not_shown(tmp_path):
    report = MatrixReport(tabulate(recorded(oracle=row("oracle", (1000, -900, 50)))))
    assert not report.matrix.recovered["b"].shares
    assert [plot.name for plot in report.figures()] == ["matrix"]
    report.write(tmp_path)
    assert "| n/a | n/a |" in (tmp_path / "report.md").read_text().replace("median", "n/a")


def test_a_seed_that_ours_lacks_leaves_the_others(tmp_path):
    four = {name: row(name, (0, 0, 0)) for name in ("plain",)}
    four["pool"] = row("pool", (500, 550))
    made = tabulate(recorded(**four))
    assert list(made.recovered["b"].shares) == ["median"]  # two seeds show nothing
    report = MatrixReport(made)
    captions = {plot.name: plot.caption for plot in report.figures()}
    assert "No gap is shown" not in captions["recovered"]
    assert made.lacking == 1


def test_a_recording_of_oracles_alone_has_one_clear_error():
    rows = [header() | {"roles": ROLES}, *row("oracle", (0, 0, 0)), *row("pool+swa", (0, 0, 0))]
    with pytest.raises(DataError, match="a control or an oracle; report when a weighting is done"):
        tabulate(rows)


def test_scenarios_may_be_repeated_by_different_numbers_of_seeds():
    rows = [*recorded(), *row("plain", (0, 0), scenario="a"), *row("pool", (10, 10), scenario="a")]
    rows += [*row("mean", (1, 1), scenario="a"), *row("median", (1, 1), scenario="a")]
    made = tabulate(rows)
    assert (made.lacking, made.repeated) == (0, "2 to 3 seeds")
    assert "digits, 2 to 3 seeds" in MatrixReport(made).markdown()


def test_a_rule_that_diverged_wherever_it_was_tuned_is_not_the_best():
    assert tabulate(recorded(median=row("median", (0, 0, 0), tuned=None))).recovered["b"].best == "mean"
    lost = [{k: v for k, v in one.items() if k != "tuned_accuracy"} for one in row("median", (0, 0, 0))]
    with pytest.raises(DataError, match="lacks tuned_accuracy"):
        tabulate(recorded(median=lost))


def test_wide_intervals_and_large_shares_are_drawn_within_the_figure():
    rows = recorded(oracle=row("oracle", (100, 50, 90)), pool=row("pool", (-400, -300, -500)))
    made = tabulate(rows)
    assert made.recovered["b"].shares["pool"].mean < -3
    (plot,) = [plot for plot in MatrixReport(made).figures() if plot.name == "recovered"]  # a warning is an error
    assert len(plot.png) > 10_000


def test_the_interval_of_a_ratio_is_unbounded_where_the_denominator_may_be_zero():
    share = ratio([1.0, 1.0, 1.0, 2.0], [1.0, -1.0, 0.5, 0.4])
    assert math.isnan(share.low)
    assert math.isnan(share.high)


def test_a_series_is_drawn_from_what_is_recorded_of_it():
    named = [
        {"series": {"title": "noisy shards", "at": {"a": 0, "b": 3}}},
        {"series": {"title": "noisy shards", "at": {"c": 6}}},
    ]
    assert series_of(named) == Series("noisy shards", {"a": 0.0, "b": 3.0, "c": 6.0})
    assert series_of([*named, {"series": {"title": "held-out samples", "at": {"a": 1}}}]) is None
    assert series_of([header()]) is None
    rows = [*recorded(), *row("plain", (0, 0, 0), scenario="a"), *row("oracle", (9, 9, 9), scenario="a")]
    rows[0] |= named[0]
    report = MatrixReport(tabulate(rows))
    assert [plot.name for plot in report.figures()] == ["recovered", "series", "matrix"]
    assert "noisy shards" in draw_series(report.matrix, series_of(rows[:1])).title
    alone = [rows[0] | {"series": {"title": "noisy shards", "at": {"c": 1, "d": 2, "e": 3}}}, *rows[1:]]
    assert "series" not in [plot.name for plot in MatrixReport(tabulate(alone)).figures()]
