"""NaN and infinity, put into one replica at every step of a round: none reaches the blend, and the replica restarts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wavg_jax as wavg
from wavg_jax import models
from wavg_jax.base import Batch

K, H, VICTIM = 4, 3, 2
LOSS, GRADIENT, STATISTICS, OPTIMIZER, HUGE = range(1, 6)
"""What a batch poisons: its inputs end with this code, and the number to put there."""


def _init(rng):
    del rng
    return {"w": jnp.zeros(2), "flag": jnp.zeros(())}, {"mean": jnp.zeros(())}


def _apply(params, mutable, x, *, train, rng):
    del rng
    mean = 0.9 * mutable["mean"] + 0.1 * x[:, 0].mean() if train else mutable["mean"]
    return x[:, :2] @ params["w"] + 0.0 * mutable["mean"], {"mean": mean}


CLEAN = models.regressor(_init, _apply)


def _loss(params, mutable, batch, rng):
    """The loss of a batch, with what its code says poisoned."""
    code, bad = batch.x[0, 2], batch.x[0, 3]
    value, (new, metrics) = CLEAN.loss(params, mutable, batch, rng)
    value = value + jax.lax.stop_gradient(jnp.where(code == LOSS, bad, 0.0))
    # A factor of the slope alone: at flag = 0 the loss itself stays as it is.
    slope = jnp.where(code == GRADIENT, bad, jnp.where(code == HUGE, 1e30, 1.0))
    value = _steeper(value, slope) + params["flag"] * jnp.where(code == OPTIMIZER, jnp.where(jnp.isnan(bad), 1, 2), 0)
    return value, ({"mean": jnp.where(code == STATISTICS, bad, new["mean"])}, metrics)


@jax.custom_vjp
def _steeper(value, slope):
    return value


_steeper.defvjp(lambda value, slope: (value, slope), lambda slope, g: (g * slope, jnp.zeros_like(slope)))
TASK = CLEAN._replace(loss=_loss)


def _update(gradient, state, params=None):
    """SGD, whose state alone is poisoned by the slope of the flag: 1 for NaN, 2 for infinity."""
    bad = jnp.where(gradient["flag"] == 1, jnp.nan, jnp.where(gradient["flag"] == 2, jnp.inf, 0.0))
    step = jax.tree.map(lambda g: -0.1 * g, gradient)
    return step | {"flag": jnp.zeros_like(step["flag"])}, 0.5 * state + bad


INNER = optax.GradientTransformation(lambda params: jnp.zeros(()), _update)


def batches(code, bad, at, victims=(VICTIM,)):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(K, H, 5, 4)).astype(np.float32)
    y = x[..., 0] - 2 * x[..., 1]
    x[..., 2:] = 0
    for victim in victims:
        x[victim, at, :, 2:] = code, bad
    return Batch(jnp.asarray(x), jnp.asarray(y))


def held_out(bad=None):
    x = np.random.default_rng(1).normal(size=(20, 4)).astype(np.float32)
    y = x[:, 0] - 2 * x[:, 1]
    if bad is not None:
        x[3, 0] = bad
    return Batch(jnp.asarray(x), jnp.asarray(y))


SCHEMES = {
    "plain": wavg.averager(wavg.uniform()),
    "scored, with an outer step": wavg.averager(wavg.softmax("loss", 0.5), outer=wavg.outer.nesterov(0.7, 0.5)),
    "kept apart": wavg.averager(wavg.inverse("loss"), pull=0.5),
}


@pytest.fixture(scope="module", params=SCHEMES)
def rounds(request):
    """The state before any round, and the compiled round, one for all cases."""
    made = wavg.make_rounds(TASK, SCHEMES[request.param], INNER, at_sync=wavg.AtSync(smoothing=wavg.smoothing.swa()))
    return made.init(jax.random.key(0), replicas=K), jax.jit(made.step)


def all_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_in_one_replica_reaches_nothing_else(rounds, bad):
    start, step = rounds
    found = {}
    for code in (LOSS, GRADIENT, STATISTICS, OPTIMIZER):
        for at in range(H):
            state, log = step(start, batches(code, bad, at), held_out())
            assert np.asarray(log.alive).tolist() == [k != VICTIM for k in range(K)], (code, at)
            assert log.weights[VICTIM] == 0
            assert all_finite((state, log.weights)), (code, at)
            found[code, at] = jax.device_get((state.params, state.mutable, state.smoothed, state.averager, log.weights))
            state, log = step(state, batches(0, 0, 0), held_out())  # it is back
            assert np.asarray(log.alive).all()
            assert all_finite(state)
    # The others neither know what was poisoned, nor when.
    first, *others = found.values()
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


def test_a_replica_of_finite_numbers_whose_score_overflows_has_no_weight():
    made = wavg.make_rounds(TASK, wavg.averager(wavg.softmax("loss", 0.5)), INNER)
    state, log = made.step(made.init(jax.random.key(0), replicas=K), batches(HUGE, 0, H - 1), held_out())
    assert np.asarray(log.alive).all()
    assert not np.isfinite(log.scores["loss"][VICTIM])
    assert log.weights[VICTIM] == 0
    assert np.abs(state.params["w"]).max() < 10
    assert all_finite(state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_held_out_sample_that_is_not_finite_leaves_equal_weights(bad):
    made = wavg.make_rounds(TASK, wavg.averager(wavg.softmax("loss", 0.5)), INNER)
    start = made.init(jax.random.key(0), replicas=K)
    state, log = made.step(start, batches(0, 0, 0), held_out(bad))
    assert not np.isfinite(log.scores["loss"]).any()
    np.testing.assert_allclose(log.weights, 1 / K)
    assert all_finite(state)


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_what_was_poisoned_before_the_round_goes_no_further(rounds, part):
    start, step = rounds
    bad = jax.tree.map(lambda x: x.at[VICTIM].set(jnp.nan), getattr(start.replicas, part))
    state, log = step(start._replace(replicas=start.replicas._replace(**{part: bad})), batches(0, 0, 0), held_out())
    if part == "params":
        assert np.asarray(log.alive).tolist() == [k != VICTIM for k in range(K)]
        assert log.weights[VICTIM] == 0
    assert all_finite((state.params, state.mutable, state.averager, state.smoothed))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fragments", [1, 2])
def test_what_a_narrow_wire_carries_over_is_dropped_where_it_is_not_finite(bad, fragments):
    """Where the residual of one replica is not finite, the replica is left out for a round and begins anew."""
    at_sync = wavg.AtSync(wire="int8", fragments=fragments)
    made = wavg.make_rounds(TASK, wavg.averager(wavg.uniform()), INNER, at_sync=at_sync)
    start, step = made.init(jax.random.key(0), replicas=K), jax.jit(made.step)
    given = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :1]], 1), batches(0, 0, 0))  # F divides four steps
    spoilt = jax.tree.map(lambda x: x.at[VICTIM].set(bad), start.replicas.residual)
    state, log = step(start._replace(replicas=start.replicas._replace(residual=spoilt)), given, held_out())
    if fragments == 1:
        assert np.asarray(log.alive).tolist() == [k != VICTIM for k in range(K)]
        assert log.weights[VICTIM] == 0
    assert all_finite((state.params, state.replicas._replace(pending=())))  # a fragment on its way may not be
    state, log = step(state, given, held_out())
    assert np.asarray(log.alive).all()
    assert all_finite(state)
    assert np.abs(state.params["w"]).max() > 0  # the others went on


@pytest.mark.parametrize("how", ["bfloat16", "int8"])
def test_a_change_that_a_narrow_wire_cannot_carry_is_left_out(how):
    made = wavg.make_rounds(TASK, wavg.averager(wavg.uniform()), INNER, at_sync=wavg.AtSync(wire=how))
    start, step = made.init(jax.random.key(0), replicas=K), jax.jit(made.step)
    most = float(np.finfo(np.float32).max)  # finite, but as a change from its negative it is not, and not in bfloat16
    huge = jax.tree.map(lambda x: x.at[VICTIM].set(most), start.replicas.params)
    start = start._replace(replicas=start.replicas._replace(params=huge))
    state, log = step(start, batches(0, 0, 0), held_out())
    assert log.weights[VICTIM] == 0
    assert all_finite(state)
    assert np.abs(state.params["w"]).max() < 10


@pytest.mark.parametrize("code", [LOSS, GRADIENT, STATISTICS, OPTIMIZER])
def test_where_all_are_poisoned_the_round_is_lost_and_nothing_moves(rounds, code):
    start, step = rounds
    before, _ = step(start, batches(0, 0, 0), held_out())
    state, log = step(before, batches(code, np.nan, 1, range(K)), held_out())
    assert not np.asarray(log.alive).any()
    assert not np.asarray(log.weights).any()
    for name in ("params", "mutable", "averager", "smoothed"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    assert all_finite(state)
