"""The tables of a report, against numbers worked by hand, and in terminals of any width."""

import re

import pytest
from reports import ALL_DEAD, DIVERGED, MINUS, ONE_SEED, PAIRS, Row, cells, make_rows, small, text_of

from wavg_jax.reporting.findings import scenario_sentences
from wavg_jax.reporting.plots import arm_places, draw_scenario
from wavg_jax.reporting.summary import summarise_scenarios
from wavg_jax.reporting.tables import comparison_tables


def test_a_column_of_times_has_one_unit_and_says_it() -> None:
    (one,) = summarise_scenarios(PAIRS)
    heads = {table.title: table.columns for table in comparison_tables(one)}
    assert heads["To 80 % test accuracy"][-2:] == ("measured (s)", "computed (ms)")
    assert heads["Cost"][2:5] == ("compiling (s)", "round, measured (ms)", "round, computed (ms)")


@pytest.mark.parametrize(
    ("rows", "title", "name", "expected"),
    [
        # 0.90 and 0.86: mean 0.88, sd 0.04 / sqrt(2) = 0.0283; losses 0.10 and 0.14.
        (PAIRS, "Final", "weighted", ("2", "88.00 ± 2.83", "0.120 ± 0.028")),
        # 0.10 and 0.16.
        (PAIRS, "Final", f"weighted {MINUS} plain", ("2", "+13.00 ± 4.24", f"{MINUS}0.130 ± 0.042")),
        (ONE_SEED, "Final", "weighted", ("1", "90.00 ± n/a", "0.100 ± n/a")),
        # Rounds 1 and 2 of 0.5 s and of 0.1 s: the first column has a whole second, the second has none.
        (PAIRS, "To 80 %", "weighted", ("2 of 2", "150 ± 71", "0.750 ± 0.354", "150 ± 71")),
        (PAIRS, "To 80 %", "plain", ("1 of 2", "200 ± n/a", "1.00 ± n/a", "200 ± n/a")),
        (
            PAIRS,
            "To 80 %",
            f"weighted {MINUS} plain",
            ("1", f"{MINUS}100 ± n/a", f"{MINUS}0.500 ± n/a", f"{MINUS}100 ± n/a"),
        ),
        # Equal values have a spread with as many digits as those beside it.
        (small({("plain", n): [0.5] for n in (0, 1)}), "Final", "plain", ("2", "50.00 ± 0.00", "0.500 ± 0.000")),
        (PAIRS, "Cost", "plain", ("2", "2.00", "500 ± 0", "100", "17.2")),
        # A seed that diverged is counted out in the open; of no output that is not finite there is an accuracy.
        (DIVERGED, "Final", "plain", ("2", "80.00 ± n/a (1 of 2)", "0.200 ± n/a (1 of 2)")),
        (PAIRS, "Weights", "plain", ("8", "8.00", "8.00", "1.00 (replica 0)")),
        (ALL_DEAD, "Weights", "weighted", ("8", "all dead", "all dead", "all dead", "all dead")),
    ],
)
def test_cells(rows: list[Row], title: str, name: str, expected: tuple[str, ...]) -> None:
    assert cells(rows, title, name)[: len(expected)] == expected


def test_a_target_out_of_reach_or_missing_and_a_clock_that_was_not_measured_are_told_apart() -> None:
    far, unset = ([row | {"target_accuracy": target} for row in PAIRS] for target in (0.99, None))
    assert cells(far, "To 99 %", "plain") == ("0 of 2", *["not reached"] * 3)
    (one,) = summarise_scenarios(unset)
    assert not any(table.title.startswith("To ") for table in comparison_tables(one))
    rows = [row | ({"critical_path": None} if row["kind"] == "run" else {}) for row in PAIRS]
    assert cells(rows, "To 80 %", "weighted") == ("2 of 2", "150 ± 71", "0.750 ± 0.354", "not measured")
    (one,) = summarise_scenarios(rows)
    assert "computed clock" not in "".join(plot.title for plot in draw_scenario(one, arm_places([one])))


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_tables_fit_unfolded_and_keep_every_spread(width: int) -> None:
    spread = [
        row | ({"test_ece": 0.4 * row["test_ece"] * row["seed"]} if "round" in row else {}) for row in make_rows()
    ]
    lines = text_of(spread, width).splitlines()
    assert max(map(len, lines)) <= width
    spare = 0 if width == 100 else 7  # F1 gives way, in 7 rows
    assert text_of(spread, width).count("±") == text_of(spread, 200).count("±") - spare
    assert any(re.match("weighted .* 17.2 *$", line) for line in lines)
    assert "…" not in "".join(lines)


def test_a_terminal_that_is_too_narrow_for_a_table_goes_on_below() -> None:
    lines = text_of(make_rows(), 50).splitlines()
    assert max(map(len, lines)) <= 50
    assert sum(line.startswith("weighted  ") for line in lines) > 4  # once for each block of each table
    assert text_of(make_rows(), 50).count("±") == text_of(make_rows(), 200).count("±") - 7


def test_minus_signs_are_all_alike() -> None:
    (one,) = summarise_scenarios(make_rows())
    every = [cell for table in comparison_tables(one) for rows in table.sections for row in rows for cell in row]
    assert any(MINUS in cell for cell in every)
    assert not [text for text in (*every, *scenario_sentences(one)) if re.search(r"(^|[ (])-\d", text)]
