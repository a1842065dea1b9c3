"""The table of slow links in README comes from the recorded rows."""

import json
import pathlib
import statistics

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ROWS = [json.loads(line) for line in (ROOT / "experiments/results/links/rows.jsonl").read_text().splitlines()]
CELLS = [row for row in ROWS if row["kind"] == "case"]
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
    sync = seconds("sync", "float32", "100mbit", 2)
    for arm, wire in (("weighted", "float32"), ("weighted", "int8")):
        assert f"{sync / seconds(arm, wire, '100mbit', 2):.0f} times" in README
    assert f"1/{sent('sync', 'float32') / sent('weighted', 'int8'):.0f}" in README
