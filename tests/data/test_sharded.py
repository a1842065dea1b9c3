"""Sharded data, the embedded digits, and loading by name."""

import importlib
import pkgutil
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import wavg_jax
from wavg_jax.base import DataError, SettingsError
from wavg_jax.data import crop_flip, digits, dirichlet, from_arrays, iid, load, per_channel, pool, shard, sized


def split_iid(split, seed):
    return iid(len(split.y), 4, seed)


def test_digits_as_published():
    data = digits()
    assert data.train.x.shape == (1437, 8, 8)
    assert data.test.x.shape == (360, 8, 8)
    assert (data.train.x.dtype, data.train.x.min(), data.train.x.max()) == (np.uint8, 0, 16)
    shares = [np.bincount(split.y) / len(split.y) for split in (data.train, data.test)]
    np.testing.assert_allclose(*shares, atol=0.002)
    theirs = load_digits()
    split = train_test_split(
        theirs.images.astype(np.uint8), theirs.target, test_size=0.2, random_state=0, stratify=theirs.target
    )
    for a, b in zip((data.train.x, data.test.x, data.train.y, data.test.y), split, strict=True):
        np.testing.assert_array_equal(a, b)


def test_load_by_name_or_path(tmp_path):
    assert load("digits").name == "digits"
    np.savez(tmp_path / "own.npz", x_train=np.zeros((4, 2)), y_train=[0, 1, 0, 1], x_test=np.zeros((1, 2)), y_test=[0])
    assert load(tmp_path / "own.npz").classes == 2
    with pytest.raises(DataError, match=r"there is no file .*none.npz"):
        load(str(tmp_path / "none.npz"))
    with pytest.raises(
        SettingsError, match="'imagenet': set dataset= to digits, mnist, fashion_mnist, cifar10, python_docs"
    ):
        load("imagenet")


def test_shard_holds_out_partitions_and_spoils():
    data = shard(digits(), split_iid, heldout=237, seed=5, noisy=(2,), augment=crop_flip)
    clean = shard(digits(), split_iid, heldout=237, seed=5)
    assert [len(s) for s in data.shards] == [300] * 4
    assert (data.name, data.classes, data.augment) == ("digits", 10, crop_flip)
    assert clean.augment is None
    wrong = data.train.y != clean.train.y
    assert not wrong[np.concatenate([data.shards[k] for k in (0, 1, 3)])].any()
    assert wrong[data.shards[2]].mean() > 0.8
    np.testing.assert_array_equal(data.heldout.y, clean.heldout.y)
    assert data.class_names == tuple("0123456789")


def test_the_seed_decides_for_every_arm_alike():
    def deal(split, seed):
        return dirichlet(split.y, 3, 0.5, seed)

    one, two = (shard(digits(), deal, heldout=100, seed=1, noisy=(0,)) for _ in range(2))
    other = shard(digits(), deal, heldout=100, seed=2, noisy=(0,))
    for a, b in zip(one.shards, two.shards, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.train.y, two.train.y)
    np.testing.assert_array_equal(one.heldout.x, two.heldout.x)
    assert one.prepare == two.prepare == other.prepare  # so that arms share compiled programs
    assert (one.heldout.x != other.heldout.x).any()


def test_pool_is_one_shard_of_all_with_the_same_labels():
    data = shard(digits(), split_iid, heldout=237, seed=5, noisy=(2,))
    pooled = pool(data)
    assert len(pooled.shards) == 1
    np.testing.assert_array_equal(pooled.shards[0], np.arange(1200))
    assert pooled.train.y is data.train.y
    assert pooled.noisy == data.noisy == (2,)


def numbers(shape=()):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, *shape))
    return from_arrays(x, y, x[:2], y[:2])


def tokens(dtype=np.uint8):
    text = np.random.default_rng(0).integers(0, 9, (20, 5)).astype(dtype)
    return from_arrays(text[:, :-1], text[:, 1:], text[:2, :-1], text[:2, 1:], classes=9)


@pytest.mark.parametrize(
    "partition", [lambda split, seed: iid(len(split.y), 3, seed), lambda split, seed: sized(len(split.y), (1, 2), seed)]
)
@pytest.mark.parametrize(
    ("dataset", "y"), [(numbers(), ()), (numbers((2, 3)), (2, 3)), (tokens(), (4,)), (tokens(np.int64), (4,))]
)
def test_targets_of_any_shape_are_held_out_sharded_and_pooled(dataset, y, partition):
    data = shard(dataset, partition, heldout=4, seed=0)
    assert data.classes == dataset.classes
    assert (data.train.y.shape, data.heldout.y.shape) == ((16, *y), (4, *y))
    assert data.train.y.dtype == data.heldout.y.dtype == dataset.train.y.dtype
    together = np.concatenate([data.train.y, data.heldout.y])
    np.testing.assert_array_equal(np.sort(together, axis=0), np.sort(dataset.train.y, axis=0))
    assert len(pool(data).shards[0]) == 16


