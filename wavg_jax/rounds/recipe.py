"""What a run is made of: the recipe of its rounds, what its replicas read, and what they are given to do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax.base import Averager, Batch, SettingsError, Task
from wavg_jax.data import ShardedData, round_indices
from wavg_jax.devices.placement import Placement, has_room, put
from wavg_jax.rounds import local, policy
from wavg_jax.rounds import score as scoring
from wavg_jax.rounds.faults import Faults
from wavg_jax.rounds.faults import faults as no_faults
from wavg_jax.rounds.local import Pace


class Shared(NamedTuple):
    """What every replica reads: the training split [N, ...] as stored and its labels [N], or None if it is streamed;
    the held-out chunks; and the sizes of the shards [K]."""

    x: jax.Array | np.ndarray | None
    y: jax.Array | np.ndarray | None
    held_out: scoring.Chunks | None
    sizes: jax.Array | np.ndarray


class Work(NamedTuple):
    """What the replicas are given to do in a round.

    Attributes:
      items: [K, H, B] int32 into the training split, or, if that is streamed, the samples themselves: a `Batch` as
        stored, [K, H, B, ...]. H is the longest round's.
      pace: how many of the H steps to take, and how fast; each number a scalar for all, [K], or None.
    """

    items: jax.Array | Batch
    pace: Pace


class Recipe(NamedTuple):
    """Everything a round is made of but the data and the state. Equal recipes share their compiled programs.

    Attributes:
      task: the network.
      averager: how the replicas become the next global parameters.
      inner: the inner optimizer.
      prepare: stored inputs [B, ...] -> the network's inputs, inside the compiled program.
      augment: `(rng, x) -> x` on prepared inputs, with a key per replica and step; or None.
      opt_state_at_sync, stats_at_sync: policies; see `wavg_jax.policy`.
      placement: where the replicas live.
      score_samples: held-out samples scored in a round, another subset each time; None scores them all.
      score_dtype: dtype of the scoring passes; None is the parameters'.
      smoothing: average of the global parameters over rounds; see `wavg_jax.smoothing`.
      faults: simulated ones.
      resident: whether the training split lies on the devices as a whole; if not, every round's batches are sent there.
    """

    task: Task
    averager: Averager
    inner: optax.GradientTransformation
    prepare: Callable[[jax.Array], jax.Array]
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None
    opt_state_at_sync: policy.Policy
    stats_at_sync: policy.Policy
    placement: Placement
    score_samples: int | None = None
    score_dtype: Any = None
    smoothing: optax.GradientTransformation | None = None
    faults: Faults | None = None
    resident: bool = True


def put_shared(recipe: Recipe, data: ShardedData, chunk: int) -> Shared:
    """Copies what every replica reads to the devices; the held-out split only if a weighting needs it."""
    scored = scoring.reads_heldout(recipe.averager.needs)
    if scored and not len(data.heldout.y):
        raise SettingsError("the weighting scores held-out data and there is none; hold out some samples (--heldout)")
    held_out = _held_out(recipe, data, chunk) if scored else None
    sizes = np.array([len(shard) for shard in data.shards], np.float32)
    x, y = (data.train.x, data.train.y.astype(np.int32)) if recipe.resident else (None, None)
    return put(Shared(x, y, held_out, sizes), recipe.placement.shared)


def _held_out(recipe: Recipe, data: ShardedData, chunk: int) -> scoring.Chunks:
    """Cuts the held-out split into chunks; where rounds score windows of it, such that all windows have one size."""
    x, y, samples = data.heldout.x, data.heldout.y, recipe.score_samples
    if samples is None or samples >= len(y):
        return scoring.chunked(x, y, chunk)
    size = -(-samples // -(-samples // chunk))
    # Filled up from the start again: padding would leave the last window with few samples.
    filled = np.resize(np.arange(len(y)), -(-len(y) // size) * size)
    return scoring.chunked(x[filled], y[filled], size)


def fetch(recipe: Recipe) -> local.Fetch:
    """Builds the making of one batch: an item of `Work`, without K and H -> Batch."""

    def gather(item: Any, shared: Shared, rng: jax.Array) -> Batch:
        stored, y = (shared.x[item], shared.y[item]) if recipe.resident else item  # type: ignore[index]
        x = recipe.prepare(stored)
        return Batch(x if recipe.augment is None else recipe.augment(rng, x), y)

    return gather


_ROUNDS_HELD = 3
"""Rounds whose items are in memory at a time: one runs, one waits, one is being made."""

_INSTEAD = ", or keep the training data on the devices all the same (--feed=resident, resident=True)"


def check_room(recipe: Recipe, data: ShardedData, longest: int, batch_size: int) -> None:
    """Raises SettingsError if what replicas are given in a round, samples or their numbers, takes too much memory.

    Args:
      recipe: says which of the two it is, and where.
      data: the shards.
      longest: H of the longest round.
      batch_size: samples per replica and step.
    """
    samples = _ROUNDS_HELD * len(data.shards) * longest * batch_size
    nbytes = samples * (4 if recipe.resident else data.train.x[:1].nbytes)
    if not has_room(recipe.placement, nbytes // len(recipe.placement.devices)):
        what, also = ("the sample indices", "") if recipe.resident else ("the streamed samples", _INSTEAD)
        raise SettingsError(
            f"{what} of {_ROUNDS_HELD} rounds would take {nbytes / 1e9:.1f} GB, more than a quarter of the memory; "
            f"take fewer --local_steps or a smaller --batch_size{also}"
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
    """Puts a round's batches on the devices; see `wavg_jax.data.round_indices`.

    Args:
      recipe: says where the replicas live, and which are slow or fast.
      data: the shards.
      seed, first_step, batch_size: of the batches.
      longest: H of the longest round; the batches of a shorter one are filled up with its last.
      steps: H of this round; None if all rounds are equally long, which need not be an argument of the program then.
    """
    taken = longest if steps is None else steps
    host = round_indices(data.shards, seed=seed, first_step=first_step, local_steps=taken, batch_size=batch_size)
    host = np.pad(host, ((0, 0), (0, longest - taken), (0, 0)), mode="edge")
    some: Any = None if steps is None else np.int32(steps)
    faults = recipe.faults or no_faults(len(data.shards))
    if set(faults.speed) != {1.0}:
        some = np.maximum(np.round(np.array(faults.speed) * taken), 1).astype(np.int32)
    rate = None if set(faults.rate) == {1.0} else np.array(faults.rate, np.float32)
    pace = Pace(*(x if x is None else put(x, _sharding(recipe, x)) for x in (some, rate)))
    items: Any = host if recipe.resident else Batch(data.train.x[host], data.train.y[host].astype(np.int32))
    return Work(put(items, recipe.placement.stacked), pace)


def longest_round(work: Work) -> int:
    """H of the longest round."""
    return jax.tree.leaves(work.items)[0].shape[1]


def _sharding(recipe: Recipe, x: np.ndarray | np.generic) -> jax.sharding.Sharding:
    return recipe.placement.stacked if np.ndim(x) else recipe.placement.shared


def steps_taken(work: Work) -> jax.Array:
    """The local steps each replica takes: int32 [K]."""
    replicas, longest = jax.tree.leaves(work.items)[0].shape[:2]
    return jnp.broadcast_to(jnp.int32(longest) if work.pace.steps is None else work.pace.steps, (replicas,))
