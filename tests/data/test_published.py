"""The publishers' files in small: what is damaged is named and leaves nothing behind; what is missing is downloaded."""

import gzip
import hashlib
import io
import shutil
import struct
import tarfile
import urllib.error

import numpy as np
import pytest

from wavg_jax.base import DataError
from wavg_jax.data import load
from wavg_jax.data.published import PUBLISHED, Part

IDX = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 50)}
IDX["test"] = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 20)


def samples(n, shape, seed=0):
    rng = np.random.default_rng([n, seed])
    return rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n).astype(np.uint8)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_files(seed=0):
    """The four unpacked files by name."""
    files = {}
    for images, labels, n in IDX.values():
        x, y = samples(n, (28, 28), seed)
        files |= {images: idx(x), labels: idx(y)}
    return files


def cifar_files():
    """The six unpacked files by name, 10 samples each: a label, then all of red, of green, of blue."""
    files = {}
    for seed, name in enumerate(PUBLISHED["cifar10"].parts):
        x, y = samples(10, (32, 32, 3), seed)
        files[name] = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(10, -1)], 1).tobytes()
    return files


def write(folder, files, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(raw, 1) if packed else raw)


def tar(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as archive:
        # Not in the order of their numbers, which is so in the published archive too.
        for name, raw in reversed({**files, "readme.html": b"hello"}.items()):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


def assert_same_samples(split, x, y):
    """TFDS stores the samples in the order of a hash of their number."""
    assert len(split.y) == len(y)
    want = {image.tobytes(): label for image, label in zip(x, y, strict=True)}
    assert {image.tobytes(): label for image, label in zip(split.x, split.y, strict=True)} == want


def assert_nothing_prepared(root, name="mnist"):
    assert not list(root.glob(f"{name}/[0-9]*"))
    assert not list(root.rglob("*.part"))


@pytest.fixture
def mnist_dir(tmp_path):
    write(tmp_path / "mnist", mnist_files())
    return tmp_path


def cut(raw):
    return raw[: len(raw) // 2]


X, Y = samples(50, (28, 28))
DAMAGE = {
    "gzip cut": ("train-images-idx3-ubyte", lambda raw: cut(gzip.compress(raw)), "cannot be unpacked"),
    "gzip bytes": ("train-images-idx3-ubyte", lambda raw: b"\x1f\x8b" + bytes(100), "cannot be unpacked"),
    "not idx": ("train-images-idx3-ubyte", lambda raw: b"<html>" + raw, "does not start like an idx file"),
    "nothing": ("t10k-images-idx3-ubyte", lambda raw: b"", "does not start like an idx file"),
    "header cut": ("t10k-images-idx3-ubyte", lambda raw: raw[:7], "does not start like an idx file"),
    "labels for images": ("train-images-idx3-ubyte", lambda raw: idx(Y), "does not start like an idx file"),
    "cut": ("train-images-idx3-ubyte", lambda raw: raw[:-1], "promises 39216 bytes, but it has 39215"),
    "too long": ("train-labels-idx1-ubyte", lambda raw: raw + b"x", "promises 58 bytes, but it has 59"),
    "other images": ("train-images-idx3-ubyte", lambda raw: idx(X[:, :9]), r"images are \(9, 28\), not \(28, 28\)"),
    "fewer labels": ("train-labels-idx1-ubyte", lambda raw: idx(Y[:40]), "50 images, but .* 40 labels"),
    "label 10": (
        "train-labels-idx1-ubyte",
        lambda raw: raw[:-1] + b"\x0a",
        "sample 49 has label 10, beyond 10",
    ),
    "another set's": (
        "t10k-labels-idx1-ubyte",
        lambda raw: idx(np.zeros(10_000, np.uint8)),
        "content differs from mnist's t10k-labels",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named_and_nothing_prepared(mnist_dir, case):
    name, damage, message = DAMAGE[case]
    path = mnist_dir / "mnist" / f"{name}.gz"
    path.write_bytes(damage(mnist_files()[name]))
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", mnist_dir)
    assert f"{name}.gz is damaged" in str(caught.value) or case == "fewer labels"
    assert str(caught.value).endswith("replace it with the published file, or delete it")
    assert_nothing_prepared(mnist_dir)
    # Once fixed, it loads.
    write(mnist_dir / "mnist", mnist_files())
    assert len(load("mnist", mnist_dir).train.y) == 50


CIFAR_DAMAGE = {
    "cut": (lambda path: path.write_bytes(cut(path.read_bytes())), "cannot be unpacked"),
    "not tar": (lambda path: path.write_bytes(b"hello"), "cannot be unpacked"),
    "lacks one": (
        lambda path: tar(path.parent, {n: r for n, r in cifar_files().items() if n != "test_batch.bin"}),
        "lacks test_batch.bin",
    ),
    "record cut": (
        lambda path: tar(path.parent, cifar_files() | {"data_batch_2.bin": bytes(3074)}),
        "data_batch_2.bin has 3074 bytes, which is not a multiple of 3073",
    ),
    "empty": (lambda path: tar(path.parent, cifar_files() | {"test_batch.bin": b""}), "is empty"),
    "label": (
        lambda path: tar(path.parent, cifar_files() | {"test_batch.bin": b"\xff" * 3073}),
        "label 255, beyond",
    ),
}


@pytest.mark.parametrize("case", CIFAR_DAMAGE)
def test_a_damaged_archive_is_named(tmp_path, case):
    damage, message = CIFAR_DAMAGE[case]
    tar(tmp_path, cifar_files())
    damage(tmp_path / "cifar-10-binary.tar.gz")
    with pytest.raises(DataError, match=rf"cifar-10-binary.tar.gz is damaged.*{message}"):
        load("cifar10", tmp_path)
    assert_nothing_prepared(tmp_path, "cifar10")


def test_an_unpacked_folder_that_lacks_a_file(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    write(folder, cifar_files(), packed=False)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"cifar-10-batches-bin lacks data_batch_3.bin: unpack cifar-10-binary.tar.gz"):
        load("cifar10", tmp_path)


def publish(monkeypatch, folder, files):
    """Publishes the files in `folder`, to be downloaded from there."""
    parts = {name: Part(len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in files.items()}
    name = "mnist" if "test_batch.bin" not in files else "cifar10"
    published = PUBLISHED[name]._replace(url=f"{folder.as_uri()}/", parts=parts)
    monkeypatch.setitem(PUBLISHED, name, published)


def test_missing_files_are_downloaded(tmp_path, monkeypatch):
    files, server, home = mnist_files(), tmp_path / "server", tmp_path / "home"
    publish(monkeypatch, server, files)
    write(server, files)
    assert_same_samples(load("mnist", home).train, *samples(50, (28, 28)))
    assert sorted(p.name for p in (home / "downloads/mnist").iterdir()) == sorted(f"{name}.gz" for name in files)
    # Kept: preparing again needs no network.
    shutil.rmtree(home / "mnist")
    shutil.rmtree(server)
    assert len(load("mnist", home).train.y) == 50


def test_a_missing_archive_is_downloaded(tmp_path, monkeypatch):
    publish(monkeypatch, tmp_path / "server", cifar_files())
    tar(tmp_path / "server", cifar_files())
    assert len(load("cifar10", tmp_path / "home").train.y) == 50


@pytest.mark.parametrize("sent", ["cut", "other"])
def test_a_download_must_be_the_published_file(tmp_path, monkeypatch, sent):
    files, server, home = mnist_files(), tmp_path / "server", tmp_path / "home"
    publish(monkeypatch, server, files)
    write(server, mnist_files(seed=1) if sent == "other" else files)
    if sent == "cut":
        path = server / "train-images-idx3-ubyte.gz"
        path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(DataError, match=r"file://.*train-images-idx3-ubyte.gz did not send the published file"):
        load("mnist", home)
    assert not [p for p in home.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("name", "wanted"), [("fashion_mnist", "train-images-idx3-ubyte.gz, train-labels"), ("cifar10", "cifar-10-binary")]
)
@pytest.mark.parametrize("error", [urllib.error.URLError(OSError(-2, "Name or service not known")), TimeoutError()])
def test_without_network_it_says_which_files_go_where(tmp_path, monkeypatch, name, wanted, error):
    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    message = rf"cannot download .*put {wanted}.* into .*/{name} by hand, or set data_dir="
    with pytest.raises(DataError, match=message) as caught:
        load(name, tmp_path / "home")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "home").exists()
