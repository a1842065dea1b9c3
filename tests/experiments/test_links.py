"""The link bench: which cells there are, when a run ends, what its rows come to, and real runs on nodes."""

import json
import signal

import numpy as np
import pytest
from absl.testing import flagsaver
from binary import invoke

from experiments.benchmarks import link_cells, link_report, links, namespaces
from experiments.benchmarks.link_cells import ALONE, LOOPBACK, Cell, Count, Limits
from experiments.benchmarks.namespaces import Traffic
from experiments.setup import app, simulation
from wavg_jax.base import DataError, Stopped, WavgError
from wavg_jax.devices.network import Link
from wavg_jax.storage.rows import as_lines, read_rows

LIMITS = Limits((0.5, 0.8), 10.0, 600.0)
REASON = namespaces.unavailable()
SMALL = (
    "--link_steps=2",
    "--seeds=0",
    "--nodes=2",
    "--link_seconds=0.5",
    "--targets=0.5,1",
    "--hidden=8",
    "--heldout=20",
)


def rows(accuracies, seconds=1.0):
    head = {"kind": "run", "run": "a", "arm": "plain", "parameters": 1000, "settings": {"lr_plain": 0.4, "lr_sync": 9}}
    return [head] + [
        {
            "kind": "round",
            "run": "a",
            "round": i,
            "samples": 100 * i,
            "seconds": seconds,
            "elapsed": seconds * i,
            "test_accuracy": accuracy,
        }
        for i, accuracy in enumerate(accuracies, 1)
    ]


def cells(*arguments):
    with flagsaver.flagsaver():
        app.parse(["binary", *arguments])
        return links._cells()


def test_cells_differ_in_what_matters_to_their_arm():
    found = cells(
        "--link_rates=50mbit,unshaped", "--link_steps=5,9", "--wires=float32,int8", "--nodes=2,4", "--seeds=3,1"
    )
    # sequential once; sync at each rate; the others at each rate, H and wire; all for two seeds and two sizes.
    assert len(found) == len(set(found)) == 2 * 2 * (1 + 2 + 3 * 2 * 2 * 2)
    assert [cell.seed for cell in found] == sorted((cell.seed for cell in found), reverse=True)
    of = {arm: {cell for cell in found if cell.arm == arm} for arm in links.LINKED}
    assert {(cell.link, cell.processes, cell.local_steps) for cell in of["sequential"]} == {(ALONE, 1, 5)}
    assert {(cell.link, cell.wire, cell.local_steps) for cell in of["sync"]} == {
        ("50mbit", "float32", 5),
        ("unshaped", "float32", 5),
    }
    assert {cell.processes for cell in of["weighted"]} == {2, 4}


def test_a_cell_gets_the_flags_that_its_arm_takes():
    given = ("--link_arms=sync,plain", "--link_rates=1gbit", "--wires=int8", "--link_steps=7", "--seeds=2", "--nodes=4")
    sync, plain = cells(*given, "--lr_sync=0.1", "--lr_plain=0.2", "--hidden=8,8")
    assert sync.options == ("--replicas=4", "--hidden=8,8", "--lr_sync=0.1")
    assert plain.options == ("--replicas=4", "--hidden=8,8", "--lr_plain=0.2")
    assert plain.flags()[-4:] == ["--arm=plain", "--local_steps=7", "--seed=2", "--wire=int8"]
    assert not any("wire" in flag for flag in sync.flags())
    assert cells(*given, "--replicas=8")[0].options == ("--replicas=8",)


def test_a_recorded_cell_is_known_again():
    cell = Cell("1gbit", 2, "plain", 50, "int8", 0, ("--hidden=8",))
    row = json.loads(as_lines([cell._asdict() | {"elapsed": 1.0}]))
    assert cell.same_as(row)
    for other in (cell._replace(seed=1), cell._replace(options=()), cell._replace(link="unshaped")):
        assert not other.same_as(row)


def test_a_row_without_limits_counts_as_measured_up_to_its_targets():
    row = {"reached": {"0.8": None, "0.5": 1.0}}
    assert LIMITS.same_as(row)
    assert LIMITS.same_as(row | {"link_seconds": 10.0})
    assert not LIMITS.same_as(row | {"link_seconds": 11.0})
    assert not LIMITS._replace(targets=(0.5,)).same_as(row)


@pytest.mark.parametrize(("steps", "says"), [((10, 20), "each arm at its best H"), ((10,), "H as in the legend")])
def test_a_picture_says_best_only_where_several_were_tried(steps, says, monkeypatch):
    drawn = []
    monkeypatch.setattr(link_report.canvas, "make_plot", lambda name, title, caption, paint: paint)
    monkeypatch.setattr(link_report.canvas, "make_axes", lambda theme, title, subtitle, height: drawn.append(subtitle))
    some = link_report.groups([row for h in steps for row in recorded("1mbit", "plain", [3.0], steps=h)])
    with pytest.raises(TypeError):  # no axes to draw on
        link_report._draw("1mbit", 2, some)(None)
    assert drawn[0].endswith(f"1 seed, {says}")