@pytest.mark.parametrize("scale", [per_channel, None])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_tokens_reach_the_network_unchanged_as_int32(dtype, scale):
    data = shard(tokens(dtype), lambda split, seed: iid(len(split.y), 2, seed), heldout=4, seed=0, scale=scale)
    x = data.prepare(data.test.x)
    assert x.dtype == np.int32
    np.testing.assert_array_equal(x, data.test.x)


@pytest.mark.parametrize("dataset", [numbers(), numbers((2,)), tokens()])
def test_label_noise_and_skew_need_class_labels(dataset):
    with pytest.raises(SettingsError, match=r"noisy=.* needs one class per sample, integer labels \[N\]"):
        shard(dataset, lambda split, seed: iid(len(split.y), 2, seed), heldout=4, seed=0, noisy=(1,))
    with pytest.raises(SettingsError, match=r"dirichlet partition needs one class per sample, integer labels \[N\]"):
        shard(dataset, lambda split, seed: dirichlet(split.y, 2, 1.0, seed), heldout=4, seed=0)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (lambda split, seed: (), "no shards, or a sample in two"),
        (lambda split, seed: (np.arange(5), np.arange(4, 9)), "a sample in two"),
        (lambda split, seed: (np.arange(5), np.arange(0)), "shard 1 is empty"),
        (lambda split, seed: (np.arange(5000),), "shard 0 is empty or has indices outside 0 to 1336"),
        (lambda split, seed: [[0, 1], []], "shard 1 is empty"),
        (lambda split, seed: None, "what the partition returned is None; it must be one array of indices per replica"),
        (lambda split, seed: np.arange(5), r"shard 0 is int64 of shape \(\): .*per replica"),
        (lambda split, seed: [[0.5, 1.5]], "shard 0 is float64 of shape .2,.: give its sample indices"),
        (lambda split, seed: [split.y < 5], r"shard 0 is bool .*np\.flatnonzero\(mask\)"),
        (lambda split, seed: ["ab"], "shard 0 is <U2"),
        (lambda split, seed: [[[0, 1], [2]]], "shard 0 is object"),
        (lambda split, seed: iid(len(split.y), 2000, seed), "2000 replicas for 1337 .*set replicas="),
    ],
)
def test_partition_refused(partition, message):
    with pytest.raises(SettingsError, match=message):
        shard(digits(), partition, heldout=100, seed=0)


def test_too_many_held_out():
    with pytest.raises(SettingsError, match="heldout= between 0 and 1436"):
        shard(digits(), split_iid, heldout=1437, seed=0)


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda shards: np.array(list(shards))])
def test_a_partition_may_return_lists(kind):
    def lists(split, seed):
        return kind([list(range(0, 600)), list(range(600, 1200))])

    data = shard(digits(), lists, heldout=237, seed=0)
    assert [(s.dtype, len(s)) for s in data.shards] == [(np.int32, 600)] * 2
    np.testing.assert_array_equal(data.shards[1], np.arange(600, 1200))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": digits().train}, r"the data set is a Split: give a data\.Dataset"),
        ({"partition": iid(1337, 4, 0)}, r"the partition is a tuple: give a function \(split, seed\) -> shards"),
        ({"heldout": 0.1}, "heldout is 0.1; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"noisy": 2}, "noisy is 2; it must be the numbers"),
        ({"noisy": (4,)}, r"noisy shards \[4\] do not exist: set noisy= to numbers from 0 to 3"),
        ({"noisy": [False, True]}, "a shard in noisy= is False"),
        ({"augment": True}, "augment is a bool: give a function"),
        ({"scale": "feature"}, r"data\.per_feature"),
    ],
)
def test_nonsense_is_refused_in_one_line(changed, message):
    good = {"dataset": digits(), "partition": split_iid, "heldout": 100, "seed": 0}
    with pytest.raises(SettingsError, match=message) as raised:
        shard(**(good | changed))
    assert "\n" not in str(raised.value)


def test_no_function_hides_the_module_of_its_name():
    for module in pkgutil.walk_packages(wavg_jax.__path__, "wavg_jax."):
        room, _, name = module.name.rpartition(".")
        imported = getattr(importlib.import_module(room), name, importlib.import_module(module.name))
        assert imported is sys.modules[module.name], f"{room} names a function {name}, which hides {module.name}"
