"""Checkpoints and resumption, with real processes and a real kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from runs import AVERAGER, ENVIRONMENT, HERE, OPTIONS, leaves, run, same, without_clocks
from small import blobs, sharded

import wavg_jax as wavg
from wavg_jax import data
from wavg_jax.storage.rows import as_lines, read_rows

pytestmark = pytest.mark.optimized  # what a resumed run computes


def other(change):
    """The blobs, but more of them, with other labels or with other inputs."""
    dataset = blobs(train=300) if change == "more" else blobs()
    if change == "labels":
        dataset = dataset._replace(train=dataset.train._replace(y=dataset.train.y[::-1].copy()))
    if change == "inputs":
        changed = dataset.train.x.copy()
        changed[-1, -1] += 1
        dataset = dataset._replace(train=dataset.train._replace(x=changed))
    return data.shard(dataset, lambda split, seed: data.iid(len(split.y), 4, seed), heldout=20, seed=0)


TRAIN = [sys.executable, "-m", "experiments.train", "--hidden=8", "--replicas=2", "--devices=1", "--weighting=plain"]
OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
CHILD = """
    import os, pathlib, signal, sys, time
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    from runs import AVERAGER, OPTIONS, run
    from small import sharded

    workdir = pathlib.Path(sys.argv[1])

    def on_round(row):
        if row["round"] == 4:
            while not (workdir / "checkpoints" / "run" / "3").exists():  # saved asynchronously
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    run(sharded(), AVERAGER, workdir=workdir, on_round=on_round, **OPTIONS)
"""


@pytest.mark.slow
def test_six_rounds_equal_three_then_kill_9_then_three_more(tmp_path):
    straight = run(sharded(), AVERAGER, workdir=tmp_path / "straight", **OPTIONS)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(killed)]
    child = subprocess.run(command, env=ENVIRONMENT | OPTIMIZED, capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert [row["round"] for row in read_rows(killed)[1:]] == [1, 2, 3, 4]
    rows_file = killed / "rows.jsonl"
    rows_file.write_bytes(rows_file.read_bytes() + b'{"kind": "rou')  # as if killed while it wrote a line
    resumed = run(sharded(), AVERAGER, workdir=killed, resume=True, **OPTIONS)
    same(straight, resumed)
    assert without_clocks(resumed.rows) == without_clocks(straight.rows)
    assert without_clocks(read_rows(killed)) == without_clocks(straight.rows)


def test_a_finished_run_can_be_resumed_for_more_rounds(tmp_path):
    straight = run(sharded(), AVERAGER, **OPTIONS)
    run(sharded(), AVERAGER, workdir=tmp_path, **(OPTIONS | {"rounds": 2}))
    more = run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    same(straight, more)
    again = run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    same(straight, again)
    assert len(again.rows) == 7
    assert again.rows[0]["rounds"] == 6


def test_many_runs_share_a_folder_and_keep_apart(tmp_path):
    first = run(sharded(), AVERAGER, workdir=tmp_path, name="a", **OPTIONS)
    second = run(sharded(seed=1), AVERAGER, workdir=tmp_path, name="b", seed=1, **OPTIONS)
    assert read_rows(tmp_path) == first.rows + second.rows
    resumed = run(sharded(), AVERAGER, workdir=tmp_path, name="a", resume=True, **OPTIONS)
    same(first, resumed)
    assert len(read_rows(tmp_path)) == 14


@pytest.mark.slow
def test_resuming_on_more_devices_gives_the_same_run(tmp_path):
    straight = run(sharded(), AVERAGER, devices=4, **OPTIONS)
    run(sharded(), AVERAGER, workdir=tmp_path, **(OPTIONS | {"rounds": 3}))
    resumed = run(sharded(), AVERAGER, workdir=tmp_path, resume=True, devices=4, **OPTIONS)
    for x, y in zip(leaves(straight), leaves(resumed), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


DEEPER = wavg.models.from_linen(wavg.models.MLP(hidden=(5,), classes=3), (4,))  # 4 * 5 + 5 + 5 * 3 + 3 numbers


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 4}, "it was started with batch_size=8, now"),
        ({"local_steps": 5}, "it was started with local_steps=4, now"),
        ({"seed": 3}, "it was started with seed=0, now"),
        ({"settings": {"lr_plain": 0.3}}, "it was started with lr_plain=0.1, now"),
        ({"rounds": 2}, "more than rounds=2; give at least rounds=3"),
        ({"sharded_data": sharded(noisy=(1,))}, "started with noisy_shards="),
        ({"sharded_data": sharded(replicas=2)}, "started with replicas=4, now it is 2"),
        ({"task": DEEPER}, "started with parameters=15, now it is 43"),
        ({"sharded_data": sharded(heldout=24)}, "started with shard_sizes="),
        ({"sharded_data": other("more")}, "data are not what it was started with .training samples: 260, now 300"),
        ({"sharded_data": other("labels"), "settings": {"lr_plain": 0.1}}, "labels, splits or shards are not what"),
        ({"sharded_data": other("inputs"), "settings": {"lr_plain": 0.1}}, "inputs, labels, splits or shards are not"),
    ],
)
def test_resuming_with_other_settings_is_refused_and_loses_nothing(change, says, tmp_path):
    settings = {"settings": {"lr_plain": 0.1}}
    run(sharded(), AVERAGER, workdir=tmp_path, **(OPTIONS | {"rounds": 3} | settings))
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(wavg.ResumeError, match=says) as raised:
        run(
            **(
                {"sharded_data": sharded(), "averager": AVERAGER, "workdir": tmp_path, "resume": True}
                | settings
                | change
            )
        )
    assert "\n" not in str(raised.value)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_starting_over_a_run_that_is_there_is_refused_and_loses_nothing(tmp_path):
    run(sharded(), AVERAGER, workdir=tmp_path, **OPTIONS)
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(wavg.SettingsError, match="resume=True, or choose another workdir="):
        run(sharded(), AVERAGER, workdir=tmp_path, **OPTIONS)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_loses_nothing(tmp_path):
    command = [*TRAIN, f"--workdir={tmp_path}", "--rounds=2"]
    options = {"env": ENVIRONMENT, "cwd": HERE.parent, "capture_output": True, "text": True, "check": False}
    assert subprocess.run(command, **options).returncode == 0
    before = (tmp_path / "rows.jsonl").read_bytes()
    for file in (tmp_path / "checkpoints" / "weighted-seed0" / "2").rglob("*"):
        if file.is_file() and "METADATA" not in file.name and file.name != "commit_success.txt":
            file.write_bytes(b"not what orbax wrote")
    again = subprocess.run([*command, "--resume"], **options)
    assert again.returncode == 2
    (said,) = again.stderr.splitlines()
    assert said.startswith("error: ")
    assert "no whole checkpoint" in said
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_rows_and_checkpoints_belong_together(tmp_path):
    straight = run(sharded(), AVERAGER, workdir=tmp_path, **OPTIONS)
    (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(wavg.ResumeError, match="lacks round 1"):
        run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    (tmp_path / "elsewhere").rename(tmp_path / "rows.jsonl")
    (tmp_path / "checkpoints").rename(tmp_path / "gone")
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(wavg.ResumeError, match="6 rounds but no whole checkpoint"):
        run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    shutil.copytree(tmp_path / "gone", tmp_path / "checkpoints", dirs_exist_ok=True)
    same(straight, run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS))


@pytest.mark.parametrize("folder", [True, False])
def test_a_run_killed_before_its_first_checkpoint_starts_over_and_says_so(folder, tmp_path):
    straight = run(sharded(), AVERAGER, workdir=tmp_path, **OPTIONS)
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    for recorded in (1, 3):  # the checkpoint of round 3 may have been under way
        (tmp_path / "rows.jsonl").write_bytes(b"".join(lines[: 1 + recorded]))
        shutil.rmtree(tmp_path / "checkpoints")
        if folder:
            (tmp_path / "checkpoints" / "run").mkdir(parents=True)
        with pytest.warns(wavg.WavgWarning, match=f"before its first checkpoint: {recorded} recorded rounds"):
            again = run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
        same(straight, again)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(lines[:5]))  # round 4 began when that of round 3 was on disk
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(wavg.ResumeError, match="rows of 4 rounds but no whole checkpoint"):
        run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    assert (tmp_path / "rows.jsonl").read_bytes() == b"".join(lines[:5])


def edited(workdir, edit):
    """Changes the rows of a folder by a function of their list."""
    file = workdir / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in edit(read_rows(workdir))))
    return file.read_bytes()


def without(number, name):
    return lambda rows: [{k: v for k, v in row.items() if i != number or k != name} for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        *(
            (without(0, name), f"first row lacks '{name}'")
            for name in ("replica_map", "settings", "data_crc", "faults")
        ),
        (without(2, "samples"), "a row of 'run' lacks 'samples'"),
        (without(2, "round"), "a row of 'run' lacks 'round'"),
        (lambda rows: rows[1:], "first row is missing"),
        (lambda rows: rows[:2] + rows[3:], "'run' lacks round 2;"),
        (
            lambda rows: [rows[0], *(row for row in rows[1:] for _ in range(2))],
            "round 1 to 6 twice.*keep one row of each",
        ),
        (lambda rows: [*rows[:4], *rows[1:]], "round 1 to 3 twice"),
    ],
)
def test_rows_that_do_not_fit_are_one_clear_line_and_nothing_is_touched(edit, says, tmp_path):
    run(sharded(), AVERAGER, workdir=tmp_path, **OPTIONS)
    before = edited(tmp_path, edit)
    with pytest.raises(wavg.ResumeError, match=says) as raised:
        run(sharded(), AVERAGER, workdir=tmp_path, resume=True, replica_map="auto", **OPTIONS)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_what_two_processes_wrote_is_mended_by_keeping_one_row_of_each(tmp_path):
    straight = run(sharded(), AVERAGER, workdir=tmp_path, **OPTIONS)
    edited(tmp_path, lambda rows: [rows[0], *(row for row in rows[1:] for _ in range(2))])
    with pytest.raises(wavg.ResumeError, match="keep one row of each"):
        run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    edited(tmp_path, lambda rows: [rows[0], *rows[1::2]])
    same(straight, run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS))


@pytest.mark.parametrize(
    "name", ["../../evil", "/evil", "a/b", "a\\b", "", " ", ".", "..", "a\0b", "a\nb", "C:evil", "x" * 201, "\udcff"]
)
def test_the_name_of_a_run_is_no_path(name, tmp_path):
    with pytest.raises(wavg.SettingsError, match="name is") as raised:
        run(sharded(), AVERAGER, workdir=tmp_path / "a" / "b", name=name, **OPTIONS)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["weighted-seed0", "run", "é 1.5 (noisy)", ".hidden", "x" * 200])
def test_other_names_are_fine(name, tmp_path):
    run(sharded(), AVERAGER, workdir=tmp_path, name=name, **(OPTIONS | {"rounds": 1}))
    assert (tmp_path / "checkpoints" / name / "1").exists()


@pytest.mark.parametrize("left", [b"", b'{"kind": "run", "run": "ru'])
def test_a_run_whose_first_row_was_cut_short_can_be_resumed(left, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(left)
    result = run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    assert result.rows[0]["kind"] == "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_ends_after_a_round_with_a_checkpoint(number, tmp_path):
    before = signal.getsignal(number)
    straight = run(sharded(), AVERAGER, **OPTIONS)

    def on_round(row):
        if row["round"] == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(wavg.Stopped, match="resume=True"):
        run(sharded(), AVERAGER, workdir=tmp_path, on_round=on_round, **(OPTIONS | {"checkpoint_every": 100}))
    stopped_after = len(read_rows(tmp_path)) - 1
    assert stopped_after in (2, 3)
    assert (tmp_path / "checkpoints" / "run" / str(stopped_after)).exists()
    same(straight, run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS))
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_in_the_last_round_lets_the_run_end_and_is_passed_on(number, tmp_path):
    def on_round(row):
        if row["round"] == 6:
            os.kill(os.getpid(), number)

    result = run(sharded(), AVERAGER, workdir=tmp_path, on_round=on_round, **OPTIONS)
    assert result.stopped
    assert len(result.rows) == 7
    again = run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    assert not again.stopped
    same(result, again)


@pytest.mark.slow
def test_sigterm_to_the_binary_leaves_a_checkpoint_and_exit_code_143(tmp_path):
    command = [*TRAIN, f"--workdir={tmp_path}", "--rounds=100000", "--local_steps=50"]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=HERE.parent, stderr=subprocess.PIPE)
    rows = tmp_path / "rows.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not rows.exists() or rows.read_bytes().count(b"\n") < 4):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr.decode()
    assert b"--resume" in stderr
    recorded = read_rows(tmp_path)
    assert (tmp_path / "checkpoints" / "weighted-seed0" / str(recorded[-1]["round"])).exists()
    more = recorded[-1]["round"] + 2
    command[-2:] = [f"--rounds={more}", "--local_steps=50", "--resume"]
    subprocess.run(command, env=ENVIRONMENT, cwd=HERE.parent, check=True, capture_output=True)
    assert [row["round"] for row in read_rows(tmp_path)[1:]] == list(range(1, more + 1))


def test_a_checkpoint_holds_everything_and_nothing_else(tmp_path):
    result = run(sharded(), AVERAGER, workdir=tmp_path, **OPTIONS)
    size = sum(np.asarray(x).nbytes for x in leaves(result))
    assert size < 4096  # 15 parameters, 4 replicas, momenta
    metadata = json.loads((tmp_path / "checkpoints" / "run" / "6" / "state" / "_METADATA").read_text())
    entries = {
        key: value
        for key, value in metadata["tree_metadata"].items()
        if value["value_metadata"]["value_type"] == "jax.Array"
    }
    names = {key.split("'")[1] for key in entries}
    assert names == {"params", "mutable", "replicas", "averager", "round"}
    assert len(jax.tree.leaves(result.state)) == len(entries)


def test_other_versions_are_named_and_the_run_goes_on(tmp_path):
    run(sharded(), AVERAGER, workdir=tmp_path, **OPTIONS | {"rounds": 3})
    first, *rest = read_rows(tmp_path)
    first["versions"]["jax"], first["versions"]["python"] = "0.1", "3.0"
    first["hardware"]["isa"] = "SSE1"
    (tmp_path / "rows.jsonl").write_bytes(as_lines([first, *rest]))
    with pytest.warns(
        wavg.WavgWarning, match=r"started with jax 0\.1, now .*; instructions SSE1, now .*: it goes on"
    ) as told:
        resumed = run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    assert "python" not in str(told[0].message)
    same(resumed, run(sharded(), AVERAGER, **OPTIONS))
