"""The critical path: the time K devices would take for a round, computed from parts measured on one."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax import tree
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.base import Batch, PyTree, TrainState
from wavg_jax.data import ShardedData
from wavg_jax.devices.placement import single
from wavg_jax.devices.transfer import put
from wavg_jax.training import progress
from wavg_jax.training.batches import check_room, make_work, put_shared, scored_samples
from wavg_jax.training.phases import blend_phase, local_phase, score_phase, window_phase
from wavg_jax.training.programs import QUICKLY, compiled_together, programs_of
from wavg_jax.training.recipe import Recipe, rounds_of
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


class _Programs(NamedTuple):
    """The phases of a round as jitted functions, on one device; `first` takes the first of K replicas."""

    window: Callable
    first: Callable
    local: Callable
    score: Callable
    blend: Callable
    means: Callable


@functools.lru_cache(maxsize=16)
def _programs_of(recipe: Recipe) -> _Programs:
    return _Programs(
        jax.jit(window_phase(recipe)),
        jax.jit(lambda replicas: jax.tree.map(lambda x: x[:1], replicas), compiler_options=QUICKLY),
        jax.jit(local_phase(recipe)),
        jax.jit(score_phase(recipe)),
        jax.jit(blend_phase(recipe)),
        jax.jit(_many_means),
    )


def _alone(recipe: Recipe) -> Recipe:
    """The recipe on one device of this process."""
    return recipe._replace(placement=single(), faults=None)


def check_parts(recipe: Recipe, data: ShardedData) -> None:
    """Raises what scoring and blending K replicas would raise in a round; traces them, and compiles nothing."""
    recipe = _alone(recipe)
    programs = _programs_of(recipe)
    state = jax.eval_shape(lambda: rounds_of(recipe).init(jax.random.key(0), len(data.shards)))
    held_out = jax.eval_shape(programs.window, state.round, scored_samples(recipe, data))
    for program, *arguments in _averaging(programs, state, held_out):
        jax.eval_shape(program, *arguments)


def measure_parts(
    recipe: Recipe,
    data: ShardedData,
    *,
    local_steps: int,
    batch_size: int,
    local: float | None = None,
    repeats: int = 5,
) -> Parts:
    """Times the parts of a round with one replica alone on one device, as on each of K devices.

    Blend and mean run on K stacked copies; neither includes the network between devices, see
    `wavg_jax.devices.network`. The programs compile side by side, and run once all are there.

    Args:
      recipe: of the round; its placement does not matter.
      data: the shards; the first is trained on.
      local_steps, batch_size: of one replica's local phase.
      local: seconds of the local phase, if it was measured with another recipe; None measures it.
      repeats: timed calls; the median counts.
    """
    check_room(recipe, data, local_steps, batch_size)
    progress.doing("timing the parts of a round")
    recipe, replicas = _alone(recipe), len(data.shards)
    where, programs = recipe.placement.shared, _programs_of(recipe)
    shapes, state_of = programs_of(recipe, replicas).begin(jax.random.key(0))
    shared = put_shared(recipe, data)
    held_out = None if shared.held_out is None else programs.window(put(np.int32(0), where), shared.held_out)
    requests = _averaging(programs, shapes, held_out)
    if local is None:
        one = data._replace(shards=data.shards[:1])
        work = make_work(recipe, one, seed=0, first_step=0, longest=local_steps, batch_size=batch_size)
        requests.append((programs.local, jax.eval_shape(programs.first, shapes.replicas), work, shared, shapes.drift))
    calls = {request[0]: made.call for request, made in zip(requests, compiled_together(*requests), strict=True)}
    state = state_of()
    first = calls[programs.first](state.replicas)

    def seconds(program: Callable, *arguments: PyTree) -> float:
        return _seconds(calls[program], arguments, repeats)

    if local is None:
        local = seconds(programs.local, first, work, shared, state.drift)
    score, measured, scored = 0.0, {}, (first, held_out, put(np.ones(1, bool), where))
    if programs.score in calls:
        score, measured = seconds(programs.score, *scored), calls[programs.score](*scored)
    if replicas == 1:
        return Parts(local, score, 0.0, 0.0)
    signals = put(_of_all(measured, replicas), where)
    blend = seconds(programs.blend, state, state.replicas, put(np.ones(replicas, bool), where), held_out, signals)
    equal = put(np.full((_MEANS, replicas), 1 / replicas, np.float32), where)
    mean = seconds(programs.means, state.replicas.params, equal) / _MEANS
    # Rounds that are not scored blend with weights that they have.
    every = recipe.scoring.every
    return Parts(local, score / every, (blend + (every - 1) * mean) / every, mean / replicas)


def _of_all(measured: dict[str, PyTree], replicas: int) -> dict[str, PyTree]:
    """The signals of K replicas, each like those measured of one, in the host's memory."""
    free = dict.fromkeys(FREE, np.ones(replicas, np.float32))
    return jax.tree.map(lambda x: np.repeat(x, replicas, axis=0), jax.device_get(measured)) | free


def _seconds(function: Callable, arguments: tuple, repeats: int) -> float:
    """Median over `repeats` calls, after one that warms up."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _averaging(programs: _Programs, state: TrainState, held_out: Batch | None) -> list[tuple]:
    """The programs of a round of the replicas in `state`, but for the local one, with the shapes of their arguments."""
    replicas = tree.count_replicas(state.replicas)
    one = jax.eval_shape(programs.first, state.replicas)
    score = (programs.score, one, held_out, jax.ShapeDtypeStruct((1,), bool))
    measured = jax.eval_shape(*score)
    requests: list[tuple] = [(programs.first, state.replicas), *([score] if measured else [])]
    if replicas == 1:
        return requests

    def of_all(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((replicas * x.shape[0], *x.shape[1:]), x.dtype)

    free = dict.fromkeys(FREE, jax.ShapeDtypeStruct((replicas,), jnp.float32))
    alive, weights = jax.ShapeDtypeStruct((replicas,), bool), jax.ShapeDtypeStruct((_MEANS, replicas), jnp.float32)
    blend = (programs.blend, state, state.replicas, alive, held_out, jax.tree.map(of_all, measured) | free)
    return [*requests, blend, (programs.means, state.replicas.params, weights)]


_MEANS = 10


def _many_means(stacked: PyTree, weights: jax.Array) -> PyTree:
    """Adds up the means by each row of `weights` [N, K], so that one call's dispatch is shared by N of them."""

    def add(total: PyTree, row: jax.Array) -> tuple[PyTree, None]:
        return optax.tree.add(total, weighted_mean(stacked, row)), None

    start = tree.as_accumulators(optax.tree.zeros_like(tree.replica(stacked, 0)))
    return jax.lax.scan(add, start, weights)[0]
