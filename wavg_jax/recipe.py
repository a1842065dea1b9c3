"""What a run is made of: the recipe of its rounds, what its replicas read, and what they are given to do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax import local, policy, signals
from wavg_jax.base import Averager, Batch, SettingsError, Task
from wavg_jax.data import ShardedData, round_indices
from wavg_jax.faults import Faults
from wavg_jax.local import Pace
from wavg_jax.placement import Placement, put


class Shared(NamedTuple):
    """What every replica reads: the training split [N, ...] as stored, its labels [N], the held-out chunks, and the
    sizes of the shards [K]."""

    x: jax.Array | np.ndarray
    y: jax.Array | np.ndarray
    held_out: signals.Chunks | None
    sizes: jax.Array | np.ndarray


class Work(NamedTuple):
    """What the replicas are given to do in a round.

    Attributes:
      indices: [K, H, B] int32 into the training split; H is the longest round's.
      pace: how many of the H steps to take, and how fast; each number a scalar for all or [K].
    """

    indices: jax.Array
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


def put_shared(recipe: Recipe, data: ShardedData, chunk: int) -> Shared:
    """Copies what every replica reads to the devices; the held-out split only if a weighting needs it."""
    scored = signals.reads_heldout(recipe.averager.needs)
    if scored and not len(data.heldout.y):
        raise SettingsError("the weighting scores held-out data and there is none; hold out some samples (--heldout)")
    size = chunk if recipe.score_samples is None else min(chunk, recipe.score_samples)
    held_out = signals.chunked(data.heldout.x, data.heldout.y, size) if scored else None
    sizes = np.array([len(shard) for shard in data.shards], np.float32)
    return put(Shared(data.train.x, data.train.y.astype(np.int32), held_out, sizes), recipe.placement.shared)


def fetch(recipe: Recipe) -> local.Fetch:
    """Builds the gathering of one batch: indices [B] into the shared training split -> Batch."""

    def gather(indices: jax.Array, shared: Shared, rng: jax.Array) -> Batch:
        x = recipe.prepare(shared.x[indices])
        return Batch(x if recipe.augment is None else recipe.augment(rng, x), shared.y[indices])

    return gather


def make_work(
    recipe: Recipe, data: ShardedData, *, seed: int, first_step: int, longest: int, batch_size: int, steps: int
) -> Work:
    """Puts a round's batches on the devices; see `wavg_jax.data.round_indices`.

    Args:
      recipe: says where the replicas live, and which are slow or fast.
      data: the shards.
      seed, first_step, batch_size: of the batches.
      longest: H of the longest round, for which there are indices.
      steps: H of this round.
    """
    host = round_indices(data.shards, seed=seed, first_step=first_step, local_steps=longest, batch_size=batch_size)
    faults = recipe.faults
    some: np.ndarray | np.generic = np.int32(steps)
    rate: np.ndarray | np.generic = np.float32(1)
    if faults is not None and set(faults.speed) != {1.0}:
        some = np.maximum(np.round(np.array(faults.speed) * steps), 1).astype(np.int32)
    if faults is not None and set(faults.rate) != {1.0}:
        rate = np.array(faults.rate, np.float32)
    pace = [put(x, recipe.placement.stacked if np.ndim(x) else recipe.placement.shared) for x in (some, rate)]
    return Work(put(host, recipe.placement.stacked), Pace(*pace))


def steps_taken(work: Work) -> jax.Array:
    """The local steps each replica takes: int32 [K]."""
    return jnp.broadcast_to(work.pace.steps, work.indices.shape[:1])
