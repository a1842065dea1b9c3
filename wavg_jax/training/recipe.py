"""The recipe of a run's rounds: everything that a compiled round depends on but data and state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from wavg_jax.base import Averager, Batch, PyTree, Task
from wavg_jax.data import ShardedData
from wavg_jax.devices import processes
from wavg_jax.devices.memory import room
from wavg_jax.devices.placement import Placement, place
from wavg_jax.rounds.faults import Faults
from wavg_jax.rounds.forward import Forward
from wavg_jax.rounds.local import Fetch
from wavg_jax.rounds.round import Rounds, make_rounds
from wavg_jax.rounds.score import Scoring
from wavg_jax.rounds.sync import AtSync


class Layout(NamedTuple):
    """Where replicas and data live.

    Attributes:
      devices: number of devices; by default as many of those at hand as divide K.
      replica_map: how the replicas of one device run, a name in `wavg_jax.devices.mapping.MAPS`; "auto" times the ways
        once and keeps one unless another is clearly faster. Results are equal up to rounding.
      resident: whether the devices hold the training samples of their replicas; if not, each round's batches are sent
        there while the round before runs. None decides by their size.
    """

    devices: int | None = None
    replica_map: str = "auto"
    resident: bool | None = None


class Recipe(NamedTuple):
    """What rounds are made of. Equal recipes share their compiled programs.

    Attributes:
      task, averager, inner, scoring, at_sync, faults, placement: as for `wavg_jax.make_rounds`.
      prepare: stored inputs [B, ...] -> the network's inputs, inside the compiled program.
      augment: `(rng, x) -> x` on prepared inputs, with a key per replica and step; or None.
      resident: whether the devices hold the training samples of their replicas.
    """

    task: Task
    averager: Averager
    inner: optax.GradientTransformation
    scoring: Scoring
    at_sync: AtSync
    faults: Faults | None
    placement: Placement
    prepare: Callable[[jax.Array], jax.Array]
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None
    resident: bool


def make_recipe(
    task: Task,
    data: ShardedData,
    averager: Averager,
    inner: optax.GradientTransformation,
    *,
    scoring: Scoring = Scoring(),  # noqa: B008 - immutable
    at_sync: AtSync = AtSync(),  # noqa: B008
    layout: Layout = Layout(),  # noqa: B008
    faults: Faults | None = None,
) -> Recipe:
    """Puts together the recipe of a run of `fit` with these arguments.

    Until it is settled by timing (`wavg_jax.training.automap`), `replica_map="auto"` is "vmap".
    """
    replica_map = "vmap" if layout.replica_map == "auto" else layout.replica_map
    where = place(len(data.shards), layout.devices, replica_map)
    resident = layout.resident
    if resident is None:  # as the process with the least room decides
        resident = bool(data.train.x.nbytes // where.parts <= processes.gather(np.int64(room(where.devices))).min())
    return Recipe(
        task,
        averager,
        inner,
        scoring._replace(test_every=1),  # no matter of the round
        at_sync,
        faults,
        where,
        data.prepare,
        data.augment,
        resident,
    )


@functools.lru_cache(maxsize=64)
def fetch_of(recipe: Recipe) -> Fetch:
    """Makes a step's batch of its item: indices into the resident split (x, y), or the samples as stored."""

    def fetch(item: Any, shared: PyTree, rng: jax.Array) -> Batch:
        stored, y = (shared[0][item], shared[1][item]) if recipe.resident else item
        x = recipe.prepare(stored)
        return Batch(x if recipe.augment is None else recipe.augment(rng, x), y)

    return fetch


@functools.lru_cache(maxsize=64)
def rounds_of(recipe: Recipe) -> Rounds:
    """The rounds of a recipe."""
    return make_rounds(
        recipe.task,
        recipe.averager,
        recipe.inner,
        scoring=recipe.scoring,
        at_sync=recipe.at_sync,
        faults=recipe.faults,
        placement=recipe.placement,
        prepare=recipe.prepare,
        fetch=fetch_of(recipe),
    )


def forward_of(recipe: Recipe) -> Forward:
    """How a network runs over the test split: in its own dtype."""
    return Forward(recipe.task, recipe.prepare, None, recipe.scoring.chunk, recipe.placement.over_samples)
