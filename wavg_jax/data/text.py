"""A text as a data set: windows of its bytes, in which every byte but the first is predicted once."""

import numpy as np
from numpy.typing import ArrayLike

from wavg_jax.arguments import as_whole, check, number
from wavg_jax.base import DataError
from wavg_jax.data.arrays import Dataset, Split, from_arrays

BYTES = 256
"""The vocabulary of a text read byte by byte."""


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

    >>> x, y = windows(np.arange(8), context=3)
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    context = as_whole("context", context, 1)
    tokens = np.asarray(tokens)
    n = max(len(tokens) - 1, 0) // context
    x, y = (tokens[first : first + n * context].reshape(n, context).copy() for first in (0, 1))
    return Split(x, y)


def from_text(text: bytes | str, *, context: int = 128, name: str = "text", test: float = 0.05) -> Dataset:
    """Builds a data set for a language model of a text, byte by byte.

    The test split is the end of the text. `wavg_jax.data.shard` holds out what comes right before that, so training,
    held-out and test samples are contiguous parts of the text, and no byte is a target in two of them.

    Args:
      text: bytes; a str is encoded in UTF-8.
      context: T, bytes that a window predicts; see `windows`.
      name: the data set's name in rows and reports.
      test: share of the windows that are for testing, rounded, but at least one.

    Returns:
      Windows [n, T] of bytes, in the order of the text; `classes` is 256, `bytes_per_token` 1.

    Raises:
      SettingsError: `context` or `test` is out of range.
      DataError: the text has fewer than three windows, one to train on, one to hold out and one to test on.

    >>> data = from_text("to be or not to be, that is the question", context=4)
    >>> data.train.x.shape, bytes(data.test.x[0]), bytes(data.test.y[0].astype("uint8"))
    ((8, 4), b'ques', b'uest')
    """
    check("test", test, number(0, below=1))
    context = as_whole("context", context, 1)
    raw = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)
    if len(raw) < 3 * context + 1:
        raise DataError(
            f"{name} has {len(raw)} bytes, too few for three windows of context={context}: give a longer text, or "
            "lower context="
        )
    x, y = windows(raw, context)
    cut = len(x) - max(round(test * len(x)), 1)
    dataset = from_arrays(x[:cut], y[:cut], x[cut:], y[cut:], name=name, classes=BYTES)
    return dataset._replace(bytes_per_token=1.0)
