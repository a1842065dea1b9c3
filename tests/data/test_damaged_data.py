"""Whatever is done to a file of data, it is read, or refused with one line; what carries sums is never read otherwise
than it was written. `--fuzz=2000` tries so many of each kind."""

import urllib.request

import jax
import numpy as np
import pytest
from damage import read_damaged
from test_published import cifar_files, mnist_files, tar, write
from test_tfds import official

from wavg_jax.data import from_npz, load
from wavg_jax.data.published import PUBLISHED, read_published

pytestmark = pytest.mark.fuzz


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("a damaged file is downloaded anew"))


def published(name):
    return lambda folder: read_published(name, PUBLISHED[name], folder)


KINDS = {
    "idx": (lambda folder: write(folder / "mnist", mnist_files(), packed=False), published("mnist")),
    "idx_packed": (lambda folder: write(folder / "mnist", mnist_files()), published("mnist")),
    "cifar": (
        lambda folder: write(folder / "cifar10/cifar-10-batches-bin", cifar_files(), packed=False),
        published("cifar10"),
    ),
    "cifar_packed": (lambda folder: tar(folder / "cifar10", cifar_files()), published("cifar10")),
    "text": (
        lambda folder: (folder / "mine.txt").write_text("the quick brown fox " * 100),
        lambda folder: load(folder / "mine.txt", context=16),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_with_one_line(kind, cases, tmp_path):
    make, read = KINDS[kind]
    make(tmp_path)
    read(tmp_path)
    with cases(f"files: {kind.replace('_', ', ')}") as tried:
        read_damaged(tmp_path, lambda: read(tmp_path), tried, kind)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_never_read_otherwise_than_it_was_written(save, cases, tmp_path):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(20, 5)).astype(np.float32), np.arange(20) % 3
    save(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])
    whole = from_npz(tmp_path / "mine.npz")
    with cases("files: npz") as tried:
        read_damaged(
            tmp_path, lambda: from_npz(tmp_path / "mine.npz"), tried, 0, lambda read: same(read[1:3], whole[1:3])
        )
    assert tried.counts["refused"] > tried.tries / 5


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_a_damaged_prepared_set_is_never_read_otherwise_than_it_was_written(kind, cases, tmp_path):
    official(tmp_path, kind)
    whole, folder = load("mnist", tmp_path), next((tmp_path / "mnist").iterdir())
    described = {path: path.read_bytes() for path in folder.glob("*.json")}  # without sums

    def read():
        for path, content in described.items():
            path.write_bytes(content)
        return load("mnist", tmp_path)

    with cases(f"files: {kind}", 0.2) as tried:
        read_damaged(folder, read, tried, 0, lambda read: same(read[1:3], whole[1:3]))
    assert tried.counts["refused"] > tried.tries / 5
