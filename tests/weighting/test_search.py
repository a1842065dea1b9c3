"""Searches over blends: numbers worked by hand, a real problem with spoiled replicas, what must never break them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import blobs

from wavg_jax import tree
from wavg_jax.averaging.averager import averager
from wavg_jax.base import SettingsError, Weighting
from wavg_jax.devices import placement
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


# A real problem: softmax regressions on three blobs, some of them trained on random labels.

K, SPOILED = 8, 3


@functools.cache
def problem():
    """(stacked, own scores, evaluate) of K replicas, each with 20 steps on its own 24 samples."""
    data, rng = blobs(), np.random.default_rng(0)
    x, y = np.asarray(data.train.x), np.asarray(data.train.y, np.int32)
    own_y = y[: 24 * K].reshape(K, 24).copy()
    own_y[:SPOILED] = rng.integers(0, 3, size=(SPOILED, 24))
    held_x, held_y = jnp.asarray(x[24 * K :]), jnp.asarray(y[24 * K :])

    def logits(params, x):
        return x.astype(params["w"].dtype) @ params["w"] + params["b"][None]

    def loss(params, x, y):
        z = logits(params, x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    def train(x, y):
        def step(params, _):
            return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params, x, y)), None

        return jax.lax.scan(step, {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}, length=20)[0]

    def evaluate(params, weights):
        del weights
        right = logits(params, held_x).argmax(1) == held_y
        return {"loss": loss(params, held_x, held_y), "accuracy": right.mean(dtype=jnp.float32)}

    stacked = jax.jit(jax.vmap(train))(jnp.asarray(x[: 24 * K]).reshape(K, 24, 4), jnp.asarray(own_y))
    return stacked, jax.vmap(lambda p: evaluate(p, None))(stacked), evaluate


def by_layer(stacked, state, params, *, alive, **signals):
    """One weight per tensor, different in each."""
    return {"w": normalise(signals["accuracy"], alive), "b": normalise(1 / signals["loss"], alive)}, state


LAYERED = Weighting(lambda params, replicas: (), by_layer, ("accuracy", "loss"))
SCHEMES = {
    "greedy_soup": search.greedy_soup("loss"),
    "learned": search.learned(),
    "best_of": search.best_of(proportional("accuracy"), search.learned(LAYERED)),
    "layers": search.learned(LAYERED),
    "carry": search.learned(carry=True, steps=2),
}
SLOW = ("layers", "carry")


def schemes(*names):
    """Each compiles for some seconds."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]
    return pytest.mark.parametrize("name", marked)


every_scheme = schemes(*SCHEMES)


@functools.cache
def program(name, place=None):
    """One jitted round of a scheme; what it takes is `inputs(...)`."""
    kwargs = {} if place is None else {"place": place}
    avg = averager(SCHEMES[name])

    def one_round(stacked, state, params, alive, own):
        return avg.update(stacked, state, params, alive=alive, evaluate=problem()[2], **own, **kwargs)

    return jax.jit(one_round)


def inputs(name, keep=slice(None), dtype=jnp.float32):
    """The problem's replicas `keep`, all alive."""
    stacked, own, _ = problem()
    stacked = jax.tree.map(lambda x: x[keep].astype(dtype), stacked)
    params = tree.replica(jax.tree.map(jnp.zeros_like, stacked), 0)
    replicas = tree.count_replicas(stacked)
    own = {signal: values[keep] for signal, values in own.items()}
    state = averager(SCHEMES[name]).init(params, replicas=replicas)
    return stacked, state, params, jnp.ones(replicas, bool), own


def held_out_loss(params):
    return float(problem()[2](params, None)["loss"])


@functools.cache
def plain_loss():
    stacked = problem()[0]
    return held_out_loss(jax.tree.map(lambda x: x.mean(0), stacked))


@every_scheme
def test_spoiled_replicas_are_found_out(name):
    params, _, weights = program(name)(*inputs(name))
    assert held_out_loss(params) < plain_loss() - 0.01
    weights = np.asarray(per_replica(weights))
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert weights[:SPOILED].mean() < 0.7 * weights[SPOILED:].mean()


