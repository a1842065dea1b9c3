"""The batches of every round, made ahead while the round before runs."""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from wavg_jax.base import Batch, SettingsError
from wavg_jax.data import ShardedData, round_indices
from wavg_jax.devices.memory import room
from wavg_jax.devices.placement import Parts
from wavg_jax.devices.transfer import own_part, put, put_own
from wavg_jax.rounds.local import Pace
from wavg_jax.rounds.score import asked, reads_heldout
from wavg_jax.training.recipe import Recipe


class Shared(NamedTuple):
    """What every replica reads in every round.

    Attributes:
      train: `Parts` of `(x, y)`, the training split as stored: all of it [N, ...] where one device reads all shards,
        else each device's own samples; `()` if it is streamed.
      held_out: the samples to score on [N, ...]; None if the weighting reads none.
      sizes: of the shards, float32 [K].
    """

    train: Any
    held_out: Batch | None
    sizes: jax.Array | np.ndarray


class Work(NamedTuple):
    """One round's batches.

    Attributes:
      items: indices [K, H, B] int32 into the device's part of the training split, or, if that is streamed, the
        samples as stored: a `Batch` with leaves [K, H, B, ...]. H is that of the longest round.
      pace: how many of the H steps to take.
    """

    items: jax.Array | Batch
    pace: Pace


def as_targets(y: np.ndarray) -> np.ndarray:
    """Labels and tokens as int32, numbers as float32."""
    return y.astype(np.float32 if y.dtype.kind == "f" else np.int32)


def scored_samples(recipe: Recipe, data: ShardedData) -> Batch | None:
    """The held-out split, in the host's memory; None if the rounds read none.

    Raises:
      SettingsError: the rounds score held-out data and there is none.
    """
    if not reads_heldout(asked(recipe.averager.needs, recipe.scoring)):
        return None
    if not len(data.heldout.y):
        raise SettingsError("the rounds score held-out data and there is none; hold out some samples (heldout=)")
    return Batch(data.heldout.x, as_targets(data.heldout.y))


def put_shared(recipe: Recipe, data: ShardedData) -> Shared:
    """Copies what every replica reads to the devices; of the held-out split, what `scored_samples` gives."""
    sizes = np.array([len(shard) for shard in data.shards], np.float32)
    everywhere = put(Shared((), scored_samples(recipe, data), sizes), recipe.placement.shared)
    return everywhere._replace(train=_put_train(recipe, data) if recipe.resident else ())


def _put_train(recipe: Recipe, data: ShardedData) -> Parts:
    """The training split on the devices: whole, or on each the samples of its own replicas, shard after shard."""
    where, split = recipe.placement, (data.train.x, as_targets(data.train.y))
    if where.parts == 1:
        return put(Parts(jax.tree.map(lambda a: a[None], split)), where.shared)
    groups = [np.concatenate(data.shards[k : k + _each(recipe, data)]) for k in _firsts(recipe, data)]
    longest = max(len(group) for group in groups)
    mine = groups[own_part(where.stacked, (where.parts,))[0]]

    def parts(a: np.ndarray) -> np.ndarray:
        out = np.zeros((len(mine), longest, *a.shape[1:]), a.dtype)
        for row, group in zip(out, mine, strict=True):
            row[: len(group)] = a[group]
        return out

    return put_own(Parts(jax.tree.map(parts, split)), where.stacked, (where.parts,))


def _each(recipe: Recipe, data: ShardedData) -> int:
    """Replicas per device."""
    return len(data.shards) // recipe.placement.parts


def _firsts(recipe: Recipe, data: ShardedData) -> range:
    """The first replica of every device."""
    return range(0, len(data.shards), _each(recipe, data))


