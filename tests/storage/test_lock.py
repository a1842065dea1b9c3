"""One process at a time writes a folder, and a dead one holds nothing."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import filelock
import pytest
from binary import invoke
from runs import AVERAGER, ENVIRONMENT, OPTIONS, run, same
from small import sharded

import wavg_jax as wavg
from experiments import reductions, scenarios, train
from wavg_jax.storage import lock
from wavg_jax.storage.rows import read_rows
from wavg_jax.training import fit as trainer

QUICK = ("--rounds=2", "--replicas=2", "--local_steps=2", "--hidden=8", "--devices=1", "--seeds=0")

HOLDER = """
    import pathlib, sys
    from wavg_jax.storage import lock

    with lock.hold(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""
RUNNER = """
    import pathlib, sys
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    from runs import AVERAGER, OPTIONS, run
    from small import sharded

    def on_round(row):
        if row["round"] == 5:
            print("held", flush=True)
            sys.stdin.read()

    run(sharded(), AVERAGER, workdir=pathlib.Path(sys.argv[1]), resume=True, on_round=on_round, **OPTIONS)
"""


@pytest.fixture
def start():
    """Starts a process that holds a folder, and waits until it does; kills it in the end."""
    started = []

    def start(script, folder):
        command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_use_is_refused_before_anything_is_compiled_or_written(resume, tmp_path, start, monkeypatch):
    monkeypatch.setattr(trainer, "Run", pytest.fail)  # compiles
    holder = start(HOLDER, tmp_path)
    before = content(tmp_path)
    with pytest.raises(wavg.WorkdirError, match=f"in use by process {holder.pid} on ") as raised:
        run(sharded(), AVERAGER, workdir=tmp_path, resume=resume, batch_size=7)
    assert "\n" not in str(raised.value)
    assert content(tmp_path) == before


def test_two_processes_that_resume_one_run_do_its_rounds_once(tmp_path, start):
    run(sharded(), AVERAGER, workdir=tmp_path, **(OPTIONS | {"rounds": 4}))
    other = start(RUNNER, tmp_path)
    with pytest.raises(wavg.WorkdirError, match=f"process {other.pid}"):
        run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    other.send_signal(signal.SIGKILL)
    assert other.wait() == -signal.SIGKILL
    again = run(sharded(), AVERAGER, workdir=tmp_path, resume=True, **OPTIONS)
    assert [row.get("round") for row in read_rows(tmp_path)] == [None, 1, 2, 3, 4, 5, 6]
    same(again, run(sharded(), AVERAGER, **OPTIONS))


def test_a_killed_process_holds_nothing_and_an_ended_one_leaves_nothing(tmp_path, start):
    holder = start(HOLDER, tmp_path)
    with pytest.raises(wavg.WorkdirError), lock.hold(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock.check_free(tmp_path)
    with lock.hold(tmp_path), pytest.raises(wavg.WorkdirError, match=str(os.getpid())):
        lock.check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_two_threads_one_is_refused(tmp_path):
    said = []

    def other():
        try:
            with lock.hold(tmp_path):
                said.append("held")
        except wavg.WorkdirError as error:
            said.append(str(error))

    with lock.hold(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other()
    assert "in use" in said[0]
    assert said[1:] == ["held"]


def test_who_only_looks_whether_a_folder_is_free_turns_nobody_away(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_LOOK", 30.0)  # however slow the machine is
    looking = filelock.FileLock(tmp_path / lock.FILE, thread_local=False)
    looking.acquire()
    threading.Timer(0.1, looking.release).start()
    with lock.hold(tmp_path):
        assert not looking.is_locked
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / lock.FILE, thread_local=False).acquire(blocking=False)


def test_runs_one_after_another_share_a_folder_and_readers_need_no_lock(tmp_path):
    seen = []
    for name in ("a", "b"):
        run(
            *(sharded(), AVERAGER),
            **(OPTIONS | {"rounds": 1, "workdir": tmp_path, "name": name}),
            on_round=lambda row: seen.append(len(read_rows(tmp_path))),
        )
    assert seen == [2, 4]


@pytest.mark.parametrize(
    ("binary", "arguments"),
    [
        (train, (*QUICK[:-1],)),
        (scenarios, (*QUICK, "--scenarios=iid", "--weightings=plain")),
        (reductions, ("--replicas=2", "--steps=2", "--total_steps=2", "--hidden=8", "--devices=1", "--seeds=0")),
    ],
    ids=["train", "scenarios", "reductions"],
)
@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["new", "resumed"])
def test_the_binaries_refuse_a_folder_in_use_with_exit_code_2(binary, arguments, resume, tmp_path, capfd):
    with lock.hold(tmp_path):
        before = content(tmp_path)
        assert invoke(binary.main, *arguments, *resume, f"--workdir={tmp_path}") == 2
        (said,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
        assert f"{tmp_path} is in use by process {os.getpid()}" in said
        assert content(tmp_path) == before


def test_a_matrix_holds_its_folder_while_its_cells_are_trained(tmp_path, monkeypatch):
    def fill(*_):
        with pytest.raises(wavg.WorkdirError, match="in use"):
            lock.check_free(tmp_path)
        raise wavg.Stopped("seen")

    monkeypatch.setattr("experiments.setup.record_matrix.fill", fill)
    assert invoke(scenarios.main, *QUICK, "--scenarios=iid", "--weightings=plain", f"--workdir={tmp_path}") == 143
    assert [row["kind"] for row in read_rows(tmp_path)] == ["matrix"]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/run")):
        with pytest.raises(wavg.WorkdirError, match="cannot be used") as raised, lock.hold(folder):
            pass
        assert "\n" not in str(raised.value)
        assert raised.value.errno
        assert raised.value.filename == str(folder)
