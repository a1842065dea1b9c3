"""Crop and flip: every output is a shifted, perhaps mirrored input; all offsets and both sides occur."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavg_jax.base import DataError, SettingsError
from wavg_jax.data import crop_flip


def variants(image, padding, mode="constant"):
    """All images that one image can become, by (row offset, column offset, flipped)."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode)
    crops = {
        (i, j): padded[i : i + height, j : j + width] for i in range(2 * padding + 1) for j in range(2 * padding + 1)
    }
    return {(*at, flip): crop[:, ::-1] if flip else crop for at, crop in crops.items() for flip in (False, True)}


@pytest.mark.parametrize(("fill", "mode"), [("zeros", "constant"), ("reflect", "reflect")])
def test_every_output_is_a_shift_or_a_mirrored_shift_and_all_occur(fill, mode):
    image = np.random.default_rng(0).normal(size=(4, 5, 2)).astype(np.float32)
    crop = jax.jit(crop_flip, static_argnums=(2, 3))
    out = np.asarray(crop(jax.random.key(0), jnp.tile(image, (400, 1, 1, 1)), 1, fill))
    possible = variants(image, 1, mode)
    seen = [next(at for at, crop in possible.items() if np.array_equal(crop, sample)) for sample in out]
    assert set(seen) == set(possible)  # 3 x 3 offsets, flipped or not
    assert 0.4 < np.mean([flipped for *_, flipped in seen]) < 0.6


def test_without_padding_only_flips():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 3, 4, 1)), jnp.float32)
    out = jax.jit(crop_flip, static_argnames="padding")(jax.random.key(1), x, padding=0)
    flipped = (out == x[:, :, ::-1]).all((1, 2, 3))
    kept = (out == x).all((1, 2, 3))
    assert (flipped | kept).all()
    assert 0 < int(flipped.sum()) < 32


def test_one_key_per_replica_equals_one_call_per_replica():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 8, 8, 3)), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(2), 3)
    jitted = jax.jit(crop_flip)
    stacked = jax.jit(jax.vmap(crop_flip))(keys, x)
    assert stacked.dtype == jnp.bfloat16
    for k in range(3):
        np.testing.assert_array_equal(stacked[k], jitted(keys[k], x[k]))
    assert not np.array_equal(stacked[0], jitted(keys[1], x[0]))


def test_refused():
    with pytest.raises(DataError, match=r"shape \(4, 7\): it takes images"):
        crop_flip(jax.random.key(0), jnp.zeros((4, 7)))
    with pytest.raises(SettingsError, match="padding is -1; it must be a whole number, 0 or more"):
        crop_flip(jax.random.key(0), jnp.zeros((4, 8, 8, 1)), padding=-1)
    with pytest.raises(SettingsError, match="fill is 'edge'; it must be zeros or reflect"):
        crop_flip(jax.random.key(0), jnp.zeros((4, 8, 8, 1)), fill="edge")
