"""What is reported of a classifier's logits on the test split, on the host."""

from typing import NamedTuple

import numpy as np


class Quality(NamedTuple):
    """Quality of a classifier.

    Attributes:
      accuracy: share of right predictions, 0 to 1.
      loss: mean cross-entropy, nats.
      macro_f1: mean over the classes of the F1 score, 0 to 1.
      ece: expected calibration error, 0 to 1.
      confusion: [classes, classes] counts, rows are true labels, columns predictions.
    """

    accuracy: float
    loss: float
    macro_f1: float
    ece: float
    confusion: np.ndarray


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of equal width (Guo et al. 2017).

        ece = sum_b (n_b / n) * |accuracy_b - confidence_b|

    Args:
      probabilities: [N, classes], rows sum to 1.
      labels: integers [N].
      bins: number of bins of the confidence, the highest probability of a row.

    >>> expected_calibration_error(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1])).__round__(3)
    0.4
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    # Of a network that diverged no confidence is a number: any bin will do, since its gap is none either.
    where = np.clip(np.ceil(np.nan_to_num(confidence) * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(where, weights=right.astype(float) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def evaluate(logits: np.ndarray, labels: np.ndarray) -> Quality:
    """Measures logits [N, classes] against integer labels [N].

    The F1 score of a class that neither occurs nor is predicted is 0.
    Where logits are not finite, loss and ece are NaN.
    """
    # In NumPy, since importing scikit-learn for it would take longer than the first round; a test compares the two.
    logits, classes = np.asarray(logits, np.float64), logits.shape[1]
    with np.errstate(invalid="ignore"):  # inf - inf
        shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    predictions = logits.argmax(axis=1)
    confusion = np.bincount(classes * labels.astype(np.int64) + predictions, minlength=classes**2)
    confusion = confusion.reshape(classes, classes)
    f1 = 2 * np.diag(confusion) / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1), 1)
    return Quality(
        accuracy=float((predictions == labels).mean()),
        loss=float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        macro_f1=float(f1.mean()),
        ece=expected_calibration_error(np.exp(log_probabilities), labels),
        confusion=confusion,
    )
