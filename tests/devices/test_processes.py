"""Processes start, speak to one another, and end together; each test runs real ones over loopback."""

import signal
import types

import numpy as np
import pytest

import wavg_jax as wavg
from tests.spawn import joined, spawn
from wavg_jax.devices import processes
from wavg_jax.devices.sockets import free_port


def ended(done, *codes):
    """Checks exit codes, and that who ended because of another one said why in one line; returns what they said."""
    assert tuple(process.returncode for process in done) == codes, [process.stderr for process in done]
    for process in done:
        if process.returncode in (0, processes.EXIT_CODE):
            assert process.stderr.count("\n") == (process.returncode == processes.EXIT_CODE), process.stderr
    return [process.stderr.strip() for process in done]


VALUES = """
import numpy as np
floats = np.array([-0.0, np.nan, 1 / 3])
tree = {"i64": np.int64(2**40 + INDEX), "f64": np.roll(floats, INDEX), "text": str(INDEX), "none": None}
got = processes.broadcast(tree)
assert got["i64"] == 2**40 and got["text"] == "0" and got["none"] is None
assert got["f64"].tobytes() == floats.tobytes()
for mine in (np.float64(INDEX / 3), np.arange(6, dtype=np.int16).reshape(2, 3) + INDEX, jax.numpy.ones(2) * INDEX):
    rows = processes.gather(mine)
    assert rows.shape == (P, *mine.shape) and rows.dtype == mine.dtype
    assert rows[INDEX].tobytes() == np.asarray(mine).tobytes()
assert processes.gather(np.int64(INDEX)).tolist() == list(range(P))
assert processes.broadcast(b"") == b""
processes.barrier("here")
assert (processes.count(), processes.index(), processes.first()) == (P, INDEX, INDEX == 0)
def decide():
    assert INDEX == 0
    return "decided"
assert processes.decided(decide) == "decided"
from wavg_jax.base import WorkdirError
def refuse():
    raise WorkdirError("no room", "/there")
try:
    processes.decided(refuse)
except WorkdirError as error:
    print(f"{error} {error.filename}")
"""


def test_values_reach_every_process_bit_for_bit_and_all_end_without_a_word():
    done = spawn(2, joined(VALUES), devices=2)
    assert ended(done, 0, 0) == ["", ""]
    assert [process.stdout for process in done] == ["no room /there\n"] * 2


def test_one_process_is_itself():
    assert (processes.count(), processes.index(), processes.first()) == (1, 0, True)
    value = {"a": np.float32(1)}
    assert processes.broadcast(value) is value
    np.testing.assert_array_equal(processes.gather(np.arange(3)), [[0, 1, 2]])
    processes.barrier("here")
    assert processes.decided(lambda: 7) == 7
    processes.initialize()
    processes.initialize("localhost:1", 1, 0)
    with pytest.raises(KeyError), processes.guarded():
        raise KeyError


LOOP = """
import time
import numpy as np
with processes.guarded():
    for step in range(10**6):
        if INDEX == int(ARGUMENTS[0]) and step == 5:
            {act}
        processes.gather(np.arange(3))
"""


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_other_with_one_line(victim):
    script = joined(LOOP.format(act=f"os.kill(os.getpid(), {signal.SIGKILL:d})"))
    codes = [processes.EXIT_CODE] * 2
    codes[victim] = -signal.SIGKILL
    said = ended(spawn(2, script, victim), *codes)
    assert said[1 - victim].startswith(f"process {victim} of 2 (on ")
    assert "is gone" in said[1 - victim]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_frozen_process_ends_the_other_with_one_line(victim):
    # It is killed once the other one has ended.
    freeze = f"""
            os.system(f"(sleep 6; kill -9 {{os.getpid()}}) &")
            os.kill(os.getpid(), {signal.SIGSTOP:d})"""
    codes = [processes.EXIT_CODE] * 2
    codes[victim] = -signal.SIGKILL
    said = ended(spawn(2, joined(LOOP.format(act=freeze), heartbeat=2), victim), *codes)
    assert "has been silent for 2 seconds" in said[1 - victim]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_fails_raises_its_own_error_and_ends_the_other(victim):
    done = spawn(2, joined(LOOP.format(act='raise RuntimeError("out of luck\\nmore")')), victim)
    codes = [processes.EXIT_CODE] * 2
    codes[victim] = 1
    said = ended(done, *codes)
    assert said[victim].endswith("RuntimeError: out of luck\nmore")
    assert f"process {victim} of 2 (on " in said[1 - victim]
    assert "failed: RuntimeError: out of luck; this one" in said[1 - victim]


