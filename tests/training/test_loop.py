"""Rounds that overlap with the host's work give what rounds one after another give, and so do streamed data."""

import itertools
import threading

import jax
import numpy as np
import optax
import pytest
from runs import train
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax.devices import machine, memory
from wavg_jax.rounds import policy
from wavg_jax.storage import checkpoints
from wavg_jax.storage.rows import Records
from wavg_jax.training import batches, footprint, loop, schedule

TASK, INNER, WEIGHTED = regression(), optax.sgd(0.1, momentum=0.9), wavg.averager(wavg.softmax("loss", 1.0))
CLOCKS = ("seconds", "elapsed", "compile_seconds", "started", "memory", "peak_memory")


def run(**options):
    options = {"inner": INNER, "local_steps": 3, "rounds": 5, "batch_size": 8} | options
    return train(TASK, sharded(), WEIGHTED, **options)


def without(row, *names):
    return {name: value for name, value in row.items() if name not in (*names, *CLOCKS)}


def same(a, b, *but):
    states = [r.state._replace(replicas=r.state.replicas._replace(rng=None)) for r in (a, b)]  # keys are no arrays
    jax.tree.map(np.testing.assert_array_equal, *states)
    for one, two in zip(a.rows, b.rows, strict=True):
        np.testing.assert_equal(without(one, *but), without(two, *but))


@pytest.mark.optimized
def test_rows_that_are_written_one_round_late_are_the_same():
    tested = [f"test_{name}" for name in ("accuracy", "loss", "macro_f1", "ece")]
    every, last = run(), run(test_every=5)
    same(every, last, *tested)
    assert [row["round"] for row in last.rows[1:]] == [1, 2, 3, 4, 5]
    assert last.rows[-1]["test_accuracy"] == every.rows[-1]["test_accuracy"]
    for result in (every, last):
        assert result.rows[-1]["elapsed"] == pytest.approx(sum(row["seconds"] for row in result.rows[1:]))


def test_the_next_round_is_launched_before_the_row_of_this_one_is_written(monkeypatch):
    order = []
    take = batches.Feeder.take
    monkeypatch.setattr(batches.Feeder, "take", lambda self, *which: (order.append("launch"), take(self, *which))[1])
    for every in (1, 5):  # an evaluation is launched with its round
        run(test_every=every, progress=lambda text: order.append("row"))
        assert order == ["launch", "launch", "row", "launch", "row", "launch", "row", "launch", "row", "row"]
        order.clear()
    # H of the next round may depend on this one's loss.
    run(test_every=5, local_steps=schedule.adacomm(3, 1), progress=lambda text: order.append("row"))
    assert order == ["launch", "row"] * 5
    order.clear()
    # A callback may end the run.
    run(test_every=5, on_round=lambda row: order.append(row["round"]))
    assert order == ["launch", 1, "launch", 2, "launch", 3, "launch", 4, "launch", 5]


def spied(monkeypatch):
    """Notes launches of rounds, rows and checkpoints, as they come."""
    order, launched = [], threading.Event()

    def note(owner, name, text, after=False):
        call = getattr(owner, name)

        def noted(*arguments, **options):
            said = text(*arguments)
            if not after:
                order.append(said)
            out = call(*arguments, **options)
            if after:
                order.append(said)
            if order.count("launch") == 4:
                launched.set()
            return out

        monkeypatch.setattr(owner, name, noted)

    note(batches.Feeder, "take", lambda *which: "launch")
    note(Records, "append", lambda self, row: f"row {row.get('round', 0)}")
    note(checkpoints, "_seal", lambda path: f"saved {path.name}", after=True)
    return order, launched


@pytest.mark.optimized
def test_a_checkpoint_is_written_while_the_next_rounds_run_and_before_their_rows(monkeypatch, tmp_path):
    order, launched = spied(monkeypatch)
    seal = checkpoints._seal

    def late(path):
        if path.name == "2":  # until round 4 is launched behind round 3
            assert launched.wait(60)
        seal(path)

    monkeypatch.setattr(checkpoints, "_seal", late)
    beside = run(workdir=tmp_path, checkpoint_every=2)
    assert order.index("row 2") < order.index("saved 2") < order.index("row 3")
    same(beside, run(), "checkpoint_every")
    resumed = run(workdir=tmp_path, checkpoint_every=2, rounds=7, resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, run(rounds=7).params)


