"""The critical path: the time K devices would take for a round, computed from parts measured on one."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.base import PyTree
from wavg_jax.data import ShardedData
from wavg_jax.devices.placement import single
from wavg_jax.training import progress
from wavg_jax.training.batches import check_room, make_work, put_shared
from wavg_jax.training.phases import blend_phase, local_phase, score_phase, window_phase
from wavg_jax.training.programs import programs_of
from wavg_jax.training.recipe import Recipe
from wavg_jax.weighting.signals import FREE


class Parts(NamedTuple):
    """Seconds of the parts of a round.

    Attributes:
      local: one replica's local phase.
      score: scoring one replica.
      blend: the averager's whole update, of all K, with the blends that a search tries.
      mean: one device's share of one bare mean over K trees, as in a ring all-reduce, where each of K devices sums 1/K
        of the numbers.
    """

    local: float
    score: float
    blend: float
    mean: float


def _seconds(function: Callable, arguments: tuple, repeats: int) -> float:
    """Median over `repeats` calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_parts(recipe: Recipe, data: ShardedData, *, local_steps: int, batch_size: int, repeats: int = 5) -> Parts:
    """Times the parts of a round with one replica alone on one device, as on each of K devices.

    Blend and mean run on K stacked copies; neither includes the network between devices, see
    `wavg_jax.devices.network`.

    Args:
      recipe: of the round; its placement does not matter.
      data: the shards; the first is trained on.
      local_steps, batch_size: of one replica's local phase.
      repeats: timed calls; the median counts.
    """
    check_room(recipe, data, local_steps, batch_size)
    progress.doing("timing the parts of a round")
    recipe = recipe._replace(placement=single(), faults=None)
    first = data._replace(shards=data.shards[:1])
    shared = put_shared(recipe, data)
    state = programs_of(recipe, 1).init(jax.random.key(0))
    work = make_work(recipe, first, seed=0, first_step=0, longest=local_steps, batch_size=batch_size)
    local = _seconds(jax.jit(local_phase(recipe)), (state.replicas, work, shared, state.drift), repeats)
    held_out = jax.jit(window_phase(recipe))(state.round, shared.held_out)
    scored, scorer = (state.replicas, held_out, jnp.ones(1, bool)), jax.jit(score_phase(recipe))
    measured = scorer(*scored)
    score = _seconds(scorer, scored, repeats) if measured else 0.0
    replicas = len(data.shards)
    if replicas == 1:
        return Parts(local, score, 0.0, 0.0)
    stacked = tree.replicate(tree.replica(state.replicas, 0), replicas)
    signals = jax.tree.map(lambda x: jnp.repeat(x, replicas, axis=0), measured)
    signals |= dict.fromkeys(FREE, jnp.ones(replicas, jnp.float32))
    alive = jnp.ones(replicas, bool)
    state = state._replace(averager=recipe.averager.init(state.params, replicas))
    blend = _seconds(jax.jit(blend_phase(recipe)), (state, stacked, alive, held_out, signals), repeats)
    many = _seconds(jax.jit(_many_means), (stacked.params, jnp.full((_MEANS, replicas), 1 / replicas)), repeats)
    # Rounds that are not scored blend with weights that they have.
    every, mean = recipe.scoring.every, many / _MEANS
    return Parts(local, score / every, (blend + (every - 1) * mean) / every, mean / replicas)


_MEANS = 10


def _many_means(stacked: PyTree, weights: jax.Array) -> PyTree:
    """Adds up the means by each row of `weights` [N, K], so that one call's dispatch is shared by N of them."""

    def add(total: PyTree, row: jax.Array) -> tuple[PyTree, None]:
        return optax.tree.add(total, weighted_mean(stacked, row)), None

    start = tree.as_accumulators(optax.tree.zeros_like(tree.replica(stacked, 0)))
    return jax.lax.scan(add, start, weights)[0]