def test_what_a_runs_rows_come_to():
    found = link_cells.summary(rows([0.3, None, 0.6, 0.55, 0.7], 2.0), LIMITS.targets)
    assert found["reached"] == {"0.5": 6.0, "0.8": None}
    assert (found["rounds"], found["samples"], found["elapsed"], found["seconds"]) == (5, 500, 10.0, 2.0)
    assert (found["final_accuracy"], found["lr"], found["parameters"]) == (0.7, 0.4, 1000)
    assert found["curve"] == [(2.0, 0.3), (6.0, 0.6), (8.0, 0.55), (10.0, 0.7)]
    with pytest.raises(DataError, match="no round"):
        link_cells.summary(rows([]), LIMITS.targets)


def test_a_long_curve_keeps_its_start_and_its_end():
    points = [(float(i), 0.1) for i in range(1, 100_001)]
    kept = link_cells._thinned(points)
    assert 200 < len(kept) <= 300
    assert kept[:3] == points[:3]
    assert kept[-1] == points[-1]


def test_bytes_are_those_of_a_round_of_a_node_and_of_a_sample():
    traffic, looks = [Traffic(1000, 7), Traffic(3000, 8)], [Count(2, 200, 900), Count(6, 600, 3300)]
    assert link_cells.sent(traffic, looks) == {
        **{"sent": [1000, 3000], "received": [7, 8], "bytes_per_round": 2400 / 4 / 2, "bytes_per_sample": 2400 / 400}
    }
    for few in ([], looks[:1], [looks[0], looks[0]]):
        assert link_cells.sent(traffic, few)["bytes_per_round"] is None
    assert set(link_cells.sent([], looks).values()) == {None}


@pytest.fixture
def watch(tmp_path, monkeypatch):
    monkeypatch.setattr(link_cells, "_LOOK", 0.0)
    return link_cells._Watch(tmp_path / "rows.jsonl", LIMITS, link_cells._Place(()))


@pytest.mark.parametrize("last", [[0.1, 0.8], [0.1] * 10])
def test_a_run_ends_at_the_highest_target_or_when_its_time_is_over(watch, last):
    assert watch() is None
    content = as_lines(rows(last))
    short = content[: content.rstrip().rfind(b"\n") + 20]  # the last line is still being written
    watch.path.write_bytes(short)
    assert watch() is None
    watch.path.write_bytes(content)
    assert watch() == watch() == signal.SIGTERM


def test_a_run_that_no_longer_moves_is_given_up(watch):
    watch.path.write_bytes(as_lines(rows([0.1])))
    assert watch() is None
    watch.moved -= LIMITS.patience
    assert watch() == signal.SIGKILL


def test_a_watch_counts_at_the_first_and_at_the_last_look_that_found_a_round(watch, monkeypatch):
    counted = iter([[Traffic(10, 0), Traffic(1, 0)], [Traffic(20, 0), Traffic(2, 0)], [Traffic(40, 0), Traffic(3, 0)]])
    monkeypatch.setattr(link_cells._Place, "traffic", lambda self: next(counted))
    for rounds in (0, 0, 2, 3, 3, 5):
        watch.path.write_bytes(as_lines(rows([0.1] * rounds)))
        watch()
    assert watch.counts == [Count(2, 200, 11), Count(5, 500, 43)]


def recorded(link, arm, times, *, wire="float32", seconds=1.0, size=4000.0, nodes=2, steps=10):
    """A row for each seed, with the seconds to 80 %."""
    found = []
    for seed, at in enumerate(times):
        cell = Cell(link, nodes, arm, steps, wire, seed, ("--hidden=8", f"--lr_{arm}=0.1"))
        entries = link_cells.summary(rows([0.1, 0.9]), (0.8,)) | {
            "reached": {"0.8": at},
            "seconds": seconds,
            "bytes_per_round": size,
            "bytes_per_sample": None,
        }
        found.append(json.loads(as_lines([cell._asdict() | entries | {"kind": "case"}])))
    return found


