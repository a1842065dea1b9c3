"""The named outer optimizers through the averager, against NumPy of the published formulas over several rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wavg_jax as wavg

ROUNDS = 4
START = np.array([1.0, -2.0, 0.5])


def blends():
    """What the replicas' mean is in each round, whatever they started from."""
    return np.random.default_rng(0).normal(size=(ROUNDS, 3))


def through_the_averager(outer):
    """Global parameters after every round [ROUNDS, 3]; two replicas around the round's blend."""
    avg = wavg.averager(wavg.uniform(), outer=outer)
    update = jax.jit(avg.update)
    params = {"w": jnp.asarray(START, jnp.float32)}
    state, seen = avg.init(params), []
    for blend in blends():
        apart = np.array([[0.25, -0.5, 1.0]])
        stacked = {"w": jnp.asarray(np.concatenate([blend + apart, blend - apart]), jnp.float32)}
        params, state, _ = update(stacked, state, params)
        seen.append(np.asarray(params["w"]))
    assert update._cache_size() == 1
    return np.array(seen)


def numpy_lookahead(alpha):
    """Algorithm 1 of Zhang et al.: phi <- phi + alpha (theta - phi)."""
    phi = START
    for theta in blends():
        phi = phi + alpha * (theta - phi)
        yield phi


def numpy_bmuf(momentum, rate, ahead):
    """Chen and Huo: G = mean - start, D <- momentum D + rate G, W <- W + D; replicas start from W + ahead * D."""
    w, delta, start = START, np.zeros(3), START
    for mean in blends():
        delta = momentum * delta + rate * (mean - start)
        w = w + delta
        start = w + ahead * delta
        yield start


def numpy_fedavgm(rate, momentum):
    """Hsu et al.: v <- momentum v + dw with dw = w - mean, w <- w - rate v."""
    w, v = START, np.zeros(3)
    for mean in blends():
        v = momentum * v + (w - mean)
        w = w - rate * v
        yield w


def numpy_adam(rate, b1, b2, eps):
    """Adam with bias correction on the pseudo-gradient."""
    w, m, v = START, np.zeros(3), np.zeros(3)
    for t, mean in enumerate(blends(), start=1):
        gradient = w - mean
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        w = w - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        yield w


def numpy_nesterov(rate, momentum):
    w, m = START, np.zeros(3)
    for mean in blends():
        gradient = w - mean
        m = momentum * m + gradient
        w = w - rate * (gradient + momentum * m)
        yield w


def numpy_delayed(rate, momentum):
    """The same, a round late: round t applies what round t - 1 sent."""
    w, m, held = START, np.zeros(3), np.zeros(3)
    for mean in blends():
        late, held = held, w - mean
        m = momentum * m + late
        w = w - rate * (late + momentum * m)
        yield w


@pytest.mark.parametrize(
    ("outer", "published"),
    [
        (wavg.outer.nesterov(), list(numpy_nesterov(0.7, 0.9))),
        (wavg.outer.lookahead(), list(numpy_lookahead(0.5))),
        (wavg.outer.bmuf(0.75, nesterov=False), list(numpy_bmuf(0.75, 1.0, ahead=0))),
        (wavg.outer.bmuf(0.75, 0.9), list(numpy_bmuf(0.75, 0.9, ahead=0.75))),
        (wavg.outer.fedavgm(0.5, 0.8), list(numpy_fedavgm(0.5, 0.8))),
        (wavg.outer.delayed(wavg.outer.nesterov(0.4, 0.6)), list(numpy_delayed(0.4, 0.6))),
    ],
    ids=["nesterov", "lookahead", "bmuf", "bmuf_nesterov", "fedavgm", "delayed_nesterov"],
)
def test_each_is_its_published_formula(outer, published):
    np.testing.assert_allclose(through_the_averager(outer), published, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_fedadam_is_adam_on_the_pseudo_gradient():
    expected = list(numpy_adam(0.1, 0.8, 0.95, 1e-2))
    np.testing.assert_allclose(
        through_the_averager(wavg.outer.fedadam(0.1, 0.8, 0.95, 1e-2)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.usefixtures("standard_promotion")
def test_fedadams_first_step_is_algorithm_2s_with_the_defaults():
    # (1 - b1) g / (sqrt(1 - b2) |g|) = 0.1 / 0.1, the learning rate, for pseudo-gradients far above eps.
    first = through_the_averager(wavg.outer.fedadam(0.01))[0]
    np.testing.assert_allclose(np.abs(first - START), 0.01, rtol=0.01)


def test_the_first_delayed_round_leaves_the_parameters_and_the_second_applies_it():
    # params 10, blends 4 and 1: nothing; then 10 - 0.5 * (10 - 4) = 7, and 7 - 0.5 * (10 - 1) = 2.5.
    avg = wavg.averager(wavg.uniform(), outer=wavg.outer.delayed(optax.sgd(0.5)))
    params = {"w": jnp.array([10.0], jnp.bfloat16)}
    state, seen = avg.init(params), []
    for blend in (4.0, 1.0, 0.0):
        params, state, _ = avg.update({"w": jnp.array([[blend]], jnp.bfloat16)}, state, params)
        seen.append(params["w"].item())
    assert seen == [10, 7, 2.5]
    assert params["w"].dtype == jnp.bfloat16
    assert state.outer.held["w"].dtype == jnp.float32


def test_a_round_with_nobody_alive_neither_applies_nor_forgets_what_is_held():
    avg = wavg.averager(wavg.uniform(), outer=wavg.outer.delayed(optax.sgd(1.0)))
    params = {"w": jnp.array([10.0])}
    _, state, _ = avg.update({"w": jnp.array([[4.0]])}, avg.init(params), params)
    lost, same, _ = avg.update({"w": jnp.array([[99.0]])}, state, params, alive=jnp.zeros(1, bool))
    assert lost["w"].tolist() == [10]
    assert same.outer.held["w"].tolist() == state.outer.held["w"].tolist() == [6]
