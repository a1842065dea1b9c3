"""What happens to the driver itself: it is killed, its store is full, its cluster has an address."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from breaking import wait_for
from drive import descendants
from runs import ENVIRONMENT, INNER, TASK, WEIGHTED
from small import sharded

import wavg_jax as wavg
from wavg_jax.storage.rows import read_rows

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.slow


def drive(what, workdir, **environment):
    command = [sys.executable, HERE / "drive.py", what, workdir]
    return subprocess.run(
        command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300, cwd=HERE.parent
    )


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_driver_leaves_nobody_behind_and_resumes(tmp_path):
    workdir = tmp_path / "run"
    assert drive("killed", workdir).returncode == -signal.SIGKILL
    end = time.monotonic() + 60
    while not all(gone(int(pid)) for pid in workdir.with_suffix(".pids").read_text().split()):
        assert time.monotonic() < end, "workers outlive their driver"
        time.sleep(0.1)
    done = drive("resumed", workdir)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    rows = read_rows(workdir)
    alone = wavg.fit(
        TASK,
        sharded(4),
        WEIGHTED,
        inner=INNER,
        local_steps=4,
        rounds=6,
        batch_size=8,
        progress=False,
        layout=wavg.Layout(1, "map"),
    )
    assert [row["round"] for row in rows[1:]] == list(range(1, 7))
    assert [row["samples"] for row in rows[1:]] == [row["samples"] for row in alone.rows[1:]]
    with np.load(workdir.with_suffix(".npz")) as params:
        for name, x in alone.params.items():
            np.testing.assert_allclose(params[name], x, rtol=1e-4, atol=1e-5)


def test_a_full_object_store_is_waited_for(tmp_path):
    done = drive("full", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "tries 1 missing [{}, {}, {}, {}]" in done.stdout


def test_a_cluster_of_this_machine_listens_on_loopback_alone(tmp_path):
    done = drive("listening", tmp_path, RAY_ADDRESS="127.0.0.1:1")  # of another cluster, which is none of ours
    assert done.returncode == 0, done.stderr
    addresses = set(done.stdout.split())
    assert addresses
    assert all(address.endswith("0100007F") for address in addresses), addresses


@pytest.fixture
def short_path():
    """A folder whose name leaves room for the sockets of Ray."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.fixture
def address(short_path):
    """The address of a cluster that asks for the token of `TOKEN`. Not `ray stop`, which ends all clusters here."""
    ray = str(pathlib.Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--head", "--block", "--port=0", "--num-cpus=4", f"--temp-dir={short_path}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    started = subprocess.Popen(start, env=ENVIRONMENT | TOKEN, **quiet)
    try:
        yield wait_for(pathlib.Path(short_path, "ray_current_cluster"))
    finally:
        for pid in [*descendants(started.pid), started.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        started.wait()


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}


def test_a_cluster_with_an_address_asks_for_a_token(address, tmp_path):
    command = [sys.executable, "-m", "experiments.elastic", f"--address={address}", "--workers=2", "--rounds=2"]
    run = {"capture_output": True, "text": True, "timeout": 300, "cwd": HERE.parents[1]}
    wrong = ENVIRONMENT | TOKEN | {"RAY_AUTH_TOKEN": "2" * 64}
    refused = subprocess.run([*command, f"--workdir={tmp_path / 'a'}"], env=wrong, **run)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: --address="), refused.stderr  # after lines of Ray's own
    taken = subprocess.run([*command, f"--workdir={tmp_path / 'b'}"], env=ENVIRONMENT | TOKEN, **run)
    assert taken.returncode == 0, taken.stderr
    assert (tmp_path / "b" / "plots" / "workers.png").exists()
