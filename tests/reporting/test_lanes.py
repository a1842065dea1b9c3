"""The lanes of workers, from rows worked out by hand."""

import pytest
from reports import make_run

from wavg_jax.reporting.lanes import draw_lanes, shares, spans
from wavg_jax.reporting.publish import summarise
from wavg_jax.reporting.runs import read_runs

COMPUTED = {"was": "computed", "sent": 0.0, "ended": 0.9, "computed": 0.8}
LATE = {"was": "late", "sent": 0.0, "ended": 1.0, "computed": None}
AWAY = {"was": "away", "why": "its worker died"}
DROPPED = {"was": "late, dropped", "sent": 0.0, "ended": 0.1, "computed": 1.5}
LANES = [(COMPUTED, COMPUTED, COMPUTED), (LATE, AWAY, AWAY), (COMPUTED, DROPPED, AWAY)]
"""Of worker 0 in three rounds, and so on."""


def elastic_rows():
    first, *rest = make_run("weighted", 0, (), rounds=3)
    rows = [first | {"rounds": 3}]
    for number, row in enumerate(rest):
        workers = [{"worker": worker, "replicas": [], **lane[number]} for worker, lane in enumerate(LANES)]
        rows.append(row | {"seconds": 1.0, "elapsed": number + 1.0, "workers": workers})
    return rows


def test_spans_and_shares_by_hand():
    (run,) = read_runs(elastic_rows())
    found = spans(run)
    assert found[0]["computed"] == [pytest.approx((at + 0.1, 0.8)) for at in (0, 1, 2)]
    assert (found[0]["late"], found[0]["away"]) == ([], [])
    assert found[1] == {"computed": [], "late": [(0.0, 1.0)], "away": [(1.0, 2.0)]}  # neighbours are one
    assert found[2]["late"] == [(1.0, 1.0)]
    # 9 worker-seconds: 4 computing 0.8 each, 2 late, 3 away; what is left of those that computed was waiting.
    assert shares(run) == pytest.approx({"computed": 3.2 / 9, "late": 2 / 9, "away": 3 / 9, "waited": 0.8 / 9})


def test_a_report_of_an_elastic_run_has_the_figure_and_another_has_not():
    names = [plot.name for plot in summarise(elastic_rows()).figures()]
    assert "workers" in names
    plain = make_run("weighted", 0, (), rounds=3)
    assert "workers" not in [plot.name for plot in summarise(plain).figures()]
    assert draw_lanes(read_runs(plain), "") is None
    figure = next(plot for plot in summarise(elastic_rows()).figures() if plot.name == "workers")
    assert "computed 36 %, late 22 %, away 33 %, waited 9 %" in figure.caption
