"""The statistics of a report, against numbers worked by hand."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from wavg_jax.base import DataError
from wavg_jax.reporting.statistic import Statistic
from wavg_jax.reporting.summary import ArmSummary, summarise_scenarios

Row = dict[str, Any]


def run_row(arm: str, seed: int, replicas: int = 4, **changes: Any) -> Row:
    """The first row of a run: 2 planned rounds of 100 samples, target 80 %, 2 classes."""
    return {
        "kind": "run",
        "run": f"{arm}-seed{seed}",
        "arm": arm,
        "seed": seed,
        "replicas": replicas,
        "local_steps": 5,
        "batch_size": 5,
        "rounds": 2,
        "parameters": 1000,
        "samples_per_round": 100,
        "bytes_per_round": 32000,
        "classes": 2,
        "dataset": "digits",
        "train_samples": 400,
        "heldout_samples": 50,
        "test_samples": 100,
        "shard_sizes": [400 // replicas] * replicas,
        "noisy_shards": [0],
        "weighting": "uniform" if arm == "plain" else "accuracy",
        "target_accuracy": 0.8,
        "compile_seconds": 1.5,
        "critical_path": {"local": 0.03, "score": 0.01, "blend": 0.01, "round": 0.05},
        "hardware": {"device": "cpu", "kind": "cpu", "count": 1, "processor": "any", "cores": 2},
        "versions": {"jax": "0.10.2", "python": "3.11.7"},
        "settings": {"dataset": "digits", "replicas": 4, "noisy": 1, "seed": seed},
    } | changes


def round_row(arm: str, seed: int, number: int, accuracy: float | None, **changes: Any) -> Row:
    """A round of 0.2 s; with 4 replicas of equal weights unless `weights` says otherwise."""
    weights = changes.pop("weights", [0.25] * 4)
    return {
        "kind": "round",
        "run": f"{arm}-seed{seed}",
        "arm": arm,
        "seed": seed,
        "round": number,
        "samples": 100 * number,
        "seconds": 0.2,
        "elapsed": 0.2 * number,
        "train_loss": 1.0,
        "test_accuracy": accuracy,
        "test_loss": 0.5,
        "test_macro_f1": accuracy,
        "test_ece": 0.05,
        "weights": weights,
        "effective_replicas": 1 / sum(w * w for w in weights),
        "alive": [True] * len(weights),
        "scores": {},
    } | changes


def make_rows() -> list[Row]:
    """Two seeds of plain and weighted, one of sequential; accuracies chosen for easy sums."""
    accuracies = {
        ("weighted", 0): (0.82, 0.90),
        ("plain", 0): (0.70, 0.80),
        ("weighted", 1): (0.75, 0.86),
        ("plain", 1): (0.60, 0.70),
        ("sequential", 0): (0.85, 0.88),
    }
    rows = []
    for (arm, seed), values in accuracies.items():
        k = 1 if arm == "sequential" else 4
        weights = {"weighted": [0.1, 0.3, 0.3, 0.3], "plain": [0.25] * 4, "sequential": [1.0]}[arm]
        rows.append(run_row(arm, seed, k))
        rows += [round_row(arm, seed, n, value, weights=weights) for n, value in enumerate(values, 1)]
        rows[-1]["confusion"] = [[40, 10], [5, 45]]
    return rows


def arms(rows: list[Row]) -> dict[str, ArmSummary]:
    (one,) = summarise_scenarios(rows)
    return {arm.name: arm for arm in one.arms}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0], (2.0, 1.0, 3)),
        ([4.0, 6.0], (5.0, math.sqrt(2.0), 2)),
        ([1.0, math.nan, 3.0, math.inf], (2.0, math.sqrt(2.0), 2)),
        ([7.0], (7.0, math.nan, 1)),
        ([], (math.nan, math.nan, 0)),
    ],
)
def test_statistic_is_the_mean_and_sample_sd_of_the_finite_values(
    values: list[float], expected: tuple[float, float, int]
) -> None:
    assert Statistic.of(values) == pytest.approx(Statistic(*expected), nan_ok=True)


def test_arms_come_in_order_of_appearance() -> None:
    rows = [run_row("zebra", 0), round_row("zebra", 0, 1, 0.5), *make_rows()]
    assert list(arms(rows)) == ["zebra", "weighted", "plain", "sequential"]


@pytest.mark.parametrize(
    ("arm", "metric", "mean", "sd", "n"),
    [
        # Last rounds 0.90 and 0.86: mean 0.88, sd = sqrt(0.02^2 + 0.02^2).
        ("weighted", "accuracy", 0.88, 0.02 * math.sqrt(2), 2),
        ("sequential", "accuracy", 0.88, math.nan, 1),
        # Seed 0 meets 0.8 in round 1, seed 1 in round 2, at 0.2 s, 0.05 s on the critical path and 100 samples each.
        ("weighted", "rounds_to_target", 1.5, math.sqrt(0.5), 2),
        ("weighted", "measured_to_target", 0.3, 0.2 * math.sqrt(0.5), 2),
        ("weighted", "critical_to_target", 0.075, 0.05 * math.sqrt(0.5), 2),
        ("weighted", "samples_to_target", 150.0, 100 * math.sqrt(0.5), 2),
        # Plain meets it with seed 0 alone, exactly, in round 2.
        ("plain", "samples_to_target", 200.0, math.nan, 1),
        ("plain", "measured_to_target", 0.4, math.nan, 1),
        ("plain", "seconds_per_round", 0.2, 0.0, 2),
        ("plain", "compile_seconds", 1.5, 0.0, 2),
        ("plain", "bytes_per_round", 32000.0, 0.0, 2),
    ],
)
def test_metrics_over_seeds(arm: str, metric: str, mean: float, sd: float, n: int) -> None:
    value = arms(make_rows())[arm].metrics[metric]
    assert value == pytest.approx(Statistic(mean, sd, n), nan_ok=True)


@pytest.mark.parametrize(
    ("arm", "metric", "mean", "sd", "n"),
    [
        # Seed 0: 0.90 - 0.80 = 0.10; seed 1: 0.86 - 0.70 = 0.16; mean 0.13, sd = 0.06 / sqrt(2).
        ("weighted", "accuracy", 0.13, 0.06 / math.sqrt(2), 2),
        # Only seed 0 of both arms reaches the target: rounds 1 and 2.
        ("weighted", "samples_to_target", -100.0, math.nan, 1),
        ("weighted", "critical_to_target", -0.05, math.nan, 1),
        # Sequential has seed 0 alone.
        ("sequential", "accuracy", 0.08, math.nan, 1),
    ],
)
def test_differences_are_paired_by_seed(arm: str, metric: str, mean: float, sd: float, n: int) -> None:
    value = arms(make_rows())[arm].differences[metric]
    assert value == pytest.approx(Statistic(mean, sd, n), nan_ok=True)


def test_differences_are_paired_by_seed_and_not_by_position() -> None:
    # Seeds 0 to 2 and 3 to 1: by seed the differences are 0.1 and 0.2, by position they would be 0.2, 0 and -0.1.
    accuracies = {("plain", 0): 0.5, ("plain", 1): 0.6, ("plain", 2): 0.8}
    accuracies |= {("weighted", 3): 0.7, ("weighted", 2): 1.0, ("weighted", 1): 0.7}
    rows = [row for (arm, seed), a in accuracies.items() for row in (run_row(arm, seed), round_row(arm, seed, 1, a))]
    value = arms(rows)["weighted"].differences["accuracy"]
    assert value == pytest.approx(Statistic(0.15, math.sqrt(0.005), 2))


def test_the_reference_has_no_differences_and_without_it_nobody_has() -> None:
    assert arms(make_rows())["plain"].differences == {}
    alone = [row for row in make_rows() if row["arm"] == "weighted"]
    assert arms(alone)["weighted"].differences == {}


def test_a_critical_path_that_was_not_measured_is_no_number() -> None:
    rows = [row | ({"critical_path": None} if row["kind"] == "run" else {}) for row in make_rows()]
    weighted = arms(rows)["weighted"]
    assert weighted.metrics["critical_round"].n == weighted.metrics["critical_to_target"].n == 0
    assert weighted.metrics["measured_to_target"].n == 2


def test_null_stands_for_a_number_that_is_not_finite() -> None:
    rows = make_rows()
    next(r for r in rows if r["run"] == "weighted-seed1" and r.get("round") == 2)["test_loss"] = None
    assert arms(rows)["weighted"].metrics["loss"] == pytest.approx(Statistic(0.5, math.nan, 1), nan_ok=True)


def test_weights_that_differ_are_found_and_equal_ones_called_uniform() -> None:
    found = arms(make_rows())
    weights = found["weighted"].shares
    assert weights is not None
    assert weights.effective_mean == pytest.approx(1 / 0.28)  # 1 / (0.1^2 + 3 * 0.3^2)
    assert weights.mean == pytest.approx([0.1, 0.3, 0.3, 0.3])
    assert not weights.uniform
    assert weights.down_weighted == (0,)
    plain = found["plain"].shares
    assert plain is not None
    assert plain.uniform
    assert plain.down_weighted == ()
    assert found["sequential"].shares is None


@pytest.mark.parametrize(("spread", "uniform"), [(0.09, True), (0.11, False)])
def test_uniform_means_a_coefficient_of_variation_under_a_tenth(spread: float, uniform: bool) -> None:
    weights = [0.25 * (1 + spread), 0.25 * (1 - spread)] * 2
    rows = [run_row("weighted", 0), round_row("weighted", 0, 1, 0.5, weights=weights)]
    found = arms(rows)["weighted"].shares
    assert found is not None
    assert found.uniform is uniform


def test_a_dead_replica_does_not_count_as_down_weighted() -> None:
    third = 1 / 3
    dead = {"weights": [0.0, third, third, third], "alive": [False, True, True, True]}
    rows = [run_row("weighted", 0), round_row("weighted", 0, 1, 0.5, **dead), round_row("weighted", 0, 2, 0.6)]
    found = arms(rows)["weighted"].shares
    assert found is not None
    assert found.mean == pytest.approx([0.25, 7 / 24, 7 / 24, 7 / 24])
    assert found.down_weighted == ()
    assert found.uniform
    assert found.effective_min == pytest.approx(3.0)
    assert found.dead.tolist() == [1, 0, 0, 0]


def test_an_incomplete_run_ends_with_its_last_round() -> None:
    rows = [row for row in make_rows() if (row["run"], row.get("round")) != ("weighted-seed0", 2)]
    found = arms(rows)["weighted"]
    assert [run.complete for run in found.runs] == [False, True]
    assert found.metrics["accuracy"].mean == pytest.approx((0.82 + 0.86) / 2)


def test_a_run_without_rounds_is_named_and_left_out() -> None:
    rows = [*make_rows(), run_row("weighted", 2)]
    (one,) = summarise_scenarios(rows)
    assert one.empty == ("weighted-seed2",)
    assert one.arms[0].seeds == (0, 1)


def test_rounds_may_stand_in_any_order_within_a_run() -> None:
    rows = make_rows()
    rows[1], rows[2] = rows[2], rows[1]
    np.testing.assert_equal(arms(rows)["weighted"].metrics, arms(make_rows())["weighted"].metrics)


def test_runs_of_different_settings_are_kept_apart_although_their_names_agree() -> None:
    clean = copy.deepcopy(make_rows())
    for row in clean:
        if row["kind"] == "run":
            row["noisy_shards"] = []
            row["settings"]["noisy"] = 0
        else:
            row["test_accuracy"] = 0.95
    noisy, quiet = summarise_scenarios([*make_rows(), *clean])
    assert noisy.scenario != quiet.scenario
    assert noisy.arms[0].metrics["accuracy"].mean == pytest.approx(0.88)
    assert quiet.arms[0].metrics["accuracy"].mean == pytest.approx(0.95)


def test_seeds_of_one_scenario_may_come_from_several_folders() -> None:
    more = [run_row("weighted", 7), round_row("weighted", 7, 1, 0.5), round_row("weighted", 7, 2, 0.94)]
    assert arms([*make_rows(), *more])["weighted"].metrics["accuracy"] == pytest.approx(Statistic(0.9, 0.04, 3))


def without(row: Row, field: str) -> Row:
    return {name: value for name, value in row.items() if name != field}


def other_sizes(arm: str, seed: int, k: int) -> list[Row]:
    return [run_row(arm, seed, k), round_row(arm, seed, 1, 0.5, weights=[1 / k] * k)]


def four_rounds(change: Callable[[Row], object]) -> list[Row]:
    """Four rounds, the third of which is changed."""
    rows = [round_row("plain", 0, number, 0.5, weights=[0.25] * 4) for number in (1, 2, 3, 4)]
    change(rows[2])
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "hold no run"),
        ([run_row("plain", 0)], "no round is recorded"),
        ([round_row("plain", 0, 1, 0.5)], "row 1 is a round of run 'plain-seed0', which has no run row"),
        ([*make_rows(), *make_rows()], "arm 'weighted' with seed 0 occurs twice"),
        ([without(run_row("plain", 0), "dataset"), round_row("plain", 0, 1, 0.5)], "lacks the field 'dataset'"),
        ([run_row("plain", 0), without(round_row("plain", 0, 1, 0.5), "test_loss")], "lacks the field 'test_loss'"),
        ([run_row("plain", 0), round_row("plain", 0, 1, 0.5, weights=[0.5, 0.5])], "round 1: 2 weights for 4 "),
        (
            [run_row("plain", 0), *four_rounds(lambda row: row["weights"].pop())],
            "'plain-seed0', round 3: 3 weights for 4",
        ),
        ([run_row("plain", 0), *four_rounds(lambda row: row["alive"].pop())], "'plain-seed0', round 3: 3 alive for 4"),
        ([run_row("plain", 0), *four_rounds(lambda row: row.update(round=9))], "'plain-seed0' lacks round 3, 5 to 8;"),
        ([run_row("plain", 0), *four_rounds(lambda row: row.update(round=4))], "'plain-seed0' lacks round 3;"),
        ([run_row("plain", 0), *[round_row("plain", 0, 1, 0.5)] * 2], "'plain-seed0' has round 1 twice.*keep one row"),
        ([run_row("plain", 0), round_row("plain", 0, 1, 0.5, seconds="fast")], "do not fit together"),
        ([run_row("plain", 0), *four_rounds(lambda row: row.update(round="third"))], "do not fit together"),
        ([run_row("plain", 0), *four_rounds(lambda row: row.pop("round"))], "lacks the field 'round'"),
        ([run_row("plain", 0) | {"seed": None}], "do not fit together"),
        ([*other_sizes("plain", 0, 4), *other_sizes("plain", 1, 2)], "differ in their number of replicas"),
    ],
)
def test_rows_that_cannot_be_summarised_give_one_clear_line(rows: list[Row], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        summarise_scenarios(rows)
    assert "\n" not in str(caught.value)


def test_a_label_names_four_settings_at_most() -> None:
    runs = [
        [run_row("plain", 0, settings=dict.fromkeys("abcdef", value)), round_row("plain", 0, 1, 0.5)]
        for value in (1, 2)
    ]
    assert [one.label for one in summarise_scenarios([*runs[0], *runs[1]])] == [
        "a = 1; b = 1; c = 1; d = 1; and 2 more settings",
        "a = 2; b = 2; c = 2; d = 2; and 2 more settings",
    ]


@pytest.mark.parametrize(("weight", "found"), [(0.2, ()), (0.13, ()), (0.12, (0,))])
def test_down_weighted_means_less_than_half_of_an_equal_share(weight: float, found: tuple[int, ...]) -> None:
    weights = [weight, *[(1 - weight) / 3] * 3]  # of 4: half of a share is 0.125
    rows = [run_row("weighted", 0), round_row("weighted", 0, 1, 0.5, weights=weights)]
    own = arms(rows)["weighted"].shares
    assert own is not None
    assert own.down_weighted == found


def test_a_label_tells_rates_in_words_and_leaves_out_what_the_shards_tell() -> None:
    settings = {"noisy": 0, "lr_sequential": 0.4, "lr_sync": 0.4, "lr_plain": 0.1, "heldout": 200}
    changed = settings | {"noisy": 2, "lr_sequential": 0.1, "lr_sync": 0.2, "heldout": 100}
    rows = [[run_row("plain", 0, settings=own), round_row("plain", 0, 1, 0.5)] for own in (settings, changed)]
    assert [one.label for one in summarise_scenarios([*rows[0], *rows[1]])] == [
        "heldout = 200; learning rates: sequential 0.4, sync 0.4",
        "heldout = 100; learning rates: sequential 0.1, sync 0.2",
    ]
