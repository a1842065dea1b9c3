"""Regression and language modelling, from arrays to rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import train

import wavg_jax as wavg
from wavg_jax import data, models

OPTIONS = {"local_steps": 4, "rounds": 3, "batch_size": 8, "devices": 1}
WEIGHTINGS = {"softmax": lambda: wavg.softmax("loss"), "learned": wavg.learned}


def deal(dataset):
    return data.shard(dataset, lambda split, seed: data.iid(len(split.y), 2, seed), heldout=20, seed=0)


def linear_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3))
    y = x @ rng.normal(size=(3, 2)) + 0.1 * rng.normal(size=(120, 2))
    return deal(data.from_arrays(x[:100], y[:100], x[100:], y[100:], name="line"))


def text_data():
    """Each token is followed by the next one of the alphabet."""
    text = (np.arange(120)[:, None] + np.arange(6)).astype(np.uint8) % 5
    x, y = text[:, :-1], text[:, 1:]
    return deal(data.from_arrays(x[:100], y[:100], x[100:], y[100:], name="alphabet"))


LINE = models.regressor(
    lambda rng: ({"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}, {}),
    lambda params, mutable, x, *, train, rng: (x @ params["w"] + params["b"][None], mutable),
)
TABLE = models.language_model(
    lambda rng: ({"table": 0.1 * jax.random.normal(rng, (5, 5))}, {}),
    lambda params, mutable, x, *, train, rng: (params["table"][x], mutable),
)
PROBLEMS = {"regression": (LINE, linear_data, 0.1, None), "tokens": (TABLE, text_data, 2.0, 5)}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_test_loss_falls_and_weights_follow_the_loss(problem, weighting):
    task, make, rate, classes = PROBLEMS[problem]
    averager = wavg.averager(WEIGHTINGS[weighting]())
    result = train(task, make(), averager, inner=optax.sgd(rate), **OPTIONS)
    first, *rounds = result.rows
    assert first["classes"] == classes
    losses = [row["test_loss"] for row in rounds]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    for row in rounds:
        assert ("test_accuracy" in row) == (problem == "tokens")
        np.testing.assert_allclose(sum(row["weights"]), 1, rtol=1e-5)


def test_a_weighting_by_accuracy_of_a_regression_is_refused_with_the_signals_there_are():
    averager = wavg.averager(wavg.proportional("accuracy"))
    with pytest.raises(wavg.SettingsError, match=r"'accuracy'.*it measures absolute_error, loss, ") as raised:
        train(LINE, linear_data(), averager, inner=optax.sgd(0.1), **OPTIONS)
    assert "\n" not in str(raised.value)


def test_a_vocabulary_of_another_size_than_the_network_s_is_refused():
    tokens = text_data()._replace(classes=7)
    with pytest.raises(wavg.SettingsError, match=r"the network outputs \(5, 5\) for a sample, .* 7 classes.*classes="):
        train(TABLE, tokens, wavg.averager(wavg.uniform()), inner=optax.sgd(0.1), **OPTIONS)


def test_a_task_made_by_hand_may_predict_what_it_likes_and_measure_arrays():
    """One logit a sample for two classes, and the share of right answers of each class."""

    def logit(params, x):
        return x @ params["w"]

    def loss(params, mutable, batch, rng):
        return optax.sigmoid_binary_cross_entropy(logit(params, batch.x), batch.y.astype(jnp.float32)).mean(), ({}, {})

    def measure(logits, batch):
        right = ((logits > 0) == (batch.y > 0)).astype(jnp.float32)
        return {
            "accuracy": right.sum(),
            "per_class": jnp.stack([jnp.where(batch.y == c, right, 0).sum() for c in (0, 1)]),
        }

    task = wavg.Task(lambda rng: ({"w": jnp.zeros(3)}, {}), loss, lambda p, m, x: logit(p, x), measure)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 3)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int)
    dataset = data.from_arrays(x[:120], y[:120], x[120:], y[120:])
    shards = data.shard(dataset, lambda split, seed: data.iid(len(split.y), 2, seed), heldout=20, seed=0)
    averager, inner = wavg.averager(wavg.proportional("accuracy")), optax.sgd(0.5)
    result = train(task, shards, averager, inner=inner, rounds=2, local_steps=10, batch_size=8)
    assert result.rows[-1]["test_accuracy"] > 0.8
    assert sum(result.rows[-1]["per_class"]) == pytest.approx(result.rows[-1]["test_accuracy"], rel=1e-5)
    clash = task._replace(measure=lambda logits, batch: {"accuracy": logits.sum(), "weights": jnp.zeros(3)})
    with pytest.raises(wavg.SettingsError, match="'weights' has the name of an entry of rows"):
        train(clash, shards, averager, inner=inner, rounds=2, local_steps=10, batch_size=8)
