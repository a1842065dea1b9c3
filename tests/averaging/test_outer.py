"""The named outer optimizers through the averager, against NumPy of the published formulas over several rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wavg_jax as wavg
from wavg_jax.devices import machine, placement
from wavg_jax.storage.checkpoints import open_checkpoints, snapshot

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
    state, seen = avg.init(params, 2), []
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


def numpy_reddi(rate, b1, tau, second):
    """Algorithm 2 of Reddi et al. with its own sign: delta = mean - w, and v from tau^2."""
    w, m, v = START, np.zeros(3), np.full(3, tau**2)
    for mean in blends():
        delta = mean - w
        m = b1 * m + (1 - b1) * delta
        v = second(v, delta**2)
        w = w + rate * m / (np.sqrt(v) + tau)
        yield w


def yogi(b2):
    return lambda v, square: v - (1 - b2) * square * np.sign(v - square)


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
        (wavg.outer.fedadagrad(0.1, 0.3, 1e-2), list(numpy_reddi(0.1, 0.3, 1e-2, lambda v, square: v + square))),
        (wavg.outer.fedyogi(0.1, 0.8, 0.95, 0.5), list(numpy_reddi(0.1, 0.8, 0.5, yogi(0.95)))),
        (
            wavg.outer.fedadam(0.1, 0.8, 0.95, 1e-2),
            list(numpy_reddi(0.1, 0.8, 1e-2, lambda v, square: 0.95 * v + 0.05 * square)),
        ),
        (wavg.outer.delayed(wavg.outer.nesterov(0.4, 0.6)), list(numpy_delayed(0.4, 0.6))),
    ],
    ids=[
        *("nesterov", "lookahead", "bmuf", "bmuf_nesterov", "fedavgm"),
        *("fedadagrad", "fedyogi", "fedadam", "delayed_nesterov"),
    ],
)
def test_each_is_its_published_formula(outer, published):
    np.testing.assert_allclose(through_the_averager(outer), published, rtol=1e-5, atol=1e-6)


ADAPTIVE = {
    # params 10, blend 8.8: g 1.2, v 0.25 + 1.44 = 1.3^2, step 1.2 / (1.3 + 0.5) = 2/3.
    # params 28/3, g 3.12: v 1.69 + 9.7344 = 3.38^2, step 3.12 / 3.88.
    "fedadagrad": (wavg.outer.fedadagrad(1.0, tau=0.5), (1.2, 3.12), (2 / 3, 3.12 / 3.88)),
    # g 4: m 0.5 * 4 = 2, v 1 - 0.5 * 16 * sign(1 - 16) = 9, step 2 / (3 + 1).
    # g 2: m 0.5 * 2 + 0.5 * 2 = 2, v 9 - 0.5 * 4 * sign(9 - 4) = 7, step 2 / (sqrt 7 + 1).
    "fedyogi": (wavg.outer.fedyogi(1.0, 0.5, 0.5, tau=1.0), (4.0, 2.0), (0.5, 2 / (7**0.5 + 1))),
    # g 7: m 3.5, v 0.5 * 1 + 0.5 * 49 = 25, step 3.5 / (5 + 1).
    # g -5: m 0.5 * 3.5 - 0.5 * 5 = -0.75, v 0.5 * 25 + 0.5 * 25 = 25, step -0.75 / 6.
    "fedadam": (wavg.outer.fedadam(1.0, 0.5, 0.5, tau=1.0), (7.0, -5.0), (3.5 / 6, -0.125)),
}


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_two_rounds_of_algorithm_2_by_hand(name, dtype):
    outer, gradients, steps = ADAPTIVE[name]
    avg = wavg.averager(wavg.uniform(), outer=outer)
    params = {"w": jnp.full(1, 10.0, dtype), "b": jnp.ones(())}
    state, w = avg.init(params, 2), 10.0
    update = jax.jit(avg.update)
    for g, step in zip(gradients, steps, strict=True):
        start = np.float32(params["w"][0])
        sent = {"w": jnp.full((2, 1), start - g, dtype), "b": jnp.ones(2)}
        params, state, _ = update(sent, state, params)
        w -= step
        np.testing.assert_allclose(np.float32(params["w"][0]), w, rtol=1e-6 if dtype == jnp.float32 else 0.01)
    assert params["w"].dtype == dtype
    assert params["b"] == 1
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state))
    assert update._cache_size() == 1


def test_an_adaptive_rate_may_be_a_schedule_of_the_round():
    # 1.0 in round 1 and 0 after it: the first step is 3.5 / 6, the second nothing.
    outer = wavg.outer.fedadam(lambda count: jnp.where(count == 0, 1.0, 0.0), 0.5, 0.5, tau=1.0)
    avg, params = wavg.averager(wavg.uniform(), outer=outer), {"w": jnp.array([10.0])}
    state = avg.init(params, 1)
    for _ in range(2):
        params, state, _ = avg.update({"w": params["w"][None] - 7}, state, params)
    np.testing.assert_allclose(params["w"], 10 - 3.5 / 6, rtol=1e-6)


def flattened_spectrum(g):
    """What Iso-C makes of a matrix, in NumPy."""
    u, s, v = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    return s.mean() * u @ v


def test_iso_c_gives_every_direction_the_mean_singular_value_and_leaves_vectors_alone():
    rng = np.random.default_rng(0)
    shapes = {"wide": (5, 30), "tall": (30, 5), "conv": (3, 3, 4, 8), "bias": (8,), "scale": ()}
    g = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    flat, _ = jax.jit(wavg.outer.isotropic().update)(g, wavg.outer.isotropic().init(g))
    for name in ("wide", "tall"):
        np.testing.assert_allclose(flat[name], flattened_spectrum(g[name]), rtol=1e-4, atol=1e-5)
    expected = flattened_spectrum(g["conv"].reshape(36, 8)).reshape(3, 3, 4, 8)
    np.testing.assert_allclose(flat["conv"], expected, rtol=1e-4, atol=1e-5)
    assert all((flat[name] == g[name]).all() for name in ("bias", "scale"))


def test_iso_c_by_hand_before_an_outer_step_in_bfloat16():
    # The blend moved from 10 by diag(3, 1, 0) turned by 90 degrees in the plane of the first two axes: singular values
    # 3, 1 and 0, mean 4/3. The third direction is not there, and stays so. Half of it is taken.
    avg = wavg.averager(wavg.uniform(), outer=optax.chain(wavg.outer.isotropic(), optax.sgd(0.5)))
    moved = np.array([[0, -1, 0], [3, 0, 0], [0, 0, 0]])
    params = {"w": jnp.full((3, 3), 10.0, jnp.bfloat16)}
    stacked = {"w": jnp.asarray([10 + 0.5 * moved, 10 + 1.5 * moved], jnp.bfloat16)}
    new, state, _ = jax.jit(avg.update)(stacked, avg.init(params, 2), params)
    expected = 10 + 2 / 3 * np.array([[0, -1, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(state.masters["w"], expected, rtol=1e-5)
    assert new["w"].dtype == jnp.bfloat16
    still, _, _ = jax.jit(avg.update)(wavg.replicate(new, 2), state, new)
    np.testing.assert_array_equal(still["w"], new["w"])


def test_the_first_delayed_round_leaves_the_parameters_and_the_second_applies_it():
    # params 10, blends 4 and 1: nothing; then 10 - 0.5 * (10 - 4) = 7, and 7 - 0.5 * (10 - 1) = 2.5.
    avg = wavg.averager(wavg.uniform(), outer=wavg.outer.delayed(optax.sgd(0.5)))
    params = {"w": jnp.array([10.0], jnp.bfloat16)}
    state, seen = avg.init(params, 1), []
    for blend in (4.0, 1.0, 0.0):
        params, state, _ = avg.update({"w": jnp.array([[blend]], jnp.bfloat16)}, state, params)
        seen.append(params["w"].item())
    assert seen == [10, 7, 2.5]
    assert params["w"].dtype == jnp.bfloat16
    assert state.outer.held["w"].dtype == jnp.float32


def test_a_round_with_nobody_alive_neither_applies_nor_forgets_what_is_held():
    avg = wavg.averager(wavg.uniform(), outer=wavg.outer.delayed(optax.sgd(1.0)))
    params = {"w": jnp.array([10.0])}
    _, state, _ = avg.update({"w": jnp.array([[4.0]])}, avg.init(params, 1), params)
    lost, same, _ = avg.update({"w": jnp.array([[99.0]])}, state, params, alive=jnp.zeros(1, bool))
    assert lost["w"].tolist() == [10]
    assert same.outer.held["w"].tolist() == state.outer.held["w"].tolist() == [6]


NARROW = [jnp.bfloat16, jnp.float16]


def toward(target, outer, dtype, rounds=200):
    """Parameters and state after so many rounds in which the blend is `target`, starting from 1."""
    avg = wavg.averager(wavg.uniform(), outer=outer)
    params = {"narrow": jnp.ones(3, dtype), "wide": jnp.ones(2)}
    stacked = wavg.replicate(jax.tree.map(lambda x: jnp.full_like(x, target), params), 2)
    state = avg.init(params, 2)
    update = jax.jit(avg.update, donate_argnums=(1, 2))
    for _ in range(rounds):
        params, state, _ = update(stacked, state, params)
    assert update._cache_size() == 1
    return params, state


@pytest.mark.parametrize("dtype", NARROW)
def test_small_steps_add_up_in_parameters_that_are_stored_in_few_bits(dtype):
    # 0.75 + 0.25 * 0.99^200 = 0.7835; each step, 0.0025 or less, is under half of bfloat16's 0.0039 below 1.
    params, state = toward(0.75, wavg.outer.lookahead(0.01), dtype)
    expected = 0.75 + 0.25 * 0.99**200
    assert params["narrow"].dtype == dtype
    np.testing.assert_allclose(np.float32(params["narrow"]), expected, atol=0.005)
    np.testing.assert_allclose(params["wide"], expected, rtol=1e-5)
    assert state.masters["narrow"].dtype == jnp.float32
    np.testing.assert_array_equal(state.masters["narrow"].astype(dtype), params["narrow"])


def test_masters_are_kept_only_where_they_are_needed():
    params = {"narrow": jnp.ones(3, jnp.bfloat16), "wide": jnp.ones(2)}
    outer = wavg.outer.lookahead()
    assert jax.tree.leaves(wavg.averager(wavg.uniform()).init(params, 2)) == []
    assert jax.tree.leaves(wavg.averager(wavg.uniform(), outer=outer).init({"wide": params["wide"]}, 2)) == []
    (master,) = jax.tree.leaves(wavg.averager(wavg.uniform(), outer=outer).init(params, 2))
    assert (master.shape, master.dtype) == ((3,), jnp.float32)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", NARROW)
def test_a_round_without_movement_changes_nothing_with_masters_between_two_stored_numbers(dtype):
    if dtype == jnp.float16 and machine.isa().startswith("SSE4_2"):
        pytest.skip("XLA's CPU compiler has no conversion of float16 for SSE4.2 (__extendhfsf2)")
    params, state = toward(0.75, wavg.outer.lookahead(0.01), dtype, rounds=5)
    avg = wavg.averager(wavg.uniform(), outer=wavg.outer.lookahead(0.01))
    same = jax.jit(avg.update)(wavg.replicate(params, 2), state, params)[:2]
    jax.tree.map(np.testing.assert_array_equal, same, (params, state))
    lost = jax.jit(avg.update)(wavg.replicate(params, 2), state, params, alive=jnp.zeros(2, bool))[:2]
    jax.tree.map(np.testing.assert_array_equal, lost, (params, state))


def test_parameters_that_are_not_the_masters_cast_are_what_the_step_starts_from():
    # The masters say 0.9878 or so; the caller has put 3 in one place: 3 + 0.5 * (1 - 3) = 2.
    params, state = toward(0.75, wavg.outer.lookahead(0.01), jnp.bfloat16, rounds=5)
    params["narrow"] = params["narrow"].at[1].set(3)
    avg = wavg.averager(wavg.uniform(), outer=wavg.outer.lookahead(0.5))
    stacked = wavg.replicate(jax.tree.map(jnp.ones_like, params), 2)
    for update in (avg.update, jax.jit(avg.update)):
        new, after, _ = update(stacked, state, params)
        assert (new["narrow"][1], after.masters["narrow"][1]) == (2, 2)
        # 0.9878 + 0.5 * (1 - 0.9883), the pseudo-gradient being that of the stored number.
        start, stored = state.masters["narrow"][0], jnp.float32(params["narrow"][0])
        assert start != stored
        np.testing.assert_allclose(after.masters["narrow"][0], start + 0.5 * (1 - stored), rtol=1e-6)


def test_masters_are_the_same_with_the_replicas_on_several_devices():
    avg = wavg.averager(wavg.uniform(), outer=wavg.outer.nesterov())
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2)}
    rng = np.random.default_rng(0)
    rounds = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(4, *x.shape)), x.dtype), params) for _ in range(3)]
    there, ends = placement.on(tuple(jax.devices()[:4])), []
    for place in (placement.single(), there):
        new, state = jax.device_put((params, avg.init(params, 4)), place.shared)
        where = (place.shared, place.shared, place.shared)
        update = jax.jit(functools.partial(avg.update, place=place.reduce), out_shardings=where)
        for stacked in rounds:
            new, state, _ = update(jax.device_put(stacked, place.stacked), state, new)
        assert update._cache_size() == 1
        np.testing.assert_array_equal(state.masters["w"].astype(jnp.bfloat16), new["w"])
        ends.append((state.masters["w"], new["b"]))
    for one, spread in zip(*ends, strict=True):
        np.testing.assert_allclose(one, spread, rtol=1e-5, atol=1e-6)


def test_masters_are_in_the_checkpoint(tmp_path):
    params, state = toward(0.75, wavg.outer.lookahead(0.01), jnp.bfloat16, rounds=5)
    held = wavg.TrainState(params, {}, {}, state, jnp.int32(5))
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(snapshot(held))
        checkpoints.wait()
        restored = checkpoints.restore(5, held)
    jax.tree.map(np.testing.assert_array_equal, restored, held)
    assert restored.averager.masters["wide"] is None


def test_hyperparameters_of_a_named_outer_optimizer_may_be_injected():
    outer = optax.inject_hyperparams(wavg.outer.lookahead)(alpha=0.25)
    avg, params = wavg.averager(wavg.uniform(), outer=outer), {"w": jnp.zeros(2)}
    new, _, _ = jax.jit(avg.update)({"w": jnp.full((3, 2), 4.0)}, avg.init(params, 3), params)
    np.testing.assert_allclose(new["w"], [1, 1], rtol=1e-6)
