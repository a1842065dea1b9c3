"""Statistics re-estimated on data are their mean over the batches, against NumPy; what is no average goes on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from runs import train
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax import data, models
from wavg_jax.averaging import smoothing
from wavg_jax.base import Batch
from wavg_jax.rounds import policy
from wavg_jax.rounds.faults import simulate
from wavg_jax.rounds.reestimation import reestimate
from wavg_jax.training import schedule

N, B = 5, 16
RNG = np.random.default_rng(0)
X = RNG.normal(1000.0, 3.0, size=(N, B, 4)) * np.array([1, 0.1, 1, 1e3])
ITEMS = Batch(jnp.asarray(X, jnp.float32), jnp.asarray(RNG.integers(0, 2, size=(N, B)), jnp.int32))


def reestimated(task, params, mutable, count=N):
    run = jax.jit(reestimate(task))
    return run(params, mutable, ITEMS, jnp.int32(count), None, jax.random.key(0))


def exactly(count):
    """Means over the batches of mean and variance of each."""
    x = X[:count]
    return x.mean(axis=(0, 1)), x.var(axis=1).mean(axis=0)


@pytest.mark.parametrize("momentum", [0.9, 0.99])
@pytest.mark.parametrize("count", [1, 3, N])
def test_batchnorms_statistics_are_the_means_over_the_batches_whatever_they_were(momentum, count):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            def norm(name):
                # By two passes, as NumPy; the default subtracts squares of means.
                return nn.BatchNorm(not train, momentum=momentum, name=name, use_fast_variance=False)

            return nn.Dense(2)(norm("second")(norm("first")(x)))

    task = models.from_linen(Normed(), (4,))
    params, mutable = task.init(jax.random.key(0))
    garbage = jax.tree.map(lambda s: jnp.full_like(s, 12345.0), mutable)
    stats = reestimated(task, params, garbage, count)["batch_stats"]
    mean, variance = exactly(count)
    np.testing.assert_allclose(stats["first"]["mean"], mean, rtol=1e-4)
    np.testing.assert_allclose(stats["first"]["var"], variance, rtol=1e-3)
    # The second layer is given batches of mean 0 and variance 1, not what the first one's old statistics make of them.
    np.testing.assert_allclose(stats["second"]["mean"], np.zeros(4), atol=1e-3)
    np.testing.assert_allclose(stats["second"]["var"], np.ones(4), rtol=1e-2)


def test_an_nnx_batchnorm_is_re_estimated_and_a_count_beside_it_goes_on():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, momentum=0.99, use_fast_variance=False, rngs=rngs)
            self.last = nnx.Linear(4, 2, rngs=rngs)
            self.batches, self.seen = nnx.Variable(jnp.int32(7)), nnx.Variable(jnp.float32(7))

        def __call__(self, x):
            self.batches[...] = self.batches[...] + 1
            self.seen[...] = self.seen[...] + x.shape[0]
            return self.last(self.norm(x))

    task = models.from_nnx(Net, (4,))
    after = reestimated(task, *task.init(jax.random.key(0)), count=3)
    mean, variance = exactly(3)
    np.testing.assert_allclose(after["norm"]["mean"], mean, rtol=1e-4)
    np.testing.assert_allclose(after["norm"]["var"], variance, rtol=1e-3)
    assert (int(after["batches"]), float(after["seen"])) == (7 + 3, 7 + 3 * B)


def test_a_batchnorm_behind_a_frozen_one_is_re_estimated_and_the_frozen_one_stays():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(True, name="frozen")(x)
            return nn.Dense(2)(nn.BatchNorm(not train, momentum=0.99, use_fast_variance=False, name="norm")(x))

    params, mutable = models.from_linen(Net(), (4,)).init(jax.random.key(0))
    frozen = {"mean": jnp.full(4, 900.0), "var": jnp.full(4, 25.0)}
    old = {"mean": jnp.full(4, 12345.0), "var": jnp.full(4, 12345.0)}
    garbage = mutable | {"batch_stats": {"frozen": frozen, "norm": old}}
    stats = reestimated(models.from_linen(Net(), (4,)), params, garbage)["batch_stats"]
    mean, variance = exactly(N)
    jax.tree.map(np.testing.assert_array_equal, stats["frozen"], frozen)
    np.testing.assert_allclose(stats["norm"]["mean"], (mean - 900) / 5, rtol=1e-3)
    np.testing.assert_allclose(stats["norm"]["var"], variance / 25, rtol=1e-2)


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
def test_what_normalises_by_its_running_statistics_in_training_too_is_never_given_zeros(momentum):
    x = RNG.normal(2.0, 3.0, size=(N, B, 4))

    def loss(params, mutable, batch, rng):
        def average(name, values):
            return momentum * mutable[name] + (1 - momentum) * values

        centred = (batch.x - mutable["mean"][None]) / jnp.sqrt(mutable["var"] + 1e-5)[None]
        new = {"mean": average("mean", batch.x.mean(axis=0)), "var": average("var", batch.x.var(axis=0))}
        return jnp.float32(0), (new | {"after": average("after", centred.var(axis=0))}, {})

    task = wavg.Task(init=None, loss=loss, predict=None, measure=None)
    mutable = {"mean": jnp.zeros(4), "var": jnp.ones(4), "after": jnp.ones(4)}
    items = Batch(jnp.asarray(x, jnp.float32), ITEMS.y)
    new = jax.jit(reestimate(task))({}, mutable, items, jnp.int32(N), None, jax.random.key(0))
    variance = x.var(axis=1)
    np.testing.assert_allclose(new["mean"], x.mean(axis=(0, 1)), rtol=1e-3)
    np.testing.assert_allclose(new["var"], variance.mean(axis=0), rtol=1e-3)
    # Each batch is divided by the deviation of the one before, the first by its own.
    by = variance[[0, *range(N - 1)]]
    np.testing.assert_allclose(new["after"], (variance / by).mean(axis=0), rtol=1e-2)


NO_AVERAGES = {
    "constant": lambda s, b, n: s,
    "count": lambda s, b, n: s + 1,
    "last": lambda s, b, n: b,
    "largest": lambda s, b, n: jnp.maximum(s, b),
    "largest, forgetting": lambda s, b, n: 0.9 * jnp.maximum(s, b),
    "length": lambda s, b, n: 0.5 * jnp.abs(s) + b,
    "unit vector": lambda s, b, n: (s + b) / jnp.sqrt(jnp.sum((s + b) ** 2)),
    "product": lambda s, b, n: s * b,
    "mean so far": lambda s, b, n: s + (b - s) / (n + 1).astype(jnp.float32),
}


@pytest.mark.parametrize("name", NO_AVERAGES)
def test_what_is_no_exponential_average_goes_on_from_its_old_value(name):
    change, old = NO_AVERAGES[name], np.array([3.0, -2.0], np.float32)

    def loss(params, mutable, batch, rng):
        b, n = 1e-3 * batch.x.mean(axis=0)[:2], mutable["n"]
        new = {"s": change(mutable["s"], b, n), "ema": 0.9 * mutable["ema"] + 0.1 * b, "n": n + 1}
        return jnp.float32(0), (new, {})

    task = wavg.Task(init=None, loss=loss, predict=None, measure=None)
    after = reestimated(task, {}, {"s": jnp.asarray(old), "ema": jnp.zeros(2), "n": jnp.int32(2)}, count=3)
    expected = {"s": jnp.asarray(old), "ema": jnp.zeros(2), "n": jnp.int32(2)}
    for i in range(3):
        _, (expected, _) = loss({}, expected, wavg.replica(ITEMS, i), None)
    np.testing.assert_allclose(after["s"], expected["s"], rtol=1e-5)
    np.testing.assert_allclose(after["ema"], 1e-3 * X[:3, :, :2].mean(axis=(0, 1)), rtol=1e-5)
    assert int(after["n"]) == 5


K, H = 4, 4
TASK, SOURCE = regression(), sharded(K)
SLOW = simulate(K, speed={1: 0.25, 2: 0.75})


def watching():
    """The regression; its statistic is a running mean of the inputs, so that it tells which batches were read."""

    def loss(params, mutable, batch, rng):
        value, _ = TASK.loss(params, {"seen": jnp.float32(0)}, batch, rng)
        return value, ({"mean": 0.99 * mutable["mean"] + 0.01 * batch.x.mean(axis=0)}, {})

    def predict(params, mutable, x):
        return TASK.predict(params, {"seen": jnp.float32(0)}, x)

    return wavg.Task(lambda rng: (TASK.init(rng)[0], {"mean": jnp.zeros(4)}), loss, predict, TASK.measure)


WATCHING = watching()


def inputs_of(steps, last, first_step=0):
    """Mean over the replicas of the mean input of the last batches of a round in which replica k takes `steps[k]`."""
    indices = data.round_indices(SOURCE.shards, seed=0, first_step=first_step, local_steps=H, batch_size=8)
    read = [indices[k, max(taken - last, 0) : taken].ravel() for k, taken in enumerate(steps)]
    return np.mean([np.asarray(SOURCE.prepare(SOURCE.train.x[i])).mean(axis=0) for i in read], axis=0)


@pytest.mark.parametrize(
    ("last", "steps", "lame", "devices"),
    [(2, 4, None, 1), (2, 3, None, 1), (3, 2, None, 1), (2, 4, SLOW, 4)],
    ids=["a whole round", "a shorter round", "fewer steps than batches", "stragglers"],
)
def test_each_replicas_last_batches_of_the_round_are_read(last, steps, lame, devices):
    options = {"stats": policy.reestimate(last), "faults": lame, "devices": devices}
    lengths = schedule.Schedule(H, lambda past: steps)
    result = train(
        WATCHING,
        SOURCE,
        wavg.averager(wavg.uniform()),
        inner=optax.sgd(0.1),
        local_steps=lengths,
        rounds=1,
        batch_size=8,
        smoothing=smoothing.swa(),
        on_round=lambda row: None,
        **options,
    )
    taken = [steps] * K if lame is None else [4, 1, 3, 4]
    np.testing.assert_allclose(result.state.mutable["mean"], inputs_of(taken, last), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result.state.replicas.mutable["mean"], [result.state.mutable["mean"]] * K)
    # For smoothed parameters up to 8 batches are read, here all of the round.
    np.testing.assert_allclose(result.mutable["mean"], inputs_of(taken, 8), rtol=1e-4, atol=1e-5)
