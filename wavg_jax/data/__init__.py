"""Data sets in, shards out: what replicas are trained, scored and tested on."""

from wavg_jax.data.arrays import Dataset, Split, from_arrays, from_npz, hold_out
from wavg_jax.data.augment import crop_flip
from wavg_jax.data.balance import class_weights
from wavg_jax.data.embedded import digits
from wavg_jax.data.feed import round_indices
from wavg_jax.data.iterables import from_iterable
from wavg_jax.data.prepare import make_prepare, overall, per_channel, per_feature
from wavg_jax.data.sharded import ShardedData, pool, shard
from wavg_jax.data.shards import contiguous, dirichlet, iid, interleaved, label_noise, sized
from wavg_jax.data.sources import load
from wavg_jax.data.text import from_text, windows

__all__ = [
    "Dataset",
    "ShardedData",
    "Split",
    "class_weights",
    "contiguous",
    "crop_flip",
    "digits",
    "dirichlet",
    "from_arrays",
    "from_iterable",
    "from_npz",
    "from_text",
    "hold_out",
    "iid",
    "interleaved",
    "label_noise",
    "load",
    "make_prepare",
    "overall",
    "per_channel",
    "per_feature",
    "pool",
    "round_indices",
    "shard",
    "sized",
    "windows",
]


def __dir__() -> list[str]:
    return __all__
