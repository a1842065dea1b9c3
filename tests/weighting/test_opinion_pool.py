"""Weights from pooled predictions, by hand: the fit, its memory, pruning, and what stays equal."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scheme_table import run, two_rounds

import wavg_jax as wavg
from wavg_jax.base import SettingsError
from wavg_jax.weighting import pool

PARAMS = jnp.zeros(2)


def two_classes(margins, labels, evaluate=None, steps=1, alive=None, state=None, **options):
    """Rounds of networks whose parameters are their logits, the same for every sample: replica k prefers class 0 by
    `margins` [K], or [rounds, K].

    Returns:
      [(weights, fitted weights)] of every round, and the last state.
    """
    avg, done = wavg.averager(wavg.opinion_pool(**options)), []
    margins = np.broadcast_to(np.float32(margins), (steps, np.shape(margins)[-1]))
    state = avg.init(PARAMS, margins.shape[1]) if state is None else state

    def of_logits(params, weights):
        return {"loss": cross_entropy(params, [y for y in labels if 0 <= y < 2]), "accuracy": jnp.float32(0)}

    @jax.jit
    def step(stacked, state):
        logits = jnp.broadcast_to(stacked[:, None], (len(stacked), len(labels), 2))
        given = {"logits": logits, "labels": jnp.asarray(labels), "evaluate": evaluate or of_logits}
        return avg.update(stacked, state, PARAMS, alive=alive, **given)[1:]

    for own in margins:
        state, weights = step(jnp.stack([own / 2, -own / 2], 1), state)
        done.append((np.asarray(weights), np.asarray(state.weighting.fitted)))
    return done, state


def cross_entropy(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits[None], jnp.asarray(labels)).mean()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


NINE_OF_TEN, THREE_OF_FOUR = [0] * 9 + [1], [0] * 12 + [1] * 4
PRIOR = 16 * 4 * (0.75 - sigmoid(1)) / math.log(3)


def test_the_fit_balances_cross_entropy_and_the_prior():
    """Two replicas with margins 2 and -2. With weight w the pool's margin is m = 2 (2 w - 1), and at the optimum

        4 (sigmoid(m) - q) + s log(w / (1 - w)) = 0,     q = 3/4 the share of class 0, s = prior / S.

    For w = 3/4 that is m = 1: 4 (0.7311 - 0.75) + s log 3 = 0, so s = 0.0690, or 1.10 of 16 samples.
    """
    [(weights, fitted)], _ = two_classes([2.0, -2.0], THREE_OF_FOUR, prior=PRIOR)
    np.testing.assert_allclose(fitted, [0.75, 0.25], rtol=1e-5)
    np.testing.assert_array_equal(weights, fitted)


def test_the_next_round_starts_from_these_weights_to_the_power_of_the_memory():
    """With prior odds 3^0.5 the optimum w solves 4 (sigmoid(2 (2 w - 1)) - q) + s log(w / (1 - w)) = s log 3 / 2."""
    rounds, _ = two_classes([2.0, -2.0], THREE_OF_FOUR, steps=2, prior=PRIOR, memory=0.5)
    w = float(rounds[1][1][0])
    assert w > 0.75
    slope = 4 * (sigmoid(2 * (2 * w - 1)) - 0.75) + PRIOR / 16 * (math.log(w / (1 - w)) - math.log(3) / 2)
    assert abs(slope) < 1e-5
    forgetful, _ = two_classes([2.0, -2.0], THREE_OF_FOUR, steps=2, prior=PRIOR, memory=0.0)
    assert forgetful[1][1][0] == pytest.approx(0.75)


def test_weights_below_a_quarter_of_an_equal_share_are_cut_off_where_that_blend_is_better():
    """One of three replicas is wrong on every sample: with a weak prior its weight falls below 1 / 12."""
    [(weights, fitted)], _ = two_classes([1.0, 1.0, -30.0], [0] * 20, prior=0.1)
    assert 0 < fitted[2] < 1 / 12
    np.testing.assert_allclose(weights, [0.5, 0.5, 0], rtol=1e-4)


def test_the_replica_with_the_lowest_weight_may_be_left_out_whatever_that_weight():
    """Where replicas are far apart a pool says little of its blend: here that is good only without replica 2."""

    def measure(params, weights):
        return {"loss": 1 + weights[2], "accuracy": jnp.float32(0)}

    [(weights, fitted)], _ = two_classes([2.0, 1.8, 1.0], [0] * 20, evaluate=measure)
    assert fitted[2] > 1 / 4  # the prior is worth more than twenty samples
    np.testing.assert_allclose(weights, [*(fitted[:2] / fitted[:2].sum()), 0], rtol=1e-5)


def test_of_equal_fitted_and_pruned_weights_the_blend_with_the_lowest_loss_is_taken():
    """What counts are the losses of blends, not of pools: here a blend's loss is least where weights are equal."""
    equal = {"loss": lambda w: jnp.square(w - 0.5).sum(), "accuracy": lambda w: jnp.float32(0)}
    measure = lambda params, weights: {name: of(weights) for name, of in equal.items()}  # noqa: E731
    [(weights, fitted)], _ = two_classes([2.0, -2.0], NINE_OF_TEN, evaluate=measure, prior=6.0)
    np.testing.assert_array_equal(weights, [0.5, 0.5])
    assert fitted[0] > 0.7


