"""Which samples each replica trains on in a round: a pure function, so that nothing about it needs saving."""

from collections.abc import Sequence

import numpy as np

from wavg_jax.arguments import as_whole
from wavg_jax.base import SettingsError
from wavg_jax.data.shards import as_indices


def round_indices(
    shards: Sequence[np.ndarray], *, seed: int, first_step: int, local_steps: int, batch_size: int
) -> np.ndarray:
    """The batches of one round, as indices into the training split.

    Replica k reads an endless stream: one permutation of its shard after another, that of epoch e drawn from
    `SeedSequence([seed, k, e])`. Local step s takes positions `s*B` to `(s+1)*B` of it, so that each epoch shows every
    sample once, also where a batch straddles two. Every call with the same arguments gives the same batches; a
    resumed run goes on where it stopped. H may change from round to round, B may not.

    Args:
      shards: K index arrays.
      seed: decides the permutations.
      first_step: local steps that every replica was given in the rounds before.
      local_steps: H, batches per replica.
      batch_size: B, at most the size of the smallest shard.

    Returns:
      Indices [K, H, B], int32.

    Raises:
      SettingsError: an argument is out of range.

    >>> import numpy as np
    >>> indices = round_indices([np.arange(4), np.arange(4, 8)], seed=0, first_step=0, local_steps=2, batch_size=2)
    >>> indices.shape, np.sort(indices.reshape(2, 4)).tolist()
    ((2, 2, 2), [[0, 1, 2, 3], [4, 5, 6, 7]])
    """
    local_steps, batch_size = as_whole("--local_steps", local_steps, 1), as_whole("--batch_size", batch_size, 1)
    seed, first_step = as_whole("--seed", seed, 0), as_whole("first_step", first_step, 0)
    shards = [as_indices(k, shard) for k, shard in enumerate(shards)]
    if not shards:
        raise SettingsError("there are no shards: give the indices of the samples of at least one replica")
    sizes = [len(shard) for shard in shards]
    smallest = int(np.argmin(sizes))
    if batch_size > sizes[smallest]:
        raise SettingsError(
            f"batches of {batch_size} do not fit shard {smallest}, which has {sizes[smallest]} samples: "
            f"set --batch_size to {sizes[smallest]}{' or less' * (sizes[smallest] > 1)}, or use fewer replicas"
        )
    start, count = first_step * batch_size, local_steps * batch_size
    streams = [_stream(shard, seed, k, start, count) for k, shard in enumerate(shards)]
    return np.stack(streams).reshape(len(streams), local_steps, batch_size)


def _stream(shard: np.ndarray, seed: int, replica: int, start: int, count: int) -> np.ndarray:
    """Positions `start` to `start + count` of a replica's stream, drawing only the epochs they touch."""
    shard = shard.astype(np.int32, copy=False)
    first, last = start // len(shard), (start + count - 1) // len(shard)
    epochs = [
        np.random.default_rng(np.random.SeedSequence([seed, replica, epoch])).permutation(shard)
        for epoch in range(first, last + 1)
    ]
    skip = start - first * len(shard)
    return np.concatenate(epochs)[skip : skip + count]
