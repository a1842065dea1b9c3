"""How much a sample of each class counts, where classes differ in size."""

import numpy as np
from numpy.typing import ArrayLike

from wavg_jax.arguments import INT32, as_whole, fits_memory
from wavg_jax.base import SettingsError
from wavg_jax.data.shards import class_labels


@fits_memory
def class_weights(labels: ArrayLike, classes: int) -> np.ndarray:
    """Weights with which every class counts the same in all, `c_i = N / (classes * N_i)`: scikit-learn's "balanced", of
    King and Zeng (Logistic Regression in Rare Events Data, Political Analysis 9(2), 2001).

    Args:
      labels: integers [N] in [0, classes), such as `dataset.train.y`.
      classes: their number.

    Returns:
      float32 [classes], for `wavg_jax.models.classifier(class_weights=)`; 0 for a class without samples. Their mean
      over the samples is 1 where every class occurs.

    Raises:
      SettingsError: the labels are no integers [N] in [0, classes), or there are none.

    >>> class_weights([0, 0, 0, 1], 2).tolist()
    [0.6666666865348816, 2.0]
    """
    labels, classes = class_labels("class_weights", labels), as_whole("classes", classes, 1, INT32)
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise SettingsError(f"class_weights needs labels in [0, {classes}), one at least; number them from 0")
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts, len(labels) / (classes * np.maximum(counts, 1)), 0).astype(np.float32)