def test_only_what_xla_says_of_a_lost_connection_waits_for_a_death(monkeypatch):
    said = []
    watch = types.SimpleNamespace(announce=said.append, wait_for_death=lambda: said.append("waited"))
    monkeypatch.setattr(processes, "_watch", watch)
    for error in (ValueError("Connection closed"), ValueError("UNKNOWN: Gloo AllGather failed: [x/pair.cc:538]")):
        processes._announce(error)
    assert [line.split(":")[0] for line in said] == ["ValueError", "waited", "ValueError"]


@pytest.mark.slow
def test_an_error_outside_the_guard_ends_the_other_too():
    done = spawn(2, joined("if INDEX == 1:\n    raise KeyError('x')\nprocesses.barrier('b')"))
    said = ended(done, processes.EXIT_CODE, 1)
    assert "failed: KeyError: 'x'" in said[0]


GOES = """
from wavg_jax.devices import watch
watch.MISSED = 2
if INDEX == 1:
    {act}
else:
    processes.barrier("b")
"""


@pytest.mark.parametrize(
    ("act", "code", "says"),
    [
        ("sys.exit(7)", 7, "failed: sys.exit(7); this one"),
        pytest.param("raise SystemExit(7)", 7, "has ended, for which this one", marks=pytest.mark.slow),
        ("pass", 0, "has ended, for which this one"),
    ],
)
def test_a_process_that_goes_ends_the_one_that_waits_for_it(act, code, says):
    said = ended(spawn(2, joined(GOES.format(act=act))), processes.EXIT_CODE, code)
    assert "process 1 of 2 (on " in said[0]
    assert says in said[0]


@pytest.mark.slow
def test_an_exit_that_is_caught_is_no_failure():
    caught = """
import time
try:
    sys.exit(7 * INDEX)
except SystemExit:
    pass
processes.barrier("b")
time.sleep(6 * (1 - INDEX))  # longer than the others would wait after a failure
"""
    assert ended(spawn(2, joined(caught)), 0, 0) == ["", ""]


@pytest.mark.slow
def test_a_process_that_waits_in_a_program_of_its_own_says_where_it_stands():
    script = GOES.format(act="watch.LAST = 5").replace("processes.barrier", "wait")
    wait = "import threading\ndef wait(_):\n    threading.Event().wait()\n"
    done = spawn(2, joined(wait + script))
    assert done[0].returncode == processes.EXIT_CODE
    assert "has ended; this one, process 0, has been at " in done[0].stderr
    assert "it ended 5 seconds ago, before the others" in done[0].stderr


@pytest.mark.slow
def test_what_comes_to_all_processes_ends_no_other_one():
    script = """
import time
from wavg_jax.base import Stopped
time.sleep(7 * INDEX)  # longer than the others would wait after a failure
with processes.guarded():
    raise Stopped("stopped")
"""
    done = spawn(2, joined(script))
    assert [process.returncode for process in done] == [1, 1]
    assert all(process.stderr.endswith("Stopped: stopped\n") for process in done)


@pytest.mark.parametrize(
    ("broken", "says"),
    [("psum", "a sum over 2 dev"), pytest.param("all_gather", "a gather over 2 dev", marks=pytest.mark.slow)],
)
def test_collectives_that_return_wrong_values_are_found_at_the_start(broken, says):
    script = f"import jax\njax.lax.{broken} = lambda x, *_, **__: x * 0\n" + joined("")
    done = spawn(2, script)
    assert [process.returncode for process in done] == [1, 1]
    assert all(f"WavgError: {says}" in process.stderr for process in done)


def test_sigterm_ends_a_process_and_with_it_the_other():
    script = joined(LOOP.format(act=f"os.kill(os.getpid(), {signal.SIGTERM:d})"))
    said = ended(spawn(2, script, 1), processes.EXIT_CODE, -signal.SIGTERM)
    assert "process 1 of 2" in said[0]


