"""Loads a data set by its name."""

from os import PathLike, fspath

from wavg_jax.base import SettingsError
from wavg_jax.data.arrays import Dataset, as_path, from_npz
from wavg_jax.data.embedded import digits
from wavg_jax.data.published import PUBLISHED
from wavg_jax.data.text import from_text
from wavg_jax.data.text_sets import TEXTS, is_text, read_text
from wavg_jax.extras import need


def load(
    name_or_path: str | PathLike[str],
    data_dir: str | PathLike[str] = "~/tensorflow_datasets",
    *,
    context: int = 128,
    tokenizer: str | PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set by its name, or your own by its path.

    Args:
      name_or_path: "digits" (ships with the library), "mnist", "fashion_mnist" or "cifar10" (read from `data_dir`, and
        downloaded and prepared if missing), or the path of an `.npz` file (see `from_npz`). Texts are "python_docs"
        (the help topics of the Python that runs), "tiny_shakespeare" (`tiny_shakespeare.txt` in `data_dir`), and the
        path of a `.txt` file, read byte by byte (see `from_text`).
      data_dir: folder of TensorFlow Datasets; "~" is the home folder.
      context: of a text, bytes or tokens that a window predicts.
      tokenizer: of a text, the `tokenizer.json` that cuts it into tokens; None reads bytes. See `from_text`.

    Returns:
      The data set.

    Raises:
      SettingsError: there is no such set.
      DataError: the files are missing or damaged; the message says how to mend it.
      MissingExtra: the set comes from TensorFlow Datasets, which is not installed.

    >>> load("digits").classes
    10
    """
    name, data_dir = fspath(as_path("the data set", name_or_path)), as_path("data_dir", data_dir)
    if name.endswith(".npz"):
        return from_npz(name)
    if is_text(name):
        found, text = read_text(name, data_dir)
        return from_text(text, context=context, name=found, tokenizer=tokenizer)
    if name == "digits":
        return digits()
    if name in PUBLISHED:
        need("tensorflow_datasets", extra="tfds", why=f"the data set {name!r}")
        # Not at the top: importing TFDS takes most of a second.
        from wavg_jax.data.tfds_sets import load_tfds

        return load_tfds(name, data_dir)
    raise SettingsError(
        f"no data set {name!r}: set dataset= to digits, {', '.join((*PUBLISHED, *TEXTS))}, or the path of an .npz or "
        ".txt file"
    )
