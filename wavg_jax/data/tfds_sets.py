"""MNIST, Fashion-MNIST and CIFAR-10 through TensorFlow Datasets, without TensorFlow.

The official builders need TensorFlow to prepare a set, but not to read one. So this module reads a prepared set as is,
whoever prepared it, and prepares a missing one from the publisher's files with a builder of its own. That builder uses
the official keys, so TFDS shuffles both alike: sample i is the same image either way.

Importing this module takes most of a second, for TFDS; `wavg_jax.data.load` imports it only for these sets.
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from wavg_jax.base import DataError, SettingsError
from wavg_jax.data.arrays import Dataset, Split, from_arrays
from wavg_jax.data.published import PUBLISHED, read_published
from wavg_jax.data.tfrecords import read_tfrecords

# Below every official version, so that an official set is preferred and ours never passes for one.
VERSION = "0.1.0"


def load_tfds(name: str, data_dir: str | PathLike[str]) -> Dataset:
    """Loads a set from `data_dir/<name>/<version>`, which it prepares first if it is missing.

    Preparing takes the publisher's files from `data_dir` (see `wavg_jax.data.published.read_published`) or downloads
    them. It writes to a folder `incomplete.*` and renames it once complete, so a killed run leaves nothing that looks
    like a prepared set, and two runs at once do not disturb each other. Of several prepared versions it reads the
    newest, in the format array_record, parquet or tfrecord.

    Args:
      name: "mnist", "fashion_mnist" or "cifar10".
      data_dir: the folder of TFDS; "~" is the home folder.

    Returns:
      Images [N, H, W, C], uint8, in TFDS's stored order.

    Raises:
      SettingsError: there is no such set.
      DataError: the set or a publisher's file is damaged, a download fails, or `data_dir` cannot be read or written.
    """
    if name not in PUBLISHED:
        raise SettingsError(f"no data set {name!r}: set dataset= to one of {', '.join(PUBLISHED)}")
    root = Path(data_dir).expanduser()
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is not a folder: set data_dir= to one")
    try:
        folder = _find_prepared(root / name)
    except OSError as error:
        raise DataError(f"{name}: cannot read {root} ({error}): check data_dir=") from None
    folder = folder or _prepare(name, root)
    try:
        train, test = (_read_split(folder, split) for split in ("train", "test"))
    except DataError:
        raise
    except Exception as error:  # the type that a damaged file raises depends on format, decoder and their versions
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the prepared set in {folder} cannot be read ({reason}): delete that folder to prepare it again"
        ) from None
    published = PUBLISHED[name]
    dataset = from_arrays(*train, *test, name=name, classes=published.classes)
    return dataset._replace(class_names=published.class_names)


def _find_prepared(folder: Path) -> Path | None:
    """The newest version in TFDS's layout; an interrupted preparation leaves no folder named like a version."""
    versions = [
        path
        for path in folder.glob("*.*.*/")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
        and (path / "dataset_info.json").is_file()
        and (path / "features.json").is_file()
    ]
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))), default=None)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the given splits; not registered, so that in TFDS the name still means the official builder."""

    VERSION = tfds.core.Version(VERSION)
    # TFDS downloads nothing here; without this it would look for checksums beside this file.
    url_infos = None

    def __init__(self, name: str, splits: dict[str, Split], root: Path):
        self.name, self._arrays = name, splits
        super().__init__(data_dir=root, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        shape, classes = self._arrays["train"].x.shape[1:], PUBLISHED[self.name].classes
        # Bytes take a tenth of the time of the default, a list of integers.
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name} as published, prepared by wavg_jax.",
            features=tfds.features.FeaturesDict(
                {"image": image, "label": tfds.features.ClassLabel(num_classes=classes)}
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(*arrays) for split, arrays in self._arrays.items()}

    def _generate_examples(self, x: np.ndarray, y: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            yield i, {"image": image, "label": int(label)}


def _prepare(name: str, root: Path) -> Path:
    splits = read_published(name, PUBLISHED[name], root)
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    folder = root / name / VERSION
    try:
        # TFDS makes a download folder even for no downloads, and prints its progress.
        with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
            builder = _Builder(name, splits, root)
            builder.download_and_prepare(download_dir=unused, download_config=config)
    except (OSError, RuntimeError) as error:
        # If another process was first, renaming onto its folder fails, and its set serves as well.
        if _find_prepared(root / name) != folder:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{name} cannot be prepared in {root} ({reason}): set data_dir= to another") from None
    if _find_prepared(root / name) is None:
        raise DataError(f"{folder} exists but holds no prepared set: delete it")
    return folder


def _read_split(folder: Path, split: str) -> Split:
    builder = tfds.builder_from_directory(folder)
    info = builder.info
    formats = {f.value for f in info.available_file_formats()}
    if formats & {"array_record", "parquet"}:
        source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        records = source.__getitems__(range(len(source)))
    elif "tfrecord" in formats:
        records = [record for path in info.splits[split].filepaths for record in read_tfrecords(Path(path))]
    else:
        raise DataError(
            f"{folder} is stored as {', '.join(formats)}, which needs TensorFlow to read: convert it with "
            f"`tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record`"
        )
    if len(records) != info.splits[split].num_examples:
        raise ValueError(f"{split} has {len(records)} of {info.splits[split].num_examples} samples")
    return _decode(records, info.features)


def _decode(records: list[bytes], features: Any) -> Split:
    """Decodes all records at five times the speed of `features.deserialize_example_np`, which handles any feature."""
    image = features["image"]
    is_encoded = isinstance(image, tfds.features.Image)
    x = np.empty((len(records), *image.shape), np.uint8)
    y = np.empty(len(records), np.int32)
    for i, record in enumerate(records):
        fields = tf_example_pb2.Example.FromString(record).features.feature
        y[i] = fields["label"].int64_list.value[0]
        if is_encoded:
            with Image.open(io.BytesIO(fields["image"].bytes_list.value[0])) as picture:
                x[i] = np.asarray(picture).reshape(image.shape)
        elif stored := fields["image"].bytes_list.value:
            x[i] = image.decode_example_np(stored[0])
        else:
            x[i] = np.asarray(fields["image"].int64_list.value).reshape(image.shape)
    return Split(x, y)
