"""Texts by their names: Python's own help topics, tiny Shakespeare, and files."""

import hashlib
from pathlib import Path

from wavg_jax.base import DataError

PYTHON_DOCS, TINY_SHAKESPEARE = "python_docs", "tiny_shakespeare"
TEXTS = (PYTHON_DOCS, TINY_SHAKESPEARE)
_SIZE = 1_115_394
_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def is_text(name: str) -> bool:
    """Whether a data set of that name, or at that path, is a text.

    >>> is_text("python_docs"), is_text("notes.txt"), is_text("digits")
    (True, True, False)
    """
    return name in TEXTS or name.endswith(".txt")


def read_text(name: str, data_dir: Path) -> tuple[str, bytes]:
    """Reads a text for which `is_text` holds.

    Args:
      name: a name in TEXTS, or the path of a file.
      data_dir: the folder that holds `tiny_shakespeare.txt`.

    Returns:
      The name of the data set, and the bytes.

    Raises:
      DataError: the file is missing or cannot be read, or is not what was published.
    """
    if name == PYTHON_DOCS:
        return name, python_docs()
    if name == TINY_SHAKESPEARE:
        return name, _tiny_shakespeare(data_dir / "tiny_shakespeare.txt")
    return Path(name).stem, _read(Path(name).expanduser(), "set dataset= to the path of a text file")


def python_docs() -> bytes:
    """The help topics of the Python that runs, `pydoc_data.topics`, in alphabetical order: 0.4 to 0.8 MB of English.

    They are on every machine, and differ between versions of Python: compare runs only where `data_crc` in the rows
    agrees.

    Reference: Python Software Foundation, https://docs.python.org/3/reference (PSF licence).
    """
    from pydoc_data.topics import topics  # not at the top: 0.5 MB that other sets do not need

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def _tiny_shakespeare(path: Path) -> bytes:
    """Karpathy's excerpt of 40,000 lines, which TFDS calls `tiny_shakespeare`."""
    source = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    text = _read(path, f"put {source} there, or set data_dir= to the folder that has it")
    if len(text) == _SIZE and hashlib.sha256(text).hexdigest() != _SHA256:
        raise DataError(f"{path} has the size of the published text, but not its bytes: get {source} again")
    return text


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from None
