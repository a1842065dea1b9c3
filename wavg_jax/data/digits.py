"""The small data set that comes with scikit-learn: no download, and training on it takes seconds."""

import numpy as np

from wavg_jax.data.arrays import Dataset, from_arrays


def digits() -> Dataset:
    """Loads scikit-learn's 1,797 handwritten digits in 10 classes, split 80:20 by class with a fixed seed.

    Returns:
      Images [N, 8, 8], uint8 with values 0 to 16 as published (not 0 to 255; standardising makes up for it): 1,437 to
      train on, 360 to test on, with every class in the same proportion.

    Reference: https://archive.ics.uci.edu/dataset/80 (the test part of that set, as in `sklearn.datasets.load_digits`).

    >>> data = digits()
    >>> data.train.x.shape, data.test.x.shape, data.classes
    ((1437, 8, 8), (360, 8, 8), 10)
    """
    # scikit-learn takes a second to import, which who brings other data should not wait for.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        source.images.astype(np.uint8), source.target, test_size=0.2, random_state=0, stratify=source.target
    )
    return from_arrays(x_train, y_train, x_test, y_test, name="digits", classes=10)