def test_what_could_be_chance_leaves_equal_weights():
    """Of two samples one says class 0 and one class 1, but for one more: nobody knows which replica is better."""
    [(weights, fitted)], _ = two_classes([0.2, -0.2], [0, 1, 0], prior=1.0)
    assert fitted[0] > 0.5
    np.testing.assert_array_equal(weights, [0.5, 0.5])


def test_a_replica_that_was_bad_for_ten_rounds_regains_weight_in_a_few():
    labels = [0] * 100
    margins = [[1.0, 1.0, 1.0, -8.0]] * 10 + [[1.0, 1.0, 1.0, 4.0]] * 8
    rounds, _ = two_classes(margins, labels, steps=18)
    assert rounds[9][1][3] < 1e-3
    assert rounds[9][0][3] == 0
    assert rounds[10][0][3] == 0.25  # equal weights are better at once
    assert rounds[17][0][3] > 0.25  # and now it is the best


def test_a_dead_replica_keeps_what_is_remembered_of_it():
    _, state = two_classes([2.0, -2.0, 0.0], NINE_OF_TEN, steps=2)
    before = np.asarray(state.weighting.fitted)
    [(weights, after)], _ = two_classes(
        [2.0, -2.0, 0.0], NINE_OF_TEN, alive=jnp.array([True, False, True]), state=state
    )
    assert weights[1] == 0
    assert after[1] == before[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_logit_that_is_not_finite_takes_a_replica_out(bad):
    [(weights, _)], _ = two_classes([2.0, bad, 2.0], NINE_OF_TEN)
    np.testing.assert_array_equal(weights, [0.5, 0, 0.5])


def test_what_is_no_logits_or_labels_is_one_clear_line():
    avg = wavg.averager(wavg.opinion_pool())
    given = {"logits": jnp.zeros((2, 5, 2)), "labels": jnp.zeros(5, jnp.int32), "evaluate": lambda p, w: {}}
    for change in ({"labels": jnp.zeros(4, jnp.int32)}, {"labels": jnp.zeros(5)}, {"logits": jnp.zeros((2, 5))}):
        with pytest.raises(SettingsError, match=r"give logits \[K, S, C\] and integer labels \[S\]"):
            avg.update(jnp.zeros((2, 2)), avg.init(PARAMS, 2), PARAMS, **(given | change))
    with pytest.raises(SettingsError, match="pass labels= to update, logits of every replica"):
        avg.update(jnp.zeros((2, 2)), avg.init(PARAMS, 2), PARAMS, logits=given["logits"], evaluate=given["evaluate"])
    with pytest.raises(SettingsError, match="opinion_pool: prior"):
        wavg.opinion_pool(prior=0.0)
    with pytest.raises(SettingsError, match="opinion_pool: memory"):
        wavg.opinion_pool(memory=1.5)


def test_a_broken_replica_loses_its_weight_however_large_its_logits():
    """One of four has logits a thousand times as large, and wrong: beside that noise no gain of a blend would count."""
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(0, 3, 200))
    logits = 2 * jax.nn.one_hot(labels, 3)[None] + jnp.asarray(rng.normal(size=(4, 200, 3)), jnp.float32)
    logits = logits.at[1].multiply(-1000)

    def evaluate(params, weights):
        return {"loss": 1 + 0.01 * weights[1], "accuracy": jnp.float32(0)}

    avg = wavg.averager(wavg.opinion_pool())
    given = {"logits": logits, "labels": labels, "evaluate": evaluate}
    _, _, weights = avg.update(jnp.zeros((4, 2)), avg.init(PARAMS, 4), PARAMS, **given)
    assert weights[1] < 1e-6
    assert min(weights[k] for k in (0, 2, 3)) > 0.1


