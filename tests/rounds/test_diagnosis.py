"""What each replica is worth to the blend, by hand, and which rounds know it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import INNER, TASK, run
from small import sharded

import wavg_jax as wavg
from wavg_jax.base import SettingsError
from wavg_jax.rounds.diagnosis import diagnose


def test_leaving_a_replica_out_and_the_gain_by_hand():
    """Margins 4, 0 and -1 for the right class on both samples; loss(m) = log(1 + e^-m) of the mean margin m.

    equal: m = 1; without 0: -1/2; without 1: 3/2; without 2: 2. Weights (3/4, 0, 1/4): m = 11/4.
    """
    loss = lambda m: math.log1p(math.exp(-m))  # noqa: E731
    logits = jnp.array([[[4.0, 0.0]], [[0.0, 0.0]], [[0.0, 1.0]]]).repeat(2, axis=1)
    found = diagnose(logits, jnp.array([0, 0]), jnp.array([0.75, 0.0, 0.25]), jnp.ones(3, bool))
    expected = [loss(m) - loss(1) for m in (-0.5, 1.5, 2)]
    np.testing.assert_allclose(found["leave_one_out"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["gain"], loss(1) - loss(2.75), rtol=1e-5)
    np.testing.assert_allclose(found["gain_error"], 0, atol=1e-6)  # all samples agree


def test_the_error_of_the_gain_is_that_of_a_mean():
    logits = jnp.array([[[2.0, 0.0]] * 4, [[0.0, 2.0]] * 4])
    found = diagnose(logits, jnp.array([0, 0, 0, 1]), jnp.array([1.0, 0.0]), jnp.ones(2, bool))
    gains = np.array([math.log(2) - math.log1p(math.exp(-m)) for m in (2, 2, 2, -2)])
    np.testing.assert_allclose(found["gain"], gains.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["gain_error"], gains.std() / 2, rtol=1e-5)


def test_the_dead_and_those_without_finite_logits_are_worth_nothing():
    logits = jnp.array([[[2.0, 0.0]], [[jnp.nan, 0.0]], [[0.0, 2.0]], [[1.0, 0.0]]])
    found = diagnose(logits, jnp.array([0]), jnp.array([1.0, 0, 0, 0]), jnp.array([True, True, True, False]))
    assert found["leave_one_out"][1] == found["leave_one_out"][3] == 0
    assert found["leave_one_out"][0] > 0 > found["leave_one_out"][2]
    equal = diagnose(logits, jnp.array([0]), jnp.full(4, 0.25), jnp.ones(4, bool))
    np.testing.assert_allclose(equal["gain"], 0, atol=1e-6)  # among those who count, equal weights are equal weights
    alone = diagnose(logits, jnp.array([0]), jnp.array([1.0, 0, 0, 0]), jnp.array([True, False, False, False]))
    assert all(np.isfinite(x).all() for x in alone.values())
    assert not np.any(alone["leave_one_out"])


@pytest.mark.parametrize("devices", [1, 4])
def test_a_run_says_what_its_replicas_are_worth(devices):
    """The noisy one is worth less than the others; with diagnose= every score is recorded, whatever the weighting."""
    result = run(
        sharded(noisy=(1,), heldout=80), wavg.averager(wavg.uniform()), rounds=5, diagnose=True, devices=devices
    )
    for row in result.rows[1:]:
        assert set(row["scores"]) == {"loss", "accuracy", "macro_f1", "ece", "train_loss"}
        assert row["diagnosis"]["gain"] == pytest.approx(0, abs=1e-6)
    worth = np.mean([row["diagnosis"]["leave_one_out"] for row in result.rows[1:]], axis=0)
    assert np.argmin(worth) == 1
    assert run(sharded(), wavg.averager(wavg.uniform())).rows[1]["diagnosis"] == {}


def test_a_task_without_classes_has_no_logits():
    line = wavg.models.regressor(
        lambda rng: ({"w": jnp.zeros((4, 1))}, {}), lambda params, mutable, x, *, train, rng: (x @ params["w"], mutable)
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    dataset = wavg.data.from_arrays(x, x[:, :1], x[:20], x[:20, :1], name="line")
    source = wavg.data.shard(dataset, lambda split, seed: wavg.data.iid(len(split.y), 2, seed), heldout=10, seed=0)
    for options in ({"diagnose": True}, {"averager": wavg.averager(wavg.opinion_pool())}):
        averager = options.pop("averager", wavg.averager(wavg.uniform()))
        with pytest.raises(SettingsError, match=r"'logits' needs a network that predicts classes.*such as learned\(\)"):
            run(source, averager, task=line, **options)


def test_rounds_of_ones_own_report_it_too():
    source = sharded(2)
    rounds = wavg.make_rounds(TASK, wavg.averager(wavg.opinion_pool()), INNER)
    x, y = source.prepare(jnp.asarray(source.train.x[:32])), jnp.asarray(source.train.y[:32], jnp.int32)
    held_out = wavg.Batch(source.prepare(jnp.asarray(source.heldout.x)), jnp.asarray(source.heldout.y, jnp.int32))
    batches = wavg.Batch(x.reshape(2, 2, 8, -1), y.reshape(2, 2, 8))
    _, log = jax.jit(rounds.step)(rounds.init(jax.random.key(0), 2), batches, held_out)
    assert {name: x.shape for name, x in log.diagnosis.items()} == {"leave_one_out": (2,), "gain": (), "gain_error": ()}
