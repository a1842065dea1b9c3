"""The comparison with peers: what driver and workers say, workers that fail, and the arithmetic of turns."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from binary import invoke

from experiments.benchmarks import peers
from experiments.benchmarks.peer_workers import cases, environment, lines
from experiments.benchmarks.peer_workers.lines import Job, Worker, WorkerFailed

FAKE = """
import os, sys
from experiments.benchmarks.peer_workers.lines import ReadyJob, serve

turns = 0

def build(job):
    print("this is no answer")
    if sys.argv[1] == "raises":
        raise ValueError("no such | network\\nsecond line")

    def check():
        return {name: x + (2 if sys.argv[1] == "wrong" else 1) for name, x in job.read("start").items()}

    def run():
        global turns
        turns += 1
        if sys.argv[1] == "dies" and turns == 2:
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)

    return ReadyJob(check, run, {"batch": job.batch})

serve(build)
"""


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return lambda manner: (sys.executable, str(path), manner)


def tiny(folder, system=""):
    return Job(system, str(folder), "digits_mlp", 2, 2, 4, 0.01, 0.9)


def test_workers_that_fail_do_not_stop_the_others(fake, tmp_path):
    manners = {"ours": "good", "torch_loop": "good", "torch_vmap": "raises", "fedjax": "dies", "flax_loop": "wrong"}
    commands = {name: fake(manner) for name, manner in manners.items()}
    commands["torch_loader"] = WorkerFailed("pip install torch==2.13.0: no such thing")
    commands["flax_sync"] = fake("good")  # what it is like, our one model, is not there
    found = peers.measure(tiny(tmp_path), commands, 2)
    reasons = {name: one.reason for name, one in found.items()}
    assert reasons == {
        "ours": None,
        "torch_loop": None,
        "torch_vmap": "ValueError: no such / network",
        "fedjax": "ended: out of luck",
        "flax_loop": "does other work than ours: difference 1 after a round",
        "torch_loader": "pip install torch==2.13.0: no such thing",
        "flax_sync": "no first round of ours to compare with",
    }
    assert found["torch_loop"].difference == 0
    assert found["torch_loop"].notes == {"batch": 4}
    assert found["torch_loop"].seconds.shape == (2,)
    assert (found["torch_loop"].seconds > 0).all()
    table = peers.table(peers.rows(tiny(tmp_path), found))
    figures = {line[4]: line[-1] for line in table.lines}
    assert figures["FedJAX FedAvg"] == "not measured (ended: out of luck)"
    assert figures["wavg_jax, rounds"] == "1.00 (1.00 to 1.00)"


def test_ratios_are_of_times_within_a_turn():
    def found(*seconds):
        return peers.Found(None, 0.0, np.array(seconds), 0.0, {})

    job = tiny("nowhere")  # 16 samples a round
    ours, peer = peers.rows(job, {"ours": found(1.0, 2.0, 4.0), "torch_loop": found(2.0, 6.0, 16.0)})
    assert (ours["samples_per_second"], peer["samples_per_second"]) == (16 / 2, 16 / 6)
    assert peer["ratio"] == (3.0, 2.5, 3.5)  # of 2, 3 and 4
    assert ours["ratio"] == (1.0, 1.0, 1.0)


def test_nothing_is_a_ratio_to_what_was_not_measured():
    failed = peers.Found("no luck", None, np.array([np.nan]), 0.0, {})
    peer = peers.Found(None, 0.0, np.array([1.0]), 0.0, {})
    ours, other = peers.rows(tiny("nowhere"), {"ours": failed, "torch_loop": peer})
    assert ours["samples_per_second"] is other["ratio"] is None
    assert [line[-1] for line in peers.table([ours, other]).lines] == ["not measured (no luck)", "not measured"]


def test_what_children_use_between_turns_counts():
    def of_children():
        return lines._used() - time.process_time()

    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = of_children()
    with subprocess.Popen((sys.executable, "-c", work), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert of_children() - before > 0.2  # while it lives
        child.communicate(b"\n")
    assert of_children() - before > 0.2  # and afterwards


def test_the_table_says_versions_and_who_is_busiest_between_turns():
    def found(idle, **versions):
        return peers.Found(None, 0.0, np.array([1.0]), idle, {"versions": versions})

    rows = peers.rows(tiny("nowhere"), {"ours": found(0.01, jax="1.0"), "torch_loop": found(0.05, torch="2.0")})
    text = peers.table(rows).text
    assert "used at most 5% of a core (PyTorch loop). Versions: jax 1.0, torch 2.0." in text


def test_a_worker_closes_its_job_at_the_end(tmp_path):
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE.replace('{"batch": job.batch})', "{}, lambda: open(job.folder + '/closed', 'w').close())"))
    variables = os.environ | {"PYTHONPATH": str(peers.ROOT)}
    with Worker((sys.executable, str(fake), "good"), tmp_path / "log", variables) as worker:
        worker.ask("job", **tiny(tmp_path)._asdict())
        assert not (tmp_path / "closed").exists()
    assert (tmp_path / "closed").exists()


def test_a_worker_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "PATIENCE", 0.2)
    with Worker((sys.executable, "-c", "import time; time.sleep(60)"), tmp_path / "log", {}) as worker:
        with pytest.raises(WorkerFailed, match="no answer"):
            worker.ask("go")
        assert worker.process.wait() < 0


def test_what_cannot_be_installed_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "none" / "bin").mkdir(parents=True)
    (tmp_path / "none" / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(WorkerFailed, match=r"^pip install no-such-thing==1.0: "):
        environment.python(tmp_path, environment.Environment("none", ("no-such-thing==1.0",)))


def test_every_system_of_one_environment_names_the_same_requirements():
    environments = {system.requires for system in peers.SYSTEMS.values() if system.requires is not None}
    assert len({one.name for one in environments}) == len(environments)
    assert all("==" in requirement or "@" in requirement for one in environments for requirement in one.requirements)


@pytest.mark.parametrize("given", ["mlp", "mlp:0", "mlp:2,mlp:3", "gpt:5", ""])
def test_bad_networks_are_refused(given, tmp_path):
    assert invoke(peers.main, f"--peer_networks={given}", f"--workdir={tmp_path / 'new'}") == 2
    assert not (tmp_path / "new").exists()


def test_the_difference_is_relative_to_how_far_a_round_moved():
    start = {"params/a": np.zeros(3), "params/b": np.zeros(1), "stats/c": np.zeros(2)}
    other = {"params/a": np.full(3, 1.0), "params/b": np.array([1.0])}
    one = {"params/a": np.array([1.0, 1.0, 1.0]), "params/b": np.array([1.5])}
    assert cases.difference(one, other, start) == 0.25  # 0.5 / sqrt(4)


@pytest.mark.slow
def test_ours_and_flax_do_the_same_work(tmp_path):
    names = ("ours", "ours_one_model", "flax_loop", "flax_sync")
    commands = peers.commands({name: peers.SYSTEMS[name] for name in names}, tmp_path)
    found = peers.measure(tiny(tmp_path), commands, 1)
    assert {name: one.reason for name, one in found.items()} == dict.fromkeys(names)
    assert max(one.difference for one in found.values()) < 1e-3
