"""Which link the computed clock assumes, or that there is none, wherever a report shows that clock."""

import pytest
from reports import Row, make_rows

from wavg_jax.base import DataError
from wavg_jax.reporting.plots import arm_places, draw_scenario
from wavg_jax.reporting.publish import summarise
from wavg_jax.reporting.runs import links_in_words, read_runs
from wavg_jax.reporting.summary import summarise_scenarios
from wavg_jax.reporting.tables import comparison_tables

NONE = "with one device for each replica and no network between them"
SLOW = "with one device for each replica and a link of 100 Mbit/s, 5 ms latency between them"


def over(entry: object, rows: list[Row]) -> list[Row]:
    """The rows with their critical paths over this link."""
    own = {"exchange": 0.1, "link": entry}
    return [row | {"critical_path": row["critical_path"] | own} if row["kind"] == "run" else row for row in rows]


LINK = {"bandwidth": 1e8, "latency": 0.005, "overhead": 0.0}


@pytest.mark.parametrize(
    ("rows", "said"),
    [(make_rows(), NONE), (over(None, make_rows()), NONE), (over(LINK, make_rows()), SLOW)],
    ids=["rows without the entry", "no network", "a link"],
)
def test_whatever_shows_the_computed_clock_says_over_which_link(rows: list[Row], said: str) -> None:
    (one,) = summarise_scenarios(rows)
    captions = [plot.caption for plot in draw_scenario(one, arm_places([one])) if plot.name.endswith("critical_path")]
    notes = [table.note for table in comparison_tables(one) if "Computed" in table.note]
    assert [said in text for text in (*captions, *notes)] == [True, True]
    page = summarise(rows)._repr_html_()
    assert said.replace("with one device", "with a device") in page


def test_runs_over_different_links_are_told_together_and_unmeasured_ones_say_nothing() -> None:
    rows = make_rows(seeds=1)
    different = read_runs([*rows, *over(LINK, rows), *over(LINK | {"bandwidth": None}, rows)])
    assert links_in_words(different) == (
        "and no network or a link of 100 Mbit/s, 5 ms latency or a link of unlimited bandwidth, 5 ms latency between "
        "them"
    )
    unmeasured = [row | ({"critical_path": None} if row["kind"] == "run" else {}) for row in rows]
    assert links_in_words(read_runs([*unmeasured, *over(LINK, rows)])) == (
        "and a link of 100 Mbit/s, 5 ms latency between them"
    )


@pytest.mark.parametrize("entry", [{"speed": 3}, {"bandwidth": "fast"}, 3], ids=str)
def test_a_link_that_is_none_is_refused_by_the_name_of_its_run(entry: object) -> None:
    with pytest.raises(DataError, match="the rows of run 'sequential-seed0' do not fit together"):
        read_runs(over(entry, make_rows(seeds=1)))