def test_processes_that_all_fail_raise_their_own_errors():
    done = spawn(2, joined("with processes.guarded():\n    raise SystemExit(7 + INDEX)"))
    assert ended(done, 7, 8) == ["", ""]


def test_a_process_that_ends_earlier_waits_for_the_other_without_a_word():
    done = spawn(2, joined("import time\nif INDEX == int(ARGUMENTS[0]):\n    time.sleep(3)\nprint('done')"), 0)
    assert ended(done, 0, 0) == ["", ""]
    assert [process.stdout for process in done] == ["done\n"] * 2


@pytest.mark.slow
def test_processes_that_were_suspended_together_go_on():
    pause = """
processes.barrier("before")
os.system(f"(sleep 5; kill -CONT {os.getpid()}) &")
os.kill(os.getpid(), 19)
processes.barrier("after")
"""
    assert ended(spawn(2, joined(pause, heartbeat=2)), 0, 0) == ["", ""]


START = """
import sys, warnings
warnings.simplefilter("error")
from wavg_jax.devices import processes
from wavg_jax.base import SettingsError
address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
    processes.initialize(address, {count}, {index}, timeout={timeout})
except SettingsError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("started", "count", "index", "wrong"),
    [
        (2, "2 + index", "index", "process 1 was given num_processes=3, process 0 num_processes=2"),
        (2, 3, "index", "waited 3 seconds for process 2 of 3"),
        (3, 3, "min(index, 1)", "two processes were given process_id=1"),
    ],
)
def test_processes_that_were_told_what_does_not_fit_together_all_refuse(started, count, index, wrong):
    done = spawn(started, START.format(count=count, index=index, timeout=3 if "waited" in wrong else 30))
    assert ended(done, *[0] * started) == [""] * started
    assert all(wrong in process.stdout for process in done)


@pytest.mark.parametrize("address", [None, "nowhere.invalid:1234"])
def test_a_coordinator_that_is_not_there_is_named(address):
    script = START.format(count=2, index=1, timeout=3).replace(
        "sys.argv[1]", "sys.argv[1]" if address is None else repr(address)
    )
    (done,) = spawn(1, script)
    assert ended([done], 0) == [""]
    named = address or done.args[3]
    assert f"waited 3 seconds for process 0 at coordinator_address='{named}', which does not answer" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({"coordinator_address": "a:1"}, "need num_processes= and process_id= beside coordinator_address="),
        ({"coordinator_address": "a:1", "num_processes": 2}, "need process_id= beside"),
        ({"num_processes": 2}, "need coordinator_address= and process_id= beside num_processes="),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, "coordinator_address is 'a'; it must be"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "process_id=2 with num_processes=2"),
        ({"coordinator_address": "a:1", "num_processes": 0, "process_id": 0}, "num_processes is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"heartbeat": 0.1}, "heartbeat is 0.1"),
    ],
)
def test_arguments_that_cannot_work_are_named(arguments, wrong):
    with pytest.raises(wavg.SettingsError, match=wrong):
        processes.initialize(**arguments)


def test_devices_that_are_already_made_are_refused():
    np.asarray(wavg.devices.machine.hardware()["count"])
    with pytest.raises(wavg.SettingsError, match="JAX has made its devices already"):
        processes.initialize("127.0.0.1:1", 2, 1)


FOUND = "from wavg_jax.devices import processes; processes.initialize(); print(processes.index(), processes.count())"


@pytest.mark.parametrize("cluster", ["slurm", pytest.param("open mpi", marks=pytest.mark.slow)])
def test_a_cluster_needs_no_arguments(cluster):
    each = "import os, sys\n"
    if cluster == "slurm":
        shared = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        each += "os.environ.update(SLURM_PROCID=sys.argv[3], SLURM_LOCALID=sys.argv[3])\n"
    else:
        shared = {"OMPI_MCA_orte_hnp_uri": f"{free_port() << 12}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
        each += "os.environ.update(OMPI_COMM_WORLD_RANK=sys.argv[3], OMPI_COMM_WORLD_LOCAL_RANK=sys.argv[3])\n"
    done = spawn(2, each + FOUND, environment=shared)
    assert ended(done, 0, 0) == ["", ""]
    assert [process.stdout for process in done] == ["0 2\n", "1 2\n"]


def test_a_pod_by_itself_is_one_process(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    processes.initialize()
    assert processes.count() == 1
