"""Rows: whole lines or none, strict JSON, and the rows that a resumed run keeps."""

import errno
import json
import os
import stat

import numpy as np
import pytest

from wavg_jax.base import DataError, ResumeError, WorkdirError
from wavg_jax.storage import resumption
from wavg_jax.storage.resumption import check_settings
from wavg_jax.storage.rows import Records, check_writable, read_rows, recorded_run, write_atomically


def header(run="a", **more):
    return {"kind": "run", "run": run, "arm": run, "seed": 0, "rounds": 3, "settings": {"lr": 0.1}} | more


def row(number, run="a", **more):
    return dict.fromkeys(resumption.ROUND, 1) | {"kind": "round", "run": run, "round": number} | more


def test_rows_come_back_as_strict_json(tmp_path):
    written = Records(tmp_path)
    written.append(
        row(1, weights=np.float32([0.5, 0.5]), loss=np.float32("nan"), best=float("inf"), alive=np.array([True]))
    )
    text = (tmp_path / "rows.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    (back,) = read_rows(tmp_path)
    assert back == row(1, weights=[0.5, 0.5], loss=None, best=None, alive=[True])
    assert Records(tmp_path).rows == written.rows


def test_a_line_cut_short_by_a_kill_is_dropped_and_the_next_starts_clean(tmp_path):
    Records(tmp_path).append(header())
    file = tmp_path / "rows.jsonl"
    file.write_bytes(file.read_bytes() + b'{"kind": "round", "ro')
    assert len(read_rows(tmp_path)) == 1
    again = Records(tmp_path)
    again.append(row(1))
    assert [r["kind"] for r in read_rows(tmp_path)] == ["run", "round"]


def test_rewinding_drops_later_rounds_of_that_run_alone(tmp_path):
    written = Records(tmp_path)
    for item in (header("a"), row(1, "a"), header("b"), row(1, "b"), row(2, "b"), row(2, "a"), row(3, "a")):
        written.append(item)
    written.rewind("a", 1, planned=5)
    assert [(r["run"], r.get("round")) for r in written.rows] == [
        ("a", None),
        ("a", 1),
        ("b", None),
        ("b", 1),
        ("b", 2),
    ]
    assert [r["rounds"] for r in written.rows if r["kind"] == "run"] == [5, 3]
    assert read_rows(tmp_path) == written.rows
    with pytest.raises(ResumeError, match="lacks round 2"):
        written.rewind("a", 2, planned=5)
    written.rewind("a", 0, planned=5)
    assert {r["run"] for r in written.rows} == {"b"}


def test_entries_are_added_to_the_last_row_of_that_run_alone(tmp_path):
    written, in_memory = Records(tmp_path), Records(None)
    for records in (written, in_memory):
        for item in (header("a"), row(1, "a"), row(2, "a"), header("b"), row(1, "b")):
            records.append(item)
        records.amend("a", {"best": np.float32(0.5)})
        assert [r.get("best") for r in records.rows] == [None, None, 0.5, None, None]
        assert records.last("a") == row(2, "a", best=0.5)
    assert read_rows(tmp_path) == written.rows == in_memory.rows


def test_the_first_row_of_a_run_is_found_if_it_has_all_that_resuming_needs(tmp_path):
    assert recorded_run(None, "a") is None
    assert recorded_run(tmp_path, "a") is None
    assert list(tmp_path.iterdir()) == []
    first = dict.fromkeys((*resumption.READ, "replica_map"), 1) | header("b")
    written = Records(tmp_path)
    for item in (header("a"), first, row(1, "b")):
        written.append(item)
    assert recorded_run(tmp_path, "b") == first
    assert recorded_run(tmp_path, "c") is None
    with pytest.raises(ResumeError, match="its first row lacks"):
        recorded_run(tmp_path, "a")
    (tmp_path / "rows.jsonl").write_bytes(b"nonsense\n")
    assert recorded_run(tmp_path, "b") is None


def test_folders_on_the_way_to_a_file_are_made(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "file", b"new")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"
    Records(tmp_path / "c" / "d").append(header())
    assert len(read_rows(tmp_path / "c" / "d")) == 1


def test_other_settings_are_named():
    first = dict.fromkeys((*resumption.READ, "replica_map"), 1) | header(data_crc=7, seed=1)
    check_settings(first, first)
    with pytest.raises(ResumeError, match=r"data are not what.*training samples: 2, now 3"):
        check_settings(first, first | {"train_samples": 2, "settings": {"lr": 0.1, "chance": 0.5}})
    with pytest.raises(ResumeError, match=r"data are not what.*classes: 1, now 2"):
        check_settings(first, first | {"classes": 2, "settings": {"lr": 0.1, "chance": 0.5}})
    # Which of them are held out is a matter of flags.
    with pytest.raises(ResumeError, match=r" train_samples=1"):
        check_settings(first, first | {"train_samples": 0, "heldout_samples": 2})
    with pytest.raises(ResumeError, match=r" lr=0.1, now it is 0.2"):
        check_settings(first, first | {"settings": {"lr": 0.2}})
    with pytest.raises(ResumeError, match=" noisy=None, now it is 2"):
        check_settings(first, first | {"settings": {"lr": 0.1, "noisy": 2}})
    with pytest.raises(ResumeError, match=" batch_size=1, now it is 2"):
        check_settings(first, first | {"batch_size": np.int64(2)})
    with pytest.raises(ResumeError, match="shards are not what"):
        check_settings(first, first | {"data_crc": 8})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b'{"kind": "run"', "empty"),
        (b'{"kind": "run", "run": "a"}\nnonsense\n', "line 2"),
        (b'{"run": "a"}\n', "line 1"),
        (b"[1, 2]\n", "line 1"),
        (b"\xff\xfe\n", "line 1"),
    ],
)
def test_what_is_not_rows_is_refused_with_the_line(content, says, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=says) as raised:
        read_rows(tmp_path)
    assert "\n" not in str(raised.value)


