"""Partitions: nothing lost, nothing doubled, sizes and skew as asked for, decided by the seed alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavg_jax.base import SettingsError
from wavg_jax.data import dirichlet, iid, label_noise, sized

LABELS = np.repeat(np.arange(10), 100)
MAKERS = {
    "iid": lambda seed: iid(1000, 7, seed),
    "sized": lambda seed: sized(1000, (1, 2, 16, 0.3), seed),
    "dirichlet": lambda seed: dirichlet(LABELS, 7, 0.3, seed),
    "dirichlet, strong": lambda seed: dirichlet(LABELS, 7, 1e-9, seed),
    "dirichlet, imbalanced": lambda seed: dirichlet(LABELS // 3, 7, 0.1, seed),
}


def assert_partition(shards, n):
    assert all(len(shard) and shard.dtype == np.int32 for shard in shards)
    assert np.sort(np.concatenate(shards)).tolist() == list(range(n))


@pytest.mark.parametrize("maker", MAKERS)
def test_partition_is_whole_and_decided_by_the_seed(maker):
    shards = MAKERS[maker](3)
    assert_partition(shards, 1000)
    for one, again in zip(shards, MAKERS[maker](3), strict=True):
        np.testing.assert_array_equal(one, again)
    assert any(set(one) != set(other) for one, other in zip(shards, MAKERS[maker](4), strict=True))


@settings(deadline=None)
@given(n=st.integers(1, 60), data=st.data(), seed=st.integers(0, 2**40))
def test_any_size_gives_a_partition(n, data, seed):
    replicas = data.draw(st.integers(1, n))
    even = iid(n, replicas, seed)
    assert_partition(even, n)
    assert max(map(len, even)) - min(map(len, even)) <= 1
    proportions = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=replicas, max_size=replicas))
    assert_partition(sized(n, proportions, seed), n)
    labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    skewed = dirichlet(labels, replicas, data.draw(st.sampled_from([1e-300, 0.01, 0.5, 100.0, 1e300])), seed)
    assert_partition(skewed, n)
    assert [len(s) for s in skewed] == [len(s) for s in even]


@pytest.mark.parametrize(
    ("n", "proportions", "sizes"),
    [
        (38, (1, 2, 16), [2, 4, 32]),
        (10, (1, 1, 1), [4, 3, 3]),
        (3, (1, 2, 16), [1, 1, 1]),
        (100, (1, 1e6), [1, 99]),
        (7, (5,), [7]),
    ],
)
def test_sized_keeps_proportions_and_empties_no_shard(n, proportions, sizes):
    assert [len(shard) for shard in sized(n, proportions, 0)] == sizes


def largest_class_share(alpha):
    shards = dirichlet(LABELS, 8, alpha, seed=0)
    return np.mean([np.bincount(LABELS[shard]).max() / len(shard) for shard in shards])


def test_skew_grows_as_alpha_falls():
    shares = [largest_class_share(alpha) for alpha in (0.01, 0.1, 1.0, 1000.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.6
    assert shares[-1] < 0.2  # about 1/10 each, and the largest of ten draws


def test_dirichlet_draws_its_mix_from_the_distribution():
    # Many replicas of one large set: class shares of Dirichlet(a, a) have variance 1 / (4 (2a + 1)) = 1/12 at a = 1.
    labels = np.repeat([0, 1], 200_000)
    shards = dirichlet(labels, 400, alpha=1.0, seed=1)
    shares = np.array([labels[shard].mean() for shard in shards[:200]])
    assert abs(shares.mean() - 0.5) < 0.05
    assert abs(shares.var() - 1 / 12) < 0.02


def test_label_noise_touches_noisy_shards_alone():
    shards = iid(1000, 4, 0)
    before = LABELS.copy()
    noisy = label_noise(LABELS, shards, (1, 3), 10, seed=5)
    np.testing.assert_array_equal(LABELS, before)
    assert noisy.dtype == np.int32
    for k in (0, 2):
        np.testing.assert_array_equal(noisy[shards[k]], LABELS[shards[k]])
    for k in (1, 3):
        assert 0.02 < np.mean(noisy[shards[k]] == LABELS[shards[k]]) < 0.2  # 1/10 by chance
        assert np.bincount(noisy[shards[k]], minlength=10).min() > 5
    np.testing.assert_array_equal(noisy, label_noise(LABELS, shards, (3, 1, 1), 10, seed=5))
    assert (noisy != label_noise(LABELS, shards, (1, 3), 10, seed=6)).any()


@pytest.mark.parametrize("targets", [np.linspace(0, 1, 10), np.zeros((10, 3)), np.zeros((10, 4), np.int32)])
def test_without_noisy_shards_targets_of_any_shape_stay(targets):
    assert label_noise(targets, iid(10, 2, 0), (), None, 0) is targets


def test_a_shard_has_the_same_noise_whichever_others_have_some():
    shards = iid(1000, 4, 0)
    one, two = (label_noise(LABELS, shards, noisy, 10, seed=5) for noisy in ((1,), (0, 1)))
    np.testing.assert_array_equal(one[shards[1]], two[shards[1]])


REFUSED = {
    "more replicas than samples": (lambda: iid(3, 4, 0), "4 replicas for 3 .*set replicas= between 1 and 3"),
    "no replica": (lambda: iid(3, 0, 0), "replicas"),
    "more proportions than samples": (lambda: sized(2, (1, 1, 1), 0), "replicas"),
    "no proportion": (lambda: sized(2, (), 0), "replicas"),
    "proportion 0": (lambda: sized(9, (1, 0), 0), "one positive number per replica"),
    "proportion NaN": (lambda: sized(9, (1, np.nan), 0), "one positive number per replica"),
    "alpha 0": (lambda: dirichlet(LABELS, 4, 0.0, 0), "^alpha is 0.0; it must be .* greater than 0"),
    "alpha NaN": (lambda: dirichlet(LABELS, 4, np.nan, 0), "alpha"),
    "dirichlet replicas": (lambda: dirichlet(LABELS, 1001, 1.0, 0), "replicas"),
    "shards too small": (lambda: dirichlet(LABELS, 8, 1.0, 0, min_size=300), "set replicas= to 3 or less"),
    "no such shard": (lambda: label_noise(LABELS, iid(1000, 4, 0), (4,), 10, 0), r"noisy shards \[4\].*0 to 3"),
    "half a replica": (lambda: iid(9, 2.5, 0), "replicas is 2.5; it must be a whole number"),
    "the samples for their number": (lambda: iid(LABELS, 4, 0), "number of training samples, is array.*whole"),
    "proportions in words": (lambda: sized(9, "half", 0), "one positive number per replica"),
    "one proportion": (lambda: sized(9, 2.0, 0), "one positive number per replica"),
    "labels of one-hot": (lambda: dirichlet(np.eye(9), 4, 1.0, 0), r"one class per sample.*shape \(9, 9\)"),
    "dirichlet of floats": (lambda: dirichlet(LABELS + 0.5, 4, 1.0, 0), "dirichlet .*integer labels .*are float64"),
    "noise in floats": (lambda: label_noise(LABELS / 2, iid(1000, 4, 0), (1,), None, 0), "noisy=. needs one class per"),
    "noise in tokens": (lambda: label_noise(LABELS[None], iid(1, 1, 0), (0,), 10, 0), r"int64 of shape \(1, 1000\)"),
    "alpha in words": (lambda: dirichlet(LABELS, 4, "strong", 0), "^alpha is 'strong'; it must be"),
    "dirichlet half a replica": (lambda: dirichlet(LABELS, 4.0, 1.0, 0), "replicas is 4.0"),
    "shards too small by half": (lambda: dirichlet(LABELS, 4, 1.0, 0, min_size=1.5), "min_size is 1.5"),
    "a noisy shard that is not a list": (
        lambda: label_noise(LABELS, iid(1000, 4, 0), 2, 10, 0),
        r"noisy is 2; .*\(0, 1\)",
    ),
    "half a noisy shard": (lambda: label_noise(LABELS, iid(1000, 4, 0), (0.5,), 10, 0), "a shard in noisy= is 0.5"),
    "seed in words": (lambda: iid(3, 2, "one"), "seed is 'one'"),
    "negative seed": (lambda: iid(3, 2, -1), "^seed is -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(SettingsError, match=message):
        call()
