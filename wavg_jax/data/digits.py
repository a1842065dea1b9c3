"""The small data set that comes with the library: no download, and training on it takes seconds."""

from pathlib import Path

from wavg_jax.data.arrays import Dataset, from_npz
from wavg_jax.data.published import DIGITS


def digits() -> Dataset:
    """Loads the 1,797 handwritten digits that also come with scikit-learn, split 80:20 by class once and for all.

    Returns:
      Images [N, 8, 8], uint8 with values 0 to 16 as published (not 0 to 255; standardising makes up for it): 1,437 to
      train on, 360 to test on, with every class in the same proportion.

    Reference: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998, CC BY 4.0,
    https://archive.ics.uci.edu/dataset/80 (the test part of that set, as in `sklearn.datasets.load_digits`).

    >>> data = digits()
    >>> data.train.x.shape, data.test.x.shape, data.classes
    ((1437, 8, 8), (360, 8, 8), 10)
    """
    # A file of our own: importing scikit-learn for its copy takes longer than the first round.
    return from_npz(Path(__file__).with_suffix(".npz"))._replace(class_names=DIGITS)
