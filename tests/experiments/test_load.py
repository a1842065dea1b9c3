"""The load of the machine: what others used is what the benchmark did not, and a report warns of it."""

import os

import pytest

from experiments.benchmarks import load
from experiments.benchmarks.load import Moment

WARNING = "**Warning: others kept this machine busy, with more than 0.5 a core. Measure again when idle.**"


def found(**entries):
    return {"before": 0.1, "after": 2.0, "others": 0.1, "of": 4} | entries


def test_others_used_what_the_benchmark_and_its_children_did_not(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    before, after = Moment(10.0, 0.3, 1000.0, 5.0), Moment(20.0, 2.0, 1025.0, 15.0)
    assert load.between(before, after) == {"before": 0.3, "after": 2.0, "others": 1.5, "of": 4}
    # Clocks of the system tick slower than this process's own.
    assert load.between(before, after._replace(busy=1009.9))["others"] == 0
    assert load.between(before, after._replace(busy=None))["others"] is None


@pytest.mark.parametrize(
    ("entries", "warned"),
    [
        ({}, False),
        ({"after": 9.0}, False),
        ({"before": 2.1}, False),
        ({"before": 2.1, "others": None}, True),
        ({"others": 2.1}, True),
        ({"before": None}, False),
    ],
)
def test_a_report_warns_of_others_and_not_of_its_own_load(entries, warned):
    assert (WARNING in load.lines(found(**entries))) == warned


def test_a_report_says_what_is_known():
    said = "Load average 0.10 before and 2.00 after; other processes used 0.10 of 4 cores meanwhile."
    assert load.lines(found()) == [said]
    assert load.lines(found(others=None)) == ["Load average 0.10 before and 2.00 after."]
    assert load.lines(found(before=None, others=None)) == []


def test_the_system_says_how_busy_it_was(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    # user, nice, system, idle, waiting for disks, interrupts, soft interrupts, stolen, guests (within user).
    stat.write_text("cpu  100 20 3 9999 888 4 5 6 50 60\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    monkeypatch.setattr(load, "_STAT", stat)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    assert load.now().busy == 1.38
    monkeypatch.setattr(load, "_STAT", tmp_path / "missing")
    assert load.now().busy is None


def test_work_of_this_process_counts_as_its_own():
    before = load.now()
    while load.now().own - before.own < 0.05:
        sum(range(10**5))
    after = load.now()
    assert after.own - before.own >= 0.05
    assert after.wall > before.wall
