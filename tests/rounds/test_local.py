"""Local training and where it runs: H=1 is synchronous data parallelism, and no placement changes the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wavg_jax as wavg
from wavg_jax.base import Batch, Replicas, Task
from wavg_jax.devices.placement import on, place, single

K, H, B, FEATURES, CLASSES = 8, 5, 4, 6, 3


def linear_task() -> Task:
    """A softmax regression over a plain dict: the core needs no flax."""

    def init(rng):
        return {"w": 0.1 * jax.random.normal(rng, (FEATURES, CLASSES)), "b": jnp.zeros(CLASSES)}, {}

    def logits(params, x):
        return x @ params["w"] + params["b"][None]

    def loss(params, mutable, batch, rng):
        x = batch.x + 0.1 * jax.random.normal(rng, batch.x.shape)  # so that every replica's key matters
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), batch.y)
        return losses.mean(), (mutable, {})

    def measure(logits, batch):
        return {"loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).sum()}

    return Task(init, loss, lambda params, mutable, x: logits(params, x), measure)


def quiet(task: Task) -> Task:
    """The same without noise, for comparisons with arithmetic that has no keys."""
    return task._replace(loss=lambda p, m, b, rng: (_cross_entropy(task, p, b), (m, {})))


def _cross_entropy(task, params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(task.predict(params, {}, batch.x), batch.y).mean()


def batches(replicas=K, steps=H, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(replicas, steps, B, FEATURES)).astype(np.float32)
    return Batch(jnp.asarray(x), jnp.asarray(rng.integers(0, CLASSES, size=(replicas, steps, B)), jnp.int32))


def replicas_of(task, inner, replicas=K):
    params, mutable = task.init(jax.random.key(0))
    return Replicas(
        wavg.replicate(params, replicas),
        wavg.replicate(inner.init(params), replicas),
        wavg.replicate(mutable, replicas),
        jax.random.split(jax.random.key(1), replicas),
    )


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def as_numbers(replicas):
    return replicas._replace(rng=jax.random.key_data(replicas.rng))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_one_replica_against_a_loop_of_optax_steps():
    task, inner = linear_task(), optax.adam(0.1)
    one = wavg.replica(replicas_of(task, inner), 3)
    items = wavg.replica(batches(), 3)
    after, loss = wavg.local_steps(task, inner)(one, items, None)
    params, opt_state, rng, losses = one.params, one.opt_state, one.rng, []
    for h in range(H):
        rng, _, key = jax.random.split(rng, 3)
        value, gradient = jax.value_and_grad(lambda p, h=h, key=key: task.loss(p, {}, wavg.replica(items, h), key)[0])(
            params
        )
        updates, opt_state = inner.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(value)
    assert_close(after.params, params)
    assert_close(loss, np.mean(losses))


@pytest.mark.slow
def test_one_local_step_of_sgd_then_plain_averaging_is_synchronous_data_parallelism():
    task, inner = quiet(linear_task()), optax.sgd(0.5)
    train = jax.vmap(wavg.local_steps(task, inner), in_axes=(0, 0, None))
    avg = wavg.averager(wavg.uniform())
    params, _ = task.init(jax.random.key(0))
    together, state = params, avg.init(params, K)
    for number in range(6):
        items = batches(steps=1, seed=number)
        replicas = replicas_of(task, inner)._replace(params=wavg.replicate(params, K))
        replicas, _ = train(replicas, items, None)
        params, state, _ = avg.update(replicas.params, state, params)
        all_samples = jax.tree.map(lambda x: x.reshape(K * B, *x.shape[3:]), items)
        gradient = jax.grad(lambda p, b=all_samples: _cross_entropy(task, p, b))(together)
        together = jax.tree.map(lambda p, g: p - 0.5 * g, together, gradient)
        assert_close(params, together)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("inner", [optax.sgd(0.1, momentum=0.9), optax.adam(0.01)], ids=["momentum", "adam"])
def test_eight_devices_give_the_numbers_of_one_and_of_pmap(inner):
    task = linear_task()
    steps = wavg.local_steps(task, inner)
    replicas, items = replicas_of(task, inner), batches()
    expected = jax.jit(single().map(lambda one, shared: steps(*one, shared)))((replicas, items), None)
    for devices in (2, 8):
        spread = place(K, devices).map(lambda one, shared: steps(*one, shared))
        actual = jax.jit(spread)((replicas, items), None)
        assert_close((as_numbers(actual[0]), actual[1]), (as_numbers(expected[0]), expected[1]))
    mapped = jax.pmap(lambda one, items: steps(one, items, None))(replicas, items)
    assert_close((as_numbers(mapped[0]), mapped[1]), (as_numbers(expected[0]), expected[1]))


def test_the_reduction_gives_the_same_numbers_on_eight_devices_as_on_one():
    rng = np.random.default_rng(0)
    stacked = {"w": jnp.asarray(rng.normal(size=(K, 5, 2)), jnp.bfloat16), "b": jnp.asarray(rng.normal(size=(K, 3)))}
    stacked = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype != jnp.bfloat16 else x, stacked)
    weights = {"w": jnp.full(K, 1 / K), "b": jnp.asarray(rng.dirichlet(np.ones(K), size=3).T, jnp.float32)}
    spread = on(tuple(jax.devices())).reduce(wavg.weighted_mean)
    actual = jax.jit(spread)(stacked, weights)
    assert_close(actual, wavg.weighted_mean(stacked, weights), rtol=1e-6)
    assert actual["w"].sharding.is_fully_replicated


def test_replicas_with_equal_data_differ_only_by_their_keys():
    task, inner = linear_task(), optax.sgd(0.1)
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], K, axis=0), batches())
    steps = single().map(lambda one, shared: wavg.local_steps(task, inner)(*one, shared))
    noisy, _ = steps((replicas_of(task, inner), same), None)
    assert np.ptp(np.asarray(noisy.params["w"]), axis=0).max() > 1e-4
    one_key = replicas_of(task, inner)._replace(rng=jnp.repeat(jax.random.key(5)[None], K))
    alike, _ = steps((one_key, same), None)
    assert np.ptp(np.asarray(alike.params["w"]), axis=0).max() < 1e-6


def test_place_takes_as_many_devices_as_divide_the_replicas():
    assert len(place(8).devices) == 8
    assert len(place(6).devices) == 6
    assert len(place(9).devices) == 3
    assert len(place(7, 1).devices) == 1
    with pytest.raises(wavg.SettingsError, match="do not spread evenly over 3"):
        place(8, 3)
    with pytest.raises(wavg.SettingsError, match=r"devices=99: JAX sees 8 .*set devices= between 1 and 8"):
        place(99, 99)
