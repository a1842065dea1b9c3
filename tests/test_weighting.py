"""Weightings: numbers worked by hand, and what no score may break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wavg_jax as wavg

ALL = jnp.ones(4, bool)
NAN, INF = float("nan"), float("inf")

SCHEMES = {
    "uniform": wavg.uniform(),
    "proportional": wavg.proportional("accuracy"),
    "inverse": wavg.inverse("loss"),
    "inverse_grad_norm": wavg.inverse("grad_norm"),
    "softmax": wavg.softmax("loss", 0.2),
    "softmax_accuracy": wavg.softmax("accuracy", 0.1),
}


def weights_of(scheme, scores, alive=ALL):
    scores = jnp.asarray(scores, jnp.float32)
    stacked = {"w": jnp.zeros((len(scores), 2))}
    signals = dict.fromkeys(("accuracy", "loss", "grad_norm"), scores)
    weights, _ = scheme.update(stacked, scheme.init(None), {"w": jnp.zeros(2)}, alive=alive, **signals)
    return np.asarray(weights)


@pytest.mark.parametrize(
    ("scheme", "scores", "expected"),
    [
        ("uniform", [9, 1, 1, 1], [0.25, 0.25, 0.25, 0.25]),
        ("proportional", [0.8, 0.4, 0.4, 0.4], [0.4, 0.2, 0.2, 0.2]),
        ("inverse", [1, 2, 4, 4], [0.5, 0.25, 0.125, 0.125]),
        # exp(-0/0.2), exp(-0.2/0.2), two hopeless ones: 1/(1+e^-1), e^-1/(1+e^-1)
        ("softmax", [1.0, 1.2, 100.0, 100.0], [0.7310586, 0.2689414, 0, 0]),
        ("softmax_accuracy", [0.9, 0.8, -50.0, -50.0], [0.7310586, 0.2689414, 0, 0]),
    ],
)
def test_numbers_worked_by_hand(scheme, scores, expected):
    np.testing.assert_allclose(weights_of(SCHEMES[scheme], scores), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    "scores",
    [
        [0.0, 0.0, 0.0, 0.0],
        [-1.0, -2.0, -3.0, -4.0],
        [NAN, NAN, NAN, NAN],
        [INF, -INF, NAN, 0.0],
        [3e38, 3e38, 3e38, 3e38],
        [1e-38, 1e-38, 1e-45, 0.0],
        [-3e38, 3e38, 1.0, 0.0],
        [NAN, 1.0, 1.0, 1.0],
    ],
)
@pytest.mark.parametrize("alive", [[True] * 4, [True, False, True, False], [False, False, False, True]])
def test_any_scores_give_weights_that_sum_to_one_over_the_living(name, scores, alive):
    weights = weights_of(SCHEMES[name], scores, jnp.array(alive))
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    assert (weights[~np.array(alive)] == 0).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_no_usable_score_means_equal_weights_over_the_living(name):
    weights = weights_of(SCHEMES[name], [NAN] * 4, jnp.array([True, True, False, True]))
    np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("name", set(SCHEMES) - {"uniform"})
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_replica_without_a_usable_score_counts_nothing_beside_others(name, bad):
    weights = weights_of(SCHEMES[name], [bad, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(weights, [0, 1 / 3, 1 / 3, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_none_alive_gives_all_zero(name):
    assert weights_of(SCHEMES[name], [1.0, 2.0, 3.0, 4.0], jnp.zeros(4, bool)).tolist() == [0, 0, 0, 0]


@given(st.lists(st.floats(width=32), min_size=4, max_size=4), st.permutations(range(4)))
def test_permuting_the_replicas_permutes_the_weights(scores, order):
    order = np.array(order)
    for scheme in SCHEMES.values():
        straight = weights_of(scheme, scores)
        assert np.isclose(straight.sum(), 1, rtol=1e-5)
        np.testing.assert_allclose(weights_of(scheme, np.array(scores, np.float32)[order]), straight[order], rtol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_dead_replica_equals_a_run_of_the_survivors(name):
    with_dead = weights_of(SCHEMES[name], [0.3, NAN, 0.7, 0.4], jnp.array([True, False, True, True]))
    survivors = weights_of(SCHEMES[name], [0.3, 0.7, 0.4], jnp.ones(3, bool))
    np.testing.assert_allclose(with_dead[[0, 2, 3]], survivors, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_float32_and_jit_changes_nothing(name):
    scheme = SCHEMES[name]
    scores = jnp.array([0.3, 0.9, 0.7, 0.4], jnp.bfloat16)

    def run(scores):
        signals = dict.fromkeys(scheme.needs, scores)
        return scheme.update({"w": jnp.zeros((4, 2))}, (), {"w": jnp.zeros(2)}, alive=ALL, **signals)[0]

    assert run(scores).dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(run)(scores), run(scores), rtol=1e-6)


def test_effective_replicas():
    assert float(wavg.effective_replicas(jnp.full(8, 0.125))) == 8
    assert float(wavg.effective_replicas(jnp.array([1.0, 0.0, 0.0]))) == 1
    assert float(wavg.effective_replicas(jnp.zeros(3))) == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: wavg.softmax("loss", 0.0), "greater than 0"),
        (lambda: wavg.softmax("loss", NAN), "greater than 0"),
        (lambda: wavg.softmax("cosine"), "higher_is_better"),
        (lambda: wavg.proportional("loss"), "inverse"),
        (lambda: wavg.inverse("accuracy"), "proportional"),
    ],
)
def test_bad_arguments_are_refused(make, says):
    with pytest.raises(wavg.SettingsError, match=says):
        make()
