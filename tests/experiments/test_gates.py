"""The gate that holds replicas between rounds, with threads in the place of their processes."""

import contextlib
import tempfile
import threading

import pytest

from experiments.benchmarks.peer_workers import gates
from experiments.benchmarks.peer_workers.gates import Entrance, Gate
from experiments.benchmarks.peer_workers.lines import Job

JOB = Job("", "", "digits_mlp", 3, 2, 4, 0.01, 0.9)


@pytest.fixture
def opened():
    with contextlib.ExitStack() as stack:
        yield lambda job: stack.enter_context(contextlib.closing(Gate(job)))


@pytest.fixture
def job():
    # Addresses of sockets must be short, and pytest's folders are not.
    with tempfile.TemporaryDirectory() as folder:
        yield JOB._replace(folder=folder)


def test_replicas_wait_for_each_round_and_one_says_what_it_came_to(job, opened):
    gate, trained = opened(job), []

    def replica(k):
        entrance = Entrance(gate.address)
        for number in range(2):
            entrance.wait()
            trained.append(number)
            entrance.done({"params/a": number} if k == 1 else None)

    threads = [threading.Thread(target=replica, args=(k,)) for k in range(job.replicas)]
    for thread in threads:
        thread.start()
    gate.admit(lambda: None)
    assert trained == []  # all are there, and none has begun
    assert gate.round() == {"params/a": 0}
    assert trained == [0, 0, 0]
    assert gate.round() == {"params/a": 1}
    assert trained == [0, 0, 0, 1, 1, 1]
    for thread in threads:
        thread.join()
    with pytest.raises((EOFError, OSError)):  # they have gone
        gate.round()


def test_a_gate_says_why_no_replica_comes(job, opened):
    with pytest.raises(RuntimeError, match="no luck"):
        opened(job).admit(lambda: "no luck")


def test_more_processes_than_fit_are_refused(job, monkeypatch):
    monkeypatch.setattr(gates, "_free", lambda: 0.5e9)
    with pytest.raises(MemoryError, match=r"needs 3 processes of about 0.25 GB each, and 0.5 GB are free"):
        Gate(job)
