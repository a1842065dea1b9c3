"""How the training samples are dealt out to K replicas: partitions of range(n), each decided by its seed alone."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from wavg_jax.arguments import as_whole, check, number, shown
from wavg_jax.base import SettingsError
from wavg_jax.data.arrays import as_array, generator

Shards = tuple[np.ndarray, ...]


def iid(n: int, replicas: int, seed: int) -> Shards:
    """Deals n samples out at random, in sizes that differ by at most 1.

    Args:
      n: number of samples.
      replicas: K.
      seed: decides who gets which.

    Returns:
      K index arrays, int32, ascending.

    Raises:
      SettingsError: fewer than one replica, or more replicas than samples.

    >>> [len(shard) for shard in iid(10, 3, seed=0)]
    [4, 3, 3]
    """
    n, replicas = _counts(n, replicas)
    return _cut(generator(seed, "iid").permutation(n), _even(n, replicas))


def sized(n: int, proportions: Sequence[float], seed: int) -> Shards:
    """Deals n samples out at random in unequal sizes, each as near its proportion as whole numbers get.

    Args:
      n: number of samples.
      proportions: one positive number per replica, such as (1, 2, 16); they need not sum to 1.
      seed: decides who gets which.

    Returns:
      K index arrays, int32, ascending, none empty.

    Raises:
      SettingsError: a proportion is not positive, or there are more replicas than samples.

    >>> [len(shard) for shard in sized(38, (1, 2, 16), seed=0)]
    [2, 4, 32]
    """
    try:
        share = np.asarray(proportions, np.float64)
    except (TypeError, ValueError):
        share = np.zeros(())
    if share.ndim != 1 or not (np.isfinite(share) & (share > 0)).all():
        raise SettingsError(f"the shard proportions are {shown(proportions)}: give one positive number per replica")
    n, _ = _counts(n, len(share))
    # Every shard has one sample before the rest is shared out, so the targets shrink by what is not there to give.
    exact = np.maximum(n * (share / share.sum()), 1)
    exact = 1 + (exact - 1) * ((n - len(share)) / max((exact - 1).sum(), 1e-300))
    sizes = np.floor(exact).astype(int)
    largest_remainders = np.argsort(-(exact - sizes), kind="stable")
    sizes[largest_remainders[: n - sizes.sum()]] += 1
    return _cut(generator(seed, "sized").permutation(n), sizes)


def dirichlet(labels: np.ndarray, replicas: int, alpha: float, seed: int, min_size: int = 1) -> Shards:
    """Deals samples out with skewed labels: replica k draws by class from `q_k ~ Dirichlet(alpha * classes * p)`.

    p is the class distribution of the whole; where it is uniform, that is a concentration of alpha for every class. The
    shards are equal in size (to within 1), so that the labels alone differ. A class that has run out is left out of
    `q_k`, which keeps its proportions among the others; when nothing that `q_k` allows is left, the replica draws from
    all that remains. Small alpha: few classes per replica; large alpha: nearly IID.

    Args:
      labels: integer labels [N].
      replicas: K.
      alpha: concentration per class, > 0; 0.1 is a strong skew, 100 hardly one.
      seed: decides the distributions and who gets which.
      min_size: the smallest shard that is of use. Equal sizes have N // K at least, so nothing needs to be moved.

    Returns:
      K index arrays, int32, ascending.

    Raises:
      SettingsError: the labels are not integers [N], alpha is not positive, or N // K is less than `min_size`.

    Reference: Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019 (arXiv:1909.06335).

    >>> import numpy as np
    >>> shards = dirichlet(np.repeat([0, 1], 50), replicas=4, alpha=0.1, seed=0)
    >>> [len(shard) for shard in shards], sorted(np.concatenate(shards)) == list(range(100))
    ([25, 25, 25, 25], True)
    """
    labels = _class_labels("a dirichlet partition", labels)
    _, replicas = _counts(len(labels), replicas)
    min_size = as_whole("min_size", min_size)
    check("the Dirichlet concentration (--alpha)", alpha, number(above=0))
    if len(labels) // replicas < min_size:
        most = max(len(labels) // min_size, 1)
        raise SettingsError(
            f"{len(labels)} samples give {replicas} replicas {len(labels) // replicas} each, fewer than the {min_size} "
            f"asked for: set --replicas to {most}{' or less' * (most > 1)}"
        )
    rng = generator(seed, "dirichlet")
    by_class = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    left = np.array([len(samples) for samples in by_class])
    mixes = rng.dirichlet(alpha * len(left) * left / left.sum(), replicas)
    taken = np.zeros_like(left)
    shards = []
    for mix, size in zip(mixes, _even(len(labels), replicas), strict=True):
        counts = _draw_counts(rng, mix, left - taken, int(size))
        parts = [s[t : t + c] for s, t, c in zip(by_class, taken, counts, strict=True)]
        shards.append(np.sort(np.concatenate(parts)).astype(np.int32))
        taken += counts
    return tuple(shards)


def _draw_counts(rng: np.random.Generator, mix: np.ndarray, left: np.ndarray, size: int) -> np.ndarray:
    """How many of each class to take: draws from `mix`, and draws again what a class cannot give."""
    counts = np.zeros_like(left)
    while (missing := size - counts.sum()) > 0:
        open_mix = np.where(left > counts, mix, 0)
        if open_mix.sum() < 1e-12:
            open_mix = (left - counts).astype(np.float64)
        drawn = rng.multinomial(missing, open_mix / open_mix.sum())
        counts += np.minimum(drawn, left - counts)
    return counts


def label_noise(labels: np.ndarray, shards: Shards, noisy: Sequence[int], classes: int | None, seed: int) -> np.ndarray:
    """Replaces every label on the noisy shards by a class drawn uniformly at random, the true one included.

    A shard's noise depends on the seed and its number alone, whichever others are noisy too.

    Args:
      labels: integer labels [N], left unchanged; targets of any shape if no shard is noisy.
      shards: index arrays into `labels`.
      noisy: numbers of the shards to spoil.
      classes: number of classes; None for regression.
      seed: decides the labels.

    Returns:
      New labels [N], int32; the targets themselves if no shard is noisy.

    Raises:
      SettingsError: a number in `noisy` is not that of a shard, or the targets are not classes.
    """
    noisy = noisy_shards(noisy, len(shards))
    if not noisy:
        return labels
    labels = np.array(_class_labels("label noise (noisy=)", labels), np.int32)
    classes = as_whole("classes", classes, 1)
    for k in noisy:
        labels[shards[k]] = generator(seed, "label_noise", k).integers(classes, size=len(shards[k]))
    return labels


def _class_labels(what: str, labels: Any) -> np.ndarray:
    labels = as_array("the labels", labels)
    if labels.ndim != 1 or labels.dtype.kind not in "bui":
        raise SettingsError(
            f"{what} needs one class per sample, integer labels [N]; the labels are {labels.dtype} of shape "
            f"{labels.shape}"
        )
    return labels


def noisy_shards(noisy: Sequence[int], shards: int) -> tuple[int, ...]:
    """The numbers of the noisy ones among so many shards, each once and ascending.

    Raises:
      SettingsError: a number is not that of a shard, or they are not whole numbers.
    """
    if not isinstance(noisy, Iterable):
        raise SettingsError(f"noisy is {shown(noisy)}: give the numbers of the noisy shards, such as (0, 1)")
    numbers = sorted({as_whole("the number of a noisy shard", k) for k in noisy})
    if unknown := [k for k in numbers if k not in range(shards)]:
        raise SettingsError(f"noisy shards {unknown}: there are {shards}, give numbers from 0 to {shards - 1}")
    return tuple(numbers)


def as_indices(shard: int, indices: Any) -> np.ndarray:
    """The indices of a shard's samples as an array, which may have been given as a list.

    Raises:
      SettingsError: they are not whole numbers [n].
    """
    try:
        array = np.asarray(indices)
    except ValueError:  # lists of different lengths
        array = np.empty((), object)
    if array.ndim == 1 and not array.size:
        return array.astype(np.int32)  # an empty list is of floats to NumPy
    if array.ndim != 1 or array.dtype.kind not in "ui":
        how = "np.flatnonzero(mask) of a mask" if array.dtype == bool else "an array or list for each replica"
        raise SettingsError(
            f"shard {shard} is {array.dtype} of shape {array.shape}: give the whole numbers of its samples, [n], {how}"
        )
    return array


def _counts(n: int, replicas: int) -> tuple[int, int]:
    n, replicas = as_whole("n, the number of training samples,", n, 0), as_whole("--replicas", replicas, 1)
    if replicas > n:
        raise SettingsError(f"{replicas} replicas for {n} training samples: set --replicas between 1 and {n}")
    return n, replicas


def _even(n: int, replicas: int) -> np.ndarray:
    return np.full(replicas, n // replicas) + (np.arange(replicas) < n % replicas)


def _cut(order: np.ndarray, sizes: np.ndarray) -> Shards:
    # Ascending, because gathering in memory order is faster and the feed shuffles anyway.
    return tuple(np.sort(part).astype(np.int32) for part in np.split(order, np.cumsum(sizes)[:-1]))
