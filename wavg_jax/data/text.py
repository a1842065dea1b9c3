"""A text as a data set: windows of its bytes or tokens, in which every one but the first is predicted once."""

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from wavg_jax.arguments import INT32, as_whole, check, fits_memory, instance, number
from wavg_jax.base import DataError
from wavg_jax.data.arrays import Dataset, Split, as_array, as_path, from_arrays
from wavg_jax.extras import need

BYTES = 256
"""The vocabulary of a text read byte by byte."""


@fits_memory
def windows(tokens: ArrayLike, context: int) -> Split:
    """Cuts tokens into windows of T + 1, which overlap in one token, so that each but the first is a target once.

        x_i = tokens[i T : i T + T],    y_i = tokens[i T + 1 : i T + T + 1]

    Args:
      tokens: [N], in the order of the text.
      context: T, inputs per window.

    Returns:
      Inputs and targets [n, T] of n = (N - 1) // T windows in the order of the text, copies of the tokens. The last
      (N - 1) % T tokens, fewer than a window's, are targets of none.

    Raises:
      SettingsError: T is not a whole number, 1 or more.
      DataError: the tokens have another shape.

    >>> x, y = windows(np.arange(8), context=3)
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    context = as_whole("context", context, 1, INT32)
    tokens = as_array("the tokens", tokens)
    if tokens.ndim != 1:
        raise DataError(f"the tokens have shape {tokens.shape}: give [N], in the order of the text")
    n = max(len(tokens) - 1, 0) // context
    x, y = (tokens[first : first + n * context].reshape(n, context).copy() for first in (0, 1))
    return Split(x, y)


def from_text(
    text: bytes | str,
    *,
    context: int = 128,
    name: str = "text",
    test: float = 0.05,
    tokenizer: str | PathLike[str] | None = None,
) -> Dataset:
    """Builds a data set for a language model of a text, byte by byte or token by token.

    The test split is the end of the text. `wavg_jax.data.shard` holds out what comes right before that, so training,
    held-out and test samples are contiguous parts of the text, and no byte is a target in two of them.

    Args:
      text: bytes; a str is encoded in UTF-8.
      context: T, bytes or tokens that a window predicts; see `windows`.
      name: the data set's name in rows and reports.
      test: share of the windows that are for testing, rounded, but at least one.
      tokenizer: the `tokenizer.json` of Hugging Face's `tokenizers`, which cuts a text in UTF-8 into tokens, without
        adding any of its own; None reads bytes.

    Returns:
      Windows [n, T] in the order of the text. Of bytes, `classes` is 256 and `bytes_per_token` 1; of tokens, they are
      the size of the vocabulary, and what a token of the test split stands for on average.

    Raises:
      SettingsError: `context` or `test` is out of range.
      DataError: the text has fewer than three windows, one to train on, one to hold out and one to test on, or is not
        UTF-8; or the tokenizer cannot be read.
      MissingExtra: `tokenizer` is given, and tokenizers is not installed.

    >>> data = from_text("to be or not to be, that is the question", context=4)
    >>> data.train.x.shape, bytes(data.test.x[0]), bytes(data.test.y[0].astype("uint8"))
    ((8, 4), b'ques', b'uest')
    """
    check("test", test, number(0, below=1))
    check("text", text, instance((str, bytes, bytearray, memoryview), "a str, or bytes"))
    context = as_whole("context", context, 1, INT32)
    raw = text.encode(errors="surrogatepass") if isinstance(text, str) else bytes(text)
    if tokenizer is None:
        tokens, classes, starts = np.frombuffer(raw, np.uint8), BYTES, None
    else:
        tokens, classes, starts = _tokens(raw, name, as_path("tokenizer", tokenizer))
    if len(tokens) < 3 * context + 1:
        raise DataError(
            f"{name} has {len(tokens)} {'bytes' if starts is None else 'tokens'}, too few for three windows of "
            f"context={context}: give a longer text, or lower context="
        )
    x, y = windows(tokens, context)
    cut = len(x) - max(round(test * len(x)), 1)
    dataset = from_arrays(x[:cut], y[:cut], x[cut:], y[cut:], name=name, classes=classes)
    if starts is None:
        return dataset._replace(bytes_per_token=1.0)
    first, last = cut * context + 1, len(x) * context + 1  # the targets of the test split
    return dataset._replace(bytes_per_token=float(starts[last] - starts[first]) / (last - first))


def load_tokenizer(path: Path) -> Any:
    """Reads a `tokenizer.json`, but for the truncation and padding that many files ask for; DataError if it is none."""
    tokenizers = need("tokenizers", extra="tokenizers", why="tokenizer=")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    except OSError as error:
        raise DataError(f"the tokenizer {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # tokenizers raises Exception itself
        raise DataError(f"{path} is no file of the tokenizers library: {' '.join(str(error).split())[:200]}") from None


def _tokens(raw: bytes, name: str, path: Path) -> tuple[np.ndarray, int, np.ndarray]:
    """The tokens [N] of a text, the size of the vocabulary, and the byte at which each starts, and the last ends,
    [N + 1]."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 (byte {error.start}), as tokenizers need it: convert it, or leave out tokenizer="
        ) from None
    tokenizer = load_tokenizer(path)
    encoded = tokenizer.encode(text, add_special_tokens=False)
    # Offsets count characters.
    sizes = np.array([len(c.encode()) for c in text], np.int64)
    at = np.concatenate([[0], np.cumsum(sizes)])
    starts = at[[*(start for start, _ in encoded.offsets), len(text)]]
    # Numbers may have gaps, so that the largest is beyond the size.
    classes = max(2, *(1 + number for number in tokenizer.get_vocab().values()))
    small = np.uint16 if classes <= 2**16 else np.int32
    return np.asarray(encoded.ids, small), classes, starts
