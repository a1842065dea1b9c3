"""The publishers' files of MNIST, Fashion-MNIST and CIFAR-10: finds, downloads, checks and reads them."""

import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import math
import os
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wavg_jax.base import DataError
from wavg_jax.data.arrays import Split

_BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError)
_TIMEOUT_S = 30


class Part(NamedTuple):
    """One published file, unpacked: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


class Found(NamedTuple):
    """The content of a part, and the file that held it."""

    path: Path
    raw: bytes


class Published(NamedTuple):
    """A data set as its publisher offers it.

    Attributes:
      class_names: in the order of the class numbers.
      url: address of the folder to download from.
      archive: the one file that holds all parts; "" if each part is a gzip file of its own.
      folder: the folder inside the archive; "" without an archive.
      parts: the unpacked files, by name.
      decode: `{name of a part: Found} -> {"train": Split, "test": Split}`, with images [N, H, W, C].
    """

    class_names: tuple[str, ...]
    url: str
    archive: str
    folder: str
    parts: Mapping[str, Part]
    decode: Callable[[Mapping[str, Found]], dict[str, Split]]

    @property
    def classes(self) -> int:
        return len(self.class_names)


def read_published(name: str, published: Published, data_dir: Path) -> dict[str, Split]:
    """Reads a set from its publisher's files and downloads those that are missing.

    It looks in `data_dir/<name>`, `data_dir/downloads/<name>`, `data_dir` and `data_dir/downloads`, for packed and for
    unpacked files. A file of the published size must match the published one to the byte; a file of another size
    counts as another set in the same format, with any number of samples.

    Args:
      name: name of the set.
      published: its files.
      data_dir: folder to look in; downloads go to `data_dir/downloads/<name>`.

    Returns:
      The train and test splits, in the publisher's order.

    Raises:
      DataError: a file is damaged or belongs to another set, or cannot be downloaded or stored.
    """
    folders = [data_dir / name, data_dir / "downloads" / name, data_dir, data_dir / "downloads"]
    read = _read_archive if published.archive else _read_gzips
    try:
        found = read(name, published, folders)
    except OSError as error:
        raise DataError(f"{name}: cannot read {data_dir} ({error}): check data_dir=") from None
    for part, (path, raw) in found.items():
        if len(raw) == published.parts[part].size and not _is_published(published.parts[part], raw):
            raise damaged(path, f"its content differs from {name}'s {part}")
    return published.decode(found)


def damaged(path: Path, why: str) -> DataError:
    """The error for a file that differs from the published one."""
    return DataError(
        f"{path} is damaged or of another data set ({why}): replace it with the published file, or delete it"
    )


def _is_published(part: Part, raw: bytes) -> bool:
    return len(raw) == part.size and hashlib.sha256(raw).hexdigest() == part.sha256


def _read_gzips(name: str, published: Published, folders: list[Path]) -> dict[str, Found]:
    found = {}
    for part in published.parts:
        candidates = [folder / file for folder in folders for file in (f"{part}.gz", part)]
        path = next((p for p in candidates if p.is_file()), None)
        path = path or _download(name, published, f"{part}.gz", folders)
        found[part] = Found(path, _unzip(path))
    return found


_MOST = 2**30
"""Bytes of a part, unpacked; the largest published one has 47 million, and a small file can unpack to any number."""


def _unzip(path: Path) -> bytes:
    raw = path.read_bytes()
    # By content, not by name: some browsers unpack a download and keep its name.
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            unpacked = file.read(_MOST + 1)
    except _BROKEN:
        raise damaged(path, "it cannot be unpacked") from None
    if len(unpacked) > _MOST:
        raise damaged(path, f"it unpacks to more than {_MOST} bytes")
    return unpacked


def _read_archive(name: str, published: Published, folders: list[Path]) -> dict[str, Found]:
    if unpacked := next((f / published.folder for f in folders if (f / published.folder).is_dir()), None):
        paths = {part: unpacked / part for part in published.parts}
        if missing := [path.name for path in paths.values() if not path.is_file()]:
            raise DataError(f"{unpacked} lacks {', '.join(missing)}: unpack {published.archive} there again")
        return {part: Found(path, path.read_bytes()) for part, path in paths.items()}
    path = next((f / published.archive for f in folders if (f / published.archive).is_file()), None)
    path = path or _download(name, published, published.archive, folders)
    return _untar(published, path)


def _untar(published: Published, path: Path) -> dict[str, Found]:
    found, packed = {}, io.BytesIO(path.read_bytes())
    try:
        with tarfile.open(fileobj=packed, mode="r:gz") as archive:
            for member in archive:
                part = member.name.removeprefix("./").removeprefix(f"{published.folder}/")
                if part in published.parts and member.size > _MOST:
                    raise damaged(path, f"{part} has {member.size} bytes")
                if part in published.parts and (content := archive.extractfile(member)):
                    found[part] = Found(path, content.read())
    except _BROKEN:
        raise damaged(path, "it cannot be unpacked") from None
    if missing := published.parts.keys() - found.keys():
        raise damaged(path, f"it lacks {', '.join(sorted(missing))}")
    # The archive stores the parts in another order, and sample numbers run through all of them.
    return {part: found[part] for part in published.parts}


def _download(name: str, published: Published, file: str, folders: list[Path]) -> Path:
    """Stores one published file in `data_dir/downloads/<name>`; only a complete file gets its name."""
    url, folder = published.url + file, folders[1]
    wanted = [published.archive] if published.archive else [f"{part}.gz" for part in published.parts]
    by_hand = f"put {', '.join(wanted)} into {folders[0]} by hand, or set data_dir= to a folder that has them"
    partial = folder / f"{file}.{os.getpid()}.part"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as target:
                shutil.copyfileobj(response, target)
        if not _is_whole(published, file, partial):
            raise DataError(f"{url} did not send the published file of {name}: {by_hand}")
        partial.replace(folder / file)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise DataError(f"{name}: cannot download {url} to {folder} ({reason}): {by_hand}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return folder / file


def _is_whole(published: Published, file: str, path: Path) -> bool:
    try:
        if published.archive:
            contents = {part: found.raw for part, found in _untar(published, path).items()}
        else:
            contents = {file.removesuffix(".gz"): _unzip(path)}
    except DataError:
        return False
    return all(_is_published(published.parts[part], raw) for part, raw in contents.items())


def _decode_idx(shape: tuple[int, int], classes: int, found: Mapping[str, Found]) -> dict[str, Split]:
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = found[f"{prefix}-images-idx3-ubyte"], found[f"{prefix}-labels-idx1-ubyte"]
        x, y = _idx(images, 3), _idx(labels, 1)
        if x.shape[1:] != shape:
            raise damaged(images.path, f"its images are {x.shape[1:]}, not {shape}")
        if len(x) != len(y):
            raise damaged(images.path, f"it holds {len(x)} images, but {labels.path.name} {len(y)} labels")
        _check_labels(labels.path, y, classes)
        splits[split] = Split(x[..., None], y.astype(np.int32))
    return splits


def _idx(found: Found, axes: int) -> np.ndarray:
    path, raw = found
    start = 4 + 4 * axes
    if raw[:4] != bytes([0, 0, 8, axes]) or len(raw) < start:
        raise damaged(path, f"it does not start like an idx file of bytes with {axes} axes")
    shape = [int(n) for n in np.frombuffer(raw, ">u4", axes, offset=4)]
    if len(raw) != start + math.prod(shape):
        raise damaged(path, f"its header promises {start + math.prod(shape)} bytes, but it has {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _decode_cifar(shape: tuple[int, int, int], classes: int, found: Mapping[str, Found]) -> dict[str, Split]:
    splits: dict[str, list[Split]] = {"train": [], "test": []}
    for part, (path, raw) in found.items():
        record = 1 + math.prod(shape)
        if len(raw) % record:
            raise damaged(path, f"{part} has {len(raw)} bytes, which is not a multiple of {record}")
        records = np.frombuffer(raw, np.uint8).reshape(-1, record)
        _check_labels(path, records[:, 0], classes)
        # Stored channel by channel.
        x = records[:, 1:].reshape(-1, *shape).transpose(0, 2, 3, 1)
        splits["test" if part.startswith("test") else "train"].append(Split(x, records[:, 0].astype(np.int32)))
    return {name: Split(*(np.concatenate(arrays) for arrays in zip(*s, strict=True))) for name, s in splits.items()}


def _check_labels(path: Path, y: np.ndarray, classes: int) -> None:
    if not len(y):
        raise damaged(path, "it is empty")
    if y.max() >= classes:
        raise damaged(
            path, f"sample {int(np.argmax(y >= classes))} has label {y[y >= classes][0]}, beyond {classes} classes"
        )


def _idx_parts(train_images: str, train_labels: str, test_images: str, test_labels: str) -> dict[str, Part]:
    return {
        "train-images-idx3-ubyte": Part(47_040_016, train_images),
        "train-labels-idx1-ubyte": Part(60_008, train_labels),
        "t10k-images-idx3-ubyte": Part(7_840_016, test_images),
        "t10k-labels-idx1-ubyte": Part(10_008, test_labels),
    }


_decode_mnist = functools.partial(_decode_idx, (28, 28), 10)

DIGITS = tuple("0123456789")
PUBLISHED = {
    "mnist": Published(
        class_names=DIGITS,
        url="https://storage.googleapis.com/cvdf-datasets/mnist/",
        archive="",
        folder="",
        parts=_idx_parts(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        decode=_decode_mnist,
    ),
    "fashion_mnist": Published(
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        archive="",
        folder="",
        parts=_idx_parts(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        decode=_decode_mnist,
    ),
    "cifar10": Published(
        class_names=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        url="https://www.cs.toronto.edu/~kriz/",
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        parts={
            f"{batch}.bin": Part(30_730_000, sha256)
            for batch, sha256 in {
                "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
                "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
                "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
                "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
                "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
                "test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
            }.items()
        },
        decode=functools.partial(_decode_cifar, (3, 32, 32), 10),
    ),
}
