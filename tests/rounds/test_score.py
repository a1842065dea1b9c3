"""What is measured: held-out signals, gradients on a common batch, windows, and the metrics of the report."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax import models
from wavg_jax.base import Batch
from wavg_jax.rounds import keys
from wavg_jax.rounds import score as scoring
from wavg_jax.training import metrics
from wavg_jax.weighting import signals

TASK = regression()
SOURCE = sharded()
HELD_OUT = ("loss", "accuracy", "macro_f1", "ece")


@functools.lru_cache
def network():
    return TASK.init(jax.random.key(3))


@functools.lru_cache
def measure(*needs):
    """Jitted, so that tests share it."""
    return jax.jit(scoring.measure(TASK, SOURCE.prepare, needs))


def chunks_of(size, x=SOURCE.heldout.x, y=SOURCE.heldout.y):
    return jax.tree.map(jnp.asarray, scoring.chunked(x, y, size))


def logits_of_all():
    return TASK.predict(*network(), SOURCE.prepare(jnp.asarray(SOURCE.heldout.x)))


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


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_of_logits_that_are_not_finite_the_measures_are_nan_without_a_warning(broken):
    quality = metrics.evaluate(np.array([[1.0, 0.0], [broken, broken]]), np.array([0, 1]))
    assert np.isnan([quality.loss, quality.ece]).all()
    assert quality.confusion.sum() == 2


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 5)) * 3, rng.integers(0, 4, 50)  # class 4 never occurs
    quality, predicted, every = metrics.evaluate(logits, labels), logits.argmax(1), np.arange(5)
    np.testing.assert_array_equal(quality.confusion, sklearn.metrics.confusion_matrix(labels, predicted, labels=every))
    f1 = sklearn.metrics.f1_score(labels, predicted, labels=every, average="macro", zero_division=0.0)
    np.testing.assert_allclose(quality.macro_f1, f1)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(quality.loss, sklearn.metrics.log_loss(labels, shares, labels=every))


def test_a_perfectly_calibrated_classifier_has_no_calibration_error():
    probabilities = np.tile([0.75, 0.25], (4, 1))
    assert metrics.expected_calibration_error(probabilities, np.array([0, 0, 0, 1])) == 0


@pytest.mark.parametrize("size", [7, 20, 1000])
def test_signals_are_those_of_the_whole_held_out_split_whatever_the_chunk(size):
    found = measure("loss", "accuracy")(network(), chunks_of(size))
    logits = logits_of_all()
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(SOURCE.heldout.y)).mean()
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], (np.argmax(logits, 1) == SOURCE.heldout.y).mean(), rtol=1e-6)


# Its parameters are the logits of 500 samples, whose inputs are their positions.
TABLE = wavg.Task(
    init=lambda rng: (jnp.zeros((500, 7)), {}),
    loss=lambda params, mutable, batch, rng: (params.sum(), (mutable, {})),
    predict=lambda params, mutable, x: params[x],
)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_the_held_out_signals_are_the_numbers_of_the_report(scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(500, 7))).astype(np.float32)
    logits[:, 5] -= 1e3  # a class that is never predicted,
    logits[:, 6] -= 1e3  # and one that is not there either
    labels = np.where(rng.random(500) < 0.5, logits.argmax(1), rng.integers(0, 6, 500))
    chunks = chunks_of(64, np.arange(500), labels)
    found = jax.jit(scoring.measure(TABLE, lambda x: x, HELD_OUT))((jnp.asarray(logits), {}), chunks)
    expected = metrics.evaluate(logits, labels)
    assert set(found) == set(HELD_OUT)
    for name, value in found.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, getattr(expected, name), rtol=2e-5, atol=1e-6, err_msg=name)


def test_one_forward_pass_serves_all_held_out_signals():
    calls = []

    def predict(*arguments):
        calls.append(1)
        return TASK.predict(*arguments)

    jax.eval_shape(scoring.measure(TASK._replace(predict=predict), SOURCE.prepare, HELD_OUT), network(), chunks_of(7))
    assert len(calls) == 1


@jax.jit
def gradient_on(x, y):
    params, mutable = network()
    batch = Batch(SOURCE.prepare(x), y)
    return jax.grad(lambda p: TASK.loss(p, mutable, batch, jax.random.key(0))[0])(params)


@pytest.mark.parametrize("size", [5, 1000])
def test_the_gradient_norm_is_taken_on_one_common_batch_and_summed_per_tensor(size):
    found = measure("grad_norm", "layer_grad_norm")(network(), chunks_of(size))
    gradient = gradient_on(SOURCE.heldout.x, SOURCE.heldout.y)
    expected = {name: np.sqrt(np.square(np.asarray(g, np.float64)).sum()) for name, g in gradient.items()}
    assert set(found) == {"grad_norm", "layer_grad_norm"}
    np.testing.assert_allclose(found["grad_norm"], expected["w"] + expected["b"], rtol=1e-5)
    for name, norm in expected.items():
        np.testing.assert_allclose(found["layer_grad_norm"][name], norm, rtol=1e-5)


def test_padding_never_enters_the_common_batch():
    # 20 samples in chunks of 7: the third has 6 and comes first in this window.
    window = scoring.window(chunks_of(7), jnp.int32(1), 2)
    assert np.asarray(window.valid).sum(axis=1).tolist() == [6, 7]
    found = measure("grad_norm", "layer_grad_norm")(network(), window)["grad_norm"]
    # 14 places, 13 samples: the first comes again.
    order = [*range(14, 20), *range(7), 14]
    gradient = gradient_on(SOURCE.heldout.x[order], SOURCE.heldout.y[order])
    np.testing.assert_allclose(found, sum(np.linalg.norm(g) for g in gradient.values()), rtol=1e-5)


def test_fisher_is_the_mean_square_of_the_gradients_of_samples_with_drawn_labels():
    found = measure("fisher")(network(), chunks_of(7))["fisher"]
    # 20 samples serve 64 places. In NumPy: d log p(y|x) / d(logits) = onehot(y) - p, times x for the weights.
    order = np.arange(scoring.FISHER_SAMPLES) % 20
    x = np.asarray(SOURCE.prepare(jnp.asarray(SOURCE.heldout.x[order])), np.float64)
    logits = np.asarray(logits_of_all())[order]
    drawn = jax.random.split(keys.roots(jax.random.key(0)).fisher, len(order))
    y = [jax.random.categorical(k, jax.nn.log_softmax(row)) for k, row in zip(drawn, jnp.asarray(logits), strict=True)]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    residual = np.eye(3)[np.array(y)] - p
    np.testing.assert_allclose(found["b"], np.square(residual).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["w"], np.square(x[:, :, None] * residual[:, None]).mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(signals.HIGHER_IS_BETTER) - {"distance", *signals.FREE}))
def test_signals_mapped_over_replicas_have_the_shape_of_their_zeros(name):
    stacked = wavg.replicate(network(), 4)
    take = jax.vmap(scoring.measure(TASK, SOURCE.prepare, (name,)), in_axes=(0, None))
    found = jax.eval_shape(take, stacked, chunks_of(7))[name]
    expected = signals.zeros(name, network()[0], 4)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def test_a_forward_pass_in_bfloat16_gives_float32_signals_close_by():
    seen = []

    def apply(params, mutable, x, *, train, rng):
        seen.append([a.dtype.name for a in (params["w"], mutable["mean"], x, mutable["count"])])
        return (x - mutable["mean"][None]) @ params["w"] + params["b"][None], mutable

    task = models.classifier(lambda rng: (network()[0], {}), apply)
    one = (network()[0], {"mean": jnp.full(4, 0.25), "count": jnp.int32(3)})
    needs = (*HELD_OUT, "grad_norm", "layer_grad_norm", "fisher")
    rough = jax.jit(scoring.measure(task, SOURCE.prepare, needs, jnp.bfloat16))(one, chunks_of(7))
    assert all(dtypes == ["bfloat16"] * 3 + ["int32"] for dtypes in seen)
    fine = jax.jit(scoring.measure(task, SOURCE.prepare, needs))(one, chunks_of(7))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(rough))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(rough[name], fine[name], rtol=0.02)


def test_the_evaluator_scores_as_measure_does_and_is_differentiable():
    params, mutable = network()
    evaluate = scoring.evaluator(TASK, SOURCE.prepare)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def score(params):
        scores = evaluate(params, mutable, chunks_of(7))
        return scores["loss"], scores

    (_, scores), found = score(params)
    expected = measure("loss", "accuracy")(network(), chunks_of(7))
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-6)
    for g, e in zip(
        jax.tree.leaves(found), jax.tree.leaves(gradient_on(SOURCE.heldout.x, SOURCE.heldout.y)), strict=True
    ):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-6)


def test_distance_by_hand_in_float32():
    # sqrt(3^2 + 4^2 + 12^2)
    params = {"w": jnp.array([4.0, 5.0], jnp.bfloat16), "b": jnp.array([12.0])}
    found = scoring.distance(params, {"w": jnp.ones(2), "b": jnp.zeros(1)})
    assert found.dtype == jnp.float32
    assert float(found) == 13


@pytest.mark.parametrize(
    ("round", "count", "expected"),
    [(0, 2, [0, 1]), (1, 2, [2, 3]), (2, 2, [4, 0]), (5, 2, [0, 1]), (2, 4, [3, 4, 0, 1]), (7, 5, [0, 1, 2, 3, 4])],
)
def test_a_window_rotates_with_the_round(round, count, expected):
    chunks = chunks_of(1, np.arange(5.0), np.arange(5))
    take = jax.jit(lambda r: scoring.window(chunks, r, count))
    assert take(jnp.int32(round)).y.ravel().tolist() == expected
    assert take(jnp.int32(round)).x.ravel().tolist() == expected


def test_a_window_late_in_a_long_run_does_not_overflow():
    chunks = chunks_of(1, np.arange(5.0), np.arange(5))
    late = 2**31 - 2
    found = scoring.window(chunks, jnp.int32(late), 4).y.ravel().tolist()
    assert found == [(late * 4 + i) % 5 for i in range(4)]


def test_an_empty_window_is_refused():
    with pytest.raises(wavg.SettingsError, match="at least 1"):
        scoring.window(chunks_of(7), jnp.int32(0), 0)


def test_only_passes_that_are_needed_are_made():
    calls = []
    task = TASK._replace(predict=lambda *_: calls.append("predict"))
    take = scoring.measure(task, lambda x: x, ("train_loss",))
    assert take(TASK.init(jax.random.key(0)), None) == {}
    assert calls == []
    assert scoring.measured(("train_loss",)) == ()
    assert scoring.measured(("accuracy", "train_loss")) == ("accuracy",)
    assert scoring.measured(("evaluate", "distance", *signals.FREE)) == ()


def test_what_reads_the_held_out_split():
    assert not scoring.reads_heldout(("distance", *signals.FREE))
    assert scoring.reads_heldout(("evaluate",))
    assert scoring.reads_heldout(("fisher",))


def test_unknown_signals_are_named():
    scoring.measurable((*signals.HIGHER_IS_BETTER, "evaluate"))
    with pytest.raises(wavg.SettingsError, match="'cosine'"):
        scoring.measurable(("loss", "cosine"))
