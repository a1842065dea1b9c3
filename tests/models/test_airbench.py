"""Airbench: patches are whitened, by constants; convolutions start as identities; published size; mirrored tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from wavg_jax.base import Batch, DataError, SettingsError
from wavg_jax.models import MLP, Airbench, from_linen, mirrored, whitening

SHAPE = (11, 9, 2)


def pictures(count: int = 300, shape=SHAPE, seed: int = 0) -> np.ndarray:
    """Images whose neighbouring pixels and channels are alike, as those of photographs are."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *shape))
    x[:, 1:] += x[:, :-1]
    x[:, :, 1:] += x[:, :, :-1]
    return (x @ rng.normal(size=(shape[-1], shape[-1]))).astype(np.float32)


IMAGES = pictures()
KERNEL = whitening(IMAGES)
TASK = from_linen(Airbench(KERNEL, (16, 4), 3), SHAPE)


def features(kernel, images):
    """One patch after another [patches, 4 C]."""
    height, width = images.shape[1:3]
    patches = [images[:, i : i + 2, j : j + 2] for i in range(height - 1) for j in range(width - 1)]
    return np.concatenate([np.einsum("nijc,ijcf->nf", patch, np.float64(kernel)) for patch in patches])


def moments(kernel, images):
    found = features(kernel, images)
    return found.T @ found / len(found)


def test_patches_are_white():
    np.testing.assert_allclose(moments(whitening(IMAGES, 0.0), IMAGES), np.eye(8), atol=1e-4)
    assert np.abs(moments(np.eye(8).reshape(2, 2, 2, 8), IMAGES) - np.eye(8)).max() > 1
    # A large epsilon leaves diag(l / (l + epsilon)), the largest first.
    found = moments(whitening(IMAGES, 1.0), IMAGES)
    values = np.linalg.eigvalsh(moments(np.eye(8).reshape(2, 2, 2, 8), IMAGES))[::-1]
    np.testing.assert_allclose(found, np.diag(values / (values + 1)), atol=1e-4)


def test_the_kernel_is_the_same_wherever_it_is_computed(monkeypatch):
    assert (KERNEL.shape, KERNEL.dtype) == ((2, 2, 2, 8), np.float32)
    eigh = np.linalg.eigh
    # Eigenvectors are found up to their signs.
    monkeypatch.setattr(np.linalg, "eigh", lambda m: (eigh(m)[0], -eigh(m)[1]))
    np.testing.assert_array_equal(whitening(IMAGES), KERNEL)


def test_at_cifars_shape_it_has_the_published_size():
    task = from_linen(Airbench(np.zeros((2, 2, 3, 12), np.float32)), (32, 32, 3))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 24 + convolutions + 2 * (64 + 256 + 256) + 10 * 256
    assert round((count + 24 * 12) / 1e6, 2) == 1.97  # which counts the fixed kernel, with its negative half


def test_at_the_start_it_is_what_it_says():
    """All 16 features go through the first stage's convolutions as they are, 4 of them through the second's."""
    params, mutable = TASK.init(jax.random.key(0))
    params = {**params, "whitening_bias": jnp.linspace(-1, 1, 16)}

    def gelu(x):
        return x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2

    def pooled(x):
        x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
        return np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)

    x = features(KERNEL, IMAGES[:5]).reshape(10, 8, 5, 8).transpose(2, 0, 1, 3)
    x = gelu(np.concatenate([x, -x], -1) + np.linspace(-1, 1, 16))
    for width in (16, 4):
        x = gelu(pooled(x)[..., :width] / np.sqrt(1 + 1e-5))
        x = gelu(x / np.sqrt(1 + 1e-5))
    expected = x.max((1, 2)) @ np.asarray(params["Dense_0"]["kernel"], np.float64) / 9
    np.testing.assert_allclose(TASK.predict(params, mutable, IMAGES[:5]), expected, rtol=1e-4, atol=1e-6)


def test_all_parameters_learn_and_the_kernel_is_none_of_them():
    params, mutable = TASK.init(jax.random.key(0))
    batch = Batch(jnp.asarray(IMAGES[:12]), jnp.arange(12) % 3)
    gradients = jax.jit(jax.grad(lambda p: TASK.loss(p, mutable, batch, jax.random.key(0))[0]))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    shapes = [leaf.shape for leaf in jax.tree.leaves((params, mutable))]
    assert KERNEL.shape not in shapes
    four = [f"{name}_{i}" for name in ("BatchNorm", "Conv") for i in range(4)]
    assert sorted(params) == [*four, "Dense_0", "whitening_bias"]


