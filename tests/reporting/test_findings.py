"""What a report says in sentences: of each scenario, and in answer to its question."""

from typing import Any

import pytest
from reports import ALL_DEAD, DEAD, DIVERGED, MINUS, ONE_SEED, PAIRS, Row, cells, make_rows, sentences, small

from wavg_jax.reporting.findings import answer, caveats, scenario_sentences
from wavg_jax.reporting.summary import scenario_names, summarise_scenarios


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            PAIRS,
            "a test accuracy 13.00 points above plain's (paired over 2 seeds): too few seeds to show a difference.",
        ),
        (
            ONE_SEED,
            "weighted ended with a test accuracy 10.00 points above plain's (one seed): too few seeds to show a diff",
        ),
        (
            small(
                {("plain", n): [a] for n, a in enumerate((0.5, 0.7, 0.6))} | {("weighted", n): [0.6] for n in range(3)}
            ),
            # Differences 0.1, -0.1 and 0: sd 0.1, t = 4.303, so 0.1 * 4.303 / sqrt(3) = 0.2484.
            f"plain's mean test accuracy (paired over 3 seeds, 95 % interval {MINUS}24.84 to +24.84): seeds differ "
            "by as much, so no difference is shown.",
        ),
        (small({("plain", 0): [0.5], ("weighted", 1): [0.6]}), "cannot be compared with plain: they share no seed"),
        (make_rows(noisy=()), "weighted: the weights were indistinguishable from uniform (effective number 8.00 of 8"),
        (make_rows(), "replicas 0, 1 were down-weighted (mean weight below half of 1/8; effective number 6.4"),
        (make_rows(), "; these are exactly the noisy shards."),
        (
            [row | ({"noisy_shards": [1, 5]} if row["kind"] == "run" else {}) for row in make_rows()],
            "; noisy shards: 1, 5.",
        ),
        (
            small({("weighted", 3): [0.5]}),
            "Incomplete: weighted-seed3 has 1 of 2 rounds; round 1, the last evaluated one, stands",
        ),
        ([*PAIRS, PAIRS[0] | {"run": "plain-seed9", "seed": 9}], "Left out: plain-seed9 has no recorded round."),
        (
            [row | ({"hardware": {"device": "gpu"}} if row["run"] == "plain-seed1" else {}) for row in PAIRS],
            "different hardware: times compare only between arms on the same",
        ),
        (DIVERGED, "plain diverged with seed 1: the network's outputs are not finite. These runs have no quality"),
        (DIVERGED, "weighted ended with a test accuracy 10.00 points above plain's (one seed)"),
        (
            [row | {"test_loss": None} if row["arm"] == "plain" else row for row in PAIRS],
            "weighted cannot be compared with plain: in no seed did both end with finite numbers.",
        ),
        (
            ALL_DEAD,
            "weighted: all replicas were dead (numbers not finite, or masked) in 4 of 4 rounds (all seeds together), "
            "so nothing was averaged there; with seeds 0, 1 the run ended that way.",
        ),
    ],
)
def test_findings(rows: list[Row], line: str) -> None:
    assert line in sentences(rows)


def test_uneven_weights_that_spare_nobody_and_dead_replicas_are_reported() -> None:
    rows = small({("weighted", 0): [0.5, 0.6]}, noisy_shards=[3])
    for row in rows[1:]:
        row.update(weights=[0.19, 0.0, *[0.135] * 6], alive=[True, False, *[True] * 6], effective_replicas=6.5)
    found = sentences(rows)
    assert "replica 1 took no part in 2 rounds" in found
    assert "the weights differed (effective number 6.50 of 8 replicas), but no replica's mean weight was below" in found
    assert "The noisy shards (3) had 1.08 of 1/8." in found


def test_the_answer_tells_where_weighting_helped_and_where_not() -> None:
    def scenario(noisy: list[int], *pairs: tuple[float, float]) -> list[Row]:
        made = {(arm, n): [pair[i]] for n, pair in enumerate(pairs) for i, arm in enumerate(("plain", "weighted"))}
        return small(made, noisy_shards=noisy)

    helped = scenario([0, 1], (0.7, 0.8), (0.6, 0.71), (0.65, 0.76))
    equal = scenario([], (0.8, 0.81), (0.7, 0.69), (0.75, 0.75))
    few = scenario([0], (0.7, 0.8), (0.6, 0.75))
    harm = scenario([0, 1, 2], (0.8, 0.7), (0.71, 0.6), (0.76, 0.65))
    alone = [row for row in scenario([1, 2, 3, 4], (0.5, 0.5)) if row["arm"] == "weighted"]
    first, *rest = answer(summarise_scenarios([*equal, *few, *helped, *alone, *harm]))
    assert first == (
        "Weighting helped: 2 of 8 shards with random labels; weighting did harm: 3 of 8 shards with random labels; no "
        "difference in test accuracy from plain is shown: clean shards; too few seeds to show a difference: 1 of 8 "
        "shards with random labels; no reference to compare with: 4 of 8 shards with random labels."
    )
    assert len(rest) == 4
    assert rest[2] == (
        "2 of 8 shards with random labels: weighted ended with a test accuracy 10.67 points above plain's (paired over "
        "3 seeds, 95 % interval +9.23 to +12.10). Its test loss is 0.107 lower. Of all arms, weighted has the highest "
        "mean, 75.67 %. A round takes 1.00 ± 0.00 times (measured) and 1.00 times (computed) as long as plain's."
    )


