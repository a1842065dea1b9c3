"""What comes from others is data: it runs no code, takes no more memory than it has bytes, and writes where it may."""

import ast
import gzip
import io
import json
import pathlib
import pickle
import tarfile

import numpy as np
import optax
import pytest
from reports import make_run
from runs import TASK, train
from small import sharded

import wavg_jax as wavg
from tests.reporting.test_matrix import rows as make_matrix
from wavg_jax import data, reporting
from wavg_jax.base import DataError, SettingsError
from wavg_jax.data import published
from wavg_jax.storage.tensors import open_tensors

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [path for folder in ("wavg_jax", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]
OF_ITS_OWN = {"wavg_jax/devices/processes.py": "pickle.loads"}
"""What the processes of one run send to each other; `wavg_jax.elastic`, by Ray, says so in the docs."""
UNSAFE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "joblib.load"}
UNSAFE |= {"torch.load", "marshal.loads", "yaml.load", "eval", "exec", "dill.loads"}


def calls(path):
    """Name and keywords of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_nothing_that_is_read_can_run_code():
    read = 0
    for path in SOURCES:
        own = OF_ITS_OWN.get(path.relative_to(ROOT).as_posix())
        for name, keywords in calls(path):
            assert name not in UNSAFE - {own}, f"{path}: {name}"
            if name in ("np.load", "numpy.load"):
                read += 1
                assert keywords["allow_pickle"] == "False", path
    assert read > 0


class Trap:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("sprung"),)


def test_a_pickle_in_a_file_is_refused_and_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = np.array([Trap()], object)
    np.savez("a.npz", x_train=array, y_train=array, x_test=array, y_test=array)
    pathlib.Path("b.npz").write_bytes(pickle.dumps(Trap()))
    pathlib.Path("c.safetensors").write_bytes(pickle.dumps(Trap()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(DataError, match="cannot be read as an npz file"):
            data.load(name)
    with pytest.raises(DataError, match="no whole safetensors file"), open_tensors("c.safetensors"):
        pass
    assert not pathlib.Path("sprung").exists()
    pickle.loads(pickle.dumps(Trap()))  # the trap works
    assert pathlib.Path("sprung").exists()


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "_MOST", 10_000)
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    for size, fits in ((10_000, True), (10_001, False)):
        packed.write_bytes(gzip.compress(bytes(size)))
        if fits:
            assert len(published._unzip(packed)) == size
        else:
            with pytest.raises(DataError, match="unpacks to more than 10000 bytes"):
                published._unzip(packed)
    cifar = published.PUBLISHED["cifar10"]
    with tarfile.open(tmp_path / cifar.archive, "w:gz") as archive:
        member = tarfile.TarInfo(f"{cifar.folder}/data_batch_1.bin")
        member.size = 10_001
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(DataError, match=r"data_batch_1\.bin has 10001 bytes"):
        published._untar(cifar, tmp_path / cifar.archive)


def test_a_header_that_promises_terabytes_takes_none(tmp_path):
    (tmp_path / "mnist").mkdir()
    for part in published.PUBLISHED["mnist"].parts:
        axes = 3 if "images" in part else 1
        head = bytes([0, 0, 8, axes]) + b"\xff\xff\xff\xff" * axes
        (tmp_path / "mnist" / part).write_bytes(head)
    with pytest.raises(DataError, match="its header promises"):
        published.read_published("mnist", published.PUBLISHED["mnist"], tmp_path)
    text = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for size in (len(text), 2**60):
        (tmp_path / "a.safetensors").write_bytes(size.to_bytes(8, "little") + text)
        with pytest.raises(DataError, match="no whole safetensors file"), open_tensors(tmp_path / "a.safetensors"):
            pass


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def spoilt(value, text):
    """A row's value whose texts, and keys that users choose, all carry another text."""
    if isinstance(value, str):
        return value + text
    if isinstance(value, list):
        return [spoilt(entry, text) for entry in value]
    return {key: spoilt(entry, text) for key, entry in value.items()} if isinstance(value, dict) else value


KINDS = {"kind", "role", "weighting", "scenario"}


@pytest.mark.parametrize("text", [EVIL, "/../../../out", "[x](javascript:alert(1))"])
def test_texts_in_rows_are_shown_and_write_nowhere_else(text, tmp_path):
    recorded = [row for arm in ("plain", "weighted") for seed in (0, 1) for row in make_run(arm, seed, (), rounds=2)]
    folder = tmp_path / "a" / "b" / "c"
    rows = [{key: value if key in KINDS else spoilt(value, text) for key, value in row.items()} for row in recorded]
    rows = [row | {"classes": 2, "class_names": ["a" + text, "b"]} if row["kind"] == "run" else row for row in rows]
    reporting.write_report(folder, rows)
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "onerror=alert(1)>" not in page.replace("&gt;", "")
    assert 'href="javascript' not in page
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.is_relative_to(folder) for path in written)
    assert (folder / "report.md") in written


def test_texts_of_a_matrix_are_shown(tmp_path):
    rows = [row | {"dataset": EVIL, "device": EVIL} for row in make_matrix()]
    reporting.write_report(tmp_path, rows)
    assert "<script" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", "a\\b", "C:x", "x\n", "", " ", "x" * 300, "\0"])
def test_the_name_of_a_run_stays_in_its_folder(name, tmp_path):
    with pytest.raises(SettingsError, match="name is "):
        train(TASK, sharded(), wavg.averager(wavg.uniform()), inner=optax.sgd(0.1), name=name, workdir=tmp_path / "w")
    assert list(tmp_path.iterdir()) == []
