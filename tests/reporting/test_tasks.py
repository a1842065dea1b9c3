"""Reports of tasks that have no accuracy, of runs that were stopped early, and of arms on different machines."""

import pathlib
from typing import Any

import pytest
from reports import DEAD, MINUS, Row, cells, make_rows, sentences, small, text_of

from wavg_jax.reporting import canvas, summarise, write_report
from wavg_jax.reporting.findings import answer
from wavg_jax.reporting.headline import draw_headline
from wavg_jax.reporting.plots import arm_places, draw_scenario
from wavg_jax.reporting.summary import Summary, summarise_scenarios


def without_accuracy(rows: list[Row]) -> list[Row]:
    """The rows of a language model or a regression: a loss, and a metric that this library never heard of."""
    gone = ("test_accuracy", "test_macro_f1", "test_ece", "confusion", "class_names")
    kept = [{key: value for key, value in row.items() if key not in gone} for row in rows]
    return [
        row | ({"classes": None, "target_accuracy": None} if row["kind"] == "run" else {"test_rank_error": 40.0})
        for row in kept
    ]


LOSSES = {"plain": (0.30, 0.32, 0.34), "weighted": (0.20, 0.21, 0.25)}  # differences of 0.10, 0.11 and 0.09


def regression(**header: Any) -> list[Row]:
    # The loss of `small` is 1 - accuracy.
    values = {(arm, seed): [0.1, 1 - loss] for arm, own in LOSSES.items() for seed, loss in enumerate(own)}
    return without_accuracy(small(values, **header))


def figures(one: Summary) -> dict[str, canvas.Plot]:
    places = arm_places([one])
    return {plot.name: plot for plot in (draw_headline([one], places), *draw_scenario(one, places))}


@pytest.fixture
def few_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "DPI", 30)


def test_without_accuracy_arms_are_judged_by_the_loss_and_lower_is_better() -> None:
    first, line = answer(summarise_scenarios(regression()))
    assert first == "Weighting helped: clean shards."
    # t = 4.303: 4.303 * 0.01 / sqrt 3 = 0.0248.
    assert line.startswith(
        "Clean shards: weighted ended with a test loss 0.100 below plain's (paired over 3 seeds, 95 % interval "
        f"{MINUS}0.125 to {MINUS}0.075). Of all arms, weighted has the lowest mean, 0.220."
    )
    worse = [row | {"arm": {"plain": "weighted", "weighted": "plain"}[row["arm"]]} for row in regression()]
    worse = [row | {"weighting": "uniform"} if row["arm"] == "plain" else row | {"weighting": "x"} for row in worse]
    assert answer(summarise_scenarios(worse))[0] == "Weighting did harm: clean shards."


def test_there_is_a_column_for_every_metric_and_no_target_of_accuracy() -> None:
    assert cells(regression(), "Final", "plain") == ("3", "0.320 ± 0.020", "40.000 ± 0.000")
    assert cells(regression(), "Final", f"weighted {MINUS} plain")[:2] == ("3", f"{MINUS}0.100 ± 0.010")
    said = text_of(regression())
    assert "rank error" in said
    for word in ("accuracy", "ECE", "F1", "target", "nan"):
        assert word not in said


@pytest.mark.usefixtures("few_dots")
def test_what_is_drawn_is_the_loss_and_nothing_is_drawn_empty(tmp_path: pathlib.Path) -> None:
    (one,) = summarise_scenarios(regression())
    drawn = figures(one)
    assert list(drawn) == [
        *("headline", "loss_measured", "loss_critical_path", "loss_samples", "effective_replicas", "weights")
    ]
    assert drawn["headline"].title == "Final test loss"
    assert "target" not in drawn["loss_measured"].caption
    write_report(tmp_path, regression())
    text = (tmp_path / "report.md").read_text()
    assert "| data set | fashion_mnist |" in text
    assert "target accuracy" not in text


@pytest.mark.usefixtures("few_dots")
def test_a_regression_and_a_classification_fit_into_one_report() -> None:
    every = summarise_scenarios([*make_rows(seeds=2), *regression(dataset="houses")])
    assert [one.measure.metric for one in every] == ["accuracy", "loss"]
    assert draw_headline(every, arm_places(every)).title == "Final test loss"  # the one that both have
    assert len(answer(every)) == 3


def test_a_loss_that_is_not_finite_in_the_last_round_means_that_the_run_diverged() -> None:
    rows = [row | {"test_loss": None} if row.get("round") == 2 and row["seed"] == 1 else row for row in regression()]
    rows = [row | {"test_rank_error": None} if "round" in row else row for row in rows]
    assert "plain diverged with seed 1: the network's outputs are not finite." in sentences(rows)
    assert cells(rows, "Final", "plain")[1].endswith("(2 of 3)")


def not_evaluated(row: Row) -> Row:
    return row | {key: None for key in row if key.startswith("test_")}


