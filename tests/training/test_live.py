"""Live views of real runs, read back by the tools that show them; they see what the rows say, and no round waits."""

import contextlib
import gzip
import itertools
import json
import struct
import time

import jax
import numpy as np
import pytest
from runs import run
from small import sharded

import wavg_jax as wavg
from wavg_jax import live
from wavg_jax.training import loop
from wavg_jax.training.callbacks import Observer

TWO = {"replicas": 2}


def rounds_of(result):
    return result.rows[1:]


def numbers(rows):
    """{round: what a live view shows of it}."""
    return {
        row["round"]: live.scalars(row, rows[0], before if before["kind"] == "round" else None)
        for before, row in itertools.pairwise(rows)
    }


def test_what_is_shown_is_what_the_rows_say():
    result = run(sharded(**TWO), rounds=2, test_every=2)
    first, second = rounds_of(result)
    shown = numbers(result.rows)
    assert shown[1]["train_loss"] == first["train_loss"]
    assert "test_accuracy" not in shown[1]
    assert shown[2]["test_accuracy"] == second["test_accuracy"]
    assert [shown[2][f"weights/{k}"] for k in range(2)] == second["weights"]
    assert [shown[2][f"scores/loss/{k}"] for k in range(2)] == second["scores"]["loss"]
    assert shown[2]["samples_per_second"] == pytest.approx(2 * 4 * 8 / second["seconds"])
    assert shown[2]["bytes_per_second"] == pytest.approx(result.rows[0]["bytes_per_round"] / second["seconds"])
    assert all(np.isfinite(list(shown[2].values())))


def test_what_is_lost_or_unknown_is_left_out():
    row = {"samples": 8, "seconds": 0.0, "train_loss": None, "alive": [False], "weights": [0.0], "scores": {}}
    shown = live.scalars(row, {"bytes_per_round": 0})
    assert shown == {"samples": 8.0, "alive": 0.0, "weights/0": 0.0}


def fails_once_at(number):
    def fail(row):
        if row["round"] == number:
            raise KeyError("of the user")

    return fail


