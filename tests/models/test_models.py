"""Tasks made by hand, of Linen and of NNX modules behave the same: jit, vmap over replicas, scan, gradients."""

import functools
import math
import subprocess
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wavg_jax.base import Batch, DataError, SettingsError, Task
from wavg_jax.models import CNN, MLP, classifier, from_linen, from_nnx, language_model, regressor

K = 3
SHAPE = (8, 8, 1)


class NnxNet(nnx.Module):
    """A user's module: a convolution, BatchNorm and Dropout, some of it in a list."""

    def __init__(self, rngs: nnx.Rngs, batch_norm: bool = True, dropout: float = 0.5):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs) if batch_norm else None
        self.body = nnx.Sequential(nnx.Linear(64, 16, rngs=rngs), nnx.relu, nnx.Dropout(dropout, rngs=rngs))
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        x = nnx.max_pool(x if self.norm is None else self.norm(x), (2, 2), (2, 2))
        return self.out(self.body(x.reshape(x.shape[0], -1)))


class NnxMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dropout: float = 0.0):
        self.layers = nnx.List([nnx.Linear(64, 16, rngs=rngs), nnx.Linear(16, 12, rngs=rngs)])
        self.out = nnx.Linear(12, 3, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = self.dropout(nnx.relu(layer(x)))
        return self.out(x)


def _by_hand() -> Task:
    def init(rng):
        return {"w": 0.1 * jax.random.normal(rng, (64, 3)), "b": jnp.zeros(3)}, {"calls": jnp.zeros(())}

    def apply(params, mutable, x, *, train, rng):
        x = x.reshape(x.shape[0], -1)
        if train:
            x = x * jax.random.bernoulli(rng, 0.5, x.shape).astype(x.dtype)
            mutable = {"calls": mutable["calls"] + 1}
        return x @ params["w"] + params["b"][None], mutable

    return classifier(init, apply)


class Row(NamedTuple):
    task: Task
    has_mutable: bool
    random: bool


ROWS = {
    "by hand": Row(_by_hand(), True, True),
    "linen mlp": Row(from_linen(MLP((16,), 3), SHAPE), False, False),
    "linen mlp, bfloat16": Row(from_linen(MLP((16,), 3, 0.5, jnp.bfloat16), SHAPE), False, True),
    "linen cnn": Row(from_linen(CNN(3, batch_norm=True, dropout=0.5), SHAPE), True, True),
    "nnx": Row(from_nnx(lambda rngs: NnxNet(rngs), SHAPE), True, True),
}
every_row = pytest.mark.parametrize("name", ROWS)


@functools.cache
def _initial(name: str):
    return jax.jit(ROWS[name].task.init)(jax.random.key(0))


@functools.cache
def _step(name: str):
    return jax.jit(jax.value_and_grad(ROWS[name].task.loss, has_aux=True))


@functools.cache
def _predict(name: str):
    return jax.jit(ROWS[name].task.predict)


def _batch(seed: int = 0, labels: type = np.int32) -> Batch:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6, *SHAPE)).astype(np.float32)
    return Batch(jnp.asarray(x), jnp.asarray(rng.integers(0, 3, 6).astype(labels)))


def _differ(a, b) -> bool:
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _avals(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@every_row
def test_shapes_dtypes_gradients_and_mutable(name):
    params, mutable = _initial(name)
    assert type(params) is type(mutable) is dict
    assert bool(mutable) == ROWS[name].has_mutable
    (loss, (new_mutable, metrics)), gradients = _step(name)(params, mutable, _batch(), jax.random.key(1))
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert _avals(metrics) == {"accuracy": ((), jnp.float32, False)}
    assert 0 < float(loss) < 10
    # A scan carries these, so not even the weak type may change.
    assert _avals(new_mutable) == _avals(mutable)
    assert _avals(gradients) == _avals(params)
    assert _differ(new_mutable, mutable) == ROWS[name].has_mutable
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients) if g.ndim > 1)


@every_row
def test_predict_is_in_evaluation_mode(name):
    params, mutable = _initial(name)
    x = _batch().x
    logits = _predict(name)(params, mutable, x)
    assert (logits.shape, logits.dtype) == ((6, 3), jnp.float32)
    # With dropout off and stored statistics, an input's logits do not depend on its place or on the batch.
    mixed = _predict(name)(params, mutable, jnp.concatenate([x[3:], 9 * x[:3]]))
    np.testing.assert_allclose(mixed[:3], logits[3:], rtol=1e-5, atol=1e-5)


