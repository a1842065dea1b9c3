"""Standardising on the device: which numbers share a mean and a deviation, what is constant, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import scenarios
from experiments.setup import app, problem
from wavg_jax import data
from wavg_jax.base import SettingsError
from wavg_jax.data import from_arrays, make_prepare, overall, per_channel, per_feature


def images(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def of(x, test=None):
    """A data set with these training inputs."""
    test = x[:1] if test is None else test
    return from_arrays(x, np.arange(len(x)) % 2, test, [0] * len(test))


@pytest.mark.parametrize(
    ("scale", "shape", "out", "axes"),
    [
        (per_channel, (40, 5, 6), (40, 5, 6, 1), (0, 1, 2, 3)),
        (per_channel, (40, 5, 6, 3), (40, 5, 6, 3), (0, 1, 2)),
        (per_channel, (40, 7), (40, 7), (0,)),
        (per_channel, (40, 2, 5, 6, 3), (40, 2, 5, 6, 3), (0, 1, 2, 3)),
        (per_feature, (40, 5, 6), (40, 5, 6, 1), (0,)),
        (per_feature, (40, 5, 6, 3), (40, 5, 6, 3), (0,)),
        (per_feature, (40, 7), (40, 7), (0,)),
        (overall, (40, 5, 6, 3), (40, 5, 6, 3), (0, 1, 2, 3)),
        (overall, (40, 7), (40, 7), (0, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_prepared_training_data_has_mean_0_and_std_1_over_what_is_scaled_together(scale, shape, out, axes, dtype):
    dataset = of(images(*shape, dtype=dtype))
    prepared = jax.jit(make_prepare(dataset, scale))(jnp.asarray(dataset.train.x))
    assert prepared.shape == out
    assert prepared.dtype == jnp.float32
    np.testing.assert_allclose(np.mean(prepared, axes), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(prepared, axes), 1, atol=1e-5)


def test_by_default_every_feature_is_scaled_on_its_own():
    rng = np.random.default_rng(0)
    units = np.array([1e-3, 1.0, 1e5], np.float32)
    dataset = of((rng.normal(size=(200, 3)) * units + 7 * units).astype(np.float32))
    for prepare in (make_prepare(dataset), data.shard(dataset, halves, heldout=10, seed=0).prepare):
        prepared = prepare(jnp.asarray(dataset.train.x))
        np.testing.assert_allclose(np.mean(prepared, 0), 0, atol=1e-4)
        np.testing.assert_allclose(np.std(prepared, 0), 1, rtol=1e-4)


def halves(split, seed):
    return data.iid(len(split.y), 2, seed)


def test_shard_passes_the_scale_on():
    dataset = of(images(40, 3))
    assert len(data.shard(dataset, halves, heldout=10, seed=0, scale=overall).prepare.mean) == 1


@pytest.mark.parametrize(("said", "means"), [([], 1), (["--scale=feature"], 64), (["--scale=none"], 1)])
def test_the_flag_of_the_binaries_chooses_the_scale(said, means):
    with flagsaver.flagsaver():
        app.parse(["binary", *said])
        prepare = problem.make_data(data.digits(), 0).prepare
        study = scenarios.Study(data.digits(), None, {"iid": scenarios.SCENARIOS["iid"](2)})
        assert study.shard("iid", 0).prepare == prepare
    assert len(prepare.mean) == means
    assert (prepare.mean == (0.0,)) == (said == ["--scale=none"])


@pytest.mark.parametrize(("dtype", "divided"), [(np.float32, 1), (np.uint8, 255)])
def test_without_a_scale_floats_stay_unchanged_and_bytes_lie_between_0_and_1(dtype, divided):
    dataset = of(images(6, 4, dtype=dtype))
    prepared = make_prepare(dataset, scale=None)(dataset.train.x)
    np.testing.assert_allclose(prepared, dataset.train.x.astype(np.float32) / divided, rtol=1e-6)


@pytest.mark.parametrize("scale", ["feature", 1, lambda shape: 2])
def test_another_scale_is_refused(scale):
    with pytest.raises(SettingsError, match=r"data\.per_channel, data\.per_feature, data\.overall or None"):
        make_prepare(of(images(6, 4)), scale)


def test_prepare_in_numbers():
    # Values 0 and 255 in equal parts: mean 1/2, std 1/2, so they become -1 and 1.
    x = np.array([0, 255, 255, 0], np.uint8).reshape(1, 2, 2)
    prepare = make_prepare(from_arrays(x.repeat(2, 0), [0, 1], x, [0]))
    assert (prepare.mean, prepare.std) == ((0.5,), (0.5,))
    np.testing.assert_allclose(prepare(jnp.asarray(x))[0, :, :, 0], [[-1, 1], [1, -1]], atol=1e-6)


@pytest.mark.parametrize("value", [np.uint8(7), np.float32(0.1), np.float32(1e-40)])
@pytest.mark.parametrize("shape", [(30, 4, 4), (30, 4)])
@pytest.mark.parametrize("scale", [per_channel, per_feature, overall])
def test_a_constant_of_the_training_split_becomes_0_and_is_not_scaled_up_elsewhere(value, shape, scale):
    x = np.full(shape, value)
    prepare = make_prepare(of(x), scale)
    np.testing.assert_allclose(prepare(jnp.asarray(x)), 0, atol=1e-6)
    other = np.asarray(prepare(jnp.asarray(x + x.dtype.type(1))))
    np.testing.assert_allclose(other, 1 / 255 if x.dtype == np.uint8 else 1, rtol=1e-5)


def test_one_constant_feature_leaves_the_others_alone():
    x = images(40, 3, dtype=np.float32)
    x[:, 1] = 5
    prepared = np.asarray(make_prepare(of(x))(jnp.asarray(x)))
    np.testing.assert_allclose(prepared.std(0), [1, 0, 1], atol=1e-5)


def test_prepare_uses_the_training_split_alone_and_maps_over_replicas():
    dataset = of(images(40, 5, 6, 3), images(10, 5, 6, 3) // 4)
    prepare = make_prepare(dataset)
    assert prepare == make_prepare(dataset._replace(test=dataset.train))
    assert hash(prepare) == hash(make_prepare(dataset))
    stacked = jnp.asarray(dataset.train.x).reshape(4, 10, 5, 6, 3)
    np.testing.assert_array_equal(jax.vmap(prepare)(stacked).reshape(40, 5, 6, 3), prepare(dataset.train.x))


def test_ten_thousand_features_are_one_constant_of_the_program_and_equal_by_value():
    x = images(6, 10_000)
    one, same, other = (make_prepare(of(x)), make_prepare(of(x)), make_prepare(of(x // 2)))
    assert (one == same, hash(one) == hash(same), one == other) == (True, True, False)
    assert len(jax.make_jaxpr(one)(x).eqns) < 10
