"""Rounds that overlap with the host's work give what rounds one after another give, and so do streamed data."""

import threading

import jax
import numpy as np
import optax
import pytest
from runs import train
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax.devices import machine, transfer
from wavg_jax.rounds import policy
from wavg_jax.training import batches, schedule

TASK, INNER, WEIGHTED = regression(), optax.sgd(0.1, momentum=0.9), wavg.averager(wavg.softmax("loss", 1.0))
CLOCKS = ("seconds", "elapsed", "compile_seconds", "started")


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


def test_rows_that_are_written_one_round_late_are_the_same():
    tested = [f"test_{name}" for name in ("accuracy", "loss", "macro_f1", "ece")]
    every, last = run(), run(test_every=5)
    same(every, last, *tested)
    assert [row["round"] for row in last.rows[1:]] == [1, 2, 3, 4, 5]
    assert last.rows[-1]["test_accuracy"] == every.rows[-1]["test_accuracy"]
    assert last.rows[-1]["elapsed"] == pytest.approx(sum(row["seconds"] for row in last.rows[1:]))


def test_the_next_round_is_launched_before_the_row_of_this_one_is_written(monkeypatch):
    order = []
    take = batches.Feeder.take
    monkeypatch.setattr(batches.Feeder, "take", lambda self, *which: (order.append("launch"), take(self, *which))[1])
    run(test_every=5, progress=lambda text: order.append("row"))
    assert order == ["launch", "launch", "row", "launch", "row", "launch", "row", "launch", "row", "row"]
    order.clear()
    # H of the next round may depend on this one's loss.
    run(test_every=5, local_steps=schedule.adacomm(3, 1), progress=lambda text: order.append("row"))
    assert order == ["launch", "row"] * 5
    order.clear()
    # A callback may end the run.
    run(test_every=5, on_round=lambda row: order.append(row["round"]))
    assert order == ["launch", 1, "launch", 2, "launch", 3, "launch", 4, "launch", 5]


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
    for devices in (1, 4):  # which share the host's memory, and hold the split between them
        monkeypatch.setattr(machine, "memory", lambda: nbytes / transfer._ROOM)
        assert run(devices=devices, **few).rows[0]["resident"]
        monkeypatch.setattr(machine, "memory", lambda: (nbytes - 1) / transfer._ROOM)
        assert not run(devices=devices, **few).rows[0]["resident"]


def test_streamed_rounds_that_do_not_fit_are_refused(monkeypatch):
    samples = 3 * 4 * 3 * 8  # three rounds of K=4, H=3, B=8
    nbytes = samples * sharded().train.x[:1].nbytes
    monkeypatch.setattr(machine, "memory", lambda: nbytes / transfer._ROOM)
    assert not run(rounds=1, resident=False, devices=1).rows[0]["resident"]
    monkeypatch.setattr(machine, "memory", lambda: (nbytes - 1) / transfer._ROOM)
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