@every_row
def test_each_calls_key_drives_dropout(name):
    first, again, other = (float(_step(name)(*_initial(name), _batch(), jax.random.key(s))[0][0]) for s in (1, 1, 2))
    assert first == again
    assert (first != other) == ROWS[name].random


@every_row
def test_vmap_over_replicas_gives_the_numbers_of_one_by_one(name):
    task = ROWS[name].task
    replicas = [
        (*jax.tree.map(lambda p, k=k: np.asarray(p) * np.asarray(1 + k / 4, p.dtype), _initial(name)), _batch(k))
        for k in range(K)
    ]
    keys = jax.random.split(jax.random.key(0), K)
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *replicas)

    def step_and_predict(params, mutable, batch, key):
        step = jax.value_and_grad(task.loss, has_aux=True)(params, mutable, batch, key)
        return step, task.predict(params, mutable, batch.x)

    together = jax.jit(jax.vmap(step_and_predict))(*stacked, keys)
    tolerance = {"rtol": 0.1, "atol": 0.02} if "bfloat16" in name else {"rtol": 1e-4, "atol": 1e-5}
    for k, (params, mutable, batch) in enumerate(replicas):
        alone = _step(name)(params, mutable, batch, keys[k]), _predict(name)(params, mutable, batch.x)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[k], b, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("linen cnn", marks=pytest.mark.slow), "nnx"])
def test_trains_inside_scan_under_vmap_without_leaking_tracers(name):
    task, batch = ROWS[name].task, _batch()

    def train(carry, rng):
        def step(carry, key):
            params, mutable = carry
            grad = jax.value_and_grad(task.loss, has_aux=True)
            (loss, (mutable, _)), gradients = grad(params, mutable, batch, key)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), mutable), loss

        return jax.lax.scan(step, carry, jax.random.split(rng, 20))[1]

    with jax.checking_leaks():
        losses = jax.jit(jax.vmap(train, in_axes=(None, 0)))(_initial(name), jax.random.split(jax.random.key(0), 2))
    assert losses.shape == (2, 20)
    assert (losses[:, -5:].mean(1) < 0.8 * losses[:, :5].mean(1)).all()


NETWORKS = {
    "mlp": MLP((16,), 3),
    "mlp, bfloat16": MLP((16,), 3, 0.5, jnp.bfloat16),
    "cnn": CNN(3),
    "cnn, all": CNN(3, True, 0.5),
    "cnn, all, bfloat16": CNN(3, True, 0.5, jnp.bfloat16),
}


@pytest.mark.parametrize("module", NETWORKS.values(), ids=NETWORKS)
def test_bfloat16_parameters_keep_their_dtype_and_the_statistics_theirs(module):
    task = from_linen(module, SHAPE)
    params, mutable = jax.eval_shape(task.init, jax.eval_shape(jax.random.key, 0))
    half = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
    step = jax.value_and_grad(task.loss, has_aux=True)
    (loss, (new, _)), gradients = jax.eval_shape(step, half, mutable, _batch(), jax.random.key(0))
    assert loss.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}
    assert _avals(new) == _avals(mutable)


def test_bfloat16_changes_the_loss_by_rounding_only():
    params, _ = _initial("linen mlp")
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    exact, rounded = (_step("linen mlp")(p, {}, _batch(), jax.random.key(1))[0][0] for p in (params, half))
    assert 0 < abs(float(rounded) / float(exact) - 1) < 0.01
    logits = from_linen(MLP((16,), 3, dtype=jnp.bfloat16), SHAPE).predict(half, {}, _batch().x)
    np.testing.assert_allclose(logits, _predict("linen mlp")(params, {}, _batch().x), atol=0.05)


