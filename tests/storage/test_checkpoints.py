"""Damage on disk: a run resumes from what was written, or from nothing."""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import AVERAGER, OPTIONS, run, same
from small import sharded

import wavg_jax as wavg
from wavg_jax.storage import checkpoints, noise
from wavg_jax.storage.checkpoints import SUMS, Found, open_checkpoints, snapshot
from wavg_jax.storage.rows import Records, read_rows

FOLDER = pathlib.Path("checkpoints", "run")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A whole run of six rounds, with checkpoints after the third and the last, and its folder."""
    workdir = tmp_path_factory.mktemp("straight")
    return run(sharded(), AVERAGER, workdir=workdir, **OPTIONS), workdir


@pytest.fixture
def workdir(straight, tmp_path):
    """A copy of that folder, to be damaged."""
    return shutil.copytree(straight[1], tmp_path / "copy")


def resumed(workdir, **options):
    return run(sharded(), AVERAGER, workdir=workdir, resume=True, **(OPTIONS | options))


def find(workdir):
    with open_checkpoints(workdir / FOLDER) as opened:
        return opened.find()


def files(step):
    return [path for path in sorted(step.rglob("*")) if path.is_file()]


def content(workdir):
    return {path: path.read_bytes() for path in files(workdir)}


def flip(path, *positions):
    damaged = bytearray(path.read_bytes())
    for position in positions:
        damaged[position] ^= 0x40
    path.write_bytes(damaged)


def test_two_flipped_bytes_are_found_wherever_they_are(workdir):
    assert find(workdir) == Found(6, {}, ())
    rng, places = np.random.default_rng(0), 0
    for path in files(workdir / FOLDER / "6"):
        whole = path.read_bytes()
        for _ in range(16 if whole else 0):  # one is empty
            flip(path, *rng.choice(len(whole), 2, replace=False))
            found = find(workdir)
            assert (found.whole, list(found.damaged)) == (3, [6]), path
            path.write_bytes(whole)
            places += 1
    assert places > 100
    assert find(workdir) == Found(6, {}, ())


def data_file(step):
    """The file that holds the arrays."""
    return max((step / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)


DAMAGE = {
    "flipped bytes": lambda step: flip(data_file(step), 300, 700),
    "a truncated file": lambda step: os.truncate(data_file(step), 100),
    "an empty file": lambda step: os.truncate(step / "state" / "manifest.ocdbt", 0),
    "a missing file": lambda step: data_file(step).unlink(),
    "metadata": lambda step: (step / "_CHECKPOINT_METADATA").write_text('{"item_handlers'),
    "the tree": lambda step: flip(step / "state" / "_METADATA", 20, 200),
    "a stray file": lambda step: (step / "state" / "d" / "more").write_bytes(b"more"),
    "sums cut short": lambda step: (step / SUMS).write_text((step / SUMS).read_text().splitlines()[0] + "\n"),
    "sums gone": lambda step: (step / SUMS).unlink(),
    "sums empty": lambda step: os.truncate(step / SUMS, 0),
    "sums that are none": lambda step: (step / SUMS).write_bytes(b"\xff\x00\n"),
    "nothing left": lambda step: [shutil.rmtree(step), step.mkdir()],
    "a file of that name": lambda step: [shutil.rmtree(step), step.write_text("6")],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_last_whole_one(kind, workdir, straight):
    DAMAGE[kind](workdir / FOLDER / "6")
    with pytest.warns(wavg.WavgWarning) as warned:
        again = resumed(workdir)
    (said,) = (str(warning.message) for warning in warned)
    assert "checkpoint of round 3, 3 recorded rounds run again: checkpoint 6: " in said
    assert "\n" not in said
    same(straight[0], again)
    assert [row.get("round") for row in read_rows(workdir)] == [None, 1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (workdir / FOLDER).iterdir()) == ["3", "6", "damaged-6"]
    same(straight[0], resumed(workdir))  # without a word


def test_an_empty_folder_is_no_checkpoint(workdir, straight):
    (workdir / FOLDER / "999").mkdir()
    with pytest.warns(wavg.WavgWarning, match=r"round 6, no round runs again: checkpoint 999: was never finished"):
        same(straight[0], resumed(workdir))


@pytest.mark.parametrize("kind", ["metadata", "the tree", "a truncated file", "sums that are none"])
def test_an_older_damaged_checkpoint_does_not_matter(kind, workdir, straight):
    DAMAGE[kind](workdir / FOLDER / "3")
    assert find(workdir) == Found(6, {}, ())
    more = resumed(workdir, rounds=9)
    assert len(more.rows) == 10
    assert sorted(path.name for path in (workdir / FOLDER).iterdir()) == ["6", "9"]


def test_only_the_checkpoint_that_is_used_is_read(workdir, monkeypatch):
    read = []
    summed = checkpoints._sum
    monkeypatch.setattr(checkpoints, "_sum", lambda path: (read.append(path), summed(path))[1])
    find(workdir)
    assert read
    assert all((workdir / FOLDER / "6") in path.parents for path in read)


def test_a_damaged_checkpoint_can_be_damaged_again(workdir, straight):
    for _ in range(2):
        flip(data_file(workdir / FOLDER / "6"), 300)
        with pytest.warns(wavg.WavgWarning, match="set aside"):
            same(straight[0], resumed(workdir))


def test_a_run_resumes_from_a_restored_copy_with_the_rows_that_were_set_aside(workdir, straight):
    whole = shutil.copytree(workdir / FOLDER / "6", workdir / "backup")
    DAMAGE["flipped bytes"](workdir / FOLDER / "6")
    before = read_rows(workdir)
    with pytest.warns(wavg.WavgWarning, match="set aside"):
        resumed(workdir, rounds=4)
    aside = workdir / FOLDER / "damaged-6"
    assert read_rows(aside) == before[4:]
    shutil.rmtree(workdir / FOLDER / "4")
    whole.rename(workdir / FOLDER / "6")
    kept = (workdir / "rows.jsonl").read_bytes().splitlines(keepends=True)[:4]
    (workdir / "rows.jsonl").write_bytes(b"".join(kept) + (aside / "rows.jsonl").read_bytes())
    rows = resumed(workdir).rows
    assert rows == before


@pytest.mark.parametrize("step", ["set_aside", "rewind"])
def test_a_kill_while_a_checkpoint_is_set_aside_loses_no_row(step, workdir, straight, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    DAMAGE["flipped bytes"](workdir / FOLDER / "6")
    before = read_rows(workdir)
    owner, name = {"set_aside": (pathlib.Path, "rename"), "rewind": (Records, "rewind")}[step]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        with pytest.raises(Killed):
            resumed(workdir)
    assert read_rows(workdir) == before
    with pytest.warns(wavg.WavgWarning, match="set aside") if step == "set_aside" else contextlib.nullcontext():
        same(straight[0], resumed(workdir))
    assert read_rows(workdir / FOLDER / "damaged-6") == before[4:]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"])
@pytest.mark.parametrize("when", [3, 6])
def test_a_save_that_never_began_leaves_nothing_that_looks_whole(when, failure, straight, tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    save = ocp.save

    def broken(path, *arguments, **options):
        if path.name == str(when):
            raise failure
        return save(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save", broken)
        with pytest.raises((wavg.WorkdirError, KeyboardInterrupt)):
            run(sharded(), AVERAGER, workdir=tmp_path, **OPTIONS)
    assert find(tmp_path) == Found(None if when == 3 else 3, {}, ())
    with pytest.warns(wavg.WavgWarning) if when == 3 else contextlib.nullcontext():
        same(straight[0], resumed(tmp_path))


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "let_go", pytest.fail)  # there are no writes to wait for
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(wavg.WorkdirError, match="no checkpoint can be written") as raised,
        open_checkpoints(tmp_path / "file" / "x"),
    ):
        pass
    assert (raised.value.errno, raised.value.filename) == (errno.ENOTDIR, str(tmp_path / "file" / "x"))


@pytest.mark.parametrize("damage", ["flipped bytes", "sums gone", "nothing left"])
def test_when_no_checkpoint_is_whole_nothing_is_touched(damage, workdir):
    for step in ("3", "6"):
        DAMAGE[damage](workdir / FOLDER / step)
    before = content(workdir)
    with pytest.raises(
        wavg.ResumeError, match=r"rows of 6 rounds but no whole checkpoint in .*checkpoint 3: "
    ) as raised:
        resumed(workdir)
    assert "\n" not in str(raised.value)
    assert content(workdir) == before


def test_a_checkpoint_under_another_number_is_refused(workdir):
    (workdir / FOLDER / "6").rename(workdir / FOLDER / "5")
    before = content(workdir)
    with pytest.raises(wavg.ResumeError, match="that of round 6"):
        resumed(workdir)
    assert content(workdir) == before


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inner": optax.sgd(0.1)}, "replicas/opt_state/0/trace/b was float32.4, 3., now it is missing"),
        ({"inner": optax.sgd(0.1, momentum=0.9, accumulator_dtype="bfloat16")}, "now it is bfloat16"),
    ],
)
def test_the_checkpoint_of_another_optimizer_is_refused_and_not_converted(change, says, workdir):
    before = content(workdir)
    with pytest.raises(wavg.ResumeError, match=says) as raised:
        resumed(workdir, **change)
    assert "\n" not in str(raised.value)
    assert content(workdir) == before


def test_keys_of_any_kind_come_back_as_they_were(tmp_path):
    keys = {"default": jax.random.key(1), "other": jax.random.split(jax.random.key(1, impl="rbg"), 2)}
    held = wavg.TrainState({}, {}, keys, {}, jnp.int32(3))
    with open_checkpoints(tmp_path) as opened:
        opened.save(snapshot(held))
        opened.wait()
        restored = opened.restore(3, held)
    for name, key in keys.items():
        assert restored.replicas[name].dtype == key.dtype
        assert (restored.replicas[name] == key).all()


def test_the_sums_are_those_of_sha256sum(workdir):
    subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=workdir / FOLDER / "6", check=True)


def test_what_a_killed_process_left_half_written_is_removed(workdir, straight):
    left = workdir / FOLDER / "7.orbax-checkpoint-tmp"
    shutil.copytree(workdir / FOLDER / "6", left)
    same(straight[0], resumed(workdir))
    assert not left.exists()


def globals_that_fit_might_change():
    absl, asyncio_log, root = (logging.getLogger(name) for name in ("absl", "asyncio", None))
    return {
        "absl": (absl.level, list(absl.filters), list(absl.handlers), absl.propagate, absl.disabled),
        "asyncio": (asyncio_log.level, list(asyncio_log.filters), list(asyncio_log.handlers)),
        "root": (root.level, list(root.filters), list(root.handlers), logging.root.manager.disable),
        "hooks": (sys.unraisablehook, sys.excepthook, threading.excepthook, sys.displayhook),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
        "jax": dict(jax.config.values),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "numpy": np.geterr(),
        "loops": type(asyncio.get_event_loop_policy()),
        "folder": pathlib.Path.cwd(),
        "environment": dict(os.environ),
        # But the pool that compiles, one for the process, which starts its threads when it needs them.
        "threads": {t for t in threading.enumerate() if not t.daemon and not t.name.startswith("compile_")},
    }


def stop(row):
    if row["round"] == 2:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how", ["well", "stopped", "damaged", "of another optimizer", "raises"])
def test_fit_leaves_logging_hooks_and_settings_as_it_found_them(how, workdir, tmp_path):
    import orbax.checkpoint  # noqa: F401 - what importing it changes is not of fit's making

    before = globals_that_fit_might_change()
    if how == "well":
        resumed(workdir, rounds=9)
    elif how == "stopped":
        with pytest.raises(wavg.Stopped):
            run(sharded(), AVERAGER, workdir=tmp_path / "new", on_round=stop, **OPTIONS)
    elif how == "damaged":
        for step in ("3", "6"):
            DAMAGE["a truncated file"](workdir / FOLDER / step)
        with pytest.raises(wavg.ResumeError):
            resumed(workdir)
    elif how == "of another optimizer":
        with pytest.raises(wavg.ResumeError):
            resumed(workdir, inner=optax.sgd(0.1))
    else:
        with pytest.raises(ZeroDivisionError):
            run(sharded(), AVERAGER, workdir=tmp_path / "new", on_round=lambda row: 1 // 0, **OPTIONS)
    gone = time.monotonic() + 10  # the threads of a read that failed end on their own, not at once
    while globals_that_fit_might_change() != before and time.monotonic() < gone:
        gc.collect()
        time.sleep(0.05)
    assert globals_that_fit_might_change() == before


def test_others_may_log_while_a_run_has_its_folder_open(workdir, caplog):
    def on_round(row):
        logging.getLogger("absl").warning("a word of the user's own")

    resumed(workdir, rounds=7, on_round=on_round)
    assert "a word of the user's own" in caplog.text


@pytest.mark.parametrize("kilobytes", [12, 24, 32, 48, 80, 96])
def test_a_full_disk_leaves_nothing_half_written_and_the_run_resumes_when_freed(kilobytes, disk, straight, recwarn):
    ballast = disk / "ballast"
    left = os.statvfs(disk)
    ballast.write_bytes(b"x" * (left.f_bavail * left.f_frsize - 1024 * kilobytes))
    with pytest.raises(wavg.WorkdirError, match="free the disk") as raised:
        run(sharded(), AVERAGER, workdir=disk / "run", **OPTIONS)
    assert "\n" not in str(raised.value)
    assert raised.value.errno == errno.ENOSPC
    assert not list(disk.rglob("*tmp*"))
    assert {path.name for path in (disk / "run" / FOLDER).iterdir()} <= {"3"}
    ballast.unlink()
    same(straight[0], resumed(disk / "run"))
    assert {warning.category for warning in recwarn} <= {wavg.WavgWarning}


def test_a_failed_rename_is_one_clear_line(workdir, monkeypatch):
    (workdir / FOLDER / "999").mkdir()
    monkeypatch.setattr(pathlib.Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Not permitted")))
    with pytest.raises(wavg.WorkdirError, match="Not permitted"):
        resumed(workdir)
    assert SUMS in {path.name for path in (workdir / FOLDER / "6").iterdir()}
