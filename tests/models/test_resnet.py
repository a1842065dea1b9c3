"""ResNet: the published size, identity shortcuts, BatchNorm in both modes, mapped over replicas."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import filled

from wavg_jax.base import Batch, SettingsError
from wavg_jax.models import ResNet, from_linen

SHAPE = (8, 8, 1)
TASK = from_linen(ResNet(classes=3, blocks=1, width=4), SHAPE)


@cache
def _initial():
    return filled(TASK)


def _batch(*leading: int) -> Batch:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*leading, 5, *SHAPE)).astype(np.float32)
    return Batch(jnp.asarray(x), jnp.asarray(rng.integers(0, 3, (*leading, 5))))


def test_resnet_20_has_the_published_size():
    params, _ = jax.eval_shape(from_linen(ResNet(), (32, 32, 3)).init, jax.random.key(0))
    convolutions = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == convolutions + norms + 64 * 10 + 10
    assert round(count / 1e6, 2) == 0.27  # the paper's table 6
    assert sum(name.startswith(("Conv", "Dense")) for name in params) == 20


def test_odd_sizes_in_bfloat16_under_vmap_keep_the_dtypes():
    task = from_linen(ResNet(classes=3, blocks=1, width=4, dtype=jnp.bfloat16), (9, 13, 3))
    initial, statistics = jax.eval_shape(task.init, jax.random.key(0))

    def replicas(dtype, tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), dtype), tree)

    params, mutable = replicas(jnp.bfloat16, initial), replicas(jnp.float32, statistics)
    batch = Batch(jax.ShapeDtypeStruct((2, 5, 9, 13, 3), jnp.float32), jax.ShapeDtypeStruct((2, 5), jnp.uint8))
    step = jax.vmap(jax.value_and_grad(task.loss, has_aux=True), in_axes=(0, 0, 0, None))
    (losses, (moved, _)), gradients = jax.eval_shape(step, params, mutable, batch, jax.random.key(0))
    assert (losses.shape, losses.dtype) == ((2,), jnp.float32)
    assert (gradients, moved) == (params, mutable)
    logits = jax.eval_shape(jax.vmap(task.predict), params, mutable, batch.x)
    assert (logits.shape, logits.dtype) == ((2, 5, 3), jnp.float32)


def test_by_hand_with_dead_branches():
    initial, mutable = _initial()
    # The norms 2, 4 and 6 end the branches; the stem copies its input to the first channel, the first logit.
    dead = {name: jax.tree.map(jnp.zeros_like, initial[name]) for name in ("BatchNorm_2", "BatchNorm_4", "BatchNorm_6")}
    stem = {"kernel": jnp.zeros((3, 3, 1, 4)).at[1, 1, 0, 0].set(1.0)}
    params = {**initial, **dead, "Conv_0": stem, "Dense_0": {"kernel": jnp.eye(16, 3), "bias": jnp.zeros(3)}}

    @jax.jit
    def train_and_predict(batch):
        return TASK.loss(params, mutable, batch, jax.random.key(0)), TASK.predict(params, mutable, batch.x)

    batch = _batch()
    (_, (moved, _)), logits = train_and_predict(batch)
    # Training moves every norm's statistics, the stem's by a tenth from mean 0 and variance 1 to the batch's own.
    assert all((new != old).any() for new, old in zip(*map(jax.tree.leaves, (moved, mutable)), strict=True))
    stem_moved = moved["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stem_moved["mean"], [0.1 * batch.x.mean(), 0, 0, 0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stem_moved["var"], [0.9 + 0.1 * batch.x.var(), 0.9, 0.9, 0.9], rtol=1e-4)
    # Evaluation reads the stored ones (and flax's epsilon); the shortcuts carry every fourth pixel to the end.
    expected = np.zeros((5, 3), np.float32)
    expected[:, 0] = np.maximum(batch.x[:, ::4, ::4, 0], 0).mean((1, 2)) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_vmap_over_replicas_keeps_them_apart():
    step = jax.jit(jax.vmap(jax.value_and_grad(TASK.loss, has_aux=True)))
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), _initial())
    batches, keys = _batch(2), jax.random.split(jax.random.key(1), 2)
    (losses, _), gradients = together = step(*stacked, batches, keys)
    swapped = step(*stacked, jax.tree.map(lambda leaf: leaf[::-1], batches), keys)
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(swapped), strict=True):
        np.testing.assert_allclose(one, other[::-1], rtol=1e-4, atol=1e-5)
    assert losses[0] != losses[1]
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


BAD = {
    "flat images": (ResNet(), (64,), r"images \[B, H, W, C\] of at least 4x4 pixels, got \(1, 64\)"),
    "tiny images": (ResNet(), (3, 8, 1), "at least 4x4"),
    "no blocks": (ResNet(blocks=0), SHAPE, "blocks is 0; it must be a whole number, 1 or more"),
}


@pytest.mark.parametrize(("module", "shape", "match"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_clear_line(module, shape, match):
    with pytest.raises(SettingsError, match=match) as raised:
        jax.eval_shape(from_linen(module, shape).init, jax.random.key(0))
    assert "\n" not in str(raised.value)
