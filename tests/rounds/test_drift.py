"""Corrections of the local steps, FedProx and SCAFFOLD: by hand, and with the dead, weights, schedules and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import leaves, run, same
from runs import train as fit
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax.base import Batch, Task
from wavg_jax.rounds import drift

RATE, H = 0.1, 2


def parabolas(dtype=jnp.float32):
    """Replica k's loss is a_k / 2 (w - b_k)^2, with a_k for its inputs and b_k for its targets."""

    def loss(params, mutable, batch, rng):
        distance = params["w"].astype(jnp.float32) - batch.y
        return 0.5 * (batch.x * distance**2).mean(), (mutable, {})

    def init(rng):
        return {"w": jnp.ones((), dtype)}, {}

    return Task(init, loss, lambda params, mutable, x: x * params["w"], lambda logits, batch: {})


CURVATURES, GOALS = (1.0, 3.0), (0.0, 4.0)  # the mean of both losses is least at 12 / 4 = 3


def batches(curvatures=CURVATURES, goals=GOALS, steps=H):
    shape = (len(goals), steps, 1)
    return Batch(*(jnp.broadcast_to(jnp.asarray(v, jnp.float32)[:, None, None], shape) for v in (curvatures, goals)))


def rounds(correction, count, weighting=None, inner=None, replicas=2, given=None, devices=1, dtype=jnp.float32, **pace):
    """The states and logs after each of `count` rounds."""
    averager = wavg.averager(weighting or wavg.uniform())
    made = wavg.make_rounds(
        parabolas(dtype),
        averager,
        inner or optax.sgd(RATE),
        at_sync=wavg.AtSync(drift=correction),
        placement=wavg.place(replicas, devices),
    )
    state, step = jax.jit(made.init, static_argnums=1)(jax.random.key(0), replicas), jax.jit(made.step)
    states, logs = [], []
    for number in range(count):
        now = batches() if given is None else given(number)
        state, log = step(state, now, pace=wavg.Pace(**pace))
        states.append(state)
        logs.append(log)
    assert step._cache_size() == 1
    return states, logs


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_fedprox_by_hand():
    # mu 0.5. k = 0: gradient 1, x 0.9; gradient 0.9 + 0.5 (0.9 - 1) = 0.85, x 0.815.
    # k = 1: gradient 3 (1 - 4) = -9, x 1.9; 3 (1.9 - 4) + 0.5 (1.9 - 1) = -5.85, x 2.485.
    # Round 2 from 1.65. k = 0: 1.65, x 1.485; 1.485 - 0.0825 = 1.4025, x 1.34475.
    # k = 1: -7.05, x 2.355; -4.935 + 0.3525 = -4.5825, x 2.81325.
    states, _ = rounds(drift.fedprox(0.5), 2)
    close([state.params["w"] for state in states], [(0.815 + 2.485) / 2, (1.34475 + 2.81325) / 2])
    assert states[-1].drift == states[-1].replicas.drift == ()


def test_scaffold_by_hand():
    # Round 1 has no correction. k = 0: gradients 1, 0.9, x 0.81; k = 1: -9, -6.3, x 2.53.
    # c_k: the mean gradients 0.95 and -7.65; c -3.35, blend 1.67.
    # Round 2. k = 0 adds c - c_0 = -4.3: 1.67 - 4.3 = -2.63, x 1.933; 1.933 - 4.3 = -2.367, x 2.1697.
    # k = 1 adds 4.3: -6.99 + 4.3 = -2.69, x 1.939; -6.183 + 4.3 = -1.883, x 2.1273.
    # c_0 = 0.95 + 3.35 + (1.67 - 2.1697) / 0.2 = 1.8015, c_1 = -7.65 + 3.35 + (1.67 - 2.1273) / 0.2 = -6.5865.
    states, _ = rounds(drift.scaffold(RATE), 2)
    close([state.params["w"] for state in states], [1.67, 2.1485])
    close([state.replicas.drift["w"] for state in states], [[0.95, -7.65], [1.8015, -6.5865]])
    close([state.drift["w"] for state in states], [-3.35, -2.3925])


