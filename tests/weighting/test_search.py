"""Searches over blends: numbers worked by hand, and what must never break them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wavg_jax import tree
from wavg_jax.averaging.averager import averager
from wavg_jax.base import SettingsError, Weighting
from wavg_jax.weighting import search
from wavg_jax.weighting.scores import inverse, normalise, per_replica, proportional, uniform

NAN, INF = float("nan"), float("inf")


def bowl(params, weights=None, target=3.0):
    """A network that is one number x, with loss (x - 3)^2."""
    del weights
    loss = (params["x"].astype(jnp.float32) - target) ** 2
    return {"loss": loss, "accuracy": 1 - loss / 100}


def own_scores(xs, evaluate=bowl):
    return jax.vmap(lambda x: evaluate({"x": x}))(jnp.asarray(xs, jnp.float32))


@functools.partial(jax.jit, static_argnames=("weighting", "evaluate"))
def one_round(weighting, evaluate, stacked, state, params, alive, own):
    return averager(weighting).update(stacked, state, params, alive=alive, evaluate=evaluate, **own)


def blended(weighting, xs, *, evaluate=bowl, own=None, alive=None, state=None):
    """One round of replicas that are one number each: (x of the blend, weights, state)."""
    stacked, params = {"x": jnp.asarray(xs)}, {"x": jnp.float32(7)}
    state = averager(weighting).init(params, replicas=len(xs)) if state is None else state
    own = own_scores(xs) if own is None else own
    alive = jnp.ones(len(xs), bool) if alive is None else jnp.asarray(alive)
    params, state, weights = one_round(weighting, evaluate, stacked, state, params, alive, own)
    return params["x"], np.asarray(per_replica(weights)), state


def constant(*weights):
    """A weighting that gives these weights whatever the signals say."""

    def update(stacked, state, params, *, alive, **signals):
        return normalise(jnp.float32(weights), alive), state

    return Weighting(lambda params, replicas: (), update)


# Greedy soup.

SOUPS = {signal: search.greedy_soup(signal) for signal in ("loss", "accuracy")}


@pytest.mark.parametrize("signal", ["loss", "accuracy"])
@pytest.mark.parametrize(
    ("xs", "expected"),
    [
        # 3.4 is 0.4 off; with 2.5: 2.95, 0.05 off, kept; with 4 too: 3.3, worse; with 9: 4.97, worse
        ([2.5, 4.0, 9.0, 3.4], [0.5, 0, 0, 0.5]),
        # 2 is 1 off; with 5: 3.5; with 1 too: 2.67, 0.33 off; with 12: 5, worse
        ([5.0, 12.0, 2.0, 1.0], [1 / 3, 0, 1 / 3, 1 / 3]),
        # what is as good as before is kept
        ([3.0, 9.0, 3.0, 3.0], [1 / 3, 0, 1 / 3, 1 / 3]),
        # the best alone
        ([3.0, 4.0, 5.0, 6.0], [1, 0, 0, 0]),
    ],
)
def test_greedy_soup_worked_by_hand(xs, expected, signal):
    _, weights, _ = blended(SOUPS[signal], xs)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_replica_without_a_usable_score_is_no_ingredient(bad):
    xs = [2.0, 4.0, 2.0, 3.0]  # equal weights over the first two would be perfect
    loss = jnp.array([1.0, bad, 1.0, bad])
    assert blended(SOUPS["loss"], xs, own={"loss": loss})[1].tolist() == [0.5, 0, 0.5, 0]
    nothing = {"loss": jnp.full(4, bad)}
    assert blended(SOUPS["loss"], xs, own=nothing)[1].tolist() == [0.25] * 4
    alive = [True, True, False, False]
    assert blended(SOUPS["loss"], xs, own=nothing, alive=alive)[1].tolist() == [0.5, 0.5, 0, 0]


def test_blends_without_a_score_are_not_kept():
    def broken_above_3(params, weights):
        return {"loss": jnp.where(params["x"] > 3, NAN, bowl(params)["loss"])}

    _, weights, _ = blended(SOUPS["loss"], [4.0, 2.0, 1.5, 9.0], evaluate=broken_above_3)
    assert weights.tolist() == [0, 1, 0, 0]  # 4, the first, has none; with 1.5, 2 would be further off
    own = {"loss": jnp.array([1.0, NAN, 1.0, 1.0])}
    _, weights, _ = blended(SOUPS["loss"], [4.0] * 4, evaluate=broken_above_3, own=own)
    np.testing.assert_allclose(weights, [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)


# Learned weights.

LEARNED, LONGER = search.learned(), search.learned(steps=50)


@pytest.mark.parametrize(
    ("xs", "expected"),
    [
        ([1.0, 5.0], [0.5, 0.5]),
        ([0.0, 4.0], [0.25, 0.75]),
        ([4.0, 0.0], [0.75, 0.25]),
        ([5.0, 9.0], [1.0, 0.0]),  # 3 is out of reach: all to the nearer one
    ],
)
def test_learned_weights_reach_a_known_optimum(xs, expected):
    _, weights, _ = blended(LEARNED, xs)
    np.testing.assert_allclose(weights, expected, atol=0.03)
    _, weights, _ = blended(LONGER, xs)
    np.testing.assert_allclose(weights, expected, atol=3e-3)


def test_a_step_of_exponentiated_gradient_descent_by_hand():
    # Replicas 0 and 4, weights 1/2: x = 2, d loss/dx = -2, g = (0, -8), sum_j w_j g_j = -4; z = -0.1 (4, -4).
    scheme = search.learned(steps=1, optimizer=optax.sgd(0.1))
    x, weights, _ = blended(scheme, [0.0, 4.0])
    second = np.exp(0.4) / (np.exp(0.4) + np.exp(-0.4))
    np.testing.assert_allclose(weights, [1 - second, second], rtol=1e-6)
    np.testing.assert_allclose(x, 4 * second, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_steps_are_as_long_whatever_the_unit_of_the_loss(scale):
    def measured(params, weights):
        return {"loss": scale * bowl(params)["loss"]}

    weights = blended(LEARNED, [0.0, 4.0])[1]
    assert np.ptp(weights) > 0.3
    np.testing.assert_allclose(blended(LEARNED, [0.0, 4.0], evaluate=measured)[1], weights, rtol=1e-3)


def test_a_step_too_far_keeps_the_start():
    scheme = search.learned(constant(0.3, 0.7), steps=3, optimizer=optax.sgd(100.0))
    np.testing.assert_allclose(blended(scheme, [0.0, 4.0])[1], [0.3, 0.7], rtol=1e-6)


def test_learning_goes_on_from_the_start_and_leaves_its_zeros():
    _, weights, _ = blended(search.learned(constant(0.9, 0.1, 0.0), steps=1, learning_rate=0.0), [0.0, 4.0, 3.0])
    np.testing.assert_allclose(weights, [0.9, 0.1, 0], rtol=1e-6)
    _, weights, _ = blended(search.learned(search.greedy_soup("loss")), [0.0, 4.0, 9.0, 50.0])
    # the soup is 4 alone: with 0, 2 is as far off as 4 is, and kept; with 9: 4.33, worse
    np.testing.assert_allclose(weights, [0.25, 0.75, 0, 0], atol=0.03)
    assert weights[2] == weights[3] == 0


@pytest.mark.parametrize(("bad", "where"), [(NAN, 2.5), (-INF, 2.5), (INF, -1.0)])
def test_a_loss_that_is_not_finite_keeps_the_best_seen(bad, where):
    def breaks(params, weights):
        return {"loss": jnp.where(params["x"] >= where, bad, (params["x"] - 4) ** 2)}

    scheme = search.learned(constant(0.5, 0.5), optimizer=optax.sgd(0.01))
    x, weights, _ = blended(scheme, [0.0, 4.0], evaluate=breaks)
    assert np.isfinite(weights).all()
    # -1: even the start has no loss
    assert 2 < x < where if where > 0 else weights.tolist() == [0.5, 0.5]


def test_a_slope_that_is_not_finite_where_the_loss_is_ends_the_walk():
    def cusp(params, weights):  # the root's slope at 0 is infinite
        return {"loss": jnp.sqrt(jnp.maximum(params["x"] - 2, 0.0))}

    assert blended(search.learned(), [0.0, 4.0], evaluate=cusp)[1].tolist() == [0.5, 0.5]


# Learned weights, carried over the rounds.

SMALL_STEPS = search.learned(carry=True, steps=1, optimizer=optax.sgd(0.05))


def test_two_rounds_of_one_step_are_one_round_of_two():
    _, first, state = blended(SMALL_STEPS, [0.0, 4.0, 1.0])
    _, second, state = blended(SMALL_STEPS, [0.0, 4.0, 1.0], state=state)
    two_steps = search.learned(steps=2, optimizer=optax.sgd(0.05))
    np.testing.assert_allclose(second, blended(two_steps, [0.0, 4.0, 1.0])[1], rtol=1e-5)
    assert second[1] > first[1] > 1 / 3
    np.testing.assert_allclose(state.weighting.logits.sum(), 0, atol=1e-6)


def test_carried_weights_worse_than_equal_ones_are_not_used_and_halved():
    state = blended(SMALL_STEPS, [0.0, 4.0])[2]
    state = state._replace(weighting=state.weighting._replace(logits=jnp.array([-1.0, 1.0])))
    gentle = search.learned(carry=True, steps=1, optimizer=optax.sgd(0.0))
    evaluate = functools.partial(bowl, target=1.9)
    _, weights, state = blended(gentle, [0.0, 4.0], evaluate=evaluate, state=state)
    assert weights.tolist() == [0.5, 0.5]
    assert state.weighting.logits.tolist() == [-0.5, 0.5]


def test_a_dead_replica_comes_back_neutral():
    _, weights, state = blended(SMALL_STEPS, [0.0, 4.0, 1.0], alive=[True, True, False])
    assert weights[2] == 0
    assert state.weighting.logits[2] == 0
    np.testing.assert_allclose(state.weighting.logits[:2].sum(), 0, atol=1e-6)
    assert (blended(SMALL_STEPS, [0.0, 4.0, 1.0], state=state)[1] > 0.05).all()


def test_a_replica_that_the_start_leaves_out_is_carried_on_neutral():
    carried = search.learned(constant(0.5, 0.5, 0), carry=True, steps=1, learning_rate=0.05)
    _, weights, state = blended(carried, [0.0, 4.0, 100.0])
    logits = np.asarray(state.weighting.logits)
    assert logits[1] > 0.1 > -0.1 > logits[0]
    assert (weights[2], abs(logits[2]) < 1e-5) == (0, True)


def test_a_carried_logit_never_sinks_out_of_reach():
    scheme = search.learned(carry=True, steps=1, optimizer=optax.sgd(5.0))
    state = None
    for _ in range(5):
        _, weights, state = blended(scheme, [3.0, 3.0, 30.0], state=state)
    assert weights[2] < 1e-3
    np.testing.assert_allclose(state.weighting.logits.max() - state.weighting.logits.min(), 8, rtol=1e-5)


def test_carried_logits_start_anew_after_a_loss_without_a_number():
    state = blended(SMALL_STEPS, [0.0, 4.0])[2]
    assert state.weighting.logits[1] > 0
    _, weights, state = blended(SMALL_STEPS, [0.0, 4.0], state=state, evaluate=lambda p, w: {"loss": p["x"] * NAN})
    assert weights.tolist() == [0.5, 0.5]
    assert state.weighting.logits.tolist() == [0, 0]


def test_carrying_averages_the_noise_of_the_rounds_out():
    """The target is 3 +- 2 from round to round: weights learned from one round alone are spread far more."""
    xs, rounds = jnp.array([0.0, 6.0]), 40
    targets = 3 + 2 * jax.random.normal(jax.random.key(0), (rounds,))

    def blends(scheme):
        def one(state, target):
            weights, state = scheme.update(
                {"x": xs},
                state,
                {"x": xs[0]},
                alive=jnp.ones(2, bool),
                blend=lambda w: {"x": w[0] * xs[0] + w[1] * xs[1]},
                evaluate=functools.partial(bowl, target=target),
            )
            return state, weights @ xs

        return jax.jit(lambda: jax.lax.scan(one, scheme.init({"x": xs[0]}, replicas=2), targets)[1])()

    alone, carried = blends(search.learned()), blends(search.learned(carry=True, steps=1, learning_rate=0.005))
    assert ((carried - 3) ** 2).mean() < 0.25 * ((alone - 3) ** 2).mean()


@pytest.mark.parametrize(
    "evaluate",
    [
        1.0,
        lambda params: {"loss": params["x"]},
        lambda params, weights: params["x"],
        lambda params, weights: {"loss": weights},
    ],
    ids=["a number", "one argument", "no names", "an array"],
)
@pytest.mark.parametrize("weighting", [search.learned(), SOUPS["loss"]], ids=["learned", "greedy_soup"])
def test_an_evaluation_that_cannot_be_used_is_refused_in_one_line(weighting, evaluate):
    with pytest.raises(SettingsError, match=r"evaluate.* it must be .*\"loss\"") as raised:
        blended(weighting, [0.0, 4.0], evaluate=evaluate)
    assert "\n" not in str(raised.value)


# The best of several.


def test_best_of_takes_the_best_blend():
    best = search.best_of(constant(1.0, 0.0), constant(0.25, 0.75), constant(0.0, 1.0))
    assert blended(best, [0.0, 4.0])[1].tolist() == [0.25, 0.75]
    assert blended(best, [3.0, 90.0])[1].tolist() == [1, 0]
    assert blended(best, [1.0, 5.0])[1].tolist() == [0.5, 0.5]  # equal weights are always there
    assert blended(best, [0.0, 4.0], alive=[True, False])[1].tolist() == [1, 0]


def test_loss_and_accuracy_may_choose_differently():
    def evaluate(params, weights):
        return {"loss": (params["x"] - 1) ** 2, "accuracy": -((params["x"] - 3) ** 2)}

    candidates = (constant(0.75, 0.25), constant(0.25, 0.75))
    assert blended(search.best_of(*candidates), [0.0, 4.0], evaluate=evaluate)[1].tolist() == [0.75, 0.25]
    by_accuracy = search.best_of(*candidates, signal="accuracy")
    assert blended(by_accuracy, [0.0, 4.0], evaluate=evaluate)[1].tolist() == [0.25, 0.75]


@pytest.mark.parametrize("score", [1.0, NAN, INF, -INF])
def test_ties_and_scores_without_a_number_leave_equal_weights(score):
    def evaluate(params, weights):  # equal weights have loss 1
        return {"loss": jnp.where(params["x"] == 2, 1.0, score)}

    scheme = search.best_of(constant(1.0, 0.0), constant(0.0, 1.0))
    assert blended(scheme, [0.0, 4.0], evaluate=evaluate)[1].tolist() == [0.5, 0.5]
    nothing = blended(scheme, [0.0, 4.0], evaluate=lambda p, w: {"loss": p["x"] * NAN})[1]
    assert nothing.tolist() == [0.5, 0.5]


def test_the_states_of_all_candidates_move_on():
    def counting(*weights):
        scheme = constant(*weights)

        def update(stacked, state, params, **signals):
            return scheme.update(stacked, (), params, **signals)[0], state + 1

        return Weighting(lambda params, replicas: jnp.int32(0), update)

    scheme = search.best_of(counting(1.0, 0.0), counting(0.0, 1.0), search.learned(carry=True, steps=1))
    _, _, state = blended(scheme, [0.0, 3.0])
    _, weights, state = blended(scheme, [0.0, 3.0], state=state)
    assert weights.tolist() == [0, 1]
    equal, first, second, learned = state.weighting
    assert (equal, int(first), int(second)) == ((), 2, 2)
    assert learned.logits[1] > learned.logits[0]


LAYERS = {"dense": {"kernel": (3, 2), "bias": (2,)}, "scale": ()}


@pytest.mark.parametrize(
    ("finer", "shapes"),
    [
        ({"dense": (2,), "scale": (2,)}, {"dense": (2,), "scale": (2,)}),  # a prefix: one weight per layer
        ({"dense": {"kernel": (2, 3, 2), "bias": (2,)}, "scale": (2,)},) * 2,
    ],
)
def test_candidates_of_several_granularities(finer, shapes):
    """Whole model, prefix tree and elements side by side: weights come out in the finest of them."""
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    rng = np.random.default_rng(0)
    stacked = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=(2, *s)), jnp.float32), LAYERS, **is_shape)
    params = tree.replica(stacked, 0)

    def fine(stacked, state, params, *, alive, **signals):  # the first replica has 1/4 everywhere
        shares = jnp.array([0.25, 0.75])
        return jax.tree.map(
            lambda s: jnp.broadcast_to(shares.reshape(2, *[1] * (len(s) - 1)), s), finer, **is_shape
        ), state

    def evaluate(params, weights, share=0.25):
        """How far it is from a blend with this share of the first replica."""
        del weights
        apart = jax.tree.map(lambda p, x: jnp.sum((p - share * x[0] - (1 - share) * x[1]) ** 2), params, stacked)
        return {"loss": optax.tree.sum(apart)}

    def run(scheme, evaluate=evaluate):
        state = averager(scheme).init(params, 2)
        return one_round(scheme, evaluate, stacked, state, params, jnp.ones(2, bool), {"loss": jnp.array([1.0, 2.0])})

    scheme = Weighting(lambda params, replicas: (), fine)
    blend, _, weights = run(search.best_of(inverse("loss"), scheme))
    assert jax.tree.map(jnp.shape, weights) == shapes
    assert float(evaluate(blend, None)["loss"]) < 1e-10
    # another one is better, and comes out in the same structure
    _, _, weights = run(search.best_of(inverse("loss"), scheme), functools.partial(evaluate, share=2 / 3))
    assert jax.tree.map(jnp.shape, weights) == shapes
    np.testing.assert_allclose(per_replica(weights), [2 / 3, 1 / 3], rtol=1e-6)


def test_needs_are_united():
    assert search.greedy_soup("loss").needs == ("loss", "evaluate")
    assert search.learned(proportional("accuracy")).needs == ("accuracy", "evaluate")
    scheme = search.best_of(inverse("loss"), search.greedy_soup("loss"), uniform())
    assert sorted(scheme.needs) == ["evaluate", "loss"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: search.greedy_soup("grad_norm"), '"loss" or "accuracy"'),
        (lambda: search.best_of(uniform(), signal="ece"), '"loss" or "accuracy"'),
        (search.best_of, "at least one weighting"),
        (lambda: search.learned(steps=0), "from 1 to"),
        (lambda: search.learned(learning_rate=0.1, optimizer=optax.sgd(0.1)), "give only one of the two"),
        (lambda: search.learned(carry=True).init({"x": jnp.zeros(2)}, None), "replicas is None"),
        (lambda: blended(search.learned(by_part, carry=True), [0.0, 4.0]), "one logit per replica"),
    ],
)
def test_bad_arguments_are_refused(make, says):
    with pytest.raises(SettingsError, match=says):
        make()


by_part = Weighting(
    lambda params, replicas: (),
    lambda stacked, state, params, *, alive, **signals: ({"x": jnp.full(2, 0.5)}, state),
)
