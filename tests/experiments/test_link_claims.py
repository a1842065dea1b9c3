"""The table of slow links in README comes from the recorded rows."""

import json
import pathlib
import statistics

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "experiments/results/README.md").read_text()


def cases(folder):
    lines = (ROOT / "experiments/results" / folder / "rows.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "case"]


CELLS = cases("links")
COLUMNS = (("100mbit", 2), ("100mbit", 4), ("1gbit", 2))
ARMS = {
    "sequential, on one node": ("sequential", "float32"),
    "sync": ("sync", "float32"),
    "accumulate": ("accumulate", "float32"),
    "plain": ("plain", "float32"),
    "plain, int8": ("plain", "int8"),
    "`learned()`": ("weighted", "float32"),
    "`learned()`, int8": ("weighted", "int8"),
}


def cells(arm, wire, link, nodes, steps=50):
    """The cells of a setting, one for each seed."""
    link = "none" if arm == "sequential" else link
    steps = 10 if arm in ("sequential", "sync") else steps
    wanted = {"arm": arm, "wire": wire, "link": link, "nodes": nodes, "local_steps": steps}
    return [
        row
        for row in CELLS
        if all(row[name] == value for name, value in wanted.items())
        and not any("--fragments" in option for option in row["options"])
    ]


def seconds(arm, wire, link, nodes):
    """Median seconds to 85 %; None without a cell."""
    times = [row["reached"]["0.85"] for row in cells(arm, wire, link, nodes)]
    return statistics.median(times) if times else None


def sent(arm, wire):
    return statistics.median(row["bytes_per_sample"] for row in cells(arm, wire, "100mbit", 2))


@pytest.mark.parametrize("label", ARMS)
def test_the_table_of_links_says_what_was_measured(label):
    arm, wire = ARMS[label]
    times = [seconds(arm, wire, *column) for column in COLUMNS]
    shown = ["" if time is None else f"{time:.1f}" for time in times]
    size = "0" if arm == "sequential" else f"{sent(arm, wire):,.0f}"
    line = " | ".join((label, *shown, size)).replace("|  |", "| |").replace("|  |", "| |")
    assert f"| {line} |" in README


def test_the_factors_in_the_text_follow_from_the_table():
    words = " ".join(README.split())
    for nodes, said in (
        (2, "{:.0f} times sooner than gradients averaged at every step, {:.0f} times with int8"),
        (4, "{:.0f}, {:.0f}"),
    ):
        sync = seconds("sync", "float32", "100mbit", nodes)
        factors = [sync / seconds("weighted", wire, "100mbit", nodes) for wire in ("float32", "int8")]
        assert said.format(*factors) in words
        rival = seconds("accumulate", "float32", "100mbit", nodes) / seconds("weighted", "float32", "100mbit", nodes)
        assert (f"and {rival:.0f} times sooner than large" if nodes == 2 else f"and {rival:.1f} times") in words
    assert f"1/{sent('sync', 'float32') / sent('weighted', 'int8'):.0f}" in README


def test_what_is_said_of_the_pool_was_measured_beside_plain():
    found = {}
    for row in cases("links_pool"):
        where = row["arm"], row["wire"], row["link"], row["nodes"]
        found.setdefault(where, []).append(row["reached"]["0.85"])
    medians = {where: statistics.median(times) for where, times in found.items()}
    of = [medians[arm, wire, "100mbit", 2] for wire in ("int8", "float32") for arm in ("weighted", "plain")]
    assert "85 % after {:.1f} s, plain after {:.1f} (float32: {:.1f} and {:.1f})".format(*of) in " ".join(
        README.split()
    )
    for where, times in found.items():
        assert len(times) >= (5 if where[2:] == ("100mbit", 2) and where[0] in ("plain", "weighted") else 1)
