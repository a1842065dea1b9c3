"""Whom weights and scores trust: correlations by hand, and the table of a report."""

import math

import numpy as np
import pytest
from test_summary import round_row, run_row

from wavg_jax.reporting.runs import read_runs
from wavg_jax.reporting.summary import summarise_scenarios
from wavg_jax.reporting.tables import comparison_tables
from wavg_jax.reporting.trust import LOWER_IS_BETTER, Trust
from wavg_jax.reporting.wording import MINUS
from wavg_jax.weighting.signals import HIGHER_IS_BETTER

WORTH = [0.3, -0.1, 0.2, 0.1]
"""Replicas in the order of their worth: 1, 3, 2, 0."""


def rows(*rounds):
    run = [run_row("weighted", 0)]
    for number, (weights, scores, diagnosis) in enumerate(rounds, 1):
        run.append(round_row("weighted", 0, number, 0.5, weights=weights, scores=scores, diagnosis=diagnosis))
    return run


def diagnosis(worth=WORTH, gain=0.02, error=0.005):
    return {"leave_one_out": worth, "gain": gain, "gain_error": error}


def test_correlations_gain_and_share_by_hand():
    """Ranks of the worth: 4, 1, 3, 2. Weights that rank alike agree to 1. A loss of 1, 2, 3, 4 ranks the replicas 4, 3,
    2, 1 from good to bad: 1 - 6 (0 + 4 + 1 + 1) / (4 * 15) = 0.4."""
    own = {"loss": [1.0, 2.0, 3.0, 4.0]}
    one, two = ([0.4, 0.1, 0.3, 0.2], own, diagnosis()), ([0.25] * 4, own, diagnosis(gain=0.01, error=0.02))
    trust = Trust.over(read_runs(rows(one, two)))
    assert trust.gain == pytest.approx(0.015)
    assert trust.beyond_chance == 0.5
    assert trust.rounds == 2
    assert trust.agreement["weights"] == pytest.approx(1.0)  # equal weights tell nobody apart, and do not count
    assert trust.agreement["loss"] == pytest.approx(0.4)


def test_rounds_without_scores_do_not_count():
    nothing = {"leave_one_out": [None] * 4, "gain": None, "gain_error": None}
    trust = Trust.over(read_runs(rows(([0.25] * 4, {}, nothing), ([0.25] * 4, {}, diagnosis()))))
    assert trust.rounds == 1
    assert trust.gain == pytest.approx(0.02)
    assert math.isnan(trust.agreement["weights"])
    assert Trust.over(read_runs(rows(([0.25] * 4, {}, {})))) is None


def test_the_dead_are_not_ranked():
    """The third replica is dead: of the others' worth, 4, 1 and 2 in rank, weights of the same order agree to 1."""
    given = rows(([0.5, 0.1, 0.0, 0.4], {}, diagnosis()))
    given[1]["alive"] = [True, True, False, True]
    assert Trust.over(read_runs(given)).agreement["weights"] == pytest.approx(1.0)


def test_the_directions_are_those_of_the_signals():
    lower = {name for name, higher in HIGHER_IS_BETTER.items() if not higher and name != "layer_grad_norm"}
    assert lower == LOWER_IS_BETTER


def test_a_report_shows_it_where_there_is_something_to_show():
    scored = rows(([0.4, 0.1, 0.3, 0.2], {"loss": [1.0, 2.0, 3.0, 4.0]}, diagnosis()))
    table = comparison_tables(*summarise_scenarios(scored))[-1]
    assert table.title == "Whom weights and scores trust"
    assert table.columns == (
        "arm",
        "rounds",
        "gain (nats)",
        "beyond chance (%)",
        "worth least",
        "worth most",
        "weights",
        "loss",
    )
    worth = (f"{MINUS}0.100 (replica 1)", "+0.300 (replica 0)")
    assert table.sections == ((("weighted", "1", "+0.020", "100", *worth, "+1.00", "+0.40"),),)
    older = rows(([0.25] * 4, {}, {}))
    for row in older[1:]:
        del row["diagnosis"]
    assert "trust" not in comparison_tables(*summarise_scenarios(older))[-1].title
    assert np.isfinite(summarise_scenarios(older)[0].arms[0].shares.effective_mean)


def test_a_run_whose_replicas_were_all_dead_has_nobody_to_trust():
    dead = rows(([0.25] * 4, {}, diagnosis(worth=[0.0] * 4)))
    dead[1]["alive"] = [False] * 4
    table = comparison_tables(*summarise_scenarios(dead))[-1]
    assert table.sections[0][0][:6] == ("weighted", "1", *["all dead"] * 4)
