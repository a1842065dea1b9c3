"""Rounds with fragments: what they compute, by hand; who has weight; and what the state carries."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import INNER, TASK
from small import sharded

import wavg_jax as wavg
from wavg_jax import models
from wavg_jax.base import Batch
from wavg_jax.data import round_indices
from wavg_jax.rounds import fragments

K, H, B = 4, 4, 8
SOURCE = sharded(K)
HELD_OUT = Batch(SOURCE.prepare(jnp.asarray(SOURCE.heldout.x)), jnp.asarray(SOURCE.heldout.y, jnp.int32))
TWO = wavg.AtSync(fragments=2)


def batches(number=0):
    """Those of a round: x [K, H, B, 4], y [K, H, B]."""
    indices = round_indices(SOURCE.shards, seed=0, first_step=number * H, local_steps=H, batch_size=B)
    return Batch(SOURCE.prepare(jnp.asarray(SOURCE.train.x[indices])), jnp.asarray(SOURCE.train.y[indices], jnp.int32))


def played(averager, rounds=3, task=TASK, at_sync=TWO, devices=1, change=lambda number, given: given, **options):
    """The states and logs of rounds, the first state among them."""
    made = wavg.make_rounds(task, averager, INNER, at_sync=at_sync, placement=wavg.place(K, devices), **options)
    states, logs, step = [jax.jit(made.init, static_argnums=1)(jax.random.key(0), K)], [], jax.jit(made.step)
    for number in range(rounds):
        state, log = step(states[-1], change(number, batches(number)), HELD_OUT)
        states.append(state)
        logs.append(log)
    return states, logs


def close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_fragments_are_of_about_equal_size_and_hold_every_leaf_once():
    params = [jnp.zeros(n) for n in (50, 3, 40, 2, 5, 20, 30)]
    for count in range(1, 8):
        groups = fragments.groups(params, count)
        assert sorted(i for group in groups for i in group) == list(range(7))
        assert all(groups)
    assert [sum(params[i].size for i in group) for group in fragments.groups(params, 3)] == [50, 50, 50]
    whole = jax.tree.map(jnp.zeros_like, params)
    for group in fragments.groups(params, 3):
        whole = fragments.put(whole, group, fragments.take(params, group))
    jax.tree.map(np.testing.assert_array_equal, whole, params)


LINE = models.regressor(
    lambda rng: ({"b": jnp.zeros(1), "w": jnp.zeros((2, 1))}, {}),
    lambda params, mutable, x, *, train, rng: (x @ params["w"] + params["b"][None], mutable),
)


def test_two_fragments_are_what_numpy_computes_by_hand():
    rate, temperature, outer, momentum, count = 0.1, 0.3, 0.7, 0.9, 3
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 2, H, B, 2)).astype(np.float32)
    y = (x @ np.array([[1.0], [-2.0]]) + np.arange(2).reshape(2, 1, 1, 1)).astype(np.float32)  # replicas disagree
    held_out = x[0, 0, 0], y[0, 0, 0]
    averager = wavg.averager(wavg.softmax("loss", temperature), outer=wavg.outer.nesterov(outer, momentum))
    made = wavg.make_rounds(LINE, averager, optax.sgd(rate), at_sync=TWO)
    state, step = made.init(jax.random.key(0), 2), jax.jit(made.step)
    assert fragments.groups(state.params, 2) == ((0,), (1,))

    names, gradient = ("b", "w"), jax.jit(jax.grad(lambda p, x, y: LINE.loss(p, {}, Batch(x, y), None)[0]))
    centre = {name: np.asarray(value) for name, value in state.params.items()}
    replicas = [dict(centre), dict(centre)]
    moments = {name: np.zeros_like(value) for name, value in centre.items()}
    weights, sent = np.full(2, 0.5), None
    for number in range(count):
        for segment in (0, 1):
            for k, replica in enumerate(replicas):
                for i in range(segment * 2, segment * 2 + 2):
                    slope = gradient(replica, x[number, k, i], y[number, k, i])
                    replica |= {name: replica[name] - rate * np.asarray(slope[name]) for name in names}
            losses = [float(LINE.loss(replica, {}, Batch(*held_out), None)[0]) for replica in replicas]
            if sent is not None:
                name = names[segment - 1]
                pseudo_gradient = centre[name] - (weights[0] * sent[0] + weights[1] * sent[1])
                moments[name] = momentum * moments[name] + pseudo_gradient
                centre[name] = centre[name] - outer * (pseudo_gradient + momentum * moments[name])
                for replica in replicas:
                    replica[name] = centre[name]
            sent = [replica[names[segment]] for replica in replicas]
        weights = np.exp(-np.array(losses) / temperature)
        weights /= weights.sum()
        state, log = step(state, Batch(x[number], y[number]), Batch(*held_out))
        np.testing.assert_allclose(log.scores["loss"], losses, rtol=1e-5)
        np.testing.assert_allclose(log.weights, weights, rtol=1e-5)
        close(state.params, centre)
        for k, replica in enumerate(replicas):
            close(jax.tree.map(lambda a, k=k: a[k], state.replicas.params), replica)


WEIGHTINGS = {
    "softmax": lambda: wavg.softmax("loss", 0.5),
    "learned": lambda: wavg.learned(carry=True),
    "distance": lambda: wavg.softmax("distance", 0.5),
    "momentum": lambda: wavg.momentum(wavg.inverse("layer_grad_norm"), 0.5),
    "elements": lambda: wavg.proportional("fisher"),
    "krum": lambda: wavg.robust.krum(1),
}


@pytest.mark.parametrize(("name", "wire"), [*((name, "float32") for name in WEIGHTINGS), ("softmax", "int8")])
def test_a_mesh_gives_the_numbers_of_one_device_and_every_weighting_works_as_it_is(name, wire):
    averager = wavg.averager(WEIGHTINGS[name](), outer=wavg.outer.nesterov())
    at_sync = wavg.AtSync(fragments=2, wire=wire)
    (one, logs), (many, spread) = (played(averager, at_sync=at_sync, devices=devices) for devices in (1, 4))
    close(one[-1].params, many[-1].params)
    close(one[-1].stream, many[-1].stream, rtol=1e-3)
    close(logs[-1].weights, spread[-1].weights, rtol=1e-3)
    np.testing.assert_allclose(logs[-1].weights.sum(), 1, rtol=1e-5)
    assert not np.allclose(one[-1].params["w"], one[0].params["w"])


def test_a_weighting_that_reads_replicas_reads_what_they_sent():
    seen = []

    def update(stacked, state, params, *, alive, **signals):
        jax.debug.callback(lambda *given: seen.append(given), stacked, params)
        return wavg.tree.equal_weights(alive), state

    weighting = wavg.Weighting(lambda params, replicas: (), update)
    states, _ = played(wavg.averager(weighting), rounds=2)
    jax.effects_barrier()
    assert len(seen) == 2
    for before, after, (stacked, params) in zip(states, states[1:], seen, strict=False):
        close(params, before.params)  # from which they started
        close(stacked, after.stream.views)
    close(states[2].stream.views["w"], states[1].replicas.pending.params["w"])
    close(states[2].params["w"], states[2].stream.views["w"].mean(0))


def ill(where, replicas, at):
    """Makes the inputs of replicas in some local steps of a round too large to survive."""
    return lambda number, given: (
        Batch(given.x.at[jnp.asarray(replicas), at].set(3e38), given.y) if number == where else given
    )


@pytest.mark.parametrize("at", [slice(0, 2), slice(2, 4)], ids=["first", "last"])
def test_a_dead_replica_has_no_weight_and_restarts_from_the_global_parameters(at):
    states, logs = played(wavg.averager(wavg.uniform()), change=ill(0, [1], at))
    assert logs[0].alive.tolist() == [True, False, True, True]
    np.testing.assert_allclose(logs[0].weights, [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)
    assert states[1].replicas.pending.alive.tolist() == [True, at.start == 0, True, True]
    if at.start:
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), states[1].replicas.params, states[1].params)
    living = states[1].replicas.pending.params["w"][jnp.array([0, 2, 3])]
    close(states[2].params["w"], living.mean(0))  # the weights of the round before
    assert logs[1].alive.all()
    np.testing.assert_allclose(logs[2].weights, 1 / K, rtol=1e-6)
    assert all(bool(wavg.tree.all_finite(state.replicas.params).all()) for state in states)


def test_a_round_in_which_all_died_is_lost_once_and_the_next_has_equal_weights():
    averager = wavg.averager(wavg.softmax("loss", 0.1), outer=wavg.outer.nesterov())
    states, logs = played(averager, change=ill(1, range(K), slice(0, 4)))
    assert [float(log.weights.sum()) > 0 for log in logs] == [True, False, True]
    # What was sent in time still counts; the rest stays.
    np.testing.assert_array_equal(states[2].params["b"], states[1].params["b"])
    np.testing.assert_array_equal(states[2].averager.outer[0][0].trace["b"], states[1].averager.outer[0][0].trace["b"])
    assert not np.allclose(states[2].params["w"], states[1].params["w"])
    np.testing.assert_array_equal(states[3].params["w"], states[2].params["w"])  # nobody sent any
    close(states[3].params["b"], states[3].replicas.params["b"][0])


def test_a_step_that_is_not_finite_loses_the_round_and_changes_nothing():
    def explode(updates, state, params=None):
        return jax.tree.map(lambda u: jnp.full_like(u, jnp.inf), updates), state

    outer = optax.GradientTransformation(lambda params: (), explode)
    states, logs = played(wavg.averager(wavg.uniform(), outer=outer), rounds=2)
    assert [float(log.weights.sum()) for log in logs] == [0, 0]
    assert all(log.alive.all() for log in logs)
    jax.tree.map(np.testing.assert_array_equal, states[2].params, states[0].params)


def test_replicas_may_be_pulled_and_masters_have_a_part_for_every_fragment():
    def init(rng):
        params, mutable = TASK.init(rng)
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), mutable

    averager = wavg.averager(wavg.uniform(), outer=wavg.outer.nesterov(), pull=0.5)
    task = TASK._replace(init=init)
    with jax.numpy_dtype_promotion("standard"):
        states, _ = played(averager, rounds=2, task=task)
    masters = states[-1].averager.masters
    assert [jax.tree.leaves(part)[0].dtype for part in masters] == [jnp.float32] * 2
    close(masters[1]["w"].astype(jnp.bfloat16).astype(jnp.float32), states[-1].params["w"].astype(jnp.float32))
    assert not np.array_equal(states[-1].replicas.params["b"][0], states[-1].replicas.params["b"][1])


@pytest.mark.optimized
def test_slow_replicas_and_short_rounds_take_the_first_of_the_steps():
    slow = wavg.faults.simulate(K, speed={1: 0.25})
    averager = wavg.averager(wavg.uniform())
    made = wavg.make_rounds(TASK, averager, INNER, at_sync=TWO, faults=slow)
    state, step = made.init(jax.random.key(0), K), jax.jit(made.step)
    _, log = step(state, batches())
    assert log.steps.tolist() == [4, 1, 4, 4]
    other, log = step(state, batches(), pace=wavg.Pace(steps=jnp.int32(2)))
    assert log.steps.tolist() == [2, 1, 2, 2]
    short = Batch(*(a.at[:, 2:].set(a[:, :2]) for a in batches()))
    same, _ = step(state, short, pace=wavg.Pace(steps=jnp.int32(2)))
    jax.tree.map(np.testing.assert_array_equal, other.params, same.params)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"at_sync": wavg.AtSync(fragments=0)}, "AtSync: fragments is 0"),
        ({"at_sync": wavg.AtSync(fragments=3)}, "fragments=3: the network has 2 tensors"),
        ({"at_sync": wavg.AtSync(wavg.policy.average, fragments=2)}, "exchange no optimizer state"),
        ({"change": lambda number, given: Batch(given.x[:, :3], given.y[:, :3])}, "set local_steps= to 2 or 4"),
    ],
)
def test_what_cannot_work_is_refused(options, says):
    with pytest.raises(wavg.SettingsError, match=says):
        played(wavg.averager(wavg.uniform()), rounds=1, **options)


def test_an_averager_of_ones_own_and_a_state_of_other_rounds_are_refused():
    averager = wavg.averager(wavg.uniform())
    with pytest.raises(wavg.SettingsError, match="halves"):
        played(averager._replace(halves=None))
    state = wavg.make_rounds(TASK, averager, INNER).init(jax.random.key(0), K)
    with pytest.raises(wavg.SettingsError, match=r"differ in AtSync\(fragments=\)"):
        wavg.make_rounds(TASK, averager, INNER, at_sync=TWO).step(state, batches())
