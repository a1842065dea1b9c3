"""What is measured: held-out signals, common gradient norm, and the metrics of the report, worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax import metrics, signals
from wavg_jax.base import Batch

TASK = regression()


def test_metrics_worked_by_hand():
    # Predictions 0, 0, 1, 2 against labels 0, 1, 1, 1.
    log = np.log(np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    labels = np.array([0, 1, 1, 1])
    quality = metrics.evaluate(log, labels)
    assert quality.accuracy == 0.5
    assert quality.confusion.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    np.testing.assert_allclose(quality.loss, -np.log([0.8, 0.3, 0.8, 0.2]).mean())
    # F1: class 0 2*1/(2+1), class 1 2*1/(2+2), class 2 nothing.
    np.testing.assert_allclose(quality.macro_f1, (2 / 3 + 1 / 2 + 0) / 3)
    # Two bins: confidence 0.8 twice, both right; 0.6 twice, both wrong.
    np.testing.assert_allclose(quality.ece, 0.5 * 0.2 + 0.5 * 0.6)


def test_a_perfectly_calibrated_classifier_has_no_calibration_error():
    probabilities = np.tile([0.75, 0.25], (4, 1))
    assert metrics.expected_calibration_error(probabilities, np.array([0, 0, 0, 1])) == 0


@pytest.mark.parametrize("size", [7, 20, 1000])
def test_signals_are_those_of_the_whole_held_out_split_whatever_the_chunk(size):
    source = sharded()
    params, mutable = TASK.init(jax.random.key(3))
    chunks = jax.tree.map(jnp.asarray, signals.chunked(source.heldout.x, source.heldout.y, size))
    found = signals.measure(TASK, source.prepare, ("loss", "accuracy"))((params, mutable), chunks)
    logits = TASK.predict(params, mutable, source.prepare(jnp.asarray(source.heldout.x)))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(source.heldout.y)).mean()
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], (np.argmax(logits, 1) == source.heldout.y).mean(), rtol=1e-6)


def test_the_gradient_norm_is_taken_on_one_common_batch():
    source = sharded()
    params, mutable = TASK.init(jax.random.key(3))
    chunks = jax.tree.map(jnp.asarray, signals.chunked(source.heldout.x, source.heldout.y, 1000))
    found = signals.measure(TASK, source.prepare, ("grad_norm",))((params, mutable), chunks)
    batch = Batch(source.prepare(jnp.asarray(source.heldout.x)), jnp.asarray(source.heldout.y))
    gradient = jax.grad(lambda p: TASK.loss(p, mutable, batch, jax.random.key(0))[0])(params)
    expected = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradient)))
    assert set(found) == {"grad_norm"}
    np.testing.assert_allclose(found["grad_norm"], expected, rtol=1e-5)


def test_only_passes_that_are_needed_are_made():
    calls = []
    task = TASK._replace(predict=lambda *_: calls.append("predict"))
    take = signals.measure(task, lambda x: x, ("train_loss",))
    assert take(TASK.init(jax.random.key(0)), None) == {}
    assert calls == []
    assert signals.measured(("train_loss",)) == ()
    assert signals.measured(("accuracy", "train_loss")) == ("accuracy",)


def test_unknown_signals_are_named():
    signals.measurable(("loss", "train_loss", "grad_norm", "accuracy"))
    with pytest.raises(wavg.SettingsError, match="'cosine'"):
        signals.measurable(("loss", "cosine"))
