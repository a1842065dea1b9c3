"""What is measured: held-out signals, gradients on a common batch, windows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax import models
from wavg_jax.base import Batch
from wavg_jax.devices.placement import place
from wavg_jax.rounds import keys, score
from wavg_jax.rounds.forward import Forward, metrics
from wavg_jax.weighting import signals

TASK = regression()
SOURCE = sharded()
HELD_OUT = ("loss", "accuracy", "macro_f1", "ece")


@functools.lru_cache
def network():
    return TASK.init(jax.random.key(3))


HELD_OUT_SPLIT = Batch(jnp.asarray(SOURCE.heldout.x), jnp.asarray(SOURCE.heldout.y, jnp.int32))


def forward(chunk=7, task=TASK, dtype=None):
    return Forward(task, SOURCE.prepare, dtype, chunk)


@functools.lru_cache
def measure(*needs, chunk=7):
    """Jitted, so that tests share it."""
    return jax.jit(score.measure(forward(chunk), needs))


def logits_of_all():
    return TASK.predict(*network(), SOURCE.prepare(jnp.asarray(SOURCE.heldout.x)))


@pytest.mark.parametrize("size", [7, 20, 1000])
def test_signals_are_those_of_the_whole_held_out_split_whatever_the_chunk(size):
    found = measure("loss", "accuracy", chunk=size)(network(), HELD_OUT_SPLIT)
    logits = logits_of_all()
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(SOURCE.heldout.y)).mean()
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], (np.argmax(logits, 1) == SOURCE.heldout.y).mean(), rtol=1e-6)


def test_one_forward_pass_serves_all_held_out_signals():
    calls = []

    def predict(*arguments):
        calls.append(1)
        return TASK.predict(*arguments)

    one = score.measure(forward(1000, TASK._replace(predict=predict)), HELD_OUT)
    jax.eval_shape(one, network(), HELD_OUT_SPLIT)
    assert len(calls) == 1


@jax.jit
def gradient_on(x, y):
    params, mutable = network()
    batch = Batch(SOURCE.prepare(x), y)
    return jax.grad(lambda p: TASK.loss(p, mutable, batch, jax.random.key(0))[0])(params)


@pytest.mark.parametrize("size", [5, 1000])
def test_the_gradient_norm_is_taken_on_one_common_batch_and_summed_per_tensor(size):
    found = measure("grad_norm", "layer_grad_norm", chunk=size)(network(), HELD_OUT_SPLIT)
    gradient = gradient_on(SOURCE.heldout.x, SOURCE.heldout.y)
    expected = {name: np.sqrt(np.square(np.asarray(g, np.float64)).sum()) for name, g in gradient.items()}
    assert set(found) == {"grad_norm", "layer_grad_norm"}
    np.testing.assert_allclose(found["grad_norm"], expected["w"] + expected["b"], rtol=1e-5)
    for name, norm in expected.items():
        np.testing.assert_allclose(found["layer_grad_norm"][name], norm, rtol=1e-5)


def test_the_common_batch_of_few_samples_starts_over():
    window = score.window(HELD_OUT_SPLIT, jnp.int32(1), 13)  # samples 13 to 19, then 0 to 5
    found = score.measure(forward(), ("fisher",))
    order = [*range(13, 20), *range(6)]
    assert np.array_equal(window.y, HELD_OUT_SPLIT.y[np.array(order)])
    again = Batch(*(a[np.array(order)[np.arange(score.FISHER_SAMPLES) % 13]] for a in HELD_OUT_SPLIT))
    few, many = (jax.jit(found)(network(), samples)["fisher"] for samples in (window, again))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), few, many)


def test_fisher_is_the_mean_square_of_the_gradients_of_samples_with_drawn_labels():
    found = measure("fisher")(network(), HELD_OUT_SPLIT)["fisher"]
    # 20 samples serve 64 places. In NumPy: d log p(y|x) / d(logits) = onehot(y) - p, times x for the weights.
    order = np.arange(score.FISHER_SAMPLES) % 20
    x = np.asarray(SOURCE.prepare(jnp.asarray(SOURCE.heldout.x[order])), np.float64)
    logits = np.asarray(logits_of_all())[order]
    drawn = jax.random.split(keys.roots(jax.random.key(0)).fisher, len(order))
    y = [jax.random.categorical(k, jax.nn.log_softmax(row)) for k, row in zip(drawn, jnp.asarray(logits), strict=True)]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    residual = np.eye(3)[np.array(y)] - p
    np.testing.assert_allclose(found["b"], np.square(residual).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["w"], np.square(x[:, :, None] * residual[:, None]).mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(signals.HIGHER_IS_BETTER) - {"distance", "absolute_error", *signals.FREE}))
def test_signals_mapped_over_replicas_have_the_shape_of_their_zeros(name):
    stacked = wavg.replicate(network(), 4)
    take = jax.vmap(score.measure(forward(), (name,)), in_axes=(0, None))
    found = jax.eval_shape(take, stacked, HELD_OUT_SPLIT)[name]
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
    rough = jax.jit(score.measure(forward(7, task, jnp.bfloat16), needs))(one, HELD_OUT_SPLIT)
    assert all(dtypes == ["bfloat16"] * 3 + ["int32"] for dtypes in seen)
    fine = jax.jit(score.measure(forward(7, task), needs))(one, HELD_OUT_SPLIT)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(rough))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(rough[name], fine[name], rtol=0.02)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_metrics_of_a_blend_are_those_of_a_replica_and_differentiable(chunk):
    params, mutable = network()

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        scores = score.scalar_metrics(forward(chunk), params, mutable, HELD_OUT_SPLIT)
        return scores["loss"], scores

    (_, scores), found = loss(params)
    expected = measure(*HELD_OUT, chunk=chunk)(network(), HELD_OUT_SPLIT)
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-6)
    for g, e in zip(
        jax.tree.leaves(found), jax.tree.leaves(gradient_on(SOURCE.heldout.x, SOURCE.heldout.y)), strict=True
    ):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("samples", [16, 20, 13])
def test_samples_spread_over_devices_measure_the_same(samples):
    where = place(4, 4)
    split = Batch(*(a[:samples] for a in HELD_OUT_SPLIT))  # 13 do not divide, and run on every device
    alone = jax.jit(functools.partial(metrics, forward(3)))(*network(), split)
    shared = functools.partial(metrics, forward(3)._replace(over_samples=where.over_samples))
    spread = jax.jit(where.together(shared))(*network(), split)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), alone, spread)


def test_distance_by_hand_in_float32():
    # sqrt(3^2 + 4^2 + 12^2)
    params = {"w": jnp.array([4.0, 5.0], jnp.bfloat16), "b": jnp.array([12.0])}
    found = score.distance(params, {"w": jnp.ones(2), "b": jnp.zeros(1)})
    assert found.dtype == jnp.float32
    assert float(found) == 13


@pytest.mark.parametrize(
    ("round", "samples", "expected"),
    [(0, 2, [0, 1]), (1, 2, [2, 3]), (2, 2, [4, 0]), (3, 2, [0, 1]), (1, 4, [4, 0, 1, 2]), (7, 5, [0, 1, 2, 3, 4])],
)
def test_a_window_rotates_with_the_round(round, samples, expected):
    split = Batch(jnp.arange(5.0), jnp.arange(5))
    found = jax.jit(lambda r: score.window(split, r, samples))(jnp.int32(round))
    assert found.y.tolist() == expected
    assert found.x.tolist() == expected


def test_a_window_late_in_a_long_run_does_not_overflow():
    late = 2**31 - 2  # an even round, of two windows
    assert score.window(Batch(jnp.arange(5.0), jnp.arange(5)), jnp.int32(late), 4).y.tolist() == [0, 1, 2, 3]


def test_no_window_takes_every_sample():
    assert score.window(HELD_OUT_SPLIT, jnp.int32(3), None) is HELD_OUT_SPLIT


def test_only_passes_that_are_needed_are_made():
    calls = []
    task = TASK._replace(predict=lambda *_: calls.append("predict"))
    take = score.measure(forward(7, task), ("train_loss", "evaluate", "distance"))
    assert take(network(), HELD_OUT_SPLIT) == {}
    assert calls == []


def test_what_reads_the_held_out_split():
    assert not score.reads_heldout(("distance", *signals.FREE))
    assert score.reads_heldout(("evaluate",))
    assert score.reads_heldout(("fisher",))


def test_unknown_signals_are_named():
    score.check_measurable((*signals.HIGHER_IS_BETTER, "evaluate"), (*HELD_OUT, "absolute_error"))
    with pytest.raises(wavg.SettingsError, match="'cosine'"):
        score.check_measurable(("loss", "cosine"), HELD_OUT)
    with pytest.raises(wavg.SettingsError, match=r"'accuracy'.*measures loss, "):
        score.check_measurable(("accuracy",), ("loss",))


def test_fisher_of_a_regression_is_refused():
    numbers = Batch(HELD_OUT_SPLIT.x, HELD_OUT_SPLIT.x[:, 0])
    with pytest.raises(wavg.SettingsError, match="predicts classes"):
        jax.eval_shape(score.measure(forward(), ("fisher",)), network(), numbers)


def test_the_scores_of_any_task_are_its_own_metrics():
    task = models.regressor(
        lambda rng: ({"w": jnp.ones(4)}, {}), lambda params, mutable, x, *, train, rng: (x @ params["w"], mutable)
    )
    numbers = Batch(HELD_OUT_SPLIT.x, HELD_OUT_SPLIT.x.sum(axis=1) + 1)
    as_is = Forward(task, chunk=6)
    found = jax.jit(score.measure(as_is, ("loss", "absolute_error")))(({"w": jnp.ones(4)}, {}), numbers)
    np.testing.assert_allclose(found["loss"], 1, rtol=1e-5)
    np.testing.assert_allclose(found["absolute_error"], 1, rtol=1e-5)
