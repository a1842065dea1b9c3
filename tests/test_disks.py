"""A disk that is full, or read-only: one clear line, and nothing half written. Checkpoints and rows of a run on a full
disk: tests/storage/test_checkpoints.py."""

import errno
import os
import subprocess

import numpy as np
import pytest
from reports import make_run
from runs import AVERAGER, OPTIONS, run
from small import sharded

import wavg_jax as wavg
from wavg_jax import reporting
from wavg_jax.reporting import canvas
from wavg_jax.reporting.document import write_files
from wavg_jax.storage.checkpoints import open_checkpoints
from wavg_jax.storage.lock import hold
from wavg_jax.storage.rows import Records, write_atomically
from wavg_jax.storage.tensors import save_safetensors

ROWS = make_run("plain", 0, (), rounds=2)


def fill(disk, kilobytes):
    """Leaves so much free."""
    left = os.statvfs(disk)
    (disk / "ballast").write_bytes(b"x" * (left.f_bavail * left.f_frsize - 1024 * kilobytes))


@pytest.fixture(scope="module")
def plots():
    """Those of a report, drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "DPI", 20)
        return reporting.summarise(ROWS).figures()


@pytest.mark.parametrize("kilobytes", [0, 4, 8, 16, 24, 40, 64, 100])
def test_a_report_on_a_full_disk_is_one_clear_line_and_has_no_torn_file(kilobytes, disk, plots):
    def write():
        return write_files(disk, "A run", "# A run\n", plots)

    whole = {path.relative_to(disk): path.read_bytes() for path in write()}
    for name in whole:
        (disk / name).write_bytes(b"old")
    fill(disk, kilobytes)
    try:
        write()
    except wavg.WorkdirError as error:
        refused = error
    else:
        refused = None
    assert refused is None or (refused.errno, "\n" in str(refused)) == (errno.ENOSPC, False)
    (disk / "ballast").unlink()
    found = {path.relative_to(disk): path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    assert found.keys() == whole.keys()
    assert all(content in (b"old", whole[name]) for name, content in found.items())
    assert (refused is None) == (found == whole)
    if kilobytes == 0:
        assert refused is not None


@pytest.mark.parametrize("kilobytes", [0, 4, 60])
def test_an_export_to_a_full_disk_is_one_clear_line_and_leaves_the_old_one(kilobytes, disk):
    save_safetensors(disk / "a.safetensors", {"w": np.ones(3, np.float32)})
    before = (disk / "a.safetensors").read_bytes()
    fill(disk, kilobytes)
    with pytest.raises(wavg.WorkdirError, match="free the disk") as raised:
        save_safetensors(disk / "a.safetensors", {"w": np.ones(20_000, np.float32)})
    assert (raised.value.errno, "\n" in str(raised.value)) == (errno.ENOSPC, False)
    (disk / "ballast").unlink()
    assert [path.name for path in disk.iterdir()] == ["a.safetensors"]
    assert (disk / "a.safetensors").read_bytes() == before


@pytest.fixture
def locked(disk):
    """A disk that was written, and can only be read now."""
    write_atomically(disk / "old", b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield disk
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def opened(folder):
    with open_checkpoints(folder):
        pass


def held(folder):
    with hold(folder):
        pass


WRITES = {
    "a run": lambda disk: run(sharded(), AVERAGER, workdir=disk / "run", **OPTIONS),
    "a run in its folder": lambda disk: run(sharded(), AVERAGER, workdir=disk, resume=True, **OPTIONS),
    "rows": lambda disk: Records(disk).append({"kind": "run", "run": "a"}),
    "a folder of rows": lambda disk: Records(disk / "new"),
    "checkpoints": lambda disk: opened(disk / "new"),
    "a lock": held,
    "an export": lambda disk: save_safetensors(disk / "a.safetensors", {"w": np.ones(3)}),
    "a report": lambda disk: write_files(disk / "report", "A run", "# A run\n", ()),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_read_only_disk_is_one_clear_line_before_anything_is_compiled(what, locked, monkeypatch):
    monkeypatch.setattr("wavg_jax.training.fit.Run", pytest.fail)
    with pytest.raises(wavg.WorkdirError, match="Read-only file system") as raised:
        WRITES[what](locked)
    assert (raised.value.errno, "\n" in str(raised.value)) == (errno.EROFS, False)
    assert [path.name for path in locked.iterdir()] == ["old"]
