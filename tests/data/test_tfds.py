"""MNIST and CIFAR-10 in small, through TFDS: prepared, read back, shared with others, damaged."""

import errno
import hashlib
import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorboardX.record_writer import masked_crc32c
from test_published import (
    IDX,
    assert_nothing_prepared,
    assert_same_samples,
    cifar_files,
    cut,
    mnist_files,
    samples,
    tar,
    write,
)

from wavg_jax.base import DataError, SettingsError
from wavg_jax.data import load, tfds_sets
from wavg_jax.data.tfrecords import read_tfrecords


@pytest.fixture
def mnist_dir(tmp_path):
    write(tmp_path / "mnist", mnist_files())
    return tmp_path


@pytest.mark.parametrize("place", ["", "mnist", "downloads", "downloads/mnist"])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_from_the_publishers_files(tmp_path, place, packed, capfd):
    write(tmp_path / place, mnist_files(), packed)
    data = load("mnist", tmp_path)
    assert (data.name, data.classes, data.class_names) == ("mnist", 10, tuple("0123456789"))
    assert data.train.x.shape == (50, 28, 28, 1)
    assert (data.train.x.dtype, data.train.y.dtype) == (np.uint8, np.int32)
    assert_same_samples(data.train, *samples(50, (28, 28)))
    assert_same_samples(data.test, *samples(20, (28, 28)))
    assert capfd.readouterr() == ("", "")
    # From now on the prepared set is all that is needed.
    for file in tmp_path.rglob("*ubyte*"):
        file.unlink()
    again = load("mnist", tmp_path)
    np.testing.assert_array_equal(again.train.x, data.train.x)
    np.testing.assert_array_equal(again.test.y, data.test.y)


@pytest.mark.parametrize("form", ["archive", "folder"])
def test_cifar10_from_the_publishers_files(tmp_path, form):
    if form == "archive":
        tar(tmp_path / "cifar10", cifar_files())
    else:
        write(tmp_path / "cifar10/cifar-10-batches-bin", cifar_files(), packed=False)
    data = load("cifar10", tmp_path)
    assert data.train.x.shape == (50, 32, 32, 3)
    assert (data.classes, data.class_names[3]) == (10, "cat")
    batches = [samples(10, (32, 32, 3), seed) for seed in range(6)]
    assert_same_samples(data.train, *(np.concatenate(arrays) for arrays in zip(*batches[:5], strict=True)))
    assert_same_samples(data.test, *batches[5])
    order = sorted(range(50), key=lambda i: hashlib.md5(f"train{i}".encode()).hexdigest())
    np.testing.assert_array_equal(data.train.y, np.concatenate([y for _, y in batches[:5]])[order])


def test_the_order_matches_the_official_builders(mnist_dir):
    # They too number the samples from 0, and TFDS sorts by MD5 of the split's name and the number.
    order = sorted(range(50), key=lambda i: hashlib.md5(f"train{i}".encode()).hexdigest())
    np.testing.assert_array_equal(load("mnist", mnist_dir).train.y, samples(50, (28, 28))[1][order])


def official(root, file_format):
    """Writes a set like the official builder's: PNG images, under an official version."""

    class Official(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.1")
        name, url_infos = "mnist", None

        def _info(self):
            image, label = tfds.features.Image(shape=(28, 28, 1)), tfds.features.ClassLabel(num_classes=10)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(50), "test": self._generate_examples(20)}

        def _generate_examples(self, n):
            for i, (image, label) in enumerate(zip(*samples(n, (28, 28), seed=1), strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                yield i, {"image": png.getvalue(), "label": int(label)}

    tfds.disable_progress_bar()
    Official(data_dir=root, file_format="array_record").download_and_prepare()
    folder = root / "mnist/3.0.1"
    if file_format != "array_record":
        store_as(folder, file_format)
    return folder


def framed_as_tensorflow_does(record):
    length = struct.pack("<Q", len(record))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, record))


def store_as(folder, file_format):
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = {n: tfds.builder_from_directory(folder).as_data_source(n, deserialize_method=raw) for n in IDX}
    for split, records in source.items():
        framed = b"".join(framed_as_tensorflow_does(record) for record in records)
        (folder / f"mnist-{split}.{file_format}-00000-of-00001").write_bytes(framed)
        (folder / f"mnist-{split}.array_record-00000-of-00001").unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": file_format}))


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_an_official_set_is_read_unchanged_and_preferred_to_ours(mnist_dir, file_format):
    ours = load("mnist", mnist_dir)
    official(mnist_dir, file_format)
    data = load("mnist", mnist_dir)
    assert_same_samples(data.train, *samples(50, (28, 28), seed=1))
    assert_same_samples(data.test, *samples(20, (28, 28), seed=1))
    assert (data.train.x != ours.train.x).any()


