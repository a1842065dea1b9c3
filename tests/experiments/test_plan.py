"""The plan: what it computes against failures that are played out, what it prints and writes, and its check."""

import doctest
import json
import math

import numpy as np
import pytest
from absl.testing import flagsaver
from binary import invoke

from experiments import plan
from experiments.setup import app, simulation
from experiments.setup.simulation import Cluster, Load, exchange, lost_by_all, lost_by_one, predicted, simulate
from wavg_jax.devices.network import NOTHING, WIRES, Link, all_gather, all_reduce, halving

LOAD = Load(parameters=1_000_000, flop_per_sample=1e6, batch_size=100)
FAST = Cluster(flops=1e9, link=Link(1e8, latency=0.001))  # 0.1 s a step; float32 over 2 workers: 0.322 s


def outcome(arm="plain", cluster=FAST, **case):
    return simulate(
        LOAD, cluster, **({"workers": 2, "local_steps": 10, "wire": "float32", "collective": "ring"} | case), arm=arm
    )


def test_the_examples_of_the_simulation_hold():
    done = doctest.testmod(simulation)
    assert (done.failed, done.attempted > 8) == (0, True)


def test_an_arm_exchanges_at_every_step_once_a_round_or_never():
    assert exchange("sequential", 100, 4, 50) == NOTHING
    assert exchange("sync", 100, 4, 50) == all_reduce(100, 4)._replace(times=50)
    for arm in ("plain", "weighted", "accumulate"):
        assert exchange(arm, 100, 4, 50, "bfloat16") == all_reduce(100, 4, "bfloat16")
        assert exchange(arm, 100, 4, 50, "int8", "gather") == all_gather(100, 4, "int8")
        assert exchange(arm, 100, 4, 50, collective="halving") == halving(100, 4)


def test_a_round_is_computing_and_exchanging_and_sync_exchanges_at_every_step():
    average, sync = outcome(), outcome("sync")
    assert average.round_seconds == pytest.approx(10 * 0.1 + 0.322)
    assert sync.round_seconds == pytest.approx(10 * 0.422)
    assert average.communication == pytest.approx(0.322 / 1.322)
    assert sync.efficiency == pytest.approx(0.1 / 0.422)
    assert average.samples == pytest.approx(2 * 10 * 100 / 1.322)
    # At the rate that hides it, an exchange takes as long as the computing.
    assert sync.hiding == pytest.approx(4e6 / 0.1) == pytest.approx(10 * average.hiding)
    hidden = outcome(cluster=FAST._replace(link=Link(8 * average.hiding)))
    assert hidden.communication == pytest.approx(0.5)


def test_averaging_less_often_and_narrower_wires_leave_more_time_to_compute():
    by_h = [outcome(local_steps=h).efficiency for h in (1, 10, 100)]
    by_wire = [outcome(wire=wire).efficiency for wire in WIRES]
    assert by_h == sorted(by_h)
    assert by_wire == sorted(by_wire)
    assert len({*by_h, *by_wire}) == 5  # one is both
    assert outcome(local_steps=1).efficiency == outcome("sync", local_steps=1).efficiency


def test_without_a_network_or_failures_nothing_is_lost():
    alone = FAST._replace(link=None)
    for arm in ("sync", "plain"):
        one = outcome(arm, alone, workers=100_000)
        assert (one.communication, one.lost, one.efficiency) == (0, 0, 1)


def rounds_played_out(rng, rate, restart, seconds, rounds):
    """The share of its rounds that a worker loses, failure by failure, by the clock."""
    kept, now = 0, 0.0
    failure = rng.exponential(1 / rate)
    while now < rounds * seconds:
        if failure >= now + seconds:
            kept, now = kept + 1, now + seconds
        else:
            now = math.ceil((failure + restart) / seconds) * seconds  # rounds start at multiples of their length
            failure = now + rng.exponential(1 / rate)
    return 1 - kept * seconds / now


def checkpoints_played_out(rng, rate, restart, checkpoint, times):
    """The share of their time that workers lose who all start again from the last checkpoint."""
    now = 0.0
    for _ in range(times):
        while (failure := rng.exponential(1 / rate)) < checkpoint:
            now += failure + restart
        now += checkpoint
    return 1 - times * checkpoint / now


@pytest.mark.parametrize(("rate", "restart", "seconds"), [(0.001, 300, 60), (0.01, 0, 50), (0.02, 35, 80)])
def test_what_failures_cost_is_what_they_cost_when_played_out(rate, restart, seconds):
    rng = np.random.default_rng(0)
    # Failures fall a little more often into the first half of a round, which the formula leaves out.
    assert rounds_played_out(rng, rate, restart, seconds, 40_000) == pytest.approx(
        lost_by_one(rate, restart, seconds), rel=0.05
    )
    assert checkpoints_played_out(rng, rate, restart, seconds, 20_000) == pytest.approx(
        lost_by_all(rate, restart, seconds), rel=0.05
    )