def test_no_folder_and_no_rows_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="no rows"):
            read_rows(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    target = tmp_path / "report.md"
    write_atomically(target, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkdirError, match="No space left") as raised:
        write_atomically(target, b"new and longer")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(target))
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_a_file_is_as_private_as_the_one_before_it_or_as_the_umask_says(tmp_path):
    target, before = tmp_path / "rows.jsonl", os.umask(0o077)
    try:
        for umask, mode in ((0o077, 0o600), (0o022, 0o644), (0o002, 0o664)):
            os.umask(umask)
            target.unlink(missing_ok=True)
            write_atomically(target, b"new")
            assert stat.S_IMODE(target.stat().st_mode) == mode
        target.chmod(0o640)
        write_atomically(target, b"newer")
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_failed_append_leaves_whole_lines(tmp_path, monkeypatch):
    written = Records(tmp_path)
    written.append(header())
    before = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left") as raised:
        written.append(row(1))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "rows.jsonl"))
    assert str(raised.value) == (
        f"{tmp_path / 'rows.jsonl'} cannot be written: No space left on device; free the disk and use resume=True"
    )
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert len(written.rows) == 1


def test_a_folder_that_cannot_be_written_is_an_os_error_with_errno_and_filename(tmp_path):
    (tmp_path / "file").write_text("")
    for use in (check_writable, Records):
        with pytest.raises(OSError, match=r"^the folder .* cannot be .*choose another") as raised:
            use(tmp_path / "file")
        assert isinstance(raised.value, WorkdirError)
        assert raised.value.errno in (errno.ENOTDIR, errno.EEXIST)
        assert raised.value.filename.startswith(str(tmp_path / "file"))


def test_looking_whether_a_folder_can_be_written_makes_nothing(tmp_path):
    check_writable(None)
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_rows_stay_in_memory(tmp_path):
    written = Records(None)
    written.append(header())
    written.append(row(1))
    written.rewind("a", 0, planned=3)
    assert written.rows == []
