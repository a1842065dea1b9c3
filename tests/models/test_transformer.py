"""Transformer and language_model: causal, any integer tokens, loss by hand, mapped over replicas, learns a cycle."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import filled

from wavg_jax.base import Batch, DataError, SettingsError
from wavg_jax.models import Transformer, from_linen, language_model

T, VOCABULARY = 6, 5


def _task(length: int = T, tokens=jnp.uint8, **attributes):
    module = Transformer(**{"vocabulary": VOCABULARY, "layers": 1, "heads": 2, "width": 16, "length": T} | attributes)
    return from_linen(module, (length,), dtype=tokens, make=language_model)


TASK = _task()


@cache
def _initial():
    return filled(TASK)


@cache
def _step():
    """Of two replicas at once."""
    return jax.jit(jax.vmap(jax.value_and_grad(TASK.loss, has_aux=True)))


@cache
def _predict():
    return jax.jit(TASK.predict)


def _replicas():
    params, mutable = _initial()
    return jax.tree.map(lambda leaf: np.stack([leaf, leaf]), params), mutable


def _text(*leading: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (*leading, T + 1)).astype(np.uint8)


def _batch(text: np.ndarray) -> Batch:
    return Batch(jnp.asarray(text[..., :-1]), jnp.asarray(text[..., 1:]))


def test_logits_depend_only_on_the_tokens_so_far():
    params, mutable = _initial()
    tokens = _text(1)[:, :T]
    # Row t is the sentence with its token t changed.
    changed = np.concatenate([tokens, (tokens + np.eye(T, dtype=np.uint8)) % VOCABULARY])
    logits = np.asarray(_predict()(params, mutable, jnp.asarray(changed)))
    assert (logits.shape, logits.dtype) == ((T + 1, T, VOCABULARY), np.float32)
    differs = (np.abs(logits[1:] - logits[:1]) > 1e-6).any(-1)
    np.testing.assert_array_equal(differs, np.triu(np.ones((T, T), bool)))


def test_any_integer_tokens_give_the_same_and_bytes_outside_the_vocabulary_nan():
    params, mutable = _initial()
    tokens = _text(7)[:, :T]
    expected = _predict()(params, mutable, jnp.asarray(tokens))
    np.testing.assert_allclose(_predict()(params, mutable, jnp.asarray(tokens, jnp.int32)), expected, rtol=1e-6)
    tokens[2, 4] = VOCABULARY
    spoilt = np.isnan(_predict()(params, mutable, jnp.asarray(tokens)))
    np.testing.assert_array_equal(spoilt.all((1, 2)), np.arange(7) == 2)


def test_a_shorter_sequence_and_the_size():
    task = _task(length=3)
    params, mutable = jax.eval_shape(task.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    assert jax.eval_shape(task.predict, params, mutable, tokens).shape == (2, 3, VOCABULARY)
    biases, norms = 9 * 16, 5 * 16 * 2 - 4 * 16
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == (VOCABULARY + T + 12 * 16) * 16 + biases + norms


def test_in_bfloat16_gradients_keep_that_dtype_and_the_loss_is_float32():
    task = _task(dropout=0.5, tokens=jnp.int8, dtype=jnp.bfloat16)
    params, mutable = jax.eval_shape(task.init, jax.random.key(0))
    half = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
    step = jax.value_and_grad(task.loss, has_aux=True)
    (loss, (moved, metrics)), gradients = jax.eval_shape(step, half, mutable, _batch(_text(2)), jax.random.key(0))
    assert moved == mutable == {}
    assert {x.dtype for x in (loss, metrics["accuracy"])} == {jnp.dtype(jnp.float32)}
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}


def test_vmap_over_replicas_keeps_them_apart():
    params, mutable = _replicas()
    batches, keys = _batch(_text(2, 4)), jax.random.split(jax.random.key(1), 2)
    (losses, _), gradients = together = _step()(params, mutable, batches, keys)
    swapped = _step()(params, mutable, jax.tree.map(lambda leaf: leaf[::-1], batches), keys)
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(swapped), strict=True):
        np.testing.assert_allclose(one, other[::-1], rtol=1e-4, atol=1e-6)
    assert losses[0] != losses[1]
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    # At the start all tokens are about as likely.
    np.testing.assert_allclose(losses, math.log(VOCABULARY), atol=0.1)


def test_replicas_learn_to_count_on():
    params, mutable = _replicas()
    counts = (np.arange(4)[:, None] + np.arange(T + 1)) % VOCABULARY
    # One replica counts up, the other down.
    batches, keys = _batch(np.stack([counts, counts[:, ::-1]]).astype(np.uint8)), jax.random.split(jax.random.key(1), 2)
    for _ in range(60):
        (losses, (_, metrics)), gradients = _step()(params, mutable, batches, keys)
        params = jax.tree.map(lambda p, g: p - np.float32(0.3) * np.asarray(g), params, gradients)
    np.testing.assert_array_equal(metrics["accuracy"], 1)
    assert (np.asarray(losses) < 0.1).all()


def _given(logits: jax.Array):
    """A task whose network outputs these logits."""
    return language_model(lambda rng: ({}, {}), lambda params, mutable, x, *, train, rng: (logits, mutable))


def test_loss_and_accuracy_by_hand():
    # softmax of (0, log 3) is (1/4, 3/4): the next tokens 1, 1, 0 cost -log 3/4 twice and -log 1/4.
    task = _given(jnp.tile(jnp.array([0.0, math.log(3)]), (1, 3, 1)))
    batch = Batch(jnp.zeros((1, 3), jnp.uint8), jnp.array([[1, 1, 0]], jnp.uint8))
    loss, (_, metrics) = jax.jit(task.loss)({}, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, (2 * math.log(4 / 3) + math.log(4)) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], 2 / 3, rtol=1e-6)


def test_bits_per_byte_are_those_of_numpy():
    rng = np.random.default_rng(1)
    logits, tokens = rng.normal(size=(4, 3, 7)).astype(np.float32), rng.integers(0, 7, (4, 3))
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    bits = -np.log2(np.take_along_axis(shares, tokens[..., None], -1)).mean()
    for bytes_per_token in (1.0, 2.5):
        task = language_model(
            lambda rng: ({}, {}), lambda p, m, x, *, train, rng: (x, m), bytes_per_token=bytes_per_token
        )
        sums = task.measure(jnp.asarray(logits), Batch(None, jnp.asarray(tokens)))
        metrics = task.metrics(sums, jnp.float32(4))
        np.testing.assert_allclose(metrics["bits_per_byte"], bits / bytes_per_token, rtol=1e-5)
    assert set(_given(jnp.zeros((1, 1, 2))).metrics(sums, jnp.float32(4))) == {"loss", "accuracy"}
    with pytest.raises(SettingsError, match="bytes_per_token is 0"):
        language_model(lambda rng: ({}, {}), lambda p, m, x, *, train, rng: (x, m), bytes_per_token=0)


def test_rotary_attention_is_causal_sees_order_and_has_no_position_embeddings():
    task = _task(rotary=True)
    params, mutable = filled(task)
    assert "positions" not in params
    tokens = _text(1)[:, :T]
    changed = np.concatenate([tokens, (tokens + np.eye(T, dtype=np.uint8)) % VOCABULARY])
    logits = np.asarray(jax.jit(task.predict)(params, mutable, jnp.asarray(changed)))
    differs = (np.abs(logits[1:] - logits[:1]) > 1e-6).any(-1)
    np.testing.assert_array_equal(differs, np.triu(np.ones((T, T), bool)))
    swapped = np.array([[0, 1, 2, 3], [1, 0, 2, 3]], np.uint8)  # one layer without positions could not tell
    first, second = np.asarray(task.predict(params, mutable, jnp.asarray(swapped)))[:, -1]
    assert np.abs(first - second).max() > 1e-6


def _init(**attributes):
    jax.eval_shape(_task(**attributes).init, jax.random.key(0))


def _loss(logits_shape: tuple[int, ...], labels_shape: tuple[int, ...]):
    batch = Batch(jnp.zeros((2, 3), jnp.int32), jnp.zeros(labels_shape, jnp.int32))
    _given(jnp.zeros(logits_shape)).loss({}, {}, batch, jax.random.key(0))


BAD = {
    "float tokens": (lambda: _init(tokens=jnp.float32), SettingsError, r"integer tokens \[B, T\], got float32"),
    "too long": (lambda: _init(length=T + 1), SettingsError, "have 7 tokens, but length=6 allows 1 to 6"),
    "heads": (lambda: _init(heads=3), SettingsError, "width=16 is not a multiple of 3, as heads=3 needs"),
    "no layers": (lambda: _init(layers=0), SettingsError, "layers is 0; it must be a whole number, 1 or more"),
    "dropout of 1": (lambda: _init(dropout=1.0), SettingsError, "dropout is 1.0; it must be a finite number"),
    "logits of a classifier": (
        lambda: _loss((2, 5), (2, 3)),
        SettingsError,
        r"must return \[B, T, vocabulary\], here \(2, 3, vocabulary\)",
    ),
    "labels of a classifier": (lambda: _loss((2, 3, 5), (2,)), DataError, r"integers of shape \(2, 3\): give each"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_clear_line(call, error, match):
    with pytest.raises(error, match=match) as raised:
        call()
    assert "\n" not in str(raised.value)