@pytest.mark.parametrize("inner", [optax.sgd(RATE), optax.sgd(RATE / 10, momentum=0.9)], ids=["sgd", "momentum"])
def test_scaffold_finds_the_optimum_of_all_shards_which_plain_averaging_misses(inner):
    # Two steps take x to 0.81 x and to 4 + 0.49 (x - 4), whose mean stays at x = 1.02 / 0.35 = 2.914. With momentum m
    # steps amount to learning_rate / (1 - m): here to the same rate, but not in so few steps.
    plain, corrected = (rounds(how, 200, inner=inner)[0][-1].params["w"] for how in (None, drift.scaffold(RATE)))
    np.testing.assert_allclose(plain, 1.02 / 0.35, atol=0.02)
    close(corrected, 3)


def test_a_dead_replica_leaves_the_mean_to_the_others_and_goes_on_uncorrected():
    curvatures, goals = (1.0, 2.0, 3.0), (0.0, 9.0, 4.0)

    def given(number):
        whole = batches(curvatures, goals)
        return whole._replace(y=whole.y.at[1].set(jnp.nan)) if number == 1 else whole

    states, logs = rounds(drift.scaffold(RATE), 3, replicas=3, given=given)
    assert [log.alive.tolist() for log in logs] == [[True] * 3, [True, False, True], [True] * 3]
    own, mean = states[1].replicas.drift["w"], states[1].drift["w"]
    close(mean, (own[0] + own[2]) / 2)
    assert own[1] == mean
    # Then its mean gradient on the way: from x, gradients g = 2 (x - 9) and (1 - 0.2) g.
    x = states[1].params["w"]
    close(states[2].replicas.drift["w"][1], 0.9 * 2 * (x - 9))


def test_a_dead_replica_equals_a_run_of_the_survivors():
    def given(number):
        whole = batches((1.0, 2.0, 3.0), (0.0, jnp.nan, 4.0))
        return whole if number < 2 else batches((1.0, 2.0, 3.0), (0.0, 9.0, 4.0))

    (*_, both), _ = rounds(drift.scaffold(RATE), 2)
    (*_, three), _ = rounds(drift.scaffold(RATE), 2, replicas=3, given=given)
    assert both.params["w"] == three.params["w"]
    assert both.drift["w"] == three.drift["w"]
    assert both.replicas.drift["w"].tolist() == three.replicas.drift["w"][jnp.array([0, 2])].tolist()


def test_where_nobody_is_alive_the_mean_stays_and_all_go_on_with_it():
    def given(number):
        return batches() if number == 0 else batches(goals=(jnp.nan, jnp.nan))

    (first, lost), _ = rounds(drift.scaffold(RATE), 2, given=given)
    assert lost.drift["w"] == first.drift["w"]
    assert lost.replicas.drift["w"].tolist() == [first.drift["w"].item()] * 2


def test_the_mean_has_the_weights_of_the_blend():
    first = wavg.Weighting(
        lambda params, replicas: (), lambda stacked, state, params, *, alive, **_: (jnp.array([0.75, 0.25]), state)
    )
    states, _ = rounds(drift.scaffold(RATE), 1, weighting=first)
    close(states[0].drift["w"], 0.75 * 0.95 + 0.25 * -7.65)
    close(states[0].params["w"], 0.75 * 0.81 + 0.25 * 2.53)


def test_steps_and_rates_of_its_own_count_for_a_replica():
    # One step: 1; and -9 at half the rate: x = 1 + 0.05 * 9 = 1.45, -0.45 / (0.1 * 0.5) = -9 again.
    ones, _ = rounds(drift.scaffold(RATE), 1, steps=jnp.array([1, 1]), rate=jnp.array([1.0, 0.5]))
    close(ones[0].replicas.drift["w"], [1, -9])
    # No step: replica 0 learns nothing, and its variate stays 0, then what it was.
    none, logs = rounds(drift.scaffold(RATE), 2, steps=jnp.array([0, 2]))
    close([state.replicas.drift["w"][0] for state in none], [0, 0])
    assert logs[-1].alive.all()
    close(none[0].replicas.drift["w"][1], -7.65)


