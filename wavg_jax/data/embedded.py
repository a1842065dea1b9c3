"""The small data set inside the package: nothing to download, and it trains in seconds."""

from pathlib import Path

from wavg_jax.data.arrays import Dataset, from_npz
from wavg_jax.data.published import DIGITS


def digits() -> Dataset:
    """Loads the 1,797 handwritten digits of scikit-learn, in a fixed 80:20 split of every class.

    Returns:
      Images [N, 8, 8], uint8, with the published values 0 to 16 (not 0 to 255; standardisation makes up for it); 1,437
      for training and 360 for testing, every class in the same proportion in both.

    Reference: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998, CC BY 4.0,
    https://archive.ics.uci.edu/dataset/80 (the test part of that set, as in `sklearn.datasets.load_digits`).

    >>> data = digits()
    >>> data.train.x.shape, data.test.x.shape, data.classes
    ((1437, 8, 8), (360, 8, 8), 10)
    """
    # Our own file, because importing scikit-learn for its copy takes longer than the first round.
    return from_npz(Path(__file__).with_name("digits.npz"))._replace(class_names=DIGITS)