def test_bfloat16_under_vmap_keeps_the_dtypes():
    task = from_linen(Airbench(KERNEL, (4, 4), 3, jnp.bfloat16), SHAPE)
    initial, statistics = jax.eval_shape(task.init, jax.random.key(0))

    def replicas(dtype, tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), dtype), tree)

    batch = Batch(jax.ShapeDtypeStruct((2, 5, *SHAPE), jnp.float32), jax.ShapeDtypeStruct((2, 5), jnp.uint8))
    step = jax.vmap(jax.value_and_grad(task.loss, has_aux=True), in_axes=(0, 0, 0, None))
    for dtype in (jnp.float32, jnp.bfloat16):
        params, mutable = replicas(dtype, initial), replicas(jnp.float32, statistics)
        (losses, (moved, _)), gradients = jax.eval_shape(step, params, mutable, batch, jax.random.key(0))
        assert (losses.shape, losses.dtype) == ((2,), jnp.float32)
        assert (gradients, moved) == (params, mutable)
    products = str(jax.make_jaxpr(task.predict)(initial, statistics, jnp.zeros((5, *SHAPE))))
    assert "conv_general_dilated" in products
    assert not [line for line in products.splitlines() if "conv_general" in line and "f32" in line.split("=")[0]]


def test_a_mirrored_task_cannot_tell_an_image_from_its_mirror_image():
    params, mutable = TASK.init(jax.random.key(1))
    x, there = jnp.asarray(IMAGES[:5]), mirrored(TASK)
    logits = there.predict(params, mutable, x)
    once, again = (TASK.predict(params, mutable, y) for y in (x, x[:, :, ::-1]))
    np.testing.assert_allclose(logits, (once + again) / 2, rtol=1e-6)
    np.testing.assert_array_equal(logits, there.predict(params, mutable, x[:, :, ::-1]))
    assert not np.allclose(once, again)
    assert there.loss is TASK.loss


BAD_NETWORKS = {
    "no images": (Airbench(KERNEL), (64,), r"an Airbench with 3 stages needs images \[B, H, W, C\] of at least 9x9"),
    "too small": (Airbench(KERNEL), (8, 9, 2), "at least 9x9 pixels, got .*; give it fewer widths"),
    "other channels": (Airbench(KERNEL), (9, 9, 3), r"the kernel has shape \(2, 2, 2, 8\); images of 3 channels need"),
    "no width": (Airbench(KERNEL, (4, 0)), SHAPE, r"widths is \(4, 0\); it must be the channels of each stage"),
    "no stage": (Airbench(KERNEL, ()), SHAPE, "widths is"),
}


@pytest.mark.parametrize(("module", "shape", "match"), BAD_NETWORKS.values(), ids=BAD_NETWORKS)
def test_bad_networks_give_one_clear_line(module, shape, match):
    with pytest.raises(SettingsError, match=match) as raised:
        jax.eval_shape(from_linen(module, shape).init, jax.random.key(0))
    assert "\n" not in str(raised.value)


BAD_IMAGES = {
    "whole numbers": (IMAGES.astype(np.uint8), {}, DataError, "whitening got uint8 of shape .* floating-point"),
    "vectors": (IMAGES[:, 0], {}, DataError, r"images \[N, H, W, C\] of at least 2x2"),
    "no image": (IMAGES[:0], {}, DataError, "whitening got"),
    "no number": (IMAGES * np.nan, {}, DataError, "takes finite"),
    "all the same": (IMAGES * 0, {"epsilon": 0}, DataError, "never varies; give epsilon a positive value"),
    "below zero": (IMAGES, {"epsilon": -1}, SettingsError, "epsilon is -1; it must be"),
}


@pytest.mark.parametrize(("images", "options", "kind", "match"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_give_one_clear_line(images, options, kind, match):
    with pytest.raises(kind, match=match) as raised:
        whitening(images, **options)
    assert "\n" not in str(raised.value)


def test_vectors_have_no_mirror_image():
    task = mirrored(from_linen(MLP((4,), 3), (7,)))
    with pytest.raises(DataError, match=r"mirrored got inputs of shape \(5, 7\): it takes images"):
        jax.eval_shape(lambda: task.predict(*task.init(jax.random.key(0)), jnp.zeros((5, 7))))