def test_rare_failures_cost_half_of_the_work_since_the_last_checkpoint_and_the_restart():
    assert lost_by_all(1e-8, 300, 600) == pytest.approx(1e-8 * (300 + 300), rel=1e-3)
    assert lost_by_one(1e-8, 300, 600) == pytest.approx(1e-8 * (600 + 300), rel=1e-3)  # half of it had been computed


def test_failures_of_many_workers_stop_sync_and_leave_averaging_alone():
    failing = FAST._replace(failure_rate=1e-3, restart=300)
    sync, average = ([outcome(arm, failing, workers=k).lost for k in (100, 10_000, 10**7)] for arm in ("sync", "plain"))
    assert sync == sorted(sync)
    assert sync[-1] == 1.0  # it never gets anywhere, and nothing overflows
    assert outcome("sync", failing, workers=10**7).samples == 0
    assert max(average[:2]) < 1e-3
    assert lost_by_one(1.0, 0.0, 1e4) == 1.0


COMMAND = ("--parameters=1e6", "--worker_counts=2,1000", "--steps=10,50", "--link_bandwidth=1e8", "--link_latency=1e-3")


def test_the_plan_is_printed_and_written_with_what_it_takes_for_granted(tmp_path, capsys):
    assert invoke(plan.main, *COMMAND, f"--workdir={tmp_path / 'out'}") == 0
    shown, written = capsys.readouterr().out, (tmp_path / "out" / "plan.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.md", "plan.png"}
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    for text in (" ".join(shown.split()), written):
        for said in ("1,000 workers", "100 Mbit/s, 1 ms latency", "2e-05 per worker and hour", *simulation.ASSUMPTIONS):
            assert said in text
    lines = [line for line in written.splitlines() if line.startswith(("| sync", "| H = "))]
    assert len(lines) == 2 * 3 * 3
    with flagsaver.flagsaver():
        app.parse(["binary", *COMMAND])
        found = plan.make_plan()
    first = found[2, 10, "float32"]
    # 16 samples of 6e6 operations at 1e14 a second, and 0.322 s.
    assert first.round_seconds == pytest.approx(10 * 16 * 6e6 / 1e14 + 0.322)
    assert "| H = 10 | float32 | 0.322 | 0.0322 | 100 |" in lines[3]
    assert len(found) == len(lines)


def test_a_plan_without_a_link_says_so_and_goes_to_a_new_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(plan.main, "--worker_counts=4", "--steps=10", "--wire_formats=float32") == 0
    assert "no network" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("plan-")
    assert "no network" in (folder / "plan.md").read_text()


@pytest.mark.parametrize(("collective", "marked"), [("library", 2), ("ring", 4), ("gather", 2)])
def test_what_the_library_does_not_exchange_so_is_marked(collective, marked, tmp_path, capsys):
    arguments = ("--worker_counts=4", "--steps=10", f"--collective={collective}", f"--workdir={tmp_path}")
    assert invoke(plan.main, *arguments) == 0
    capsys.readouterr()
    lines = [line for line in (tmp_path / "plan.md").read_text().splitlines() if line.startswith(("| sync", "| H = "))]
    assert sum(plan.NOT_BUILT in line for line in lines) == marked
    assert not any("| int8 |" in line for line in lines if line.startswith("| sync"))


def test_by_default_narrow_formats_are_gathered():
    arguments = ("--parameters=1e5", "--worker_counts=4", "--steps=10", "--link_bandwidth=2.4e6", "--failure_rate=0")
    with flagsaver.flagsaver():
        app.parse(["binary", *arguments])
        found = plan.make_plan()
    seconds = {(h, wire): one.round_seconds * one.communication for (_, h, wire), one in found.items()}
    assert seconds[10, "float32"] == pytest.approx(all_reduce(1e5, 4).seconds(Link(2.4e6)))
    assert seconds[10, "int8"] == pytest.approx(all_gather(1e5, 4, "int8").seconds(Link(2.4e6)))


@pytest.mark.parametrize(
    ("collective", "average", "sync"), [("ring", 2.0, 2.0), ("halving", 2.0, 2.0), ("gather", 4.0, 2.0)]
)
def test_gathering_is_for_averages_alone(collective, average, sync):
    # 100,000 parameters over 4 workers: 600 kB in a ring.
    arguments = (
        "--parameters=1e5",
        "--worker_counts=4",
        "--steps=10",
        "--wire_formats=float32",
        "--link_bandwidth=2.4e6",
    )
    with flagsaver.flagsaver():
        app.parse(["binary", *arguments, f"--collective={collective}", "--failure_rate=0"])
        found = plan.make_plan()
    seconds = {h: one.round_seconds * one.communication for (_, h, _), one in found.items()}
    assert seconds == pytest.approx({10: average, 0: sync})


POINT = {"nodes": 2, "rate": 1e8, "local_steps": 50, "arm": "plain", "wire": "float32", "parameters": 1_000_000}
POINT |= {"local_seconds": 0.5, "seconds_per_round": 0.82}


