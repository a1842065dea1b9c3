"""Rounds that are not scored blend with the weights of the last one that was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import TASK, run, same
from small import sharded

import wavg_jax as wavg
from wavg_jax.base import SettingsError

SOURCE = sharded(heldout=60)
HELD_OUT = wavg.Batch(SOURCE.prepare(jnp.asarray(SOURCE.heldout.x)), jnp.asarray(SOURCE.heldout.y, jnp.int32))
BATCHES = wavg.Batch(
    SOURCE.prepare(jnp.asarray(SOURCE.train.x[:64])).reshape(4, 2, 8, -1),
    jnp.asarray(SOURCE.train.y[:64], jnp.int32).reshape(4, 2, 8),
)
BY_LOSS = wavg.averager(wavg.softmax("loss", 0.1))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    "weighting",
    [wavg.softmax("loss", 0.1), wavg.opinion_pool(), wavg.inverse("layer_grad_norm")],
    ids=["scores", "pool", "layers"],
)
def test_weights_stay_between_scorings_and_change_at_them(weighting, devices):
    result = run(sharded(noisy=(1,), heldout=60), wavg.averager(weighting), rounds=6, every=3, devices=devices)
    weights = [row["weights"] for row in result.rows[1:]]
    for number in (1, 2, 4, 5):
        np.testing.assert_allclose(weights[number], weights[number - 1], rtol=1e-6)
    assert not np.allclose(weights[0], weights[3])
    assert result.rows[0]["score_every"] == 3


def test_only_scored_rounds_have_scores():
    rows = run(SOURCE, BY_LOSS, rounds=4, every=2, diagnose=True).rows[1:]
    for number, row in enumerate(rows):
        scored = number % 2 == 0
        assert all((x is None) != scored for x in row["scores"]["loss"])
        assert (row["diagnosis"]["gain"] is None) != scored
        assert not any(x is None for x in row["scores"]["train_loss"])  # that is free


def test_the_first_round_is_scored_and_one_scoring_a_round_is_the_default():
    once, always = (run(SOURCE, BY_LOSS, rounds=1, **options) for options in ({"every": 9}, {}))
    np.testing.assert_allclose(once.rows[1]["weights"], always.rows[1]["weights"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), once.params, always.params)


def test_the_dead_give_their_weight_to_the_living():
    """Replica 0 is at an infinite rate from the second round on, which is not scored."""
    rounds = wavg.make_rounds(TASK, BY_LOSS, optax.sgd(0.1), scoring=wavg.Scoring(every=4))
    step = jax.jit(rounds.step)
    state, first = step(rounds.init(jax.random.key(0), 4), BATCHES, HELD_OUT)
    state, second = step(state, BATCHES._replace(x=BATCHES.x.at[0].set(3e38)), HELD_OUT)
    assert second.alive.tolist() == [False, True, True, True]
    left = first.weights.at[0].set(0)
    np.testing.assert_allclose(second.weights, left / left.sum(), rtol=1e-5)
    _, third = step(state, BATCHES, HELD_OUT)  # it is back, with the weight it had
    np.testing.assert_allclose(third.weights, first.weights, rtol=1e-5)


def test_a_lost_round_keeps_the_weights():
    rounds = wavg.make_rounds(TASK, BY_LOSS, optax.sgd(0.1), scoring=wavg.Scoring(every=4))
    step = jax.jit(rounds.step)
    state, first = step(rounds.init(jax.random.key(0), 4), BATCHES, HELD_OUT)
    state, lost = step(state, BATCHES._replace(x=jnp.full_like(BATCHES.x, 3e38)), HELD_OUT)
    assert not lost.weights.any()
    _, third = step(state, BATCHES, HELD_OUT)
    np.testing.assert_allclose(third.weights, first.weights, rtol=1e-5)


@pytest.mark.optimized
def test_a_run_that_was_stopped_between_scorings_resumes_bit_for_bit(tmp_path):
    options = {"every": 3, "checkpoint_every": 2, "workdir": tmp_path}
    whole = run(SOURCE, BY_LOSS, rounds=5, every=3)
    run(SOURCE, BY_LOSS, rounds=2, **options)
    same(run(SOURCE, BY_LOSS, rounds=5, resume=True, **options), whole)


@pytest.mark.parametrize("devices", [1, 4])
def test_with_fragments_the_weights_stay_too(devices):
    result = run(sharded(noisy=(1,), heldout=60), BY_LOSS, rounds=5, every=2, fragments=2, devices=devices)
    weights = [row["weights"] for row in result.rows[1:]]
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-5)
    np.testing.assert_allclose(weights[3], weights[2], rtol=1e-5)
    assert not np.allclose(weights[2], weights[1])


def test_states_of_rounds_that_score_otherwise_are_refused():
    scored, always = (wavg.make_rounds(TASK, BY_LOSS, optax.sgd(0.1), scoring=wavg.Scoring(every=n)) for n in (2, 1))
    for made, other in ((scored, always), (always, scored)):
        with pytest.raises(SettingsError, match=r"rounds that differ in Scoring\(every=\)"):
            other.step(made.init(jax.random.key(0), 4), BATCHES, HELD_OUT)
    with pytest.raises(SettingsError, match="every"):
        wavg.make_rounds(TASK, BY_LOSS, optax.sgd(0.1), scoring=wavg.Scoring(every=0))


@pytest.mark.parametrize("weighting", [wavg.uniform(), wavg.robust.coordinate_median()], ids=["uniform", "median"])
def test_weightings_that_read_no_held_out_data_weigh_in_every_round(weighting):
    """Replica 0 is dead in the first round alone."""
    rounds = wavg.make_rounds(TASK, wavg.averager(weighting), optax.sgd(0.1), scoring=wavg.Scoring(every=3))
    step, state = jax.jit(rounds.step), rounds.init(jax.random.key(0), 4)
    state, first = step(state, BATCHES._replace(x=BATCHES.x.at[0].set(3e38)))
    _, second = step(state, BATCHES)
    assert first.weights[0] == 0
    assert second.weights[0] > 0.1
