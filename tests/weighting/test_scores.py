"""Weightings: numbers worked by hand, at every granularity, and what no score may break."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wavg_jax as wavg
from wavg_jax import tree
from wavg_jax.weighting.scores import best, fisher_merging, per_replica, rank

ALL = jnp.ones(4, bool)
NAN, INF = float("nan"), float("inf")

SCHEMES = {
    "uniform": wavg.uniform(),
    "proportional": wavg.proportional("accuracy"),
    "inverse": wavg.inverse("loss"),
    "inverse_grad_norm": wavg.inverse("grad_norm"),
    "softmax": wavg.softmax("loss", 0.2),
    "softmax_accuracy": wavg.softmax("accuracy", 0.1),
    "softmax_standardised": wavg.softmax("loss", 0.5, standardise=True),
    "above_chance": wavg.proportional("accuracy", chance=0.1, power=2.0),
    "rank": rank("loss"),
    "best": best("loss"),
}


@functools.partial(jax.jit, static_argnums=0)
def update(scheme, scores, alive):
    stacked = {"w": jnp.zeros((len(scores), 2))}
    return scheme.update(stacked, (), {"w": jnp.zeros(2)}, alive=alive, **dict.fromkeys(scheme.needs, scores))[0]


def weights_of(scheme, scores, alive=ALL):
    return np.asarray(update(scheme, jnp.asarray(scores, jnp.float32), alive))


@pytest.mark.parametrize(
    ("scheme", "scores", "expected"),
    [
        ("uniform", [9, 1, 1, 1], [0.25, 0.25, 0.25, 0.25]),
        ("proportional", [0.8, 0.4, 0.4, 0.4], [0.4, 0.2, 0.2, 0.2]),
        ("inverse", [1, 2, 4, 4], [0.5, 0.25, 0.125, 0.125]),
        # exp(-0/0.2), exp(-0.2/0.2), two hopeless ones: 1/(1+e^-1), e^-1/(1+e^-1)
        ("softmax", [1.0, 1.2, 100.0, 100.0], [0.7310586, 0.2689414, 0, 0]),
        ("softmax_accuracy", [0.9, 0.8, -50.0, -50.0], [0.7310586, 0.2689414, 0, 0]),
        # Mean 3, squared gaps 4, 0, 0, 4, std sqrt 2; gaps to the best over 0.5 sqrt 2: 1, e^-(2 sqrt 2), e^-(4 sqrt 2)
        ("softmax_standardised", [1, 3, 3, 5], [0.8915000, 0.0526928, 0.0526928, 0.0031144]),
        ("softmax_standardised", [0.1, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]),
        # The same gaps in units of the last bit
        ("softmax_standardised", [1 + 2**-23 * i for i in (0, 2, 2, 4)], [0.8915000, 0.0526928, 0.0526928, 0.0031144]),
        # (0.8, 0.4, 0.4, 0)^2 = 0.64, 0.16, 0.16, 0 of 0.96
        ("above_chance", [0.9, 0.5, 0.5, 0.05], [2 / 3, 1 / 6, 1 / 6, 0]),
        # Ranks 4, (3 + 2) / 2 twice, 1, of 10
        ("rank", [0.1, 0.5, 0.5, 9e9], [0.4, 0.25, 0.25, 0.1]),
        # The infinite one counts nothing; ranks 3, 2, 1 of 6
        ("rank", [0.1, 0.5, INF, 0.7], [1 / 2, 1 / 3, 0, 1 / 6]),
        ("best", [0.5, 0.2, 0.9, 0.2], [0, 0.5, 0, 0.5]),
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


@pytest.mark.parametrize("name", sorted(set(SCHEMES) - {"uniform"}))
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


@pytest.mark.optimized
@pytest.mark.parametrize("name", SCHEMES)
def test_a_dead_replica_equals_a_run_of_the_survivors_exactly(name):
    with_dead = weights_of(SCHEMES[name], [0.3, NAN, 0.7, 0.4], jnp.array([True, False, True, True]))
    survivors = weights_of(SCHEMES[name], [0.3, 0.7, 0.4], jnp.ones(3, bool))
    np.testing.assert_array_equal(with_dead[[0, 2, 3]], survivors)


@pytest.mark.parametrize(
    ("rule", "signal", "higher"),
    [
        (wavg.proportional, "val_accuracy", True),
        (wavg.inverse, "val_loss", False),
        (wavg.softmax, "val_loss", False),
        (rank, "val_accuracy", True),
        (best, "val_loss", False),
    ],
)
def test_every_rule_takes_a_signal_of_ones_own_with_its_direction_and_trusts_the_best_most(rule, signal, higher):
    weights = weights_of(rule(signal, higher_is_better=higher), [0.2, 0.4, 0.6, 0.8])
    assert weights.argmax() == (3 if higher else 0)
    with pytest.raises(wavg.SettingsError, match="higher_is_better="):
        rule(signal)


@pytest.mark.parametrize(
    ("tokens", "steps", "alive", "expected"),
    [
        # 400 * 40, 400 * 10, 100 * 20 and 600 * 20 of 34000
        ([400, 400, 100, 600], [10, 40, 5, 30], [True] * 4, np.array([16, 4, 2, 12]) / 34),
        ([400, 400, 100, 600], [10, 40, 5, 30], [True, True, True, False], np.array([16, 4, 2, 0]) / 22),
        # Nothing done, nothing weighed; squares that overflow
        ([0, 3e38, 1e38, NAN], [0, 3, 1, 1], [True] * 4, [0, 0.75, 0.25, 0]),
        ([9, 9, -1, 0], [0, NAN, 1, 1], [True] * 4, [0.25] * 4),
    ],
)
def test_token_weights_by_hand(tokens, steps, alive, expected):
    given = {"tokens": jnp.asarray(tokens, jnp.float32), "steps": jnp.asarray(steps, jnp.float32)}
    weights, _ = wavg.token_weighted().update(None, (), None, alive=jnp.array(alive), **given)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


PARAMS = {"w": jnp.zeros((3, 5)), "b": jnp.zeros(3)}


def tree_signal(rng, replicas, per_element):
    """What `layer_grad_norm` or `fisher` looks like."""
    return {
        name: np.square(rng.normal(size=(replicas, *(leaf.shape if per_element else ())))).astype(np.float32)
        for name, leaf in PARAMS.items()
    }


TREES = {
    "inverse": (wavg.inverse("layer_grad_norm"), False),
    "softmax": (wavg.softmax("layer_grad_norm", 0.3, standardise=True), False),
    "proportional": (wavg.proportional("fisher", power=0.5), True),
    "rank": (rank("fisher"), True),
    "fisher_merging": (fisher_merging(), True),
    "fisher_merging_normalised": (fisher_merging(normalise=True), True),
}


@functools.partial(jax.jit, static_argnums=0)
def run_tree(scheme, signal, alive):
    (name,) = scheme.needs
    return scheme.update(None, (), PARAMS, alive=alive, **{name: signal})[0]


@pytest.mark.optimized
@pytest.mark.parametrize("name", TREES)
def test_a_dead_replica_equals_a_run_of_the_survivors_in_every_layer_and_element_exactly(name):
    scheme, per_element = TREES[name]
    survivors = np.array([1, 2, 4])
    signal = tree_signal(np.random.default_rng(0), 5, per_element)
    for values in signal.values():
        values[[0, 3]] = NAN
    alive = jnp.zeros(5, bool).at[survivors].set(True)
    with_dead = run_tree(scheme, signal, alive)
    alone = run_tree(scheme, jax.tree.map(lambda v: v[survivors], signal), jnp.ones(3, bool))
    for leaf, expected in zip(jax.tree.leaves(with_dead), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf)[survivors], expected)
        assert not np.asarray(leaf)[[0, 3]].any()
    last = run_tree(scheme, signal, jnp.arange(5) == 2)
    jax.tree.map(lambda w: np.testing.assert_array_equal(w[2], np.ones_like(w[2])), last)
    np.testing.assert_array_equal(np.asarray(per_replica(with_dead))[survivors], per_replica(alone))


@pytest.mark.parametrize("name", sorted(set(TREES) - {"fisher_merging_normalised"}))
def test_each_layer_and_element_gets_the_weights_of_its_own_scores(name):
    scheme, per_element = TREES[name]
    signal = tree_signal(np.random.default_rng(1), 3, per_element)
    three = jnp.ones(3, bool)
    weights = run_tree(scheme, signal, three)
    assert jax.tree.map(lambda w: w.shape, weights) == jax.tree.map(lambda v: v.shape, signal)
    jax.tree.map(lambda w: np.testing.assert_allclose(w.sum(axis=0), 1, rtol=1e-6), weights)
    alone = run_tree(scheme, signal["w"][..., 2, 1] if per_element else signal["w"], three)
    np.testing.assert_allclose(weights["w"][:, 2, 1] if per_element else weights["w"], alone, rtol=1e-5)


def test_fisher_merging_by_hand():
    # Two replicas, elements (3, 0) and (1, 0): 3/4 and 1/4; both at the floor: equal.
    fisher = {"w": jnp.array([[3.0, 0.0], [1.0, 0.0]])}
    np.testing.assert_allclose(run_tree(fisher_merging(), fisher, jnp.ones(2, bool))["w"], [[0.75, 0.5], [0.25, 0.5]])
    # Floor 2: (3, 2) and (2, 2).
    np.testing.assert_allclose(
        run_tree(fisher_merging(floor=2.0), fisher, jnp.ones(2, bool))["w"], [[0.6, 0.5], [0.4, 0.5]]
    )
    # Norms 5 and 10 over the whole tree: (3, 4) / 5 = 0.6, 0.8 and (8, 6) / 10 = 0.8, 0.6.
    fisher = {"w": jnp.array([3.0, 8.0])[:, None], "b": jnp.array([4.0, 6.0])[:, None]}
    weights = run_tree(fisher_merging(normalise=True), fisher, jnp.ones(2, bool))
    np.testing.assert_allclose(weights["w"][:, 0], [3 / 7, 4 / 7], rtol=1e-6)
    np.testing.assert_allclose(weights["b"][:, 0], [4 / 7, 3 / 7], rtol=1e-6)


@pytest.mark.parametrize("name", ["fisher_merging", "fisher_merging_normalised"])
def test_fisher_merging_survives_any_fisher(name):
    fisher = {"w": jnp.array([[NAN, 0.0, 3e38], [1.0, -1.0, 2.0], [INF, 1e-45, 1.0]])}
    weights = run_tree(TREES[name][0], fisher, jnp.ones(3, bool))["w"]
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-6)
    np.testing.assert_array_equal(weights[:, 0], [0, 1, 0])


def test_weights_per_replica_are_the_mean_over_layers_and_elements():
    # Layer "b" 1 and 0; the elements of "w" 0, 0.5, 1 and 1, 0.5, 0, on average 0.5 each: (1 + 0.5) / 2.
    weights = {"b": jnp.array([1.0, 0.0]), "w": jnp.array([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])}
    np.testing.assert_allclose(per_replica(weights), [0.75, 0.25])


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_float32_and_jit_changes_nothing(name):
    scheme = SCHEMES[name]
    scores = jnp.array([0.3, 0.9, 0.7, 0.4], jnp.bfloat16)

    plain = update.__wrapped__(scheme, scores, ALL)
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(update(scheme, scores, ALL), plain, rtol=1e-6)


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
        (lambda: wavg.proportional("val_loss"), "'val_loss'.*higher_is_better="),
        (lambda: wavg.inverse("val_accuracy"), "'val_accuracy'.*higher_is_better="),
        (lambda: wavg.proportional("val_loss", higher_is_better=False), "worst val_loss most; use inverse"),
        (lambda: wavg.inverse("val_accuracy", higher_is_better=True), "worst val_accuracy most; use proportional"),
        (lambda: wavg.softmax("val_loss", higher_is_better="no"), "higher_is_better is 'no'; it must be True or False"),
        (lambda: wavg.proportional("accuracy", power=0.0), "greater than 0"),
        (lambda: wavg.proportional("accuracy", chance=NAN), "finite"),
        (lambda: rank("cosine"), "higher_is_better"),
        (lambda: best("cosine"), "higher_is_better"),
        (lambda: fisher_merging(floor=-1.0), "0 or more"),
    ],
)
def test_bad_arguments_are_refused(make, says):
    with pytest.raises(wavg.SettingsError, match=says):
        make()


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5], 0.5, [[0.5] * 4] * 3])
def test_a_signal_of_another_shape_is_refused(scores):
    with pytest.raises(wavg.SettingsError, match=r"'loss'.*one entry per replica"):
        wavg.softmax("loss").update(None, (), None, alive=ALL, loss=jnp.array(scores))


@pytest.mark.parametrize("alive", [[True], [True, False, True, True], [True] * 7, [False, False]])
def test_equal_weights_are_the_same_bits_wherever_they_come_from(alive):
    alive = jnp.array(alive)
    equal = tree.equal_weights(alive)
    assert equal.dtype == jnp.float32
    np.testing.assert_array_equal(equal, wavg.uniform().update(None, (), None, alive=alive)[0])
    np.testing.assert_array_equal(equal, wavg.normalise(jnp.zeros(alive.shape), alive))
    np.testing.assert_array_equal(equal, wavg.normalise(jnp.ones(alive.shape), alive))
