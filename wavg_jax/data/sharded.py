"""The data of a run: the training split in shards, a held-out split and a test split."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from wavg_jax.arguments import check, fits_memory, iterable
from wavg_jax.base import SettingsError
from wavg_jax.data.arrays import Dataset, Split, hold_out
from wavg_jax.data.prepare import Scale, make_prepare, per_channel
from wavg_jax.data.shards import Shards, check_within, index_arrays, label_noise, noisy_shards, shuffled_tokens


class ShardedData(NamedTuple):
    """The data that `wavg_jax.fit` trains, scores and tests on.

    Attributes:
      name: name of the data set.
      train: the training samples not held out, with noise on the noisy shards.
      heldout: samples with true labels, to score replicas and blends on.
      test: the test split, for evaluation alone.
      shards: K index arrays into `train`, none empty, no sample in two.
      classes: number of classes, or size of the vocabulary; None for regression.
      prepare: stored inputs [B, ...] -> the network's inputs [B, ...], inside jit: float32, or int32 tokens.
      augment: `(rng, prepared x) -> x`, applied during training; or None.
      noisy: numbers of the shards with noise.
      class_names: names of the classes, for reports; None if they have numbers alone.
      noise: what the noisy shards have.
    """

    name: str
    train: Split
    heldout: Split
    test: Split
    shards: Shards
    classes: int | None
    prepare: Callable[[jax.Array], jax.Array]
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    noisy: tuple[int, ...] = ()
    class_names: tuple[str, ...] | None = None
    noise: str = "random labels"


@fits_memory
def shard(
    dataset: Dataset,
    partition: Callable[[Split, int], Shards],
    *,
    heldout: int,
    seed: int,
    noisy: Sequence[int] = (),
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    scale: Scale | None = per_channel,
) -> ShardedData:
    """Holds out samples, deals the rest to the replicas and spoils the noisy shards.

    The same arguments give the same data, whatever trains on them.

    Args:
      dataset: the data set.
      partition: `(training split, seed) -> shards`, one array or list of indices per replica, such as
        `lambda split, seed: iid(len(split.y), 8, seed)`.
      heldout: number of training samples to hold out: random ones, but of a text the last ones.
      seed: decides the held-out samples, the shards and the noise.
      noisy: numbers of the shards that get random labels, or, of a text, their bytes in random order.
      augment: `(rng, prepared x) -> x`, applied during training, such as `crop_flip`; or None.
      scale: which numbers of a sample are standardised together; see `make_prepare`. Tokens are never standardised.

    Returns:
      The sharded data.

    Raises:
      SettingsError: an argument has the wrong type, `heldout` leaves nothing to train on, there are more replicas than
        samples, `noisy` names a shard that does not exist or targets are not class labels, or the partition returns
        an empty shard or puts a sample in two.

    >>> from wavg_jax.data import digits, iid
    >>> data = shard(digits(), lambda split, seed: iid(len(split.y), 4, seed), heldout=237, seed=0)
    >>> [len(s) for s in data.shards], len(data.heldout.y), data.prepare(data.test.x[:2]).shape
    ([300, 300, 300, 300], 237, (2, 8, 8, 1))
    """
    _check(dataset, partition, augment)
    text = dataset.bytes_per_token is not None
    train, held = hold_out(dataset.train, heldout, seed, last=text)
    shards = _dealt(partition(train, seed), len(train.y))
    noisy = noisy_shards(noisy, len(shards))
    prepare = make_prepare(dataset, scale)
    if text:
        train = shuffled_tokens(train, shards, noisy, seed)
    else:
        train = Split(train.x, label_noise(train.y, shards, noisy, dataset.classes, seed))
    return ShardedData(
        name=dataset.name,
        train=train,
        heldout=held,
        test=dataset.test,
        shards=shards,
        classes=dataset.classes,
        prepare=prepare,
        augment=augment,
        noisy=noisy,
        class_names=dataset.class_names,
        noise="shuffled bytes" if text else "random labels",
    )


def pool(data: ShardedData) -> ShardedData:
    """Pools all shards into one, for sequential training and for training that averages at every step.

    Args:
      data: sharded data.

    Returns:
      The same data with one shard that holds every sample; noisy labels stay noisy.
    """
    return data._replace(shards=(np.sort(np.concatenate(data.shards)),))


def _check(dataset: Dataset, partition: Callable, augment: Callable | None) -> None:
    if not isinstance(dataset, Dataset):
        raise SettingsError(
            f"the data set is a {type(dataset).__name__}: give a data.Dataset, from data.load or data.from_arrays"
        )
    if not callable(partition):
        raise SettingsError(
            f"the partition is a {type(partition).__name__}: give a function (split, seed) -> shards, such as "
            "lambda split, seed: data.iid(len(split.y), 8, seed)"
        )
    if augment is not None and not callable(augment):
        raise SettingsError(f"augment is a {type(augment).__name__}: give a function (rng, x) -> x, or None")


def _dealt(shards: Any, n: int) -> Shards:
    """Checks what a partition of range(n) returned and makes it index arrays."""
    check("what the partition returned", shards, iterable("one array of indices per replica"))
    shards = index_arrays(shards)
    check_within(dict(enumerate(shards)), n)
    if not shards or np.bincount(np.concatenate(shards)).max() > 1:
        raise SettingsError("the partition has no shards, or a sample in two of them: fix the partition")
    return tuple(indices.astype(np.int32) for indices in shards)
