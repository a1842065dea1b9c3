"""The averager against plain NumPy: blend, outer step, the sign of the pseudo-gradient, and who is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wavg_jax as wavg

NAN = float("nan")


def stacked_trees(replicas=4, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "dense": {
            "kernel": jnp.asarray(rng.normal(size=(replicas, 3, 5)), dtype),
            "bias": jnp.asarray(rng.normal(size=(replicas, 5)), dtype),
        },
        "scale": jnp.asarray(rng.normal(size=(replicas,)), dtype),
    }


PARAMS = wavg.replica(stacked_trees(1, seed=7), 0)


def assert_close(actual, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **({"rtol": 1e-6, "atol": 1e-6} | tolerance)), actual, expected
    )


def numpy_mean(stacked, weights=None):
    return jax.tree.map(lambda x: np.average(np.asarray(x, np.float64), axis=0, weights=weights), stacked)


@pytest.mark.parametrize("outer", [None, optax.sgd(1.0)], ids=["none", "sgd1"])
def test_no_outer_optimizer_and_sgd_with_rate_one_are_plain_averaging(outer):
    stacked = stacked_trees()
    avg = wavg.averager(wavg.uniform(), outer=outer)
    new, _, weights = avg.update(stacked, avg.init(PARAMS, 4), PARAMS)
    assert weights.tolist() == [0.25] * 4
    assert_close(new, numpy_mean(stacked))


def test_weighted_blend_is_numpys_weighted_average():
    stacked = stacked_trees()
    avg = wavg.averager(wavg.proportional("accuracy"))
    new, _, _ = avg.update(stacked, avg.init(PARAMS, 4), PARAMS, accuracy=jnp.array([0.1, 0.2, 0.3, 0.4]))
    assert_close(new, numpy_mean(stacked, [0.1, 0.2, 0.3, 0.4]))


def test_without_jit_nothing_is_compiled_in_the_second_call(compilations):
    params = {"w": jnp.zeros((3, 2))}
    stacked, avg = wavg.replicate(params, 4), wavg.averager(wavg.uniform())
    for _ in range(2):
        before = len(compilations)
        avg.update(stacked, avg.init(params, 4), params)
    assert len(compilations) == before


def test_a_reduction_may_return_the_dtype_of_the_parameters():
    def in_own_dtype(stacked, weights, *, sum_over=None):
        del sum_over
        return jax.tree.map(lambda x: (x * weights.astype(x.dtype)[:, None]).sum(0), stacked)

    params = {"w": jnp.zeros(2, jnp.bfloat16)}
    avg = wavg.averager(wavg.uniform(), reduce=in_own_dtype)
    stacked = {"w": jnp.array([[1, 2], [3, 4]], jnp.bfloat16)}
    new, _, _ = jax.jit(avg.update)(stacked, avg.init(params, 2), params)
    assert (new["w"].dtype, new["w"].tolist()) == (jnp.bfloat16, [2.0, 3.0])


def test_the_pseudo_gradient_points_from_the_blend_to_the_old_parameters():
    # params 10, blend 4: pseudo-gradient +6, and SGD with rate 0.5 goes down it, to 10 - 0.5 * 6 = 7.
    params = {"w": jnp.array([10.0])}
    seen = []

    def spy_update(gradient, state, params=None):
        seen.append(gradient["w"].item())
        return jax.tree.map(lambda g: -0.5 * g, gradient), state

    avg = wavg.averager(wavg.uniform(), outer=optax.GradientTransformation(lambda p: (), spy_update))
    new, _, _ = avg.update({"w": jnp.array([[3.0], [5.0]])}, avg.init(params, 2), params)
    assert seen == [6.0]
    assert new["w"].tolist() == [7.0]


def test_dilocos_nesterov_against_numpy_over_three_rounds():
    # Sutskever et al. 2013 as PyTorch has it: m = 0.9 m + g; params -= 0.7 * (g + 0.9 m), with g = params - blend.
    avg = wavg.averager(wavg.uniform(), outer=wavg.outer.nesterov(0.7, 0.9))
    params = {"w": jnp.array([1.0, -2.0])}
    state = avg.init(params, 2)
    expected, momentum = np.array([1.0, -2.0]), np.zeros(2)
    for number in range(3):
        stacked = {"w": jnp.array([[0.5, 1.0], [1.5, -3.0]]) + jnp.float32(number)}
        gradient = expected - np.asarray(stacked["w"]).mean(axis=0)
        momentum = 0.9 * momentum + gradient
        expected = expected - 0.7 * (gradient + 0.9 * momentum)
        params, state, _ = avg.update(stacked, state, params)
        assert_close(params, {"w": expected})


@pytest.mark.optimized
@pytest.mark.parametrize("outer", [None, wavg.outer.nesterov()], ids=["none", "nesterov"])
@pytest.mark.parametrize("how", ["mask", "nan parameters", "infinite parameters"])
def test_a_dead_replica_equals_a_run_of_the_survivors_exactly(outer, how):
    stacked = stacked_trees()
    survivors = jax.tree.map(lambda x: x[jnp.array([0, 2, 3])], stacked)
    alive = jnp.array([True, how != "mask", True, True])
    poison = {"mask": NAN, "nan parameters": NAN, "infinite parameters": float("inf")}[how]
    stacked["dense"]["bias"] = stacked["dense"]["bias"].at[1, 2].set(poison)
    avg = wavg.averager(wavg.softmax("loss", 1.0), outer=outer)
    losses = jnp.array([0.5, 0.1, 0.7, 0.6])
    update = jax.jit(avg.update)
    new, _, weights = update(stacked, avg.init(PARAMS, 4), PARAMS, alive=alive, loss=losses)
    alone, _, _ = update(survivors, avg.init(PARAMS, 3), PARAMS, loss=losses[jnp.array([0, 2, 3])])
    assert weights[1] == 0
    jax.tree.map(np.testing.assert_array_equal, new, alone)


@pytest.mark.parametrize("pull", [1.0, 0.5])
def test_a_caller_that_has_tested_the_parameters_is_trusted(pull):
    avg, stacked = wavg.averager(wavg.uniform(), pull=pull), {"w": jnp.array([[1.0], [NAN], [3.0]])}
    params, state, finite = {"w": jnp.zeros(1)}, avg.init({"w": jnp.zeros(1)}, 3), jnp.array([True, False, True])

    def both(alive, check_finite):
        new, _, weights = avg.update(stacked, state, params, alive=alive, check_finite=check_finite)
        return new, weights, avg.restart(stacked, params, new, alive=alive, check_finite=check_finite)

    trusted, tested = both(finite, check_finite=False), both(jnp.ones(3, bool), check_finite=True)
    jax.tree.map(np.testing.assert_array_equal, trusted, tested)
    # Wrongly told that all are finite, it blends the NaN, and the step as a whole is refused.
    new, weights, stacked = both(jnp.ones(3, bool), check_finite=False)
    assert (new["w"].tolist(), weights.tolist()) == ([0.0], [0.0] * 3)
    assert np.isnan(stacked["w"]).any() == (pull != 1)


@pytest.mark.parametrize("pull", [1.0, 0.5])
def test_to_be_trusted_the_living_must_be_given(pull):
    avg, stacked = wavg.averager(wavg.uniform(), pull=pull), stacked_trees()
    for call in (
        lambda **more: avg.update(stacked, avg.init(PARAMS, 4), PARAMS, check_finite=False, **more),
        lambda **more: avg.restart(stacked, PARAMS, PARAMS, check_finite=False, **more),
    ):
        with pytest.raises(wavg.SettingsError, match="check_finite=False trusts alive=, which is missing"):
            call()
        with pytest.raises(wavg.SettingsError, match=r"alive is bool of shape \(3,\).*\[4\]"):
            call(alive=jnp.ones(3, bool))


@pytest.mark.parametrize("k", [None, 0, 2.5, True])
def test_init_takes_a_whole_number_of_replicas(k):
    weighting = wavg.momentum(wavg.uniform(), 0.5)
    for init in (weighting.init, wavg.uniform().init, wavg.robust.krum(1).init, wavg.averager(weighting).init):
        with pytest.raises(wavg.SettingsError, match=f"replicas is {k}; it must be a whole number, 1 or more"):
            init(PARAMS, k)
        with pytest.raises(TypeError, match="replicas"):
            init(PARAMS)


@pytest.mark.parametrize("reduce", [wavg.weighted_mean, wavg.norm_preserving])
def test_the_global_parameters_take_the_place_of_a_dead_replica_that_a_users_weighting_counts(reduce):
    careless = wavg.Weighting(
        lambda params, replicas: (), lambda stacked, state, params, **given: (jnp.full(4, 0.25), state)
    )
    stacked, alive = stacked_trees(), jnp.array([True, False, True, True])
    broken = jax.tree.map(lambda x: x.at[1].set(NAN), stacked)
    instead = jax.tree.map(lambda x, p: x.at[1].set(p), stacked, PARAMS)
    avg = wavg.averager(careless, reduce=reduce)
    new, _, _ = jax.jit(avg.update)(broken, avg.init(PARAMS, 4), PARAMS, alive=alive)
    expected, _, _ = avg.update(instead, avg.init(PARAMS, 4), PARAMS)
    assert_close(new, expected)


def test_when_all_are_dead_parameters_and_state_stay():
    avg = wavg.averager(wavg.uniform(), outer=wavg.outer.nesterov())
    state = avg.init(PARAMS, 4)
    _, state, _ = avg.update(stacked_trees(), state, PARAMS)
    new, same, weights = avg.update(stacked_trees(), state, PARAMS, alive=jnp.zeros(4, bool))
    assert weights.tolist() == [0] * 4
    jax.tree.map(np.testing.assert_array_equal, (new, same), (PARAMS, state))


@settings(max_examples=8)  # each number of replicas compiles anew
@given(st.integers(1, 6), st.integers(0, 1000))
def test_equal_replicas_are_unchanged(replicas, seed):
    params = wavg.replica(stacked_trees(1, seed=seed), 0)
    avg = wavg.averager(wavg.proportional("accuracy"))
    scores = jnp.asarray(np.random.default_rng(seed).uniform(size=replicas), jnp.float32)
    new, _, _ = avg.update(wavg.replicate(params, replicas), avg.init(params, replicas), params, accuracy=scores)
    assert_close(new, params)


def test_bfloat16_is_summed_in_float32_and_comes_back_as_bfloat16():
    # In bfloat16 256 + 1 is 256: a sum of 1s would stick there.
    stacked = {"w": jnp.concatenate([jnp.full((1, 1), 256.0), jnp.ones((31, 1))]).astype(jnp.bfloat16)}
    total = wavg.weighted_mean(stacked, jnp.ones(32, jnp.float32))
    assert total["w"].dtype == jnp.float32
    assert total["w"].item() == 287
    avg = wavg.averager(wavg.uniform(), outer=wavg.outer.nesterov())
    params = {"w": jnp.zeros(1, jnp.bfloat16)}
    new, state, _ = avg.update({"w": stacked["w"][:4]}, avg.init(params, 4), params)
    assert new["w"].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}


def test_weights_may_differ_per_layer_and_per_element():
    stacked = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": {"c": jnp.array([[10.0], [20.0]])}}
    weights = {"a": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "b": jnp.array([0.25, 0.75])}
    blend = wavg.weighted_mean(stacked, weights)
    assert blend["a"].tolist() == [1.0, 4.0]
    assert blend["b"]["c"].tolist() == [17.5]


@pytest.mark.optimized
def test_one_replica_is_taken_as_it_is():
    stacked = stacked_trees(1)
    avg = wavg.averager(wavg.softmax("loss", 0.2))
    new, _, weights = avg.update(stacked, avg.init(PARAMS, 1), PARAMS, loss=jnp.array([3.0]))
    assert weights.tolist() == [1.0]
    jax.tree.map(np.testing.assert_array_equal, new, wavg.replica(stacked, 0))


@pytest.mark.parametrize(
    ("weighting", "settings", "reads"),
    [
        (wavg.softmax("loss"), {}, False),
        (wavg.token_weighted(), {}, False),
        (wavg.softmax("loss"), {"outer": optax.sgd(0.5), "pull": 0.5, "deltas": True}, False),
        (wavg.softmax("loss"), {"transform": wavg.transforms.trim_deltas()}, True),
        (wavg.softmax("loss"), {"reduce": wavg.norm_preserving}, True),
        (wavg.learned(), {}, True),
    ],
)
def test_one_sum_over_the_devices_is_enough_for_the_weighted_mean_of_scored_replicas_alone(weighting, settings, reads):
    assert wavg.averager(weighting, **settings).reads_replicas is reads


def test_a_missing_signal_is_named():
    avg = wavg.averager(wavg.softmax("loss", 0.2))
    with pytest.raises(wavg.SettingsError, match="'loss'"):
        avg.update(stacked_trees(), avg.init(PARAMS, 4), PARAMS, accuracy=jnp.ones(4))


def test_the_update_compiles_once_and_its_buffers_can_be_donated():
    avg = wavg.averager(wavg.proportional("accuracy"), outer=wavg.outer.nesterov())
    update = jax.jit(avg.update, donate_argnums=(1, 2))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = avg.init(params, 4)
    for seed in range(3):
        old = params
        params, state, _ = update(stacked_trees(seed=seed), state, params, accuracy=jnp.full(4, 0.1 + seed))
    assert update._cache_size() == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(old))


def test_replicate_gives_every_replica_memory_of_its_own():
    stacked = wavg.replicate({"w": jnp.arange(3.0)}, 4)
    assert stacked["w"].shape == (4, 3)
    assert jax.jit(lambda s: s, donate_argnums=0)(stacked)["w"].tolist() == [[0, 1, 2]] * 4