@every_scheme
def test_rounds_compile_once_and_none_is_worse_than_plain_averaging(name):
    run = program(name)
    stacked, state, params, alive, own = inputs(name)
    compiled = run._cache_size()
    for _ in range(3):
        params, state, _ = run(stacked, state, params, alive, own)
        assert held_out_loss(params) <= plain_loss() + 1e-6
    assert run._cache_size() == max(compiled, 1)


@every_scheme
def test_a_dead_replica_is_a_run_of_the_survivors_to_rounding(name):
    """Not to the last bit: XLA rounds a network, and its gradient, by the program that it stands in."""

    def close(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    dead = np.array([1, 4, 5])
    keep = np.setdiff1d(np.arange(K), dead)
    stacked, state, params, alive, own = inputs(name)
    alive = alive.at[dead].set(False)
    stacked = jax.tree.map(lambda x: x.at[dead].set(NAN), stacked)
    own = {signal: values.at[dead].set(NAN) for signal, values in own.items()}
    few, few_state, few_params, few_alive, few_own = inputs(name, keep)
    for _ in range(2):  # the second round goes on from what is carried
        params, state, weights = program(name)(stacked, state, params, alive, own)
        few_params, few_state, few_weights = program(name)(few, few_state, few_params, few_alive, few_own)
        for w, f in zip(jax.tree.leaves(weights), jax.tree.leaves(few_weights), strict=True):
            assert (w[dead] == 0).all()
            close(w[keep], f)
        jax.tree.map(close, params, few_params)


@every_scheme
def test_none_alive_changes_nothing(name):
    stacked, state, _, alive, own = inputs(name)
    before = tree.replica(stacked, 3)
    after, after_state, weights = program(name)(stacked, state, before, ~alive, own)
    jax.tree.map(np.testing.assert_array_equal, (after, after_state), (before, state))
    assert all((w == 0).all() for w in jax.tree.leaves(weights))


@pytest.mark.slow
@schemes("greedy_soup", "learned")
def test_jit_changes_nothing(name):
    with_jit = program(name)(*inputs(name))
    without = program(name).__wrapped__(*inputs(name))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), with_jit, without)


@schemes("learned", "carry")
def test_a_single_replica_has_it_all(name):
    stacked, state, params, alive, own = inputs(name, slice(6, 7))
    after, _, weights = program(name)(stacked, state, params, alive, own)
    assert all((w == 1).all() for w in jax.tree.leaves(weights))
    jax.tree.map(np.testing.assert_array_equal, after, tree.replica(stacked, 0))


@pytest.mark.slow
@schemes("greedy_soup", "learned")
def test_bfloat16_parameters(name):
    params, _, weights = program(name)(*inputs(name, dtype=jnp.bfloat16))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
    assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(weights))
    assert held_out_loss(params) < plain_loss() - 0.01


@schemes("best_of", "layers", "carry")
def test_sharded_replicas_give_the_same_numbers(name):
    """The slope goes through shard_map and psum, and in best_of through a switch inside a scan."""
    mesh = placement.on(tuple(jax.devices()))
    stacked, *rest = inputs(name)
    alone = program(name)(stacked, *rest)
    spread = program(name, mesh.reduce)(jax.device_put(stacked, mesh.stacked), *rest)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), spread, alone)


def test_needs_are_united():
    assert search.greedy_soup("loss").needs == ("loss", "evaluate")
    assert search.learned(proportional("accuracy")).needs == ("accuracy", "evaluate")
    scheme = search.best_of(inverse("loss"), search.greedy_soup("loss"), uniform())
    assert sorted(scheme.needs) == ["evaluate", "loss"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: search.greedy_soup("grad_norm"), '"loss" or by "accuracy"'),
        (lambda: search.best_of(uniform(), signal="ece"), '"loss" or by "accuracy"'),
        (search.best_of, "at least one weighting"),
        (lambda: search.learned(steps=0), "1 or more"),
        (lambda: search.learned(learning_rate=0.1, optimizer=optax.sgd(0.1)), "give one of the two"),
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
