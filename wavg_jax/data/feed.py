"""Which samples each replica trains on in a round: a pure function, with no state to save."""

from collections.abc import Sequence

import numpy as np

from wavg_jax.arguments import as_whole, fits_memory
from wavg_jax.base import SettingsError
from wavg_jax.data.shards import index_arrays


@fits_memory
def round_indices(
    shards: Sequence[np.ndarray],
    *,
    seed: int,
    first_step: int,
    local_steps: int,
    batch_size: int,
    replicas: slice = slice(None),
) -> np.ndarray:
    """Draws the batches of one round, as indices into the training split.

    Replica k reads an endless stream: one permutation of its shard after another, the one of epoch e drawn from
    `SeedSequence([seed, k, e])`. Local step s takes positions `s*B` to `(s+1)*B` of the stream, so every epoch shows
    every sample once, even if a batch straddles two epochs. The same arguments always give the same batches, so a
    resumed run continues where it stopped. H may change from round to round, B may not.

    Args:
      shards: K index arrays.
      seed: decides the permutations.
      first_step: local steps of each replica before this round.
      local_steps: H, batches per replica.
      batch_size: B, no larger than the smallest shard.
      replicas: those to draw for; all by default.

    Returns:
      Indices [K, H, B], int32; K replicas, or those asked for.

    Raises:
      SettingsError: an argument is out of range.

    >>> import numpy as np
    >>> indices = round_indices([np.arange(4), np.arange(4, 8)], seed=0, first_step=0, local_steps=2, batch_size=2)
    >>> indices.shape, np.sort(indices.reshape(2, 4)).tolist()
    ((2, 2, 2), [[0, 1, 2, 3], [4, 5, 6, 7]])
    """
    local_steps, batch_size = as_whole("local_steps", local_steps, 1), as_whole("batch_size", batch_size, 1)
    seed, first_step = as_whole("seed", seed, 0), as_whole("first_step", first_step, 0)
    shards = index_arrays(shards)
    if not shards:
        raise SettingsError("there are no shards: give one array of sample indices per replica")
    sizes = [len(shard) for shard in shards]
    smallest = int(np.argmin(sizes))
    if batch_size > sizes[smallest]:
        raise SettingsError(
            f"batches of {batch_size} do not fit shard {smallest}, which has {sizes[smallest]} samples: "
            f"set batch_size= to {sizes[smallest]}{' or less' * (sizes[smallest] > 1)}, or use fewer replicas"
        )
    start, count = first_step * batch_size, local_steps * batch_size
    streams = [_stream(shards[k], seed, k, start, count) for k in range(len(shards))[replicas]]
    return np.stack(streams).reshape(len(streams), local_steps, batch_size)


def _stream(shard: np.ndarray, seed: int, replica: int, start: int, count: int) -> np.ndarray:
    """Positions `start` to `start + count` of a replica's stream; draws only the epochs they touch."""
    shard = shard.astype(np.int32, copy=False)
    first, last = start // len(shard), (start + count - 1) // len(shard)
    epochs = [
        np.random.default_rng(np.random.SeedSequence([seed, replica, epoch])).permutation(shard)
        for epoch in range(first, last + 1)
    ]
    skip = start - first * len(shard)
    return np.concatenate(epochs)[skip : skip + count]
