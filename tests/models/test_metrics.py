"""Metrics of the user's own, and classes that count differently."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import TASK, run
from sklearn.metrics import roc_auc_score
from sklearn.utils.class_weight import compute_class_weight
from small import blobs, sharded

import wavg_jax as wavg
from wavg_jax.models import classifier, with_metrics

BATCH = wavg.Batch(np.ones((6, 4), np.float32), np.array([0, 0, 0, 0, 1, 2]))


def top2(logits, y):
    return (jnp.argsort(logits, axis=1)[:, -2:] == y[:, None]).any(axis=1)


def margin(logits, y):
    return jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0] - logits.mean(axis=1)


def test_a_metric_is_recorded_and_weighs_replicas():
    task = with_metrics(TASK, top2=top2, margin=margin)
    averager = wavg.averager(wavg.softmax("margin", 0.1, higher_is_better=True))
    result = run(sharded(replicas=2, noisy=(0,)), averager, task, rounds=3)
    first, *_, last = result.rows[1:]
    assert last["test_accuracy"] <= last["test_top2"] <= 1
    assert first["scores"]["margin"][0] < first["scores"]["margin"][1]
    assert first["weights"][0] < first["weights"][1]
    data = sharded()
    logits = task.predict(result.params, result.mutable, data.prepare(data.test.x))
    assert last["test_top2"] == pytest.approx(float(np.mean(top2(logits, data.test.y))))
    plain = run(sharded(replicas=2, noisy=(0,)), averager=wavg.averager(wavg.uniform()), rounds=1)
    assert {"test_accuracy", "test_macro_f1", "test_ece"} <= set(last) & set(plain.rows[-1])


def test_what_is_no_mean_over_samples_is_computed_in_a_callback():
    data, found = sharded(replicas=2), []

    def area(row, state):
        logits = TASK.predict(state.params, state.mutable, data.prepare(data.test.x))
        found.append(roc_auc_score(data.test.y, jax.nn.softmax(logits), multi_class="ovr"))

    run(data, on_round=wavg.with_state(area), rounds=2)
    assert len(found) == 2
    assert 0.5 < found[-1] <= 1


def test_a_metric_that_cannot_be_is_refused():
    with pytest.raises(wavg.SettingsError, match=r"with_metrics: top2 is 3; it must be a function"):
        with_metrics(TASK, top2=3)
    for name in ("accuracy", "macro_f1"):
        with pytest.raises(wavg.SettingsError, match=f"has a metric '{name}' already"):
            run(sharded(replicas=2), task=with_metrics(TASK, **{name: top2}))
    with pytest.raises(wavg.SettingsError, match=r"mean returned shape \(\) for \d+ samples; .* a number for each"):
        run(sharded(replicas=2), task=with_metrics(TASK, mean=lambda logits, y: logits.mean()))


def weighted(**options):
    return functools.partial(classifier, **options)(
        lambda rng: ({"w": jnp.eye(4, 3)}, {}), lambda params, mutable, x, *, train, rng: (x @ params["w"], mutable)
    )


def test_class_weights_are_scikit_learns_and_weigh_the_training_loss_alone():
    ours = wavg.data.class_weights(BATCH.y, 3)
    np.testing.assert_allclose(ours, compute_class_weight("balanced", classes=np.arange(3), y=BATCH.y))
    plain, balanced = weighted(), weighted(class_weights=ours)
    params, _ = plain.init(jax.random.key(0))
    losses = optax.softmax_cross_entropy_with_integer_labels(BATCH.x @ params["w"], BATCH.y)
    loss, (_, metrics) = balanced.loss(params, {}, BATCH, jax.random.key(0))
    np.testing.assert_allclose(loss, np.mean(ours[BATCH.y] * losses), rtol=1e-6)
    assert metrics["accuracy"] == plain.loss(params, {}, BATCH, jax.random.key(0))[1][1]["accuracy"]
    sums = [task.measure(task.predict(params, {}, BATCH.x), BATCH)["loss"] for task in (plain, balanced)]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("counts", [None, [1.0, 0.5, 2.0]])
def test_smoothed_labels_change_the_training_loss_alone(counts):
    plain, smooth = weighted(class_weights=counts), weighted(class_weights=counts, label_smoothing=0.3)
    batch = BATCH._replace(x=np.random.default_rng(0).normal(size=BATCH.x.shape).astype(np.float32))
    params, _ = plain.init(jax.random.key(0))
    logits = plain.predict(params, {}, batch.x)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    of_labels, of_all = log_p[np.arange(len(batch.y)), batch.y], log_p.mean(1)
    share = np.ones(len(batch.y)) if counts is None else np.array(counts)[batch.y]
    (loss, (_, metrics)), (plainly, (_, others)) = (
        t.loss(params, {}, batch, jax.random.key(0)) for t in (smooth, plain)
    )
    np.testing.assert_allclose(loss, -np.mean(share * (0.7 * of_labels + 0.3 * of_all)), rtol=1e-5)
    assert abs(loss - plainly) > 0.01
    assert metrics == others
    assert smooth.measure(logits, batch)["loss"] == plain.measure(logits, batch)["loss"]
    with pytest.raises(wavg.SettingsError, match=r"label_smoothing is 1; it must be .*less than 1"):
        weighted(label_smoothing=1)


def test_a_class_that_counts_for_nothing_teaches_nothing():
    task = weighted(class_weights=[1.0, 1.0, 0.0])
    params, _ = task.init(jax.random.key(0))

    def slope(label):
        batch = wavg.Batch(BATCH.x, np.full(6, label))
        return jax.grad(lambda params: task.loss(params, {}, batch, jax.random.key(0))[0])(params)["w"]

    assert not np.any(slope(2))
    assert np.any(slope(1))
    result = run(sharded(replicas=2), wavg.averager(wavg.uniform()), task, rounds=2)
    assert np.isfinite(result.rows[-1]["test_loss"])


@pytest.mark.parametrize("given", [[], [[1.0]], [1.0, np.nan], [-1.0, 1.0], [0.0, 0.0], "balanced"])
def test_weights_that_are_none_are_refused(given):
    with pytest.raises(wavg.SettingsError, match=r"class_weights is .*; it must be a finite number of 0 or more"):
        weighted(class_weights=given)


def test_a_wrong_number_of_weights_and_labels_that_are_none_are_refused():
    with pytest.raises(wavg.SettingsError, match=r"2 class_weights= for logits of 3 classes"):
        weighted(class_weights=[1.0, 1.0]).loss({"w": jnp.eye(4, 3)}, {}, BATCH, jax.random.key(0))
    for labels in ([], [0, 5], [-1, 0]):
        with pytest.raises(wavg.SettingsError, match=r"class_weights needs"):
            wavg.data.class_weights(np.array(labels, int), 3)
    with pytest.raises(wavg.SettingsError, match="one class per sample"):
        wavg.data.class_weights(blobs().train.x, 3)