def test_the_answer_names_the_runs_that_diverged() -> None:
    _, line = answer(summarise_scenarios(DIVERGED))
    assert line.endswith("Left out because they diverged: plain with seed 1; weighted with seed 1.")


def test_scenarios_that_differ_in_more_than_their_shards_are_told_apart() -> None:
    def made(**header: Any) -> list[Row]:
        return small({("weighted", 0): [0.5]}, **header)

    one = summarise_scenarios(
        [*made(settings={"lr": 1}), *made(settings={"lr": 2}), *made(settings={"lr": 1}, noisy_shards=[3])]
    )
    assert scenario_names(one) == ("clean shards (lr = 1)", "clean shards (lr = 2)", "1 of 8 shards with random labels")
    two = summarise_scenarios([*made(), *made(dataset="digits", settings={"partition": "dirichlet"})])
    assert scenario_names(two) == ("fashion_mnist, clean shards", "digits, clean dirichlet shards")


def test_dead_rounds_are_no_part_of_the_effective_number() -> None:
    half = [row | DEAD if row.get("round") == 2 and row["arm"] == "weighted" else row for row in PAIRS]
    assert cells(half, "Weights", "weighted")[1] == cells(PAIRS, "Weights", "weighted")[1]
    assert "in 2 of 4 rounds" in sentences(half)
    for made in (half, ALL_DEAD):
        assert "effective number 0" not in sentences(made)
        assert "nan" not in sentences(made)
        assert "took no part" not in sentences(made)


def pairs(*accuracies: tuple[float, float], **header: Any) -> list[Row]:
    """Runs of plain and weighted of one round, with these accuracies, seed by seed."""
    made = {(arm, n): [pair[i]] for n, pair in enumerate(accuracies) for i, arm in enumerate(("plain", "weighted"))}
    return small(made, rounds=1, **header)


def test_two_seeds_that_tie_show_nothing() -> None:
    tied = pairs((0.5, 0.75), (0.5, 0.75))  # both by 25 points, so the spread is 0
    first, line = answer(summarise_scenarios(tied))
    assert first == "Too few seeds to show a difference: clean shards."
    assert "25.00 points above plain's (paired over 2 seeds): too few seeds to show a differ" in line


FIVE = [(0.5, 0.625), (0.25, 0.375), (0.75, 0.9375), (0.5, 0.75), (0.5, 0.75)]


def lost(rows: list[Row], arm: str, seeds: tuple[int, ...], **how: Any) -> list[Row]:
    """Rows in which every round of some runs was changed."""
    return [row | how if (row["kind"], row["arm"]) == ("round", arm) and row["seed"] in seeds else row for row in rows]


def test_the_answer_says_over_how_many_seeds_it_is_where_runs_diverged() -> None:
    rows = lost(pairs(*FIVE), "weighted", (3, 4), test_loss=None)
    first, line = answer(summarise_scenarios(rows))
    assert first == "Weighting helped: clean shards (in 3 of 5 seeds; weighted diverged in 2)."
    # The mean of 0.625, 0.375 and 0.9375; over its own five seeds plain could not have been compared with it.
    assert "Of all arms, weighted has the highest mean over the 3 seeds that all have, 64.58 %." in line
    both = lost(rows, "plain", (0,), test_loss=None)
    assert "(in 2 of 5 seeds; plain diverged in 1, weighted in 2)" in answer(summarise_scenarios(both))[0]
    none = lost(rows, "plain", (0, 1, 2), test_loss=None)
    first, line = answer(summarise_scenarios(none))
    assert first == ("No comparison with plain: clean shards (in 0 of 5 seeds; plain diverged in 3, weighted in 2).")
    assert "highest" not in line