def test_the_table_has_medians_and_how_many_times_sooner_than_sync(tmp_path, capsys):
    every = [
        *recorded("1mbit", "sync", [40.0, 60.0, None]),
        *recorded("1mbit", "plain", [3.0, 6.0, 5.0]),
        *recorded("1mbit", "weighted", [3.0, None, None]),
        *recorded("1gbit", "plain", [2.0]),
        *recorded(ALONE, "sequential", [1.0]),
    ]
    found = {(one.link, one.arm): one for one in link_report.groups(every)}
    assert found["1mbit", "sync"].reached("0.8") == 60.0
    assert found["1mbit", "weighted"].reached("0.8") is None
    lines = [line.split() for line in _shown(every, tmp_path, capsys) if "│" in line]
    assert [line[5] for line in lines] == ["sequential", "sync", "plain", "weighted", "plain"]
    assert "(12.0x)" in lines[2]
    assert not any("x)" in word for line in (lines[0], lines[4]) for word in line)  # no sync there to compare with
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy_1gbit_2nodes.png",
        "accuracy_1mbit_2nodes.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def _shown(every, folder, capsys):
    link_report.publish(every, folder, app.console(log_width=200))
    return capsys.readouterr().out.splitlines()


def test_points_hold_what_a_plan_predicts_them_from(tmp_path, capsys):
    every = [
        *recorded("1mbit", "sync", [9.0], seconds=1.5),
        *recorded("unshaped", "sync", [2.0], seconds=0.5),
        *recorded("1mbit", "weighted", [9.0], wire="int8", seconds=0.3, size=3000.0, nodes=4),
        *recorded("unshaped", "weighted", [2.0], wire="int8", seconds=0.1, nodes=4),
        *recorded("1mbit", "weighted", [9.0], seconds=0.3, size=6100.0, nodes=4),
        *recorded("unshaped", "weighted", [2.0], seconds=0.1, nodes=4),
        *recorded("1mbit", "accumulate", [9.0], seconds=0.3, size=12500.0, nodes=4),
        *recorded("unshaped", "accumulate", [2.0], seconds=0.1, nodes=4),
        *recorded("1mbit", "plain", [9.0]),  # not measured unshaped
    ]
    shown = "\n".join(_shown(every, tmp_path, capsys))
    sync, narrow, ring, gathered = map(json.loads, (tmp_path / "points.jsonl").read_text().splitlines())
    assert sync == {
        **{"nodes": 2, "arm": "sync", "local_steps": 10, "wire": "float32", "rate": 1e6, "parameters": 1000},
        **{"seconds_per_round": 1.5, "local_seconds": 0.5, "collective": "ring"},
    }
    assert [one["collective"] for one in (narrow, ring, gathered)] == ["gather", "ring", "gather"]
    # 10 steps of 1,000 numbers of 4 bytes at 1 Mbit/s, and 0.5 s of other work.
    assert simulation.predicted(sync, Link()) == pytest.approx(0.5 + 10 * 4000 * 8 / 1e6)
    assert "0.82 (0.55x)" in shown


def test_every_accuracy_is_held_until_the_next_evaluation():
    one, two = recorded("1mbit", "plain", [1.0, 1.0])
    one["curve"], two["curve"] = [[1.0, 0.2], [3.0, 0.6]], [[2.0, 0.4], [4.0, 0.8]]
    (group,) = link_report.groups([one, two])
    times, accuracy = link_report._middle(group)
    np.testing.assert_allclose(times, [2.0, 3.0])
    np.testing.assert_allclose(accuracy, [0.3, 0.5])


BAD = [
    ("--link_rates=fast", "'fast' is no rate"),
    ("--link_rates=1gbit,1gbit", "--link_rates=1gbit,1gbit"),
    ("--link_arms=none", "--link_arms=none"),
    ("--wires=int4", "--wires=int4"),
    ("--nodes=0", "--nodes=0"),
    ("--targets=80", "--targets=80"),
    ("--wire=int8", "--wire has no effect"),
    ("--local_steps=5", "--local_steps has no effect"),
]


