"""Wrappers: numbers worked by hand over rounds, any granularity, dead replicas and bad scores."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wavg_jax as wavg
from wavg_jax.weighting import signals, wrappers

NAN, INF = float("nan"), float("inf")
PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(2, jnp.bfloat16)}
ACCURACY = wavg.proportional("accuracy")


@functools.partial(jax.jit, static_argnums=0)
def update(scheme, state, alive, measured):
    stacked = wavg.replicate(PARAMS, alive.shape[0])
    return scheme.update(stacked, state, PARAMS, alive=alive, blend=lambda weights: PARAMS, **measured)


def rounds(scheme, history, alive=None):
    """Weights after each round; `history` holds one dict of signals a round, `alive` one mask a round."""
    replicas = len(jax.tree.leaves(history[0])[0])
    state = scheme.init(PARAMS, replicas)
    found = []
    for r, measured in enumerate(history):
        mask = jnp.ones(replicas, bool) if alive is None else jnp.array(alive[r], bool)
        weights, state = update(scheme, state, mask, jax.tree.map(jnp.float32, measured))
        found.append(jax.tree.map(np.asarray, weights))
    return found


def accuracies(*rows):
    return [{"accuracy": np.array(row, np.float32)} for row in rows]


def test_uniform_floor_by_hand():
    # 0.6 * (1, 0, 0, 0) + 0.4 / 4
    [weights] = rounds(wrappers.uniform_floor(ACCURACY, 0.4), accuracies([1, 0, 0, 0]))
    np.testing.assert_allclose(weights, [0.7, 0.1, 0.1, 0.1], rtol=1e-6)
    # One dead: 0.6 * (0.75, 0.25, 0) + 0.4 / 3
    [weights] = rounds(wrappers.uniform_floor(ACCURACY, 0.4), accuracies([3, 1, 0, 9]), [[1, 1, 1, 0]])
    np.testing.assert_allclose(weights, [0.45 + 0.4 / 3, 0.15 + 0.4 / 3, 0.4 / 3, 0], rtol=1e-6)


def test_momentum_by_hand():
    scheme = wrappers.momentum(ACCURACY, 0.75)
    first, second = rounds(scheme, accuracies([3, 1, 0], [1, 1, 2]))
    np.testing.assert_allclose(first, [0.75, 0.25, 0], rtol=1e-6)
    # 0.75 * (0.75, 0.25, 0) + 0.25 * (0.25, 0.25, 0.5)
    np.testing.assert_allclose(second, [0.625, 0.25, 0.125], rtol=1e-6)


def test_a_dead_replica_keeps_its_memory_of_weights():
    scheme = wrappers.momentum(ACCURACY, 0.5)
    alive = [[1, 1, 0], [1, 0, 1], [1, 1, 1]]
    first, second, third = rounds(scheme, accuracies([3, 1, NAN], [1, NAN, 1], [1, 1, 2]), alive)
    np.testing.assert_allclose(first, [0.75, 0.25, 0], rtol=1e-6)
    # Replica 0: (0.75 + 0.5) / 2 = 0.625; replica 2 is new: 0.5; over 1.125.
    np.testing.assert_allclose(second, [5 / 9, 0, 4 / 9], rtol=1e-6)
    # (0.625 + 0.25) / 2, (0.25 + 0.25) / 2, (0.5 + 0.5) / 2 = 0.4375, 0.25, 0.5 over 1.1875
    np.testing.assert_allclose(third, [7 / 19, 4 / 19, 8 / 19], rtol=1e-6)


def test_smoothed_signals_by_hand():
    scheme = wrappers.smooth_signals(wavg.inverse("loss"), 0.5)
    first, second = rounds(scheme, [{"loss": np.array([1.0, 3.0])}, {"loss": np.array([4.0, 3.0])}])
    np.testing.assert_allclose(first, [0.75, 0.25], rtol=1e-6)  # not biased: 0.5 / (1 - 0.5)
    # (0.5 * 0.5 + 0.5 * 4) / (1 - 0.25) = 3 for the first, and 3 for the second.
    np.testing.assert_allclose(second, [0.5, 0.5], rtol=1e-6)


def test_what_is_not_finite_counts_nothing_and_does_not_poison_the_memory():
    scheme = wrappers.smooth_signals(ACCURACY, 0.5)
    history = accuracies([1, 1, 2], [NAN, INF, 1], [1, 1, 3e38], [1, 1, -3e38], [1, 1, 4])
    found = rounds(scheme, history)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1], [0, 0, 1])
    # A replica whose first value comes late starts there.
    late = rounds(scheme, accuracies([NAN, 1, 1], [2, 1, 1]), [[1, 1, 1], [1, 1, 0]])[1]
    np.testing.assert_allclose(late, [2 / 3, 1 / 3, 0], rtol=1e-6)


def test_dead_replicas_keep_their_memory_of_signals():
    scheme = wrappers.smooth_signals(ACCURACY, 0.5)
    third = rounds(scheme, accuracies([1, 4], [1, 100], [1, 1]), [[1, 1], [1, 0], [1, 1]])[2]
    # The dead round is not there: (0.25 * 4 + 0.5 * 1) / 0.75 = 2 against 1.
    np.testing.assert_allclose(third, [1 / 3, 2 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("losses", "accuracy", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], [1, 3, 9, 9], [0.25, 0.75, 0, 0]),
        ([0.2, 0.2, 0.1, 0.2], [1, 1, 1, 1], [0.25, 0.25, 0.25, 0.25]),  # three tie for the second place
        ([NAN, 0.3, 0.2, INF], [9, 1, 1, 9], [0, 0.5, 0.5, 0]),
        ([NAN, NAN, NAN, NAN], [1, 1, 1, 1], [0.25, 0.25, 0.25, 0.25]),
        ([0.1, NAN, NAN, NAN], [1, 9, 9, 9], [1, 0, 0, 0]),
    ],
)
def test_shortlist_by_hand(losses, accuracy, expected):
    scheme = wrappers.shortlist(ACCURACY, 2)
    assert scheme.needs == ("accuracy", "train_loss")
    [weights] = rounds(scheme, [{"train_loss": np.array(losses), "accuracy": np.array(accuracy, np.float32)}])
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_the_shortlist_is_of_the_living():
    measured = {"train_loss": np.array([0.1, 0.2, 0.3]), "accuracy": np.ones(3)}
    [weights] = rounds(wrappers.shortlist(ACCURACY, 2), [measured], [[0, 1, 1]])
    np.testing.assert_allclose(weights, [0, 0.5, 0.5])


def test_a_weighting_is_told_that_those_off_the_shortlist_are_dead():
    seen = {}

    def look(stacked, state, params, *, alive, blend, **signals):
        seen.update(stacked=stacked, alive=alive)
        return wavg.normalise(jnp.ones(3), alive), state

    scheme = wrappers.shortlist(wavg.Weighting(lambda params, replicas: (), look), 1)
    stacked = {"w": jnp.array([1.0, 2.0, 3.0])}
    losses = jnp.array([2.0, 1.0, 3.0])
    scheme.update(
        stacked, (), {"w": jnp.array(9.0)}, alive=jnp.ones(3, bool), blend=lambda weights: None, train_loss=losses
    )
    assert seen["alive"].tolist() == [False, True, False]
    assert seen["stacked"]["w"].tolist() == [9, 2, 9]


def test_grawa_is_the_authors_rule():
    # Their code, three rounds, in NumPy: g <- beta g + (1 - beta) new; estimate g / (1 - beta^t); weights 1 / estimate.
    rng = np.random.default_rng(0)
    norms = [{"w": rng.uniform(0.1, 2, 4), "b": rng.uniform(0.1, 2, 4)} for _ in range(3)]
    found = rounds(wrappers.grawa(layerwise=True), [{"layer_grad_norm": n} for n in norms])
    whole = rounds(wrappers.grawa(), [{"grad_norm": n["w"] + n["b"]} for n in norms])
    beta, memory = 0.9**8, {"w": 0.0, "b": 0.0}
    for t, new in enumerate(norms, 1):
        memory = {name: beta * memory[name] + (1 - beta) * new[name] for name in memory}
        estimate = {name: g / (1 - beta**t) for name, g in memory.items()}
        for name in memory:
            np.testing.assert_allclose(found[t - 1][name], (1 / estimate[name]) / (1 / estimate[name]).sum(), rtol=1e-5)
        total = estimate["w"] + estimate["b"]
        np.testing.assert_allclose(whole[t - 1], (1 / total) / (1 / total).sum(), rtol=1e-5)


NESTED = {
    "uniform_floor": lambda inner: wrappers.uniform_floor(inner, 0.1),
    "momentum": lambda inner: wrappers.momentum(inner, 0.9),
    "smooth_signals": lambda inner: wrappers.smooth_signals(inner),
    "shortlist": lambda inner: wrappers.shortlist(inner, 2),
    "all": lambda inner: wrappers.uniform_floor(
        wrappers.momentum(wrappers.smooth_signals(wrappers.shortlist(inner, 2)), 0.9), 0.1
    ),
}
INNER = {
    "model": wavg.softmax("loss", standardise=True),
    "layer": wavg.inverse("layer_grad_norm"),
    "element": wavg.fisher_merging(),
}


def measured_at_random(scheme, rng, replicas):
    return {
        name: jax.tree.map(lambda z: rng.uniform(0.1, 2, z.shape), signals.zeros(name, PARAMS, replicas))
        for name in scheme.needs
    }


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "inner"), [*((name, "element") for name in NESTED), ("all", "model"), ("all", "layer")]
)
def test_wrappers_keep_the_granularity_and_a_dead_replica_equals_the_survivors_exactly(name, inner):
    scheme = NESTED[name](INNER[inner])
    rng = np.random.default_rng(0)
    history = [measured_at_random(scheme, rng, 4) for _ in range(2)]
    for measured in history:
        for leaf in jax.tree.leaves(measured):
            leaf[1] = NAN
    survivors = np.array([0, 2, 3])
    found = rounds(scheme, history, [[1, 0, 1, 1]] * 2)
    alone = rounds(scheme, jax.tree.map(lambda x: x[survivors], history))
    plain = rounds(INNER[inner], [{name: history[0][name] for name in INNER[inner].needs}])[0]
    for weights, expected in zip(found, alone, strict=True):
        assert jax.tree.map(np.shape, weights) == jax.tree.map(np.shape, plain)
        for w, e in zip(jax.tree.leaves(weights), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(w[survivors], e)
            assert not w[1].any()
            np.testing.assert_allclose(w.sum(axis=0), 1, rtol=1e-6)


@pytest.mark.parametrize("name", NESTED)
def test_the_state_keeps_its_shapes_and_dtypes_so_that_nothing_recompiles(name):
    scheme = NESTED[name](INNER["element"])
    measured = jax.tree.map(jnp.float32, measured_at_random(scheme, np.random.default_rng(0), 3))
    before = jax.eval_shape(lambda: scheme.init(PARAMS, 3))
    after = jax.eval_shape(lambda s: update.__wrapped__(scheme, s, jnp.ones(3, bool), measured)[1], before)

    def facts(x):
        return x.shape, x.dtype, x.weak_type

    assert jax.tree.map(facts, after) == jax.tree.map(facts, before)


def test_momentum_knows_the_weights_of_a_search_before_any_is_made():
    def update(stacked, state, params, *, alive, blend, evaluate, loss):
        scores = evaluate(blend(jnp.ones(2) / 2), jnp.ones(2) / 2)["loss"] * loss
        return jax.tree.map(lambda p: wavg.normalise(scores, alive), params), state

    search = wavg.Weighting(lambda params, replicas: (), update, ("evaluate", "loss"))
    state = wrappers.momentum(search, 0.9).init(PARAMS, 2)
    assert jax.tree.map(jnp.shape, state.weights) == {"w": (2,), "b": (2,)}
    assert wrappers.smooth_signals(search).init(PARAMS, 2).sums.keys() == {"loss"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: wrappers.uniform_floor(ACCURACY, 1.5), "0 or more and at most 1"),
        (lambda: wrappers.uniform_floor(ACCURACY, NAN), "0 or more and at most 1"),
        (lambda: wrappers.momentum(ACCURACY, 1.0), "less than 1"),
        (lambda: wrappers.smooth_signals(ACCURACY, -0.1), "less than 1"),
        (lambda: wrappers.shortlist(ACCURACY, 0), "1 or more"),
        (lambda: wrappers.shortlist(ACCURACY, 2, "cosine"), "higher_is_better"),
        (lambda: wrappers.momentum(ACCURACY, 0.5).init(PARAMS, 0), "replicas is 0"),
        (lambda: wrappers.grawa().init(PARAMS, 2.5), "replicas is 2.5"),
        (
            lambda: rounds(
                wrappers.shortlist(ACCURACY, 2, "layer_grad_norm"),
                [{"accuracy": np.ones(3), "layer_grad_norm": {"w": np.ones(3), "b": np.ones(3)}}],
            ),
            "not an array",
        ),
    ],
)
def test_bad_arguments_are_refused(make, says):
    with pytest.raises(wavg.SettingsError, match=says):
        make()


def test_every_wrapper_is_in_the_table():
    made = {name for name, f in vars(wrappers).items() if inspect.isfunction(f) and f.__module__ == wrappers.__name__}
    public = {name for name in made if not name.startswith("_")}
    assert public - {"grawa"} == set(NESTED) - {"all"}
