"""Partitions of the training samples among K replicas, each decided by its seed alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wavg_jax.arguments import INT32, as_whole, check, fits_memory, iterable, number, shown
from wavg_jax.base import SettingsError
from wavg_jax.data.arrays import Split, as_array, generator

Shards = tuple[np.ndarray, ...]


@fits_memory
def iid(n: int, replicas: int, seed: int) -> Shards:
    """Deals out n samples at random, in shards whose sizes differ by at most 1.

    Args:
      n: number of samples.
      replicas: K.
      seed: decides which replica gets which samples.

    Returns:
      K index arrays, int32, ascending.

    Raises:
      SettingsError: fewer than one replica, or more replicas than samples.

    >>> [len(shard) for shard in iid(10, 3, seed=0)]
    [4, 3, 3]
    """
    n, replicas = _counts(n, replicas)
    return _cut(generator(seed, "iid").permutation(n), _even(n, replicas))


@fits_memory
def contiguous(n: int, replicas: int) -> Shards:
    """Cuts n samples into contiguous parts, whose sizes differ by at most 1: of a text, one passage per replica.

    Args:
      n: number of samples.
      replicas: K.

    Returns:
      K index arrays, int32, ascending.

    Raises:
      SettingsError: fewer than one replica, or more replicas than samples.

    >>> [shard.tolist() for shard in contiguous(7, 3)]
    [[0, 1, 2], [3, 4], [5, 6]]
    """
    n, replicas = _counts(n, replicas)
    return _cut(np.arange(n), _even(n, replicas))


@fits_memory
def interleaved(n: int, replicas: int, length: int, seed: int) -> Shards:
    """Deals out blocks of successive samples at random, in shards whose sizes differ by at most 1: of a text, each
    replica gets passages from all over it. A block that does not fit into a shard goes on in the next.

    Args:
      n: number of samples.
      replicas: K.
      length: samples per block.
      seed: decides which replica gets which blocks.

    Returns:
      K index arrays, int32, ascending.

    Raises:
      SettingsError: fewer than one replica, more replicas than samples, or blocks of no sample.

    >>> [shard.tolist() for shard in interleaved(12, 2, length=3, seed=0)]
    [[6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5]]
    """
    n, replicas = _counts(n, replicas)
    length = as_whole("length", length, 1, INT32)
    order = generator(seed, "interleaved").permutation(-(-n // length))
    samples = (order[:, None] * length + np.arange(length)).reshape(-1)
    return _cut(samples[samples < n], _even(n, replicas))


@fits_memory
def sized(n: int, proportions: Sequence[float], seed: int) -> Shards:
    """Deals out n samples at random in unequal shards, each as close to its proportion as whole numbers allow.

    Args:
      n: number of samples.
      proportions: one positive number per replica, such as (1, 2, 16); they need not sum to 1.
      seed: decides which replica gets which samples.

    Returns:
      K index arrays, int32, ascending, none empty.

    Raises:
      SettingsError: a proportion is not positive, or there are more replicas than samples.

    >>> [len(shard) for shard in sized(38, (1, 2, 16), seed=0)]
    [2, 4, 32]
    """
    try:
        share = np.zeros(()) if np.iscomplexobj(proportions) else np.asarray(proportions, np.float64)
    except (TypeError, ValueError, OverflowError):
        share = np.zeros(())
    if share.ndim != 1 or not (np.isfinite(share) & (share > 0)).all():
        raise SettingsError(f"the shard proportions are {shown(proportions)}: give one positive number per replica")
    n, _ = _counts(n, len(share))
    # Every shard gets one sample first; the shares of the rest shrink to add up to what is left.
    exact = np.maximum(n * (share / share.sum()), 1)
    exact = 1 + (exact - 1) * ((n - len(share)) / max((exact - 1).sum(), 1e-300))
    sizes = np.floor(exact).astype(int)
    largest_remainders = np.argsort(-(exact - sizes), kind="stable")
    sizes[largest_remainders[: n - sizes.sum()]] += 1
    return _cut(generator(seed, "sized").permutation(n), sizes)


@fits_memory
def dirichlet(labels: np.ndarray, replicas: int, alpha: float, seed: int, min_size: int = 1) -> Shards:
    """Deals out samples with skewed labels: replica k draws its classes from `q_k ~ Dirichlet(alpha * classes * p)`.

    p is the class distribution of the training split; if it is uniform, every class has the concentration alpha. Shard
    sizes differ by at most 1, so only the labels differ. Once a class has run out, `q_k` drops it and keeps the
    proportions of the others; once all classes that `q_k` allows have run out, the replica draws from the remaining
    samples. A small alpha gives few classes per replica, a large one nearly IID shards.

    Args:
      labels: integer labels [N].
      replicas: K.
      alpha: concentration per class, > 0; 0.1 skews strongly, 100 hardly at all.
      seed: decides the distributions, and which replica gets which samples.
      min_size: the smallest useful shard. Equal shards have N // K samples or more, so none is ever topped up.

    Returns:
      K index arrays, int32, ascending.

    Raises:
      SettingsError: the labels are not integers [N], `alpha` is not positive, or N // K is less than `min_size`.

    Reference: Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019 (arXiv:1909.06335).

    >>> import numpy as np
    >>> shards = dirichlet(np.repeat([0, 1], 50), replicas=4, alpha=0.1, seed=0)
    >>> [len(shard) for shard in shards], sorted(np.concatenate(shards)) == list(range(100))
    ([25, 25, 25, 25], True)
    """
    labels = class_labels("a dirichlet partition", labels)
    _, replicas = _counts(len(labels), replicas)
    min_size = as_whole("min_size", min_size)
    check("alpha", alpha, number(above=0, in_rounds=False))
    if len(labels) // replicas < min_size:
        most = max(len(labels) // min_size, 1)
        raise SettingsError(
            f"{len(labels)} samples give {replicas} replicas {len(labels) // replicas} each, fewer than the {min_size} "
            f"of min_size=: set replicas= to {most}{' or less' * (most > 1)}"
        )
    rng = generator(seed, "dirichlet")
    by_class = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    left = np.array([len(samples) for samples in by_class])
    mixes = rng.dirichlet(float(alpha) * len(left) * left / left.sum(), replicas)
    taken = np.zeros_like(left)
    shards = []
    for mix, size in zip(mixes, _even(len(labels), replicas), strict=True):
        counts = _draw_counts(rng, mix, left - taken, int(size))
        parts = [s[t : t + c] for s, t, c in zip(by_class, taken, counts, strict=True)]
        shards.append(np.sort(np.concatenate(parts)).astype(np.int32))
        taken += counts
    return tuple(shards)


def _draw_counts(rng: np.random.Generator, mix: np.ndarray, left: np.ndarray, size: int) -> np.ndarray:
    """The number of samples per class: draws from `mix`, and redraws what a class cannot supply."""
    counts = np.zeros_like(left)
    while (missing := size - counts.sum()) > 0:
        open_mix = np.where(left > counts, mix, 0)
        if open_mix.sum() < 1e-12:
            open_mix = (left - counts).astype(np.float64)
        drawn = rng.multinomial(missing, open_mix / open_mix.sum())
        counts += np.minimum(drawn, left - counts)
    return counts


@fits_memory
def label_noise(labels: np.ndarray, shards: Shards, noisy: Sequence[int], classes: int | None, seed: int) -> np.ndarray:
    """Replaces every label on the noisy shards by a uniformly random class, the true one included.

    A shard's noise depends on the seed and its own number alone, not on which others are noisy.

    Args:
      labels: integer labels [N], not modified; targets of any shape if no shard is noisy.
      shards: index arrays into `labels`.
      noisy: numbers of the noisy shards.
      classes: number of classes; None for regression.
      seed: decides the random labels.

    Returns:
      New labels [N], int32; the targets themselves if no shard is noisy.

    Raises:
      SettingsError: `noisy` names a shard that does not exist, or the targets are not class labels.
    """
    shards = index_arrays(shards)
    noisy = noisy_shards(noisy, len(shards))
    if not noisy:
        return labels
    spoilt = {k: shards[k] for k in noisy}
    labels = np.array(class_labels("label noise (noisy=)", labels), np.int32)
    classes = as_whole("classes", classes, 1, INT32)
    check_within(spoilt, len(labels))
    for k, shard in spoilt.items():
        labels[shard] = generator(seed, "label_noise", k).integers(classes, size=len(shard))
    return labels


def shuffled_tokens(train: Split, shards: Shards, noisy: Sequence[int], seed: int) -> Split:
    """Puts the tokens of the noisy shards, read as one text, in random order: they keep their frequencies alone.

    A shard's order depends on the seed and its own number alone, not on which others are noisy.

    Args:
      train: windows [N, T] of a text, not modified.
      shards: index arrays into them.
      noisy: numbers of the noisy shards.
      seed: decides the order.

    Returns:
      New windows in which every input but the shard's first is still the target before it.

    Raises:
      SettingsError: `noisy` names a shard that does not exist.
    """
    x, y = train.x.copy(), train.y.copy()
    for k in noisy_shards(noisy, len(shards)):
        shard = shards[k]
        targets = generator(seed, "shuffled_tokens", k).permutation(y[shard].reshape(-1))
        inputs = np.append(x[shard[0], :1], targets[:-1].astype(x.dtype))
        x[shard], y[shard] = inputs.reshape(x[shard].shape), targets.reshape(y[shard].shape)
    return Split(x, y)


def class_labels(what: str, labels: Any) -> np.ndarray:
    """Returns labels as an array; SettingsError, which says `what` needs them, unless they are integers [N]."""
    labels = as_array("the labels", labels)
    if labels.ndim != 1 or labels.dtype.kind not in "bui":
        raise SettingsError(
            f"{what} needs one class per sample, integer labels [N]: the labels are {labels.dtype} of shape "
            f"{labels.shape}"
        )
    return labels


def noisy_shards(noisy: Sequence[int], shards: int) -> tuple[int, ...]:
    """The numbers of the noisy shards out of `shards` ones, each once, ascending.

    Raises:
      SettingsError: `noisy` holds something else than the numbers of existing shards.
    """
    check("noisy", noisy, iterable("the numbers of the noisy shards, such as (0, 1)"))
    numbers = sorted({as_whole("a shard in noisy=", k) for k in noisy})
    if unknown := [k for k in numbers if k not in range(shards)]:
        raise SettingsError(f"noisy shards {unknown} do not exist: set noisy= to numbers from 0 to {shards - 1}")
    return tuple(numbers)


def index_arrays(shards: Any) -> Shards:
    """The sample indices of all shards, as arrays.

    Raises:
      SettingsError: `shards` is no sequence, or the indices of one are not whole numbers [n].
    """
    check("shards", shards, iterable("one array of sample indices per replica"))
    return tuple(as_indices(k, shard) for k, shard in enumerate(shards))


def check_within(shards: Mapping[int, np.ndarray], n: int) -> None:
    """Raises SettingsError unless every shard, by its number, has samples, all in range(n)."""
    for k, indices in shards.items():
        if not len(indices) or indices.min() < 0 or indices.max() >= n:
            raise SettingsError(f"shard {k} is empty or has indices outside 0 to {n - 1}: fix the partition")


def as_indices(shard: int, indices: Any) -> np.ndarray:
    """The sample indices of a shard, an array or list, as an array.

    Raises:
      SettingsError: the indices are not whole numbers [n].
    """
    try:
        array = np.asarray(indices)
    except ValueError:  # lists of different lengths
        array = np.empty((), object)
    if array.ndim == 1 and not array.size:
        return array.astype(np.int32)  # NumPy makes an empty list an array of floats
    if array.ndim != 1 or array.dtype.kind not in "ui":
        how = "np.flatnonzero(mask) of a mask" if array.dtype == bool else "one array or list per replica"
        raise SettingsError(
            f"shard {shard} is {array.dtype} of shape {array.shape}: give its sample indices, whole numbers [n], {how}"
        )
    return array


def _counts(n: int, replicas: int) -> tuple[int, int]:
    n = as_whole("n, the number of training samples,", n, 0, INT32)
    replicas = as_whole("replicas", replicas, 1)
    if replicas > n:
        raise SettingsError(f"{replicas} replicas for {n} training samples: set replicas= between 1 and {n}")
    return n, replicas


def _even(n: int, replicas: int) -> np.ndarray:
    return np.full(replicas, n // replicas) + (np.arange(replicas) < n % replicas)


def _cut(order: np.ndarray, sizes: np.ndarray) -> Shards:
    # Ascending, because gathering in memory order is faster and the feed shuffles anyway.
    return tuple(np.sort(part).astype(np.int32) for part in np.split(order, np.cumsum(sizes)[:-1]))
