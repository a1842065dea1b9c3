"""Several processes as one: prefixes, logs, exit codes, signals, and that none is left behind."""

import signal
import subprocess
import sys
import time

import pytest
import terminal
from binary import invoke

from experiments import launch as binary
from experiments.setup import processes
from experiments.setup.processes import Command, launch
from wavg_jax.base import WavgError

WAITS = "import time; time.sleep(60)"
TIDY = """
import signal, sys, time
def end(number, frame):
    print(f"told {number}\\n", end="", flush=True)
    sys.exit(7)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
print("ready\\n", end="", flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: print(f"told {number}\\n", end="", flush=True))
print("ready\\n", end="", flush=True)
while True:
    time.sleep(60)
"""


def code(text, **variables):
    return Command((sys.executable, "-c", text), variables)


def script(path, text):
    path.write_text(text)
    return str(path)


def runs(pid):
    """Whether a process runs; a zombie does not."""
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(said) and not said.startswith("Z")


def ends(pid):
    """Whether a process ends within 5 seconds."""
    return any(not runs(pid) or time.sleep(0.1) for _ in range(50))


def test_lines_of_all_but_process_0_have_a_prefix_and_none_is_lost(capfd):
    text = "import sys; print('a'); print('b', end=''); print('c\\nd', file=sys.stderr)"
    assert launch([code(text)] * 3).code == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[1] a", "[1] b", "[2] a", "[2] b", "a", "b"]
    assert sorted(err.splitlines()) == ["[1] c", "[1] d", "[2] c", "[2] d", "c", "d"]


def test_a_long_output_arrives_whole(capfd):
    text = "print('\\n'.join(str(number) for number in range(50_000)))"
    assert launch([code("pass"), code(text)]).code == 0
    assert capfd.readouterr().out == "".join(f"[1] {number}\n" for number in range(50_000))


def test_logs_hold_what_each_process_wrote_shown_or_not(tmp_path, capfd):
    both = [code(f"import sys; print({name!r}); sys.stderr.write('e')") for name in "xy"]
    for show in (True, False):
        folder = tmp_path / str(show) / "new"
        assert launch(both, log_dir=folder, show=show).code == 0
        for number, name in enumerate("xy"):
            assert sorted((folder / f"process-{number}.log").read_text()) == sorted(f"{name}\ne")
        assert "".join(sorted("".join(capfd.readouterr()))) == ("".join(sorted("x\n[1] y\ne\n[1] e\n")) if show else "")


def test_the_first_failure_ends_the_others_and_gives_the_exit_code(tmp_path, capfd):
    log = tmp_path / "process-1.log"
    fails = code(f"import time\nwhile not open({str(log)!r}).read(): time.sleep(0.01)\nexit(3)")
    assert launch([code("pass"), code(TIDY), fails], log_dir=tmp_path).code == 3
    out, err = capfd.readouterr()
    assert out == "[1] ready\n[1] told 15\n"
    assert err == "error: process 2 ended with exit code 3; ending the others\n"


def test_who_ignores_sigterm_is_killed_after_the_grace_and_its_children_too(tmp_path):
    child = tmp_path / "child"
    parent = f"""
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
{
        STUBBORN.replace(
            "while",
            f'''
new = pathlib.Path({str(child)!r} + ".new")
new.write_text(str(child.pid))
new.rename({str(child)!r})
while''',
        )
    }
"""
    fails = f"import os, time\nwhile not os.path.exists({str(child)!r}): time.sleep(0.01)\nos.kill(os.getpid(), 11)"
    assert launch([code(parent), code(fails)], grace=0.2, show=False).code == 128 + signal.SIGSEGV
    assert ends(int(child.read_text()))


def test_a_program_that_cannot_start_ends_those_that_did(monkeypatch):
    started, popen = [], subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    with pytest.raises(WavgError, match=r"cannot start process 1: .*no/such"):
        launch([code(WAITS), Command(("no/such",))])
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2  # and who guards it