@pytest.mark.optimized
def test_a_state_that_does_not_fit_twice_is_saved_before_the_next_round(monkeypatch, tmp_path):
    order, _ = spied(monkeypatch)
    monkeypatch.setattr("wavg_jax.training.run.room", lambda devices: 0)
    alone = run(workdir=tmp_path, checkpoint_every=2)
    rounds = [event for event in order if event != "row 0"]
    assert rounds[:5] == ["launch", "launch", "row 1", "row 2", "saved 2"]
    assert rounds[5:8] == ["launch", "launch", "row 3"]
    same(alone, run(), "checkpoint_every")


def test_a_clock_stops_when_results_are_there_however_late_the_host_looks(monkeypatch):
    ticks, there = itertools.count(), threading.Event()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: (next(ticks), there.set())[0])
    with loop.open_watch() as watch:
        arrival = watch(jax.numpy.ones(3))
        assert there.wait(60)
        loop.time.perf_counter()
        assert arrival.result() == 0


@pytest.mark.parametrize("options", [{}, {"local_steps": schedule.linear(1, 3, 2)}, {"stats": policy.reestimate(2)}])
def test_streamed_data_are_the_same_data(options):
    resident, streamed = run(**options), run(resident=False, **options)
    assert (resident.rows[0]["resident"], streamed.rows[0]["resident"]) == (True, False)
    # Two programs, each rounded in its own way.
    for one, two in zip(resident.rows[1:], streamed.rows[1:], strict=True):
        assert (one["round"], one["samples"], one["local_steps"]) == (two["round"], two["samples"], two["local_steps"])
        np.testing.assert_allclose(one["train_loss"], two["train_loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), resident.params, streamed.params)


@pytest.mark.slow
def test_data_too_large_for_the_devices_are_streamed(monkeypatch):
    nbytes, few = sharded().train.x.nbytes, {"local_steps": 1, "batch_size": 2, "rounds": 1}
    monkeypatch.setattr(footprint, "memory_of", lambda devices: None)  # the runs need more than the split
    for devices in (1, 4):  # which share the host's memory, and hold the split between them
        monkeypatch.setattr(machine, "memory", lambda: nbytes / memory._ROOM)
        assert run(devices=devices, **few).rows[0]["resident"]
        monkeypatch.setattr(machine, "memory", lambda: (nbytes - 1) / memory._ROOM)
        assert not run(devices=devices, **few).rows[0]["resident"]


def test_streamed_rounds_that_do_not_fit_are_refused(monkeypatch):
    samples = 3 * 4 * 3 * 8  # three rounds of K=4, H=3, B=8
    nbytes = samples * sharded().train.x[:1].nbytes
    monkeypatch.setattr(batches, "room", lambda devices: nbytes)
    assert not run(rounds=1, resident=False, devices=1).rows[0]["resident"]
    monkeypatch.setattr(batches, "room", lambda devices: nbytes - 1)
    with pytest.raises(wavg.SettingsError, match="local_steps="):
        run(rounds=1, resident=False, devices=1)


def test_a_feeder_makes_the_next_work_in_the_background_and_passes_errors_on():
    made = {}

    def make(first_step, steps):
        made[first_step, steps] = threading.current_thread().name.startswith("feed")
        if steps > 5:
            raise ValueError("too many")
        return first_step

    with batches.open_feeder(make) as feed:
        assert feed.take(0, 2) == 0
        feed.prepare(2, 2)
        assert feed.take(2, 2) == 2
        feed.prepare(4, 2)
        assert feed.take(4, 3) == 4  # another round than was expected
        feed.prepare(7, 9)
        with pytest.raises(ValueError, match="too many"):
            feed.take(7, 9)
    assert made == {(0, 2): False, (2, 2): True, (4, 2): True, (4, 3): False, (7, 9): True}