def test_the_last_evaluated_round_is_the_final_one() -> None:
    for made in (make_rows(), without_accuracy(make_rows())):
        rows = [not_evaluated(row) if row.get("round", 0) % 4 else row for row in made]
        (full,), (sparse,) = summarise_scenarios(made), summarise_scenarios(rows)
        metric = full.measure.metric
        assert sparse.arms[0].metrics[metric] == full.arms[0].metrics[metric]
        cut = [row for row in rows if row.get("round", 0) < 11]  # the last of them evaluated is round 8
        (short,) = summarise_scenarios(cut)
        run, whole = short.runs[0], full.runs[0]
        assert run.final(metric) == whole.quality[metric][7]
        assert "has 10 of 12 rounds; round 8, the last evaluated one, stands for the final one." in sentences(cut)
        assert "diverged" not in sentences(cut)


@pytest.mark.usefixtures("few_dots")
def test_a_line_goes_from_one_evaluated_round_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [not_evaluated(row) if row.get("round", 0) % 4 else row for row in make_rows()]
    (one,) = summarise_scenarios(rows)
    painted = {}
    make_plot = canvas.make_plot

    def plot(name: str, title: str, caption: str, paint: Any) -> canvas.Plot:
        painted[name] = paint(canvas.LIGHT)
        return make_plot(name, title, caption, paint)

    monkeypatch.setattr(canvas, "make_plot", plot)
    draw_scenario(one, arm_places([one]))
    (axes,) = painted["accuracy_samples"].axes
    assert [line.get_xdata().tolist() for line in axes.lines[:4]] == [[12800 * 4, 12800 * 8, 12800 * 12]] * 4


def test_a_run_that_a_callback_stopped_is_complete_and_the_report_says_so() -> None:
    rows = [row for row in make_rows(seeds=1) if row["run"] != "weighted-seed0" or row.get("round", 0) <= 7]
    assert "Incomplete: weighted-seed0 has 7 of 12 rounds" in sentences(rows)
    rows = [
        row | {"stopped_early": True} if row.get("round") == 7 and row["arm"] == "weighted" else row for row in rows
    ]
    said = sentences(rows)
    assert "Incomplete" not in said
    assert "Stopped early by a callback, and complete: weighted-seed0 after 7 of 12 rounds." in said


def test_a_run_that_gave_up_is_not_called_stopped() -> None:
    rows = [row | DEAD if row.get("round", 0) > 10 and row["arm"] == "weighted" else row for row in make_rows(seeds=1)]
    assert "Stopped early" not in sentences(rows)


def on(arm: str, rows: list[Row], **header: Any) -> list[Row]:
    return [row | header if (row["kind"], row["arm"]) == ("run", arm) else row for row in rows]


def test_the_answer_tells_the_price_in_time_on_the_clocks_that_compare() -> None:
    rows = [row | {"seconds": 0.75} if "round" in row and row["arm"] == "weighted" else row for row in regression()]
    path = {"critical_path": {"local": 0.1, "score": 0.1, "blend": 0.0, "round": 0.2}}
    rows = on("weighted", rows, **path)  # plain takes 0.5 s, and 0.1 s on the critical path
    both = " A round takes 1.50 ± 0.00 times (measured) and 2.00 times (computed) as long as plain's."
    assert both in answer(summarise_scenarios(rows))[1]
    devices = on("weighted", rows, devices=2)
    assert " A round takes 2.00 times (computed) as long as plain's." in answer(summarise_scenarios(devices))[1]
    elsewhere = on("weighted", rows, hardware={"device": "gpu"})
    assert "A round takes" not in answer(summarise_scenarios(elsewhere))[1]


def test_times_of_arms_on_different_machines_are_not_subtracted() -> None:
    name, no = f"weighted {MINUS} plain", "not comparable"
    rows = make_rows(noisy=())
    assert no not in cells(rows, "Cost", name)
    devices = on("weighted", rows, devices=2)
    cost, target = cells(devices, "Cost", name), cells(devices, "To 82 %", name)
    assert (cost[1], cost[2], target[2]) == (no, no, no)  # compiling and rounds as measured, and the time to target
    assert no not in (cost[3], cost[4], target[1], target[3])  # computed, sent, samples
    assert no not in cells(devices, "Cost", f"sync {MINUS} plain")
    elsewhere = on("weighted", rows, hardware={"device": "gpu"})
    assert cells(elsewhere, "Cost", name)[1:4] == (no, no, no)
    (one,) = summarise_scenarios(devices)
    assert "The arms ran on different numbers of devices, so their lines do not compare here." in (
        figures(one)["accuracy_measured"].caption
    )


def test_a_report_on_tasks_without_accuracy_is_shown_everywhere() -> None:
    report = summarise(regression())
    assert "Final quality" in report._repr_html_()
    assert "test loss" in text_of(regression())
