"""What becomes of counts, flags and random keys at a sync, beside what is averaged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import train
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax import tree
from wavg_jax.devices.placement import place
from wavg_jax.rounds import policy, sync

# Optax's noise, schedules and Adam mix integers and floats.
pytestmark = pytest.mark.usefixtures("standard_promotion")

K, H = 8, 10
PLAIN = wavg.averager(wavg.uniform())
ALIVE = jnp.array([True, False, *[True] * 6])
TASK = regression()
PARAMS = {"w": jnp.arange(3.0)}


def noisy():
    return optax.chain(optax.add_noise(0.01, 0.55, key=7), optax.sgd(0.1, momentum=0.9))


OPTIMIZERS = {
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.3, 80), momentum=0.9),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(optax.cosine_decay_schedule(0.3, 80), momentum=0.9),
    "many steps": lambda: optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 4).gradient_transformation(),
    "if finite": lambda: optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 3),
    "adam": lambda: optax.adam(0.1),
    "noise": noisy,
}


def carried(inner, state, weights, how=policy.keep):
    """The optimizer state of K replicas on one device after a blend."""
    return sync.carry_opt_state(how, inner, lambda reduction: reduction, state, PARAMS, ALIVE, weights)


def trained(inner):
    """The optimizer state of K replicas, each after H steps on other gradients."""
    state, step = wavg.replicate(inner.init(PARAMS), K), jax.jit(jax.vmap(inner.update))
    for h in range(H):
        gradients = {"w": jnp.asarray(np.random.default_rng(h).normal(size=(K, 3)), jnp.float32)}
        _, state = step(gradients, state, wavg.replicate(PARAMS, K))
    return state


def split(state):
    """Its leaves: those that are floating-point, and the others, as numbers."""
    leaves = [jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x for x in jax.tree.leaves(state)]
    return [[np.asarray(x) for x in leaves if (x.dtype.kind == "f") == floats] for floats in (True, False)]


@pytest.mark.parametrize("how", [policy.keep, policy.average, policy.reset])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_at_a_sync_counts_flags_and_keys_go_on_and_floats_follow_the_policy(name, how):
    inner = OPTIMIZERS[name]()
    state = trained(inner)
    weights = tree.equal_weights(ALIVE)
    after = carried(inner, state, weights, how)
    (floats, others), (new_floats, new_others) = split(state), split(after)
    assert others
    for before, new in zip(others, new_others, strict=True):
        np.testing.assert_array_equal(new, before)
    for fresh, before, new in zip(split(inner.init(PARAMS))[0], floats, new_floats, strict=True):
        if how is policy.average:
            expected = np.broadcast_to(np.average(before, axis=0, weights=weights), before.shape)
        else:
            dead = np.arange(K) == 1 if how is policy.keep else np.ones(K, bool)
            expected = np.where(dead.reshape(-1, *[1] * (before.ndim - 1)), fresh, before)
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["schedule", "injected"])
def test_a_revived_replica_takes_its_next_step_at_the_rate_of_the_others(name):
    inner = OPTIMIZERS[name]()
    after = carried(inner, trained(inner), tree.equal_weights(ALIVE))
    ones = {"w": jnp.ones((K, 3))}
    updates, _ = jax.vmap(inner.update)(ones, after, ones)
    updates_of_one, _ = inner.update({"w": jnp.ones(3)}, wavg.replica(after, 1), PARAMS)
    rate = 0.3 * (1 + np.cos(np.pi * H / 80)) / 2
    np.testing.assert_allclose(updates_of_one["w"], -rate * np.ones(3), rtol=1e-5)
    np.testing.assert_allclose(updates["w"][1], updates_of_one["w"], rtol=1e-6)


def test_a_schedule_runs_through_rounds_in_which_a_replica_was_dead():
    def loss(params, mutable, batch, rng):
        value, out = TASK.loss(params, mutable, batch, rng)
        ill = (batch.x[0, 0] > 500) & (mutable["seen"] >= 2) & (mutable["seen"] < 6)
        return jnp.where(ill, jnp.nan, value), out

    source = sharded()
    x = source.train.x.copy()
    x[source.shards[1], 0] = 1000
    source = source._replace(train=source.train._replace(x=x), prepare=lambda x: x)
    inner = optax.sgd(optax.cosine_decay_schedule(1e-4, 80), momentum=0.9)
    options = {"inner": inner, "local_steps": 2, "rounds": 4, "batch_size": 8, "devices": 1}
    with pytest.warns(wavg.WavgWarning, match="replica 1 is not finite in round 2"):
        result = train(TASK._replace(loss=loss), source, PLAIN, **options)
    assert [row["alive"][1] for row in result.rows[1:]] == [True, False, False, True]
    (count,) = split(result.state.replicas.opt_state)[1]
    assert count.tolist() == [8] * 4


LARGE = 20_000_001  # float32 has 20,000,000 and 20,000,002


@pytest.mark.parametrize("devices", [1, 8])
def test_the_mean_of_a_tree_takes_counts_flags_and_keys_from_the_first_replica_with_weight(devices):
    where = place(K, devices)
    stacked = {
        "count": jnp.int32(LARGE) + 2 * jnp.arange(K),
        "flag": jnp.arange(K) == 2,
        "key": jax.random.split(jax.random.key(0), K),
        "mean": jnp.arange(float(K)),
    }
    otherwise = {"count": jnp.int32(-1), "flag": jnp.array(False), "key": jax.random.key(9), "mean": jnp.float32(-1)}
    mean = jax.jit(
        lambda stacked, weights: sync.mean_over_living(where.reduce, stacked, weights, otherwise),
        out_shardings=where.shared,
    )
    stacked = jax.device_put(stacked, where.stacked)
    found = mean(stacked, jnp.array([0, 0, 0.5, 0, 0.5, 0, 0, 0]))
    assert (int(found["count"]), bool(found["flag"]), float(found["mean"])) == (LARGE + 4, True, 3)
    assert found["key"] == jax.random.split(jax.random.key(0), K)[2]
    nobody = mean(stacked, jnp.zeros(K))
    assert (int(nobody["count"]), bool(nobody["flag"]), float(nobody["mean"])) == (-1, False, -1)
    assert nobody["key"] == otherwise["key"]


def counting():
    """A task whose collections hold a count, a key that it splits in every step, and a statistic."""

    def init(rng):
        params, _ = TASK.init(rng)
        return params, {"count": jnp.int32(LARGE - 1), "key": jax.random.key(5), "mean": jnp.zeros(3)}

    def loss(params, mutable, batch, rng):
        value, _ = TASK.loss(params, {"seen": jnp.float32(0)}, batch, rng)
        key, draw = jax.random.split(mutable["key"])
        mean = 0.9 * mutable["mean"] + 0.1 * jax.random.normal(draw, (3,))
        return value, ({"count": mutable["count"] + 1, "key": key, "mean": mean}, {})

    return TASK._replace(init=init, loss=loss, predict=lambda p, m, x: TASK.predict(p, {"seen": jnp.float32(0)}, x))


def run(**options):
    defaults = {"inner": noisy(), "local_steps": 2, "rounds": 2, "batch_size": 8}
    return train(counting(), sharded(K), PLAIN, **(defaults | options))


def numbers(state):
    return [leaf for leaves in split(state) for leaf in leaves]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("how", [policy.keep, policy.average, policy.reset])
def test_states_with_counts_and_keys_train_under_every_policy(how, devices):
    result = run(opt_state=how, stats=how, devices=devices)
    numbers_sent = 15 + 3 + (15 if how is policy.average else 0)  # parameters, statistics, momentum; up and down
    assert result.rows[0]["bytes_per_round"] == 2 * K * 4 * numbers_sent
    state = result.state
    assert state.replicas.mutable["count"].tolist() == [LARGE - 1 + 4] * K
    assert int(state.mutable["count"]) == LARGE - 1 + 4
    assert state.replicas.mutable["key"][0] == state.mutable["key"]
    (noise_key,) = (x for x in jax.tree.leaves(state.replicas.opt_state) if x.dtype == jax.random.key(0).dtype)
    for key in (noise_key, state.replicas.mutable["key"]):
        assert len({tuple(data) for data in np.asarray(jax.random.key_data(key)).tolist()}) == K
    spread = np.ptp(np.asarray(state.replicas.mutable["mean"]), axis=0).max()
    assert (spread > 1e-3) == (how is policy.keep)


@pytest.mark.optimized
def test_a_run_whose_states_hold_keys_resumes_bit_for_bit(tmp_path):
    options = {"stats": policy.reestimate(2), "devices": 1}
    straight = run(**options, rounds=3)
    run(**options, rounds=2, workdir=tmp_path)
    resumed = run(**options, rounds=3, workdir=tmp_path, resume=True)
    for a, b in zip(numbers(straight.state), numbers(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_mean_is_taken_that_no_policy_uses(monkeypatch):
    taken = []
    monkeypatch.setattr(
        sync, "weighted_mean", lambda *arguments, **_: taken.append(1) or wavg.weighted_mean(*arguments)
    )
    inner = noisy()
    state = trained(inner)
    for how, means in ((policy.keep, 0), (policy.reset, 0), (policy.average, 1)):
        taken.clear()
        carried(inner, state, tree.equal_weights(ALIVE), how)
        assert len(taken) == means


def stats_after(rounds, pull, how, devices=1, **options):
    """The replicas' statistic [K] and the global one after every round; replica k's is k + 1 in round 0, then + 1."""

    def init(rng):
        return TASK.init(rng)[0], {"mean": jnp.zeros(())}

    def loss(params, mutable, batch, rng):
        value, _ = TASK.loss(params, {"seen": jnp.float32(0)}, batch, rng)
        return value, ({"mean": mutable["mean"] + batch.x[0, 0]}, {})

    task = TASK._replace(init=init, loss=loss)
    averager = wavg.averager(wavg.uniform(), pull=pull)
    at_sync = wavg.AtSync(stats=how, **options)
    made = wavg.make_rounds(task, averager, optax.sgd(0.01), at_sync=at_sync, placement=place(4, devices))
    state, step = jax.jit(made.init, static_argnums=1)(jax.random.key(0), 4), jax.jit(made.step)
    x = jnp.broadcast_to(jnp.arange(1.0, 5).reshape(4, 1, 1, 1), (4, 2, 8, 4)) / 2  # two steps a round
    for _ in range(rounds):
        state, _ = step(state, wavg.Batch(x, jnp.zeros((4, 2, 8), jnp.int32)))
        yield state.replicas.mutable["mean"].tolist(), state.mutable["mean"].item()


HALVING = wavg.pull.scheduled(lambda r: 0.5 / (1 + r.astype(jnp.float32)))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("fragments", [1, 2])
def test_statistics_are_pulled_as_the_parameters(fragments, devices):
    # Round 0: 1, 2, 3, 4 with the mean 2.5, half the way. Round 1: + 1, 2, 3, 4 gives 2.75, 4.25, 5.75, 7.25 with the
    # mean 5, a quarter of the way.
    found = list(stats_after(2, HALVING, policy.pull, devices, fragments=fragments))
    assert found == [([1.75, 2.25, 2.75, 3.25], 2.5), ([3.3125, 4.4375, 5.5625, 6.6875], 5.0)]


def test_pulled_statistics_are_averaged_ones_where_parameters_are_replaced():
    assert list(stats_after(2, 1.0, policy.pull)) == list(stats_after(2, 1.0, policy.average))


def test_an_optimizer_state_is_not_pulled():
    with pytest.raises(wavg.SettingsError, match="pull is for BatchNorm-style statistics"):
        carried(noisy(), trained(noisy()), tree.equal_weights(ALIVE), policy.pull)