def _positions(recipe: Recipe, data: ShardedData, replicas: slice) -> list[np.ndarray]:
    """The shards as positions in what `_put_train` puts on the device of each of these replicas."""
    shards = list(data.shards)
    for first in _firsts(recipe, data):
        end = 0
        for k in range(first, first + _each(recipe, data)):
            if replicas.start <= k < replicas.stop:
                shards[k] = np.arange(end, end + len(shards[k]), dtype=np.int32)
            end += len(shards[k])
    return shards


ROUNDS_HELD = 3
"""Rounds whose items are in memory at once: one runs, one waits, one is being made."""


def check_room(recipe: Recipe, data: ShardedData, longest: int, batch_size: int) -> None:
    """Raises SettingsError if the items of the rounds held at once take too much memory.

    Args:
      recipe: says whether items are indices or samples, and where they go.
      data: the shards.
      longest: H of the longest round.
      batch_size: samples per replica and step.
    """
    samples = ROUNDS_HELD * len(data.shards) * longest * batch_size
    nbytes = samples * (4 if recipe.resident else data.train.x[:1].nbytes)
    if nbytes // len(recipe.placement.devices) > room(recipe.placement.devices):
        what, also = ("the sample indices", "") if recipe.resident else ("the streamed samples", ", or resident=True")
        raise SettingsError(
            f"{what} of {ROUNDS_HELD} rounds would take {nbytes / 1e9:.1f} GB, more than a quarter of the memory; "
            f"take fewer local_steps=, a smaller batch_size={also}"
        )


def make_work(
    recipe: Recipe,
    data: ShardedData,
    *,
    seed: int,
    first_step: int,
    longest: int,
    batch_size: int,
    steps: int | None = None,
) -> Work:
    """Puts one round's batches on the devices; see `wavg_jax.data.round_indices`.

    Args:
      recipe: where the replicas live.
      data: the shards.
      seed, first_step, batch_size: of the batches.
      longest: H of the longest round; a shorter round is padded with its last batch.
      steps: H of this round; None if all rounds have the same H, so that the compiler knows it.
    """
    taken, where = longest if steps is None else steps, recipe.placement
    shape = (len(data.shards), longest, batch_size)
    mine, _, columns = own_part(where.items, shape)
    resident = recipe.resident and where.parts > 1
    indices = round_indices(
        _positions(recipe, data, mine) if resident else data.shards,
        seed=seed,
        first_step=first_step,
        local_steps=taken,
        batch_size=batch_size,
        replicas=mine,
    )[:, :, columns]
    indices = np.pad(indices, ((0, 0), (0, longest - taken), (0, 0)), mode="edge")
    items: Any = indices if recipe.resident else Batch(data.train.x[indices], as_targets(data.train.y[indices]))
    # H is an argument only where it changes, so that the compiler knows it otherwise.
    given = None if steps is None else put(np.int32(steps), where.shared)
    return Work(put_own(items, where.items, shape), Pace(given))


Make = Callable[[int, int], Work]
"""`(first_step, steps) -> Work`: the batches of a `steps`-step round starting at global local step `first_step`."""


class Feeder:
    """Makes the batches of rounds, the next round's in the background. Use `open_feeder`."""

    def __init__(self, make: Make, pool: concurrent.futures.Executor):
        self._make, self._pool = make, pool
        self._ahead: dict[tuple[int, int], concurrent.futures.Future[Work]] = {}

    def prepare(self, first_step: int, steps: int) -> None:
        """Starts making a round's batches in the background; drops what it made ahead for any other round."""
        self._ahead = {(first_step, steps): self._pool.submit(self._make, first_step, steps)}

    def take(self, first_step: int, steps: int) -> Work:
        """Returns a round's batches, and raises what making them raised."""
        ahead = self._ahead.pop((first_step, steps), None)
        return self._make(first_step, steps) if ahead is None else ahead.result()


@contextlib.contextmanager
def open_feeder(make: Make) -> Iterator[Feeder]:
    """Opens a feeder whose one thread ends with the block."""
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        yield Feeder(make, pool)
