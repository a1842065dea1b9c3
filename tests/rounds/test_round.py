"""make_rounds(): two pure functions that fit loops over, usable alone, on one device or a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import INNER, TASK, WEIGHTED, run
from small import sharded

import wavg_jax as wavg
from wavg_jax.base import Batch
from wavg_jax.data import round_indices

K, H, B = 4, 4, 8
SOURCE = sharded(K)
HELD_OUT = Batch(SOURCE.prepare(jnp.asarray(SOURCE.heldout.x)), jnp.asarray(SOURCE.heldout.y, jnp.int32))


def batches(first_step=0, replicas=K):
    """The batches that `fit` would make, prepared: x [K, H, B, 4], y [K, H, B]."""
    source = sharded(replicas)
    indices = round_indices(source.shards, seed=0, first_step=first_step, local_steps=H, batch_size=B)
    return Batch(source.prepare(jnp.asarray(source.train.x[indices])), jnp.asarray(source.train.y[indices], jnp.int32))


def test_rounds_of_ones_own_are_those_of_fit():
    rounds = wavg.make_rounds(TASK, WEIGHTED, INNER)
    state, step = rounds.init(jax.random.key(0), replicas=K), jax.jit(rounds.step)
    for number in range(3):
        state, log = step(state, batches(number * H), HELD_OUT)
    result = run(SOURCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, result.params)
    np.testing.assert_allclose(log.weights, result.rows[-1]["weights"], rtol=1e-4)
    assert set(log.scores) == {"loss"}
    assert int(state.round) == 3


def test_a_step_is_pure_compiles_once_and_may_be_scanned(compilations):
    rounds = wavg.make_rounds(TASK, WEIGHTED, INNER)
    state, step = rounds.init(jax.random.key(0), K), jax.jit(rounds.step)
    many = jax.tree.map(lambda *xs: jnp.stack(xs), *(batches(n * H) for n in range(3)))
    first, _ = step(state, batches(), HELD_OUT)
    done = len(compilations)
    again, _ = step(state, batches(), HELD_OUT)  # the state was not donated, and is as it was
    third, _ = step(step(again, batches(H), HELD_OUT)[0], batches(2 * H), HELD_OUT)
    assert len(compilations) <= done + 4  # of the batches, none of the step
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    scanned, logs = jax.jit(lambda s, m: jax.lax.scan(lambda s, b: rounds.step(s, b, HELD_OUT), s, m))(state, many)
    assert logs.weights.shape == (3, K)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), scanned.params, third.params)


@pytest.mark.parametrize("weighting", [wavg.softmax("loss", 0.5), wavg.learned(carry=True)], ids=["softmax", "learned"])
def test_a_mesh_gives_the_numbers_of_one_device_and_keeps_its_layout(weighting):
    states = {}
    for devices in (1, 4):
        rounds = wavg.make_rounds(TASK, wavg.averager(weighting), INNER, placement=wavg.place(K, devices))
        state, step = jax.jit(rounds.init, static_argnums=1)(jax.random.key(0), K), jax.jit(rounds.step)
        for number in range(2):
            state, _ = step(state, batches(number * H), HELD_OUT)
        assert step._cache_size() == 1
        states[devices] = state
    spread = jax.tree.leaves(states[4].replicas.params)[0].sharding
    assert len(spread.device_set) == 4
    assert not spread.is_fully_replicated
    assert jax.tree.leaves(states[4].params)[0].sharding.is_fully_replicated
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, states[1].params, states[4].params)


def test_fewer_steps_and_other_rates_need_no_other_program():
    rounds = wavg.make_rounds(TASK, wavg.averager(wavg.uniform(), pull=0.0), INNER)
    state, step = rounds.init(jax.random.key(0), K), jax.jit(rounds.step)
    half, _ = step(state, batches(), pace=wavg.Pace(steps=jnp.int32(2)))
    other, log = step(state, batches(), pace=wavg.Pace(steps=jnp.int32(3)))
    assert step._cache_size() == 1
    assert log.steps.tolist() == [3] * K
    short = Batch(*(a[:, :2] for a in batches()))
    whole, _ = jax.jit(rounds.step)(state, short)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), half.replicas.params, whole.replicas.params
    )
    assert not np.allclose(other.params["w"], half.params["w"])


def test_a_replica_whose_numbers_are_not_finite_has_no_weight_and_restarts():
    ill = Batch(batches().x.at[1].set(3e38), batches().y)
    rounds = wavg.make_rounds(TASK, wavg.averager(wavg.uniform()), INNER)
    state, log = jax.jit(rounds.step)(rounds.init(jax.random.key(0), K), ill)
    assert log.alive.tolist() == [True, False, True, True]
    np.testing.assert_allclose(log.weights, [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(state.replicas.params["w"][1], state.params["w"])


def test_parameters_are_tested_for_finiteness_once_a_round():
    seen = []
    averager = wavg.averager(wavg.uniform(), pull=0.5)
    update, restart = averager.update, averager.restart

    def watched(*arguments, check_finite=True, **options):
        seen.append(check_finite)
        return update(*arguments, check_finite=check_finite, **options)

    def watched_restart(*arguments, check_finite=True, **options):
        seen.append(check_finite)
        return restart(*arguments, check_finite=check_finite, **options)

    rounds = wavg.make_rounds(TASK, averager._replace(update=watched, restart=watched_restart), INNER)
    state = jax.eval_shape(lambda rng: rounds.init(rng, K), jax.random.key(0))
    jax.eval_shape(rounds.step, state, batches())
    assert seen == [False, False]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: Batch(b.x[:3], b.y[:3]), r"batches= has a leaf of shape \(3, 4, 8, 4\).*\[4, H, ...\]"),
        (lambda b: Batch(b.x, b.y[:, :2]), r"batches= has a leaf of shape \(4, 2, 8\)"),
        (lambda b: (), r"batches= is \(\); give a wavg_jax.Batch"),
        (lambda b: tuple(b), "give a wavg_jax.Batch"),
        (lambda b: Batch(b.x[:, 0, 0, 0], b.y[:, 0, 0]), r"must be \[4, H, ...\]"),
    ],
)
def test_batches_that_do_not_fit_the_replicas_are_one_clear_line(change, says):
    rounds = wavg.make_rounds(TASK, wavg.averager(wavg.uniform()), INNER)
    with pytest.raises(wavg.SettingsError, match=says):
        rounds.step(rounds.init(jax.random.key(0), K), change(batches()))


def test_a_weighting_that_scores_needs_held_out_data():
    rounds = wavg.make_rounds(TASK, WEIGHTED, INNER)
    with pytest.raises(wavg.SettingsError, match="held_out="):
        rounds.step(rounds.init(jax.random.key(0), K), batches())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((None, WEIGHTED, INNER), "task"),
        ((TASK, wavg.uniform(), INNER), "averager"),
        ((TASK, WEIGHTED, WEIGHTED), "inner"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(wavg.SettingsError, match=says):
        wavg.make_rounds(*arguments)
    with pytest.raises(wavg.SettingsError, match="replicas"):
        wavg.make_rounds(TASK, WEIGHTED, optax.sgd(0.1)).init(jax.random.key(0), 0)


def test_rounds_of_ones_own_obey_faults():
    faults = wavg.faults.simulate(K, speed={0: 0.25}, rate={1: 10.0}, sent={2: -1.0})
    rounds = wavg.make_rounds(TASK, wavg.averager(wavg.uniform(), pull=0.0), INNER, faults=faults)
    state, log = jax.jit(rounds.step)(rounds.init(jax.random.key(0), K), batches())
    assert log.steps.tolist() == [1, 4, 4, 4]
    result = run(SOURCE, wavg.averager(wavg.uniform(), pull=0.0), rounds=1, faults=faults)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, state.replicas.params, result.state.replicas.params)
    jax.tree.map(close, state.params, result.params)


def test_a_pace_is_kept_within_the_batches_and_may_be_zero():
    rounds = wavg.make_rounds(TASK, wavg.averager(wavg.uniform(), pull=0.0), INNER)
    state, step = rounds.init(jax.random.key(0), K), jax.jit(rounds.step)
    whole, log = step(state, batches(), pace=wavg.Pace(steps=7))
    assert log.steps.tolist() == [H] * K
    still, log = step(state, batches(), pace=wavg.Pace(steps=0))
    assert log.steps.tolist() == [0] * K
    assert log.alive.all()
    jax.tree.map(np.testing.assert_array_equal, still.replicas.params, state.replicas.params)
    assert not np.allclose(whole.replicas.params["w"], state.replicas.params["w"])


def test_a_state_that_keeps_an_average_can_be_donated_and_no_other_rounds_take_it():
    at_sync = wavg.AtSync(smoothing=wavg.smoothing.ema(0.9))
    rounds = wavg.make_rounds(TASK, wavg.averager(wavg.uniform()), INNER, at_sync=at_sync)
    state, _ = jax.jit(rounds.step, donate_argnums=0)(rounds.init(jax.random.key(0), K), batches())
    with pytest.raises(wavg.SettingsError, match="smoothing="):
        wavg.make_rounds(TASK, wavg.averager(wavg.uniform()), INNER).step(state, batches())


def test_a_metric_of_ones_own_may_not_hide_another_signal_and_one_that_is_not_there_is_named():
    clash = TASK._replace(metrics=lambda sums, n: {"loss": sums["loss"] / n, "distance": sums["loss"]})
    for task, signal, says in ((clash, "loss", "'distance' has the name of a signal"), (TASK, "f1", "'f1'.*measures")):
        averager = wavg.averager(wavg.softmax(signal, higher_is_better=True))
        rounds = wavg.make_rounds(task, averager, INNER)
        with pytest.raises(wavg.SettingsError, match=says):
            jax.eval_shape(rounds.step, rounds.init(jax.random.key(0), K), batches(), HELD_OUT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scoring": wavg.Scoring(samples=0)}, "Scoring: samples"),
        ({"scoring": wavg.Scoring(chunk=2.5)}, "Scoring: chunk"),
        ({"scoring": wavg.Scoring(dtype=jnp.int32)}, "Scoring: dtype"),
        ({"at_sync": wavg.AtSync(stats="average")}, "AtSync: stats"),
        ({"at_sync": wavg.AtSync(smoothing=3)}, "AtSync: smoothing"),
    ],
)
def test_groups_are_checked_as_in_fit(options, says):
    with pytest.raises(wavg.SettingsError, match=says):
        wavg.make_rounds(TASK, WEIGHTED, INNER, **options)


def test_held_out_data_replicas_and_faults_that_do_not_fit_are_one_clear_line():
    rounds = wavg.make_rounds(TASK, WEIGHTED, INNER)
    state = rounds.init(jax.random.key(0), K)
    for held_out in (tuple(HELD_OUT), Batch(HELD_OUT.x[:0], HELD_OUT.y[:0]), Batch(HELD_OUT.x[:3], HELD_OUT.y)):
        with pytest.raises(wavg.SettingsError, match="held_out="):
            rounds.step(state, batches(), held_out)
    with pytest.raises(wavg.SettingsError, match="6 replicas do not spread evenly over 4"):
        wavg.make_rounds(TASK, WEIGHTED, INNER, placement=wavg.place(4, 4)).init(jax.random.key(0), 6)
    three = wavg.make_rounds(TASK, WEIGHTED, INNER, faults=wavg.faults.simulate(3))
    with pytest.raises(wavg.SettingsError, match="faults= are of 3 replicas, there are 4"):
        three.step(state, batches(), HELD_OUT)