@pytest.mark.parametrize("ignored", [-100, -1, 2, 7])
def test_labels_of_no_class_do_not_count(ignored):
    [(weights, fitted)], _ = two_classes([2.0, -2.0], THREE_OF_FOUR + [ignored] * 16, prior=PRIOR)
    np.testing.assert_allclose(fitted, [0.75, 0.25], rtol=1e-5)
    np.testing.assert_array_equal(weights, fitted)


@pytest.mark.parametrize("samples", [4, 5, 16, 20])
def test_in_blocks_of_samples_the_weights_are_those_of_all_together(samples, monkeypatch):
    """Of 21 samples: the last block starts earlier, and counts nothing twice. Two labels do not count."""
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(0, 4, 21)).at[jnp.array([2, 19])].set(-1)
    sure = jnp.array([2.0, 1.0, 0.0])[:, None, None] * jax.nn.one_hot(labels, 4)[None]
    given = {"logits": sure + jnp.asarray(rng.normal(size=(3, 21, 4)), jnp.float32), "labels": labels}
    avg = wavg.averager(wavg.opinion_pool(prior=1.0))

    def found():
        loss = lambda params, weights: {"loss": -weights[0], "accuracy": jnp.float32(0)}  # noqa: E731
        _, state, weights = avg.update(jnp.zeros((3, 2)), avg.init(PARAMS, 3), PARAMS, evaluate=loss, **given)
        return state.weighting.fitted, weights

    together = found()
    assert np.ptp(together[0]) > 0.1
    assert np.ptp(together[1]) > 0.1
    monkeypatch.setattr(pool, "_TOGETHER", samples * 3 * 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found(), together)


def test_the_state_is_float32_also_where_floats_are_64_bits_wide():
    with jax.enable_x64(True):
        avg = wavg.averager(wavg.opinion_pool())
        state = avg.init(PARAMS, 2)
        logits = jnp.zeros((2, 5, 2), jnp.float32).at[0, :, 0].set(3)
        given = {"logits": logits, "labels": jnp.zeros(5, jnp.int32)}
        loss = {"loss": jnp.float32(0), "accuracy": jnp.float32(0)}
        _, after, weights = avg.update(
            jnp.zeros((2, 2), PARAMS.dtype), state, PARAMS, evaluate=lambda p, w: loss, **given
        )
    assert after.weighting.fitted.dtype == state.weighting.fitted.dtype == weights.dtype == jnp.float32


def test_the_rows_of_the_table_have_weights_that_differ():
    """Else the invariants would hold of equal weights."""
    assert max(np.ptp(weights) for weights in run("opinion_pool", two_rounds()).weights) > 0.02