def start_launcher(tmp_path, text, *flags):
    """A launcher of two processes in a process of its own, once both are ready."""
    path = script(tmp_path / "work.py", text)
    command = [sys.executable, "-m", "experiments.launch", "--processes=2", f"--log_dir={tmp_path}", *flags, "--", path]
    launcher = subprocess.Popen(
        command, cwd=terminal.ROOT, env=terminal.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert sorted(launcher.stdout.readline() for _ in range(2)) == ["[1] ready\n", "ready\n"]
    return launcher


@pytest.mark.parametrize("text", [TIDY, pytest.param(STUBBORN + "#", id="stubborn")])
def test_a_launcher_that_is_killed_leaves_no_process_behind(text, tmp_path):
    launcher = start_launcher(tmp_path, "import os; open(f'{__file__}-{os.getpid()}', 'w');" + text, "--grace=0.5")
    pids = [int(path.name.rpartition("-")[2]) for path in tmp_path.glob("work.py-*")]
    launcher.kill()
    assert len(pids) == 2
    assert all(ends(pid) for pid in pids)
    launcher.communicate()


def test_who_stopped_in_order_takes_the_others_along(capfd):
    stops = f"exit({processes.STOPPED})"
    assert launch([code(stops), code("import time; time.sleep(0.5); print('saved'); " + stops)]).code == 143
    assert capfd.readouterr() == ("[1] saved\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_forwarded_to_all_once(number, tmp_path):
    launcher = start_launcher(tmp_path, TIDY)
    launcher.send_signal(number)
    out, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 7
    assert sorted(out.splitlines()) == [f"[1] told {number:d}", f"told {number:d}"]
    assert err == ""


def test_a_second_signal_kills(tmp_path):
    launcher = start_launcher(tmp_path, STUBBORN + "#", "--grace=60")
    launcher.send_signal(signal.SIGTERM)
    assert sorted(launcher.stdout.readline() for _ in range(2)) == ["[1] told 15\n", "told 15\n"]
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 143


def test_a_command_names_the_flag_that_lets_it_wait_longer():
    command = [sys.executable, "-m", "experiments.train", f"--coordinator_address=127.0.0.1:{processes.free_port()}"]
    command += ["--num_processes=2", "--process_id=1", "--start_timeout=1"]
    done = subprocess.run(command, cwd=terminal.ROOT, env=terminal.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "process 1 waited 1 seconds for process 0" in done.stderr
    assert "or wait longer (--start_timeout)" in done.stderr


@pytest.mark.parametrize("logged", [False, True])
def test_process_0_sees_the_terminal(logged, tmp_path):
    sees = "import os; print(os.get_terminal_size().columns, os.isatty(1), os.isatty(2))"
    path = script(tmp_path / "work.py", sees + TIDY)
    flags = ("--processes=1", f"--log_dir={tmp_path if logged else ''}")
    exit_code, shown = terminal.run("experiments.launch", *flags, "--", path, interrupt_at=["ready"])
    assert exit_code == 7
    assert shown.replace("starting", "").split() == ["80", "True", "True", "ready", "told", "2"]
    assert (tmp_path / "process-0.log").exists() == logged


def test_a_watch_ends_the_processes_with_a_signal_of_its_choice(tmp_path):
    def watch():
        logs = [tmp_path / f"process-{number}.log" for number in range(2)]
        return number if all(log.exists() and "ready\n" in log.read_text() for log in logs) else None

    number = signal.SIGTERM
    assert launch([code(TIDY)] * 2, log_dir=tmp_path, show=False, watch=watch) == (7, None)
    assert [(tmp_path / f"process-{i}.log").read_text() for i in range(2)] == ["ready\ntold 15\n"] * 2
    number = signal.SIGKILL
    assert launch([code(STUBBORN)] * 2, log_dir=tmp_path, show=False, watch=watch) == (128 + 9, None)


def test_processes_are_told_where_to_meet_and_have_a_share_of_the_cores(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false")
    monkeypatch.setattr(processes.machine, "cores", lambda: 7)
    every = binary.commands(["-m", "some.module", "--x=1"], 3, "127.0.0.1:99")
    assert [one.arguments[1:] for one in every] == [
        ("-m", "some.module", "--x=1", "--coordinator_address=127.0.0.1:99", "--num_processes=3", f"--process_id={i}")
        for i in range(3)
    ]
    shares = {"NPROC": "2", "JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    assert all(one.variables == shares for one in every)
    assert processes.share(8)["NPROC"] == "1"


def test_the_port_is_free():
    with processes.socket.socket() as server:
        server.bind(("127.0.0.1", processes.free_port()))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing to run; give it after --"),
        (("--",), "nothing to run; give it after --"),
        (("--processes=0", "--", "x.py"), "--processes=0"),
        (("--rounds=3", "--", "x.py"), "--rounds has no effect"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, says, capfd):
    assert invoke(binary.main, *arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_the_help_after_the_dashes_is_the_other_binarys(capfd):
    assert invoke(binary.main, "--processes=1", "--", "-c", "import sys; print(sys.argv[1])", "--help") == 0
    assert capfd.readouterr().out == "--help\n"