def test_loss_and_accuracy_by_hand():
    task = classifier(lambda rng: ({}, {}), lambda params, mutable, x, *, train, rng: (x, mutable))
    # softmax of (0, log 3) is (1/4, 3/4): the losses are -log 3/4 (right) and -log 1/4 (wrong).
    x = jnp.array([[0.0, math.log(3)], [0.0, math.log(3)]])
    loss, (_, metrics) = task.loss({}, {}, Batch(x, jnp.array([1, 0])), jax.random.key(0))
    np.testing.assert_allclose(loss, (math.log(4 / 3) + math.log(4)) / 2, rtol=1e-6)
    assert metrics["accuracy"] == 0.5


def test_the_loss_is_computed_in_float32():
    task = classifier(lambda rng: ({}, {}), lambda params, mutable, x, *, train, rng: (x, mutable))
    x = jnp.zeros((1, 1000), jnp.bfloat16)
    loss = task.loss({}, {}, Batch(x, jnp.array([3])), jax.random.key(0))[0]
    np.testing.assert_allclose(loss, math.log(1000), rtol=1e-6)


@pytest.mark.parametrize("labels", [np.uint8, np.int8, np.uint32])
def test_any_integer_labels_give_the_same(labels):
    expected, actual = (
        _step("linen mlp")(*_initial("linen mlp"), _batch(labels=dtype), jax.random.key(1))
        for dtype in (np.int32, labels)
    )
    assert not _differ(actual, expected)


def test_batch_norm_statistics_move_by_a_tenth_towards_the_batch():
    task = from_nnx(lambda rngs: nnx.BatchNorm(3, momentum=0.9, rngs=rngs), (3,))
    params, mutable = task.init(jax.random.key(0))
    x = jnp.array([[1.0, 0.0, 4.0], [3.0, 0.0, 8.0]])
    _, (new, _) = task.loss(params, mutable, Batch(x, jnp.array([0, 1])), jax.random.key(0))
    np.testing.assert_allclose(new["mean"], [0.2, 0.0, 0.6], rtol=1e-6)
    np.testing.assert_allclose(new["var"], [0.9 + 0.1, 0.9, 0.9 + 0.4], rtol=1e-6)
    np.testing.assert_array_equal(mutable["mean"], np.zeros(3))


def test_an_nnx_module_becomes_a_regressor_or_a_language_model():
    task = from_nnx(lambda rngs: nnx.Linear(2, 1, rngs=rngs), (2,), make=regressor)
    batch = Batch(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[1.0], [1.0]]))
    params = {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}
    loss, _ = task.loss(params, {}, batch, jax.random.key(0))
    assert float(loss) == 2.0  # errors 2 and 0
    assert set(task.measure(task.predict(params, {}, batch.x), batch)) == {"loss", "absolute_error"}
    task = from_nnx(lambda rngs: nnx.Embed(5, 5, rngs=rngs), (3,), dtype=jnp.int32, make=language_model)
    tokens = jnp.zeros((2, 3), jnp.int32)
    assert jax.eval_shape(lambda: task.predict(*task.init(jax.random.key(0)), tokens)).shape == (2, 3, 5)


def _nnx_weights(params: dict) -> dict:
    return {"layers": {0: params["Dense_0"], 1: params["Dense_1"]}, "out": params["Dense_2"]}


def test_linen_and_nnx_agree_on_copied_weights():
    linen, in_nnx = from_linen(MLP((16, 12), 3), SHAPE), from_nnx(NnxMLP, SHAPE)
    params, _ = jax.jit(linen.init)(jax.random.key(0))
    copied = _nnx_weights(params)
    assert _avals(copied) == _avals(jax.jit(in_nnx.init)(jax.random.key(5))[0])
    batch = _batch()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(jax.jit(linen.predict)(params, {}, batch.x), jax.jit(in_nnx.predict)(copied, {}, batch.x))
    ours, theirs = (
        jax.jit(jax.value_and_grad(task.loss, has_aux=True))(weights, {}, batch, jax.random.key(1))
        for task, weights in ((linen, params), (in_nnx, copied))
    )
    close(ours[0][0], theirs[0][0])
    for a, b in zip(jax.tree.leaves(_nnx_weights(ours[1])), jax.tree.leaves(theirs[1]), strict=True):
        close(a, b)