def test_a_run_that_ended_since_nothing_came_of_its_rounds_diverged_and_has_no_quality() -> None:
    """Its parameters are finite, but those of before: of the untrained network if no round came to anything."""
    rows = lost(pairs(*FIVE), "plain", (1, 2), **DEAD)
    (one,) = summarise_scenarios(rows)
    plain, weighted = one.arms
    for metric in ("accuracy", "loss", "macro_f1", "ece", "rounds_to_target"):
        assert plain.metrics[metric].n <= 3, metric
    assert weighted.differences["accuracy"].n == 3
    said = sentences(rows)
    assert "plain diverged with seeds 1, 2: all replicas were dead in their last rounds. These runs have no" in said
    assert "Incomplete" not in said


def test_only_what_ended_by_itself_has_diverged_and_only_what_was_stopped_is_incomplete() -> None:
    def ended(*rounds: bool) -> tuple[bool, bool]:
        rows = small({("weighted", 0): [0.5] * len(rounds)}, rounds=4)
        rows = [row | ({} if row["kind"] == "run" or rounds[row["round"] - 1] else DEAD) for row in rows]
        ((run,),) = ([*one.runs] for one in summarise_scenarios(rows))
        return bool(run.diverged[-1]), "Incomplete" in sentences(rows)

    assert ended(True, False, False) == (True, False)  # gives up at the second lost round in a row
    assert ended(True, True, True, False) == (True, False)
    assert ended(True, False, True, True) == (False, False)
    assert ended(True, True, False) == (False, True)  # one lost round is survived
    assert ended(True, True) == (False, True)


def test_a_difference_in_loss_that_is_not_shown_is_not_told() -> None:
    equal = pairs((0.5, 0.625), (0.625, 0.5), (0.5, 0.5))  # the loss is 1 - accuracy: differences of -1/8, 1/8 and 0
    assert not any("test loss" in line for line in answer(summarise_scenarios(equal)))


def test_a_mean_difference_that_rounds_to_0_has_no_side() -> None:
    for values in ((0.5, 0.625), (0.625, 0.5), (0.5, 0.50002)), ((0.5, 0.625), (0.625, 0.5), (0.5, 0.49998)):
        assert "weighted ended at plain's mean test accuracy (paired over 3 seeds, 95 % interval" in sentences(
            pairs(*values)
        )


def uneven(rows: list[Row]) -> list[Row]:
    """Rows in which weighted weights unevenly, though no replica by less than half of an equal share."""
    weights = {"weights": [0.19, 0.075, *[0.1225] * 6], "effective_replicas": 7.5}
    return lost(rows, "weighted", (0, 1, 2, 3, 4), **weights)


@pytest.mark.parametrize(
    ("rows", "end"),
    [
        (pairs((0.5, 0.625), (0.625, 0.5), (0.5, 0.5)), ", and no difference in test accuracy is shown."),
        (pairs(*FIVE), ", and it ended with a test accuracy 18.75 points above plain's."),
        (pairs(*((b, a) for a, b in FIVE)), ", and it ended with a test accuracy 18.75 points below plain's."),
        (pairs((0.5, 0.625)), ", and there are too few seeds to show a difference in test accuracy."),
        (small({("weighted", 0): [0.5]}), "."),
    ],
)
def test_weights_that_differ_are_told_with_what_that_did_to_accuracy(rows: list[Row], end: str) -> None:
    assert f"no replica's mean weight was below half of 1/8{end}" in sentences(uneven(rows))


def test_unequal_learning_rates_of_plain_and_weighted_are_told() -> None:
    def with_rates(**rates: float) -> str:
        return sentences([row | ({"settings": rates} if row["kind"] == "run" else {}) for row in PAIRS])

    line = "plain was trained at learning rate 0.01 and weighted at 0.02: part of their difference may be due to that."
    assert line in with_rates(lr_plain=0.01, lr_weighted=0.02)
    for same in ({"lr_plain": 0.01, "lr_weighted": 0.01}, {"lr_weighted": 0.01}, {}):
        assert "learning rate" not in with_rates(**same)


def test_what_holds_for_all_scenarios_is_told_once() -> None:
    busy = "One device that is already busy gains nothing from K replicas"
    devices = [
        row | {"devices": 2} if row["kind"] == "run" and row["arm"] == "weighted" else row for row in make_rows()
    ]
    every = summarise_scenarios([*devices, *make_rows(noisy=())])
    said = caveats(every)
    assert sum(busy in line for line in said) == 1
    assert "The arms ran on different numbers of devices, so their measured times are not comparable." in said
    for one in every:
        assert not any(busy in line or "numbers of devices" in line for line in scenario_sentences(one))
    # In each of 2 scenarios the accuracy of 3 arms, and the loss of weighted: 0.05 * 8.
    assert said[0] == (
        "8 differences from plain are tested one by one at 95 %: if there were none at all, about 0.4 of them would "
        "still be shown."
    )
    assert not any("tested" in line or "devices:" in line for line in caveats(summarise_scenarios(PAIRS)))
