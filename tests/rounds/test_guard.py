"""The guard against loss spikes: what it keeps and rolls back, what a round with it does, and that it resumes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import TASK, leaves, run, same, without_clocks
from small import sharded

import wavg_jax as wavg
from wavg_jax.base import Batch, Replicas, TrainState
from wavg_jax.rounds import guard as guards
from wavg_jax.storage.rows import read_rows

INF, NAN = float("inf"), float("nan")
GUARD = wavg.SpikeGuard(factor=3.0, lower=0.5, rounds=2)
SPIKES = pytest.mark.filterwarnings("ignore:round .* was rolled back:wavg_jax.WavgWarning")
PLAIN = wavg.averager(wavg.uniform())


@pytest.mark.parametrize(
    ("losses", "loss", "taken", "bound", "kept"),
    [
        ((INF, INF), 1e9, True, INF, True),  # the first blend
        ((INF, 0.5), 1.5, True, 1.5, True),  # 0.5 + 2 |0.5|
        ((INF, 0.5), 1.6, True, 1.5, False),
        ((0.4, 0.5), 1.3, True, 1.2, False),  # the lowest counts
        ((-4.0, -5.0), 4.0, True, 5.0, True),  # -5 + 2 |-5|
        ((-4.0, -5.0), 6.0, True, 5.0, False),
        ((INF, INF), INF, True, INF, False),
        ((INF, INF), NAN, True, INF, False),
        ((0.4, 0.5), 0.4, False, 1.2, False),  # a lost round
    ],
)
def test_a_blend_beyond_the_bound_is_rolled_back(losses, loss, taken, bound, kept):
    def state(number, seed):
        replicas = Replicas({"w": jnp.full((2, 1), number)}, {}, {}, jax.random.split(jax.random.key(seed), 2))
        watch = guards.Watch(jnp.array(losses, jnp.float32), jnp.float32(0.8))
        return TrainState({"w": jnp.full(1, number)}, {}, replicas, (), jnp.int32(seed), guard=watch)

    before, after = state(1.0, 6), state(2.0, 7)
    new, found = guards.judged(GUARD, before, after, jnp.float32(loss), jnp.array(taken))
    assert bool(found["rolled_back"]) == (not kept)
    np.testing.assert_allclose(found["bound"], bound)
    assert float(new.params["w"][0]) == float(new.replicas.params["w"][0, 0]) == (2.0 if kept else 1.0)
    assert int(new.round) == 7
    assert (jax.random.key_data(new.replicas.rng) == jax.random.key_data(after.replicas.rng)).all()
    np.testing.assert_allclose(new.guard.rate, 0.8 if kept else 0.4)
    np.testing.assert_allclose(new.guard.losses, (losses[1], loss) if kept else losses)


def step_of(inner, guard, placement=None):
    rounds = wavg.make_rounds(TASK, PLAIN, inner, scoring=wavg.Scoring(guard=guard), placement=placement)
    return rounds.init(jax.random.key(0), replicas=4), jax.jit(rounds.step)


def data_of(number, scale=1.0):
    draw = np.random.default_rng(number)
    x = draw.normal(size=(4, 3, 8, 4)).astype(np.float32)
    labels = (x.sum(-1) > 0).astype(np.int32)
    held = draw.normal(size=(64, 4)).astype(np.float32)
    return Batch(jnp.asarray(scale * x), jnp.asarray(labels)), Batch(held, (held.sum(-1) > 0).astype(np.int32))


@pytest.mark.parametrize(("inner", "factor"), [(optax.sgd(0.3, momentum=0.9), 3.0), (optax.adam(0.3), 1.02)])
@pytest.mark.usefixtures("standard_promotion")
def test_a_bad_batch_leaves_no_trace_but_a_lower_rate(inner, factor):
    state, step = step_of(inner, GUARD._replace(factor=factor))
    _, held = data_of(0)
    for number in range(3):
        state, log = step(state, data_of(number)[0], held)
        assert not log.guard["rolled_back"]
    good, losses = jax.tree.map(jnp.copy, state), state.guard.losses
    flipped = data_of(3)[0]
    bad = Batch(flipped.x * 1000, 1 - flipped.y)
    state, log = step(state, bad, held)
    assert log.guard["rolled_back"]
    assert log.guard["loss"] > log.guard["bound"]
    assert np.all(np.asarray(log.alive))
    for name in ("params", "mutable", "averager"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(good, name))
    for name in ("params", "opt_state", "mutable"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state.replicas, name), getattr(good.replicas, name))
    np.testing.assert_array_equal(state.guard.losses, losses)
    assert float(state.guard.rate) == 0.5
    # The next round is that of a run without a guard at half the rate.
    plain, free = step_of(inner, None)
    plain = good._replace(guard=(), replicas=good.replicas._replace(rng=state.replicas.rng))
    after, log = step(state, data_of(4)[0], held)
    expected, _ = free(plain, data_of(4)[0], held, pace=wavg.Pace(rate=jnp.float32(0.5)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after.params, expected.params)
    assert not log.guard["rolled_back"]


def test_a_quiet_run_is_that_without_a_guard():
    inner, (_, held) = optax.sgd(0.1), data_of(0)
    (watched, step), (plain, free) = step_of(inner, GUARD), step_of(inner, None)
    for number in range(4):
        watched, log = step(watched, data_of(number)[0], held)
        plain, other = free(plain, data_of(number)[0], held)
        assert not log.guard["rolled_back"]
    assert other.guard == {}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), watched.params, plain.params)


def test_several_devices_roll_back_the_same_rounds():
    found = []
    for placement in (None, wavg.place(4)):
        state, step = step_of(optax.sgd(0.3), GUARD, placement)
        _, held = data_of(0)
        for number in range(4):
            batch = data_of(number)[0]
            state, log = step(state, Batch(1000 * batch.x, 1 - batch.y) if number == 2 else batch, held)
            found.append(jax.device_get((log.guard, state.params)))
    for one, other in zip(found[:4], found[4:], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)
    assert [bool(log["rolled_back"]) for log, _ in found[:4]] == [False, False, True, False]


WILD = {"averager": PLAIN, "inner": optax.sgd(30.0, momentum=0.9), "rounds": 8, "seed": 1}
WATCHED = WILD | {"guard": wavg.SpikeGuard(factor=1.2), "checkpoint_every": 1}


@SPIKES
def test_a_run_at_an_absurd_rate_survives_and_resumes_bit_for_bit(tmp_path):
    data = sharded()
    wild, whole = run(data, **WILD), run(data, **WATCHED)
    told = [row["guard"] for row in whole.rows[1:]]
    assert any(entry["rolled_back"] for entry in told)
    assert told[-1]["rate"] == 0.5 ** sum(entry["rolled_back"] for entry in told)
    assert min(entry["loss"] for entry in told if not entry["rolled_back"]) == pytest.approx(
        min(np.asarray(whole.state.guard.losses)), rel=1e-6
    )
    assert whole.rows[-1]["test_loss"] < 0.5 * wild.rows[-1]["test_loss"]
    first = next(number for number, entry in enumerate(told, 1) if entry["rolled_back"])
    run(data, **WATCHED | {"rounds": first}, workdir=tmp_path)
    resumed = run(data, **WATCHED, workdir=tmp_path, resume=True)
    same(resumed, whole)
    assert [row.get("guard") for row in without_clocks(resumed.rows)] == [row.get("guard") for row in whole.rows]
    assert json.loads(json.dumps(read_rows(tmp_path)[-1]["guard"])) == told[-1]
    assert len(leaves(resumed)) == len(leaves(whole))


def test_a_rollback_is_said_once_a_round():
    with pytest.warns(
        wavg.WavgWarning, match=r"was rolled back: its blend has a held-out loss of .*, beyond .*; updates"
    ):
        run(sharded(), **WATCHED)


@pytest.mark.parametrize(
    ("guard", "fragments", "says"),
    [
        (3.0, 1, "Scoring: guard is 3.0; it must be"),
        (wavg.SpikeGuard(factor=1), 1, "SpikeGuard: factor is 1"),
        (wavg.SpikeGuard(lower=1.0), 1, "SpikeGuard: lower is 1"),
        (wavg.SpikeGuard(rounds=0), 1, "SpikeGuard: rounds is 0"),
        (wavg.SpikeGuard(), 2, "leave out one of them"),
    ],
)
def test_what_cannot_work_is_refused(guard, fragments, says):
    scoring, at_sync = wavg.Scoring(guard=guard), wavg.AtSync(fragments=fragments)
    with pytest.raises(wavg.SettingsError, match=says):
        wavg.make_rounds(TASK, PLAIN, optax.sgd(0.1), scoring=scoring, at_sync=at_sync)
    with pytest.raises(wavg.SettingsError, match=says):
        run(sharded(), PLAIN, scoring=scoring, at_sync=at_sync)


def test_a_guard_needs_held_out_samples_and_a_state_of_its_own():
    with pytest.raises(wavg.SettingsError, match="there is none"):
        run(sharded(heldout=0), PLAIN, guard=GUARD)
    state, _ = step_of(optax.sgd(0.1), None)
    _, step = step_of(optax.sgd(0.1), GUARD)
    with pytest.raises(wavg.SettingsError, match=r"differ in Scoring\(guard=\)"):
        step(state, *data_of(0))