def test_nnx_streams_are_not_carried_and_differ_from_each_other():
    class Noise(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.scale = nnx.Param(jnp.ones(2))
            self.rngs = rngs

        def __call__(self, x: jax.Array) -> jax.Array:
            a, b = self.rngs.dropout(), self.rngs.noise()
            return x * self.scale[...][None] + jnp.stack([jax.random.normal(a), jax.random.normal(b)])[None]

    def make(rngs):
        key = rngs.params()
        return Noise(nnx.Rngs(dropout=key, noise=key))

    task = from_nnx(make, (2,))
    params, mutable = task.init(jax.random.key(0))
    assert set(params) == {"scale"}
    assert mutable == {}
    logits = task.predict(params, mutable, jnp.zeros((1, 2)))
    assert logits[0, 0] != logits[0, 1]


def test_linen_streams_of_any_name_are_driven():
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            x = nn.Dense(3)(x)
            return x + jax.random.normal(self.make_rng("noise"), x.shape) if train else x

    task = from_linen(Noise(), (4,))
    params, mutable = task.init(jax.random.key(0))
    batch = Batch(jnp.ones((2, 4)), jnp.array([0, 1]))
    first, second = (task.loss(params, mutable, batch, jax.random.key(seed))[0] for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)], ids=str)
@pytest.mark.parametrize("module", [MLP((16,)), CNN(), CNN(batch_norm=True)], ids=["mlp", "cnn", "cnn, norm"])
def test_networks_take_the_images_of_every_data_set(module, shape):
    task = from_linen(module, shape)
    params, mutable = jax.eval_shape(task.init, jax.random.key(0))
    logits = jax.eval_shape(task.predict, params, mutable, jax.ShapeDtypeStruct((2, *shape), jnp.float32))
    assert logits.shape == (2, 10)


def test_sizes_of_the_networks():
    def count(module, shape):
        params, _ = jax.eval_shape(from_linen(module, shape).init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    assert count(MLP(), (28, 28, 1)) == (784 * 256 + 256) + (256 * 256 + 256) + (256 * 10 + 10)
    convolutions = (9 * 32 + 32) + (9 * 32 * 64 + 64)
    dense = (7 * 7 * 64 * 128 + 128) + (128 * 10 + 10)
    assert count(CNN(), (28, 28, 1)) == convolutions + dense
    # BatchNorm brings a scale and a bias for each channel, and the convolution's own bias goes.
    assert count(CNN(batch_norm=True), (28, 28, 1)) == convolutions + dense + 32 + 64


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(x)


BAD = {
    "linen without train": (lambda: from_linen(NoTrain(), (4,)), SettingsError, "takes no `train`"),
    "nnx given to from_linen": (
        lambda: from_linen(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), (4,)),
        SettingsError,
        "from_nnx",
    ),
    "no nnx module": (
        lambda: from_nnx(lambda rngs: rngs.params(), (4,)),
        SettingsError,
        "make_module= must return a",
    ),
    "no logits": (
        lambda: from_nnx(lambda rngs: nnx.Linear(8, 3, rngs=rngs), (4, 8)),
        SettingsError,
        r"must return \[B, classes\]",
    ),
    "dropout of 1": (
        lambda: jax.eval_shape(from_linen(MLP(dropout=1.0), (4,)).init, jax.random.key(0)),
        SettingsError,
        "dropout is 1.0; it must be a finite number, 0 or more and less than 1",
    ),
    "flat images": (
        lambda: jax.eval_shape(from_linen(CNN(), (64,)).init, jax.random.key(0)),
        SettingsError,
        r"at least 4x4 pixels, got \(1, 64\)",
    ),
    "tiny images": (
        lambda: jax.eval_shape(from_linen(CNN(), (3, 8, 1)).init, jax.random.key(0)),
        SettingsError,
        "at least 4x4",
    ),
    "one-hot labels": (lambda: _loss_of_labels(jnp.ones((6, 3))), DataError, "take the argmax"),
    "too few labels": (lambda: _loss_of_labels(jnp.ones(5, jnp.int32)), DataError, r"shape \(6,\)"),
}


def _loss_of_labels(y: jax.Array):
    return _step("linen mlp")(*_initial("linen mlp"), _batch()._replace(y=y), jax.random.key(1))


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_clear_line(call, error, match):
    with pytest.raises(error, match=match) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_importing_the_models_does_not_import_nnx():
    code = "import sys, wavg_jax.models; sys.exit('flax.nnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
