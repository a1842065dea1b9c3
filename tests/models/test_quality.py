"""Quality of a classifier, against numbers worked by hand and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from wavg_jax.models import quality


def measured(logits, labels):
    sums = jax.jit(quality.sums)(jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32))
    return quality.metrics(sums, jnp.float32(len(labels)))


def test_metrics_worked_by_hand():
    # Predictions 0, 0, 1, 2 against labels 0, 1, 1, 1.
    log = np.log(np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    found = measured(log, [0, 1, 1, 1])
    assert found["accuracy"] == 0.5
    assert found["confusion"].tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    np.testing.assert_allclose(found["loss"], -np.log([0.8, 0.3, 0.8, 0.2]).mean(), rtol=1e-6)
    # F1: class 0 2*1/(2+1), class 1 2*1/(2+2), class 2 nothing.
    np.testing.assert_allclose(found["macro_f1"], (2 / 3 + 1 / 2 + 0) / 3, rtol=1e-6)
    # Two bins: confidence 0.8 twice, both right; 0.6 twice, both wrong.
    np.testing.assert_allclose(found["ece"], 0.5 * 0.2 + 0.5 * 0.6, rtol=1e-5)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_loss_and_calibration_of_logits_that_are_not_finite_are_nan(broken):
    found = measured([[1.0, 0.0], [broken, broken]], [0, 1])
    assert np.isnan([found["loss"], found["ece"]]).all()
    assert found["confusion"].sum() == 2


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_metrics_match_scikit_learn(scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(500, 7))).astype(np.float32)
    logits[:, 5:] -= 1e3  # two classes that are never predicted, one of which never occurs either
    labels = np.where(rng.random(500) < 0.5, logits.argmax(1), rng.integers(0, 6, 500))
    found, predicted, every = measured(logits, labels), logits.argmax(1), np.arange(7)
    np.testing.assert_array_equal(found["confusion"], sklearn.metrics.confusion_matrix(labels, predicted, labels=every))
    f1 = sklearn.metrics.f1_score(labels, predicted, labels=every, average="macro", zero_division=0.0)
    np.testing.assert_allclose(found["macro_f1"], f1, rtol=1e-5)
    shares = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)), np.float64)
    loss = -np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)), np.float64)[np.arange(500), labels].mean()
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    confidence, right = shares.max(1), predicted == labels
    bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    gaps = [np.abs((right[bins == b] - confidence[bins == b]).sum()) for b in range(15)]
    np.testing.assert_allclose(found["ece"], np.sum(gaps) / 500, rtol=1e-4, atol=1e-6)


def test_a_perfectly_calibrated_classifier_has_no_calibration_error():
    found = measured(np.log(np.tile([0.75, 0.25], (4, 1))), [0, 0, 0, 1])
    np.testing.assert_allclose(found["ece"], 0, atol=1e-6)


def test_the_sums_of_two_halves_add_up():
    rng = np.random.default_rng(1)
    logits, labels = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32), jnp.asarray(rng.integers(0, 3, 64), jnp.int32)
    whole = quality.sums(logits, labels)
    halves = [quality.sums(logits[s], labels[s]) for s in (slice(32), slice(32, None))]
    for name, total in whole.items():
        np.testing.assert_allclose(halves[0][name] + halves[1][name], total, rtol=1e-5, atol=1e-5)