def check(path, *rows, arguments=()):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return invoke(plan.main, f"--check={path}", *arguments)


@pytest.mark.parametrize(
    ("changes", "link", "seconds"),
    [
        ({}, Link(), 0.5 + 0.32),
        ({"arm": "sync"}, Link(), 0.5 + 50 * 0.32),
        ({"arm": "accumulate"}, Link(latency=0.1), 0.5 + 0.32 + 0.2),
        ({"arm": "weighted", "wire": "int8"}, Link(overhead=0.01), 0.5 + 0.08125 + 0.01),
        ({"nodes": 4}, Link(), 0.5 + 0.48),
        ({"nodes": 4, "collective": "gather"}, Link(), 0.5 + 0.96),
        ({"nodes": 4, "wire": "bfloat16"}, Link(), 0.5 + 0.48),
        ({"nodes": 4, "wire": "bfloat16", "collective": "ring"}, Link(), 0.5 + 0.24),
        ({"rate": None}, Link(overhead=0.1), 0.6),
        ({"arm": "sequential"}, Link(1, 1, 1), 0.5),
    ],
    ids=str,
)
def test_a_point_is_predicted_from_its_local_seconds_and_what_it_exchanges(changes, link, seconds):
    assert predicted(POINT | changes, link) == pytest.approx(seconds)


def test_the_check_passes_within_the_tolerance_and_fails_beyond(tmp_path, capsys):
    far = POINT | {"arm": "weighted", "seconds_per_round": 1.0}  # 0.82 is 18 % less
    assert check(tmp_path / "points", POINT, far) == 0
    assert "Worst error: -18.0 %. Off by more than 20 %: 0 of 2 points." in capsys.readouterr().out
    assert check(tmp_path / "points", POINT, far, arguments=["--tolerance=0.1"]) == 1
    said = capsys.readouterr().out
    assert "Off by more than 10 %: 1 of 2 points." in said
    assert "100 Mbit/s" in said
    # The overhead of an exchange can be what was missing.
    assert check(tmp_path / "points", far, arguments=["--tolerance=0.1", "--link_overhead=0.15"]) == 0


def test_the_check_tells_a_slow_collective_from_a_slow_link(tmp_path, capsys):
    gathered = POINT | {"collective": "gather", "seconds_per_round": 0.5 + 1.6 * 0.32}
    unshaped = POINT | {"rate": None}
    assert check(tmp_path / "points", POINT, gathered, gathered | {"seconds_per_round": 1.14}, unshaped) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Ring over 2 nodes: exchanges took 1.00 to 1.00 times what was computed for them." in said
    assert "Gather over 2 nodes: exchanges took 1.60 to 2.00 times what was computed for them." in said


BAD_POINTS = {
    "no JSON": "{",
    "no object": "3",
    "lacks local_seconds": json.dumps({name: value for name, value in POINT.items() if name != "local_seconds"}),
    "int4": json.dumps(POINT | {"wire": "int4"}),
    "mesh": json.dumps(POINT | {"collective": "mesh"}),
    "of no time": json.dumps(POINT | {"seconds_per_round": 0}),
    "of no nodes": json.dumps(POINT | {"nodes": 0}),
    "of half a step": json.dumps(POINT | {"local_steps": 0.5}),
    "of no arm": json.dumps(POINT | {"arm": "psync"}),
    "of no rate": json.dumps(POINT | {"rate": 0}),
    "in words": json.dumps(POINT | {"rate": "fast"}),
    "null": json.dumps(POINT | {"seconds_per_round": None}),
}


@pytest.mark.parametrize("what", BAD_POINTS)
def test_a_point_that_is_none_is_refused_in_one_line(what, tmp_path, capsys):
    file = tmp_path / "points"
    file.write_text(f"{json.dumps(POINT)}\n{BAD_POINTS[what]}\n")
    assert invoke(plan.main, f"--check={file}") == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {file}, line 2: not a measured point (")
    assert said.err.count("\n") == 1
    assert said.out == ""


BAD = {
    "--worker_counts=0": "--worker_counts=0: give positive whole numbers",
    "--steps=1.5": "--steps=1.5: give positive whole numbers",
    "--wire_formats=int4": "--wire_formats=int4: choose from float32, bfloat16, int8",
    "--link_bandwidth=0": "--link_bandwidth=0",
    "--failure_rate=-1": "--failure_rate=-1",
    "--flops=nan": "--flops=nan",
    "--tolerance=0.3": "--tolerance has no effect without --check",
    "--replicas=3": "--replicas has no effect here",
    "--check=nowhere": "no measured points in nowhere",
    "--check=empty": "no measured points in empty: the file is empty",
    "--check=empty --worker_counts=3": "--worker_counts has no effect with --check",
    "100": "'100' is not a flag",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_written(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("")
    assert invoke(plan.main, *arguments.split()) == 2
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith("error: ")
    assert BAD[arguments] in line
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