def test_a_varying_number_of_steps_compiles_once_and_gives_the_numbers_of_a_fixed_one():
    options = {"local_steps": wavg.schedule.linear(1, 4, 4), "rounds": 4, "drift": drift.scaffold(1.0)}
    varying = run(sharded(), **options)
    assert [row["local_steps"] for row in varying.rows[1:]] == [1, 1, 2, 3]
    short = run(sharded(), **(options | {"local_steps": 1, "rounds": 1}))
    first = run(sharded(), **(options | {"rounds": 1}))
    for a, b in zip(leaves(short), leaves(first), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("correction", [drift.fedprox(0.5), drift.scaffold(RATE)], ids=["fedprox", "scaffold"])
def test_bfloat16_parameters_are_corrected_in_float32(correction):
    states, _ = rounds(correction, 2, dtype=jnp.bfloat16)
    exact, _ = rounds(correction, 2)
    assert states[-1].params["w"].dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((states[-1].drift, states[-1].replicas.drift)))
    np.testing.assert_allclose(np.float32(states[-1].params["w"]), exact[-1].params["w"], rtol=0.02)


@pytest.mark.parametrize("weighting", [wavg.uniform(), wavg.learned()], ids=["uniform", "learned"])
@pytest.mark.parametrize("policy", [wavg.policy.keep, wavg.policy.average], ids=["keep", "average"])
def test_devices_change_nothing(weighting, policy):
    options = {"averager": wavg.averager(weighting), "drift": drift.scaffold(1.0), "opt_state": policy}
    one, four = (run(sharded(), devices=devices, **options) for devices in (1, 4))
    for a, b in zip(leaves(one), leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_single_replica_has_nothing_to_correct(devices):
    source = wavg.data.pool(sharded())
    plain, corrected = (
        run(source, devices=devices, inner=optax.sgd(0.1), drift=how) for how in (None, drift.scaffold(0.1))
    )
    for name in ("w", "b"):
        np.testing.assert_allclose(plain.params[name], corrected.params[name], rtol=1e-4, atol=1e-6)


@pytest.mark.optimized
def test_a_run_resumes_bit_for_bit(tmp_path):
    options = {"drift": drift.scaffold(0.1), "checkpoint_every": 2}
    straight = run(sharded(), rounds=4, **options)
    run(sharded(), rounds=2, workdir=tmp_path, **options)
    same(straight, run(sharded(), rounds=4, workdir=tmp_path, resume=True, **options))
    assert np.abs(straight.state.drift["w"]).max() > 0


def test_control_variates_count_among_the_bytes_of_a_round():
    plain, corrected = (run(sharded(), rounds=1, drift=how).rows[0] for how in (None, drift.scaffold(0.1)))
    assert corrected["bytes_per_round"] - plain["bytes_per_round"] == 2 * 4 * 4 * 15  # 4 replicas, 15 numbers


def test_what_a_correction_returns_is_checked():
    for functions, says in (
        ({"correct": lambda *given: {}}, r"drift: correct\(\.\.\.\) is not a tree like the gradient"),
        ({"finish": lambda *given: jnp.zeros(2)}, r"drift: finish\(\.\.\.\) is not a tree like the control variate"),
    ):
        with pytest.raises(wavg.SettingsError, match=says):
            rounds(drift.fedprox(0.1)._replace(**functions), 1)


def test_fragments_and_a_state_of_other_rounds_are_refused():
    with pytest.raises(wavg.SettingsError, match=r"AtSync: drift= .* fragments= .*leave one of them out"):
        fit(
            regression(),
            sharded(),
            wavg.averager(wavg.uniform()),
            inner=optax.sgd(0.1),
            local_steps=4,
            rounds=1,
            fragments=2,
            drift=drift.fedprox(0.1),
        )
    (state,), _ = rounds(None, 1)
    made = wavg.make_rounds(
        parabolas(), wavg.averager(wavg.uniform()), optax.sgd(RATE), at_sync=wavg.AtSync(drift=drift.scaffold(RATE))
    )
    with pytest.raises(wavg.SettingsError, match=r"AtSync\(drift=\)"):
        made.step(state, batches())