def in_two_parts(tmp_path, observer):
    """A run that fails after its third round, whose last checkpoint is of the second, and is resumed."""
    options = {"rounds": 4, "workdir": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(KeyError):
        run(sharded(**TWO), on_round=[observer, fails_once_at(3)], **options)
    return run(sharded(**TWO), on_round=observer, resume=True, **options)


def test_tensorboard_reads_every_round_once_also_of_a_resumed_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = in_two_parts(tmp_path, live.tensorboard(tmp_path / "events"))
    events = accumulator.EventAccumulator(str(tmp_path / "events" / "run"))
    events.Reload()
    expected = numbers(result.rows)
    assert set(events.Tags()["scalars"]) == set(expected[4])
    for name in ("train_loss", "weights/1", "scores/loss/0", "effective_replicas", "samples_per_second"):
        read = {event.step: event.value for event in events.Scalars(name)}
        assert read == pytest.approx({number: found[name] for number, found in expected.items()}, rel=1e-5)
        assert len(events.Scalars(name)) == 4
    (text, *_) = events.Tensors("run/text_summary")
    assert b"| replicas | 2 |" in text.tensor_proto.string_val[0]


def test_mlflow_keeps_every_round_once_in_one_run_also_of_a_resumed_one(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    where = f"file:{tmp_path / 'mlruns'}"
    observer = live.mlflow(where, experiment="tests")
    client = mlflow.MlflowClient(tracking_uri=where)
    options = {"rounds": 4, "workdir": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(KeyError):
        run(sharded(**TWO), on_round=[observer, fails_once_at(3)], **options)
    experiment = client.get_experiment_by_name("tests").experiment_id
    assert [one.info.status for one in client.search_runs([experiment])] == ["FAILED"]
    result = run(sharded(**TWO), on_round=observer, resume=True, **options)
    (one,) = client.search_runs([experiment])
    assert (one.info.status, one.info.run_name) == ("FINISHED", "run")
    assert one.data.params["replicas"] == "2"
    for name in ("train_loss", "weights/1", "test_accuracy"):
        history = {metric.step: metric.value for metric in client.get_metric_history(one.info.run_id, name)}
        assert history == {number: found[name] for number, found in numbers(result.rows).items()}


def test_mlflow_says_what_it_does_not_take(monkeypatch):
    pytest.importorskip("mlflow")
    with pytest.raises(wavg.SettingsError, match=r"^MLflow does not take tracking_uri='gopher:x': "):
        live.mlflow("gopher:x")


BLOCK, HEADER = 32768, 7


def records(content):
    """The records of a file that W&B writes offline: LevelDB's log format, behind a header of its own."""
    at, record = HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block that no header fits
            at += BLOCK - at % BLOCK
        _, length, part = struct.unpack("<IHB", content[at : at + HEADER])
        record += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if part in (1, 4):  # the only part, or the last
            yield record
            record = b""


def test_wandb_offline_keeps_every_round(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    result = run(sharded(**TWO), rounds=2, on_round=live.wandb("tests"))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    kinds, read, end = set(), {}, time.monotonic() + 20
    while "exit" not in kinds and time.monotonic() < end:  # a process of W&B's own writes, and is not waited for
        found = [Record.FromString(record) for record in records(file.read_bytes())]
        kinds = {one.WhichOneof("record_type") for one in found}
    for one in found:
        if one.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.history.item}
            read[items["_step"]] = items
    for number, expected in numbers(result.rows).items():
        assert {name: read[number][name] for name in expected} == pytest.approx(expected)


def test_loggers_only_look_so_rounds_do_not_wait_and_a_true_ends_nothing(monkeypatch):
    seen, waited = [], []
    real = loop.train
    monkeypatch.setattr(loop, "train", lambda *given: waited.append(given[3]) or real(*given))
    look = Observer(lambda rows: contextlib.nullcontext(lambda row: seen.append((len(rows), row["round"])) or True))
    result = run(sharded(**TWO), rounds=3, on_round=look)
    assert seen == [(1, 1), (1, 2), (1, 3)]
    assert waited == [[]]
    assert len(rounds_of(result)) == 3


@pytest.mark.parametrize("number", [1, 3])
def test_the_trace_of_a_round_is_one_that_perfetto_opens(number, tmp_path):
    run(sharded(**TWO), rounds=3, on_round=live.profile(number, tmp_path))
    (trace,) = tmp_path.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"ph", "ts", "pid", "tid", "dur"} <= set(next(event for event in events if event.get("ph") == "X"))
    assert any("PjitFunction" in str(name) or "Execute" in str(name) for name in names)
    jax.profiler.start_trace(tmp_path / "another")  # which it refuses while one runs
    jax.profiler.stop_trace()


def test_a_round_that_is_none_of_the_run_has_no_trace(tmp_path):
    with pytest.raises(wavg.SettingsError, match=r"^profile=4: the run takes a trace of 1 to 3; choose another round"):
        run(sharded(**TWO), rounds=3, on_round=live.profile(4, tmp_path))
    with pytest.raises(wavg.SettingsError, match=r"profile: round is 0"):
        live.profile(0, tmp_path)


def test_a_view_that_fails_is_left_out_with_a_warning_and_the_run_goes_on(tmp_path):
    seen = []

    @contextlib.contextmanager
    def start(rows):
        def see(row):
            seen.append(row["round"])
            if row["round"] == 2:
                raise ConnectionError("no server")

        yield see

    with pytest.warns(wavg.WavgWarning, match=r"failed in round 2.*ConnectionError: no server"):
        result = run(sharded(**TWO), rounds=4, workdir=tmp_path, on_round=Observer(start))
    assert len(rounds_of(result)) == 4
    assert seen == [1, 2]


def test_a_view_that_fails_in_the_end_costs_no_result():
    @contextlib.contextmanager
    def start(rows):
        yield lambda row: None
        raise ConnectionError("no server")

    with pytest.warns(wavg.WavgWarning, match=r"failed when the run was over: ConnectionError: no server"):
        result = run(sharded(**TWO), rounds=2, on_round=Observer(start))
    assert len(rounds_of(result)) == 2