def test_a_format_that_needs_tensorflow_is_refused(tmp_path):
    official(tmp_path, "riegeli")
    with pytest.raises(DataError, match=r"stored as riegeli.*tfds convert_format .*--out_file_format=array_record"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize("damage", ["cut", "empty", "overwritten", "missing", "features", "info"])
def test_a_damaged_prepared_set_is_named(tmp_path, file_format, damage):
    folder = official(tmp_path, file_format)
    path = next(folder.glob("mnist-test*"))
    if damage == "missing":
        path.unlink()
    elif damage in ("features", "info"):
        (folder / {"features": "features.json", "info": "dataset_info.json"}[damage]).write_text("{}")
    else:
        raw = path.read_bytes()
        middle = len(raw) // 10
        overwritten = raw[:middle] + b"\xff" * 900 + raw[middle + 900 :]
        path.write_bytes({"cut": cut(raw), "empty": b"", "overwritten": overwritten}[damage])
    with pytest.raises(DataError, match=r"3.0.1 cannot be read .*delete that folder to prepare it again") as caught:
        load("mnist", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tfrecord_is_read_only_if_every_sum_in_it_fits(tmp_path):
    rng = np.random.default_rng(0)
    records = [rng.bytes(n) for n in (9, 0, 700, 1, 64)]
    whole, path = b"".join(map(framed_as_tensorflow_does, records)), tmp_path / "a.tfrecord"
    path.write_bytes(whole)
    assert read_tfrecords(path) == records
    path.write_bytes(b"")
    assert read_tfrecords(path) == []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ends within a record|has changed since it was written"):
            read_tfrecords(path)


def test_a_folder_that_cannot_be_written(mnist_dir, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tfds_sets._Builder, "download_and_prepare", full)
    with pytest.raises(DataError, match=r"mnist cannot be prepared in .*No space left.*set data_dir="):
        load("mnist", mnist_dir)


def test_a_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is not a folder: set data_dir= to one"):
        load("mnist", tmp_path / "file")


def test_a_version_folder_without_a_set(mnist_dir):
    (mnist_dir / "mnist/0.1.0").mkdir()
    with pytest.raises(DataError, match=r"0.1.0 exists but holds no prepared set: delete it"):
        load("mnist", mnist_dir)


def test_another_process_prepared_it_first(mnist_dir, monkeypatch):
    examples = tfds_sets._Builder._generate_examples

    def generate(self, x, y):
        # While this one is at work, another finishes.
        monkeypatch.setattr(tfds_sets._Builder, "_generate_examples", examples)
        load("mnist", mnist_dir)
        yield from examples(self, x, y)

    monkeypatch.setattr(tfds_sets._Builder, "_generate_examples", generate)
    assert len(load("mnist", mnist_dir).train.y) == 50
    assert [p.name for p in (mnist_dir / "mnist").iterdir() if p.is_dir()] == ["0.1.0"]


def test_no_such_set(tmp_path):
    with pytest.raises(SettingsError, match="no data set 'imagenet': set dataset= to one of mnist, f"):
        tfds_sets.load_tfds("imagenet", tmp_path)


def run(root, code, **kwargs):
    return subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True, **kwargs)


def test_tensorflow_is_never_imported_nor_tfds_early_and_nothing_is_printed(mnist_dir):
    process = run(mnist_dir, IMPORTS, stderr=subprocess.PIPE)
    assert process.communicate() == ("False False\n", "")


IMPORTS = """
import sys
import wavg_jax.data
early = "tensorflow_datasets" in sys.modules
wavg_jax.data.load("mnist", sys.argv[1])
print(early, "tensorflow" in sys.modules)
"""


def test_killed_while_preparing(mnist_dir):
    process = run(mnist_dir, STUCK)
    assert process.stdout.readline() == "at work\n"
    process.kill()
    process.communicate()
    assert list(mnist_dir.glob("mnist/incomplete*"))
    assert_nothing_prepared(mnist_dir)
    assert len(load("mnist", mnist_dir).train.y) == 50


# To the real stdout, because what TFDS prints while it prepares is swallowed.
STUCK = """
import sys, time
from wavg_jax.data import load, tfds_sets
from wavg_jax.data.tfrecords import read_tfrecords

def generate(self, x, y):
    yield 0, {"image": x[0], "label": int(y[0])}
    print("at work", file=sys.__stdout__, flush=True)
    time.sleep(60)

tfds_sets._Builder._generate_examples = generate
load("mnist", sys.argv[1])
"""
