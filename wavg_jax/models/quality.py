"""Metrics of a classifier: sums over samples, and the metrics derived from them."""

import jax
import jax.numpy as jnp
import optax

from wavg_jax.base import Sums

BINS = 15
"""Number of confidence bins in the calibration error."""


def sums(logits: jax.Array, labels: jax.Array) -> Sums:
    """Sums over samples from which `metrics` derives every metric.

    Args:
      logits: [B, classes] float32.
      labels: [B] int32.

    Returns:
      `loss`: total cross-entropy, nats. `confusion`: counts [classes, classes], rows true labels, columns predictions.
      `calibration`: [BINS], the sum of `right - confidence` over the samples of each confidence bin.
    """
    predicted, classes = logits.argmax(-1), logits.shape[-1]
    confidence = jax.nn.softmax(logits).max(-1)
    # A diverged network's confidence is NaN; any bin will do, since the sum is NaN too.
    bins = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    gap = (predicted == labels).astype(jnp.float32) - confidence
    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(),
        "confusion": jnp.zeros((classes, classes), jnp.float32).at[labels, predicted].add(1.0),
        "calibration": jnp.where(jax.nn.one_hot(bins, BINS, dtype=bool), gap[:, None], 0).sum(axis=0),
    }


def metrics(sums: Sums, samples: jax.Array) -> dict[str, jax.Array]:
    """Computes a classifier's metrics on `samples` samples from their sums.

    Returns:
      `accuracy`: share of correct predictions.
      `loss`: mean cross-entropy, nats.
      `macro_f1`: mean over the classes of `2 tp / (predicted + true)`, 0 for a class that neither occurs nor is
      predicted.
      `ece`: expected calibration error `sum_b (n_b / n) |accuracy_b - confidence_b|` over BINS bins of equal width
      (Guo et al. 2017, arXiv:1706.04599).
      `confusion`: counts [classes, classes], int32.
    """
    confusion = sums["confusion"]
    right = jnp.diagonal(confusion)
    f1 = 2 * right / jnp.maximum(confusion.sum(axis=0) + confusion.sum(axis=1), 1)
    return {
        "accuracy": right.sum() / samples,
        "loss": sums["loss"] / samples,
        "macro_f1": f1.mean(),
        "ece": jnp.abs(sums["calibration"]).sum() / samples,
        "confusion": confusion.astype(jnp.int32),
    }
