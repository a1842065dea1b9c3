"""This library.

rounds: rounds of plain averaging over all CPU devices, one device per core, with the mapping of replicas that is chosen
  automatically; the host draws every round's batches and ships them, as in `fit`.
one_model: one model with K times the batch, H steps: the ceiling, the same operations without replicas.
"""

import jax
import numpy as np
import optax

import wavg_jax as wavg
from experiments.benchmarks.peer_workers import cases
from experiments.benchmarks.peer_workers.lines import Arrays, Job, ReadyJob, serve
from wavg_jax import data
from wavg_jax.base import PyTree, TrainState
from wavg_jax.data import ShardedData
from wavg_jax.devices import machine
from wavg_jax.devices.transfer import put
from wavg_jax.rounds.local import Pace
from wavg_jax.training import automap
from wavg_jax.training.batches import Work, make_work, put_shared
from wavg_jax.training.programs import compiled, programs_of
from wavg_jax.training.recipe import Recipe, make_recipe


def build(job: Job) -> ReadyJob:
    """Prepares a job."""
    sharded, batch = cases.random_data(job), job.batch
    indices = job.read("data")["indices"]
    if job.system == "rounds":
        jax.config.update("jax_num_cpu_devices", machine.cores())
    else:
        sharded, batch = data.pool(sharded), job.replicas * batch
        indices = indices.transpose(1, 0, 2).reshape(1, job.steps, batch)
    recipe = _recipe(job, sharded)
    shared = put_shared(recipe, sharded)
    state = programs_of(recipe, len(indices)).init(jax.random.key(0))
    state = _started(recipe, state, cases.nested(job.read("start"))["params"], len(indices))
    given = Work(put(_positions(recipe, sharded, indices), recipe.placement.stacked), Pace())
    step = compiled(programs_of(recipe, len(indices)).run, state, given, shared).call
    done = 0

    def check() -> Arrays:
        nonlocal state
        state, *_ = step(state, given, shared)
        return cases.flat({"params": state.params})

    def run() -> None:
        nonlocal state, done
        done += job.steps
        work = make_work(recipe, sharded, seed=0, first_step=done, longest=job.steps, batch_size=batch)
        state, log, _ = step(state, work, shared)
        jax.block_until_ready((state, log))

    notes = {
        "versions": machine.versions(),
        "devices": len(recipe.placement.devices),
        "replica_map": recipe.placement.replica_map,
    }
    return ReadyJob(check, run, notes)


def _recipe(job: Job, sharded: ShardedData) -> Recipe:
    inner = optax.sgd(job.rate, momentum=job.momentum)
    recipe = make_recipe(cases.task(job.network), sharded, wavg.averager(wavg.uniform()), inner)
    return automap.settle(recipe, sharded, batch_size=job.batch)


def _positions(recipe: Recipe, sharded: ShardedData, indices: np.ndarray) -> np.ndarray:
    """Indices [K, H, B] into the training split as positions among the samples of each replica's device."""
    if recipe.placement.parts == 1:
        return indices
    each, places = len(sharded.shards) // recipe.placement.parts, []
    for k, shard in enumerate(sharded.shards):
        before = sum(len(other) for other in sharded.shards[k - k % each : k])
        places.append(before + np.searchsorted(shard, indices[k]))
    return np.stack(places).astype(np.int32)


def _started(recipe: Recipe, state: TrainState, params: PyTree, replicas: int) -> TrainState:
    """The state with these parameters instead of its own."""
    place, stacked = recipe.placement, jax.tree.map(lambda x: np.stack([x] * replicas), params)
    alike = state.replicas._replace(params=put(stacked, place.stacked))
    return state._replace(params=put(params, place.shared), replicas=alike)


if __name__ == "__main__":
    serve(build)
