"""What fit calls after every round, early stopping, progress, and what a stopped run carries."""

import os
import signal
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from runs import run
from small import sharded

import wavg_jax as wavg
from wavg_jax.storage.rows import read_rows

PLAIN = wavg.averager(wavg.uniform())


def test_several_callbacks_see_every_row_and_some_the_state_now_and_then():
    rows, states = [], []
    see = wavg.with_state(lambda row, state: states.append((row["round"], int(state.round))), every=2)
    result = run(sharded(), PLAIN, rounds=5, on_round=[rows.append, see])
    assert rows == result.rows[1:]
    assert states == [(2, 2), (4, 4)]


def test_a_state_that_a_callback_copies_is_the_one_after_that_round():
    kept = {}
    see = wavg.with_state(lambda row, state: kept.update(w=np.array(state.params["w"])), every=2)
    run(sharded(), PLAIN, rounds=3, on_round=see)
    np.testing.assert_array_equal(kept["w"], run(sharded(), PLAIN, rounds=2).params["w"])


@pytest.mark.parametrize("every", [1, 5])
def test_a_callback_that_returns_true_ends_the_run_after_that_round(every, tmp_path):
    result = run(sharded(), PLAIN, rounds=6, test_every=every, workdir=tmp_path, on_round=lambda row: row["round"] == 2)
    whole = run(sharded(), PLAIN, rounds=2)
    assert [row["round"] for row in result.rows[1:]] == [1, 2]
    assert result.rows[-1]["stopped_early"] is True
    assert not result.stopped
    for name in ("test_accuracy", "test_loss", "confusion"):
        assert result.rows[-1][name] == whole.rows[-1][name]
    np.testing.assert_array_equal(result.params["w"], whole.params["w"])
    assert read_rows(tmp_path) == result.rows
    assert (tmp_path / "checkpoints" / "run" / "2").exists()


def test_a_true_of_the_last_round_changes_nothing():
    result = run(sharded(), PLAIN, rounds=2, on_round=lambda row: row["round"] == 2)
    assert "stopped_early" not in result.rows[-1]


def test_a_run_that_a_callback_ended_is_complete_and_resuming_returns_it(tmp_path):
    options = {"rounds": 4, "workdir": tmp_path}
    ended = run(sharded(), PLAIN, on_round=lambda row: row["round"] == 2, **options)
    again = run(sharded(), PLAIN, resume=True, **options)
    assert again.rows == ended.rows
    np.testing.assert_array_equal(again.params["w"], ended.params["w"])


@pytest.mark.parametrize("true", [np.True_, jnp.array(True)], ids=["numpy", "jax"])
def test_an_array_that_is_true_ends_the_run_too(true):
    assert len(run(sharded(), PLAIN, rounds=3, on_round=lambda row: true).rows) == 2


def test_what_other_callbacks_return_ends_nothing():
    answers = (1, "yes", np.ones(2, bool), jnp.array(1.0), None)
    result = run(sharded(), PLAIN, rounds=2, on_round=[lambda row, answer=answer: answer for answer in answers])
    assert len(result.rows) == 3
    assert len(run(sharded(), PLAIN, rounds=2, on_round=None).rows) == 3


def test_a_callback_cannot_spoil_the_rows():
    result = run(sharded(), PLAIN, rounds=2, on_round=lambda row: row.clear())
    assert [row["round"] for row in result.rows[1:]] == [1, 2]


def test_a_checkpoint_that_is_due_is_saved_before_a_callback_raises(tmp_path):
    def fail(row):
        if row["round"] == 2:
            raise KeyError("of the user")

    with pytest.raises(KeyError):
        run(sharded(), PLAIN, rounds=4, workdir=tmp_path, checkpoint_every=2, on_round=fail)
    assert (tmp_path / "checkpoints" / "run" / "2").exists()


def test_progress_may_be_a_function_of_ones_own():
    said = []
    run(sharded(), PLAIN, rounds=2, progress=said.append)
    assert len(said) == 2
    assert all(text.startswith("run: accuracy") for text in said)


def test_progress_switched_off_says_nothing(capfd):
    run(sharded(), PLAIN, rounds=1, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"on_round": 3}, "on_round"), ({"on_round": [print, 3]}, "on_round"), ({"progress": "yes"}, "progress")],
)
def test_callbacks_that_are_none_are_refused(options, says):
    with pytest.raises(wavg.SettingsError, match=says):
        run(sharded(), PLAIN, **options)
    with pytest.raises(wavg.SettingsError, match="every"):
        wavg.with_state(print, every=0)


def test_a_stopped_run_carries_its_result_and_handlers_are_as_before(tmp_path):
    def stop(row):
        if row["round"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(wavg.Stopped, match=r"stopped after round 2 .*workdir=.*resume=True") as raised:
        run(sharded(), PLAIN, rounds=5, workdir=tmp_path, on_round=stop)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    result = raised.value.result
    assert result.stopped
    assert [row["round"] for row in result.rows[1:]] == [1, 2]
    np.testing.assert_array_equal(result.params["w"], run(sharded(), PLAIN, rounds=2).params["w"])


def test_outside_the_main_thread_fit_touches_no_handlers(tmp_path):
    seen, results = [], []

    def work():
        watch = {"on_round": lambda row: seen.append(signal.getsignal(signal.SIGTERM))}
        results.append(run(sharded(), PLAIN, rounds=1, workdir=tmp_path, **watch))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
    assert len(results[0].rows) == 2