@pytest.mark.parametrize(("argument", "says"), BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_written(argument, says, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(links.main, argument) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def measured(monkeypatch):
    """Runs no processes: every cell takes a second a round."""
    called = []

    def measure(cell, limits, folder, data_dir):
        called.append(cell)
        if cell.arm == "plain" and called.count(cell) == 1:
            raise WavgError("exit code 1: no luck")
        found = link_cells.summary(rows([0.9]), limits.targets) | link_cells.sent([], [])
        return cell._asdict() | limits.entries() | found

    monkeypatch.setattr(links, "measure", measure)
    return called


def test_a_failed_cell_does_not_stop_the_others_and_is_all_that_runs_again(measured, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(namespaces, "unavailable", lambda: None)
    arguments = (f"--workdir={tmp_path}", "--link_rates=1gbit", "--wires=float32", *SMALL)
    assert invoke(links.main, *arguments) == 2
    out, err = capfd.readouterr()
    assert "1 of 5 cells failed, first: plain, 2 nodes, 1gbit" in err
    assert "failed: exit code 1: no luck" in out
    assert len(measured) == 5
    assert invoke(links.main, *arguments) == 0
    assert [cell.arm for cell in measured[5:]] == ["plain"]
    assert [row["kind"] for row in read_rows(tmp_path)] == ["benchmark"] + ["case"] * 5
    assert invoke(links.main, *arguments[:-2], "--hidden=9", "--link_arms=sync") == 0  # other settings, another cell
    assert len(read_rows(tmp_path)) == 7
    # A higher target, a longer run: measured again, each with the command that did it.
    for number, other in enumerate(("--targets=0.5,0.9,1", "--link_seconds=2"), 8):
        again = (*arguments[:-2], "--hidden=9", "--link_arms=sync", other)
        assert invoke(links.main, *again) == invoke(links.main, *again) == 0
        assert len(read_rows(tmp_path)) == number
        assert other in read_rows(tmp_path)[-1]["command"]
    assert "--hidden=8" in read_rows(tmp_path)[1]["command"]
    assert len(link_report.groups([row for row in read_rows(tmp_path) if row["kind"] == "case"])) == 8


def test_without_namespaces_one_line_says_why_and_all_run_over_the_loopback(measured, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(namespaces, "unavailable", lambda: "network namespaces need root")
    arguments = ("--link_rates=1gbit,50mbit", "--link_arms=sequential,sync,weighted", "--wires=int8", *SMALL)
    assert invoke(links.main, f"--workdir={tmp_path}", *arguments) == 0
    assert "network namespaces need root: measuring over the loopback, unshaped\n" in capfd.readouterr().out
    assert [(cell.link, cell.arm) for cell in measured] == [
        (ALONE, "sequential"),
        (LOOPBACK, "sync"),
        (LOOPBACK, "weighted"),
    ]


def test_a_run_that_fails_or_is_stopped_says_so_and_keeps_its_logs(tmp_path, monkeypatch):
    folder, cell = tmp_path / "cells" / "1", Cell(ALONE, 2, "sequential", 2, "float32", 0, ("--hidden=none",))
    with pytest.raises(WavgError, match=r"exit code 2: error: .*--hidden=none.* \(logs in .*cells/1\)"):
        link_cells.measure(cell, LIMITS, folder, "")
    assert (folder / "process-0.log").exists()
    ended = link_cells.processes.Ended(143, signal.SIGTERM)
    monkeypatch.setattr(link_cells.processes, "launch", lambda *args, **kwargs: ended)
    with pytest.raises(Stopped, match="sequential, alone"):
        link_cells.measure(cell, LIMITS, folder, "")


def test_of_a_failed_run_the_error_is_shown(tmp_path):
    assert link_cells._last_words(tmp_path) == "it said nothing"
    (tmp_path / "process-0.log").write_text("a\nprocess 1 is gone\n")
    assert link_cells._last_words(tmp_path) == "process 1 is gone"
    (tmp_path / "process-1.log").write_text("Traceback\n  raise\nIndexError: 7\nmore follows\n")
    assert link_cells._last_words(tmp_path) == "IndexError: 7"


@pytest.mark.slow
def test_a_run_alone_and_one_over_the_loopback_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(namespaces, "unavailable", lambda: "no root today")
    given = (f"--workdir={tmp_path}", *SMALL, "--link_arms=sequential,plain", "--wires=int8")
    assert invoke(links.main, *given) == 0
    _, *found = read_rows(tmp_path)
    assert [(row["arm"], row["link"]) for row in found] == [("sequential", ALONE), ("plain", LOOPBACK)]
    assert all(row["reached"]["0.5"] > 0 and row["reached"]["1"] is None and row["sent"] is None for row in found)
    assert all(row["elapsed"] >= 0.5 and row["rounds"] > 1 for row in found)
    assert not (tmp_path / "cells").exists()


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_nodes_send_what_their_arm_sends(tmp_path, monkeypatch):
    """Each arm and wire on one link, as a cell starts two processes that compile, and one of them on two to compare."""
    all_cells = links._cells
    cells = {(arm, wire, "unshaped") for arm, wire in (("sync", "float32"), ("plain", "float32"), ("plain", "int8"))}
    cells |= {("plain", "float32", "1gbit")}
    monkeypatch.setattr(links, "_cells", lambda: [one for one in all_cells() if (one.arm, one.wire, one.link) in cells])
    given = ("--link_rates=1gbit,unshaped", "--link_arms=sync,plain", "--wires=float32,int8", "--hidden=512")
    assert invoke(links.main, f"--workdir={tmp_path}", *SMALL, *given, "--link_seconds=3") == 0
    _, *found = read_rows(tmp_path)
    assert len(found) == 4
    for row in found:
        least = row["parameters"] * (4 if row["wire"] == "float32" else 1) * (2 if row["arm"] == "sync" else 1)
        assert least < row["bytes_per_round"] < 1.3 * least + 8000  # headers, scales, scores, and who wishes to stop
    assert (tmp_path / "points.jsonl").exists()
