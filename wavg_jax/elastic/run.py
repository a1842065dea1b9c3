"""fit() of an elastic run."""

import contextlib
import functools
import inspect
import time
from typing import Any

import jax
import numpy as np

from wavg_jax.arguments import check
from wavg_jax.base import Averager, SettingsError, Task
from wavg_jax.data import ShardedData
from wavg_jax.devices import machine, processes
from wavg_jax.elastic.cluster import connected
from wavg_jax.elastic.crew import Crew
from wavg_jax.elastic.engine import Elastic, shapes_of
from wavg_jax.elastic.settings import WORKERS, Workers, check_workers, size_in
from wavg_jax.elastic.worker import CONFIG, Kit, Shard
from wavg_jax.rounds.faults import Faults, check_apart, lies
from wavg_jax.storage.schema import Row
from wavg_jax.training import fit as in_process
from wavg_jax.training.batches import as_targets, scored_samples
from wavg_jax.training.engine import Step
from wavg_jax.training.fit import Result, Store, carry_out
from wavg_jax.training.programs import Compiled, compiled
from wavg_jax.training.recipe import Layout, Recipe


def fit(
    task: Task,
    data: ShardedData,
    averager: Averager,
    *,
    workers: Workers = Workers(),  # noqa: B008 - immutable
    **settings: Any,
) -> Result:
    """Trains as `wavg_jax.fit` does, the replicas in workers that may die, hang, be slow, and return.

    A round ends when all workers have answered, or at its deadline. Replicas that have not come, or that came broken,
    are dead in it: they have no weight, and restart from the blend in the next round. Without faults the result is that
    of `wavg_jax.fit` up to float tolerance.

    Args:
      task, data, averager: as for `wavg_jax.fit`.
      workers: how many, where, and how long to wait for them.
      **settings: the other arguments of `wavg_jax.fit`. `layout` may set the `replica_map` of the workers alone;
        `at_sync` neither a wire nor fragments.

    Returns:
      The `Result` of `wavg_jax.fit`. Rows have entries of their own: `missing`, {replica: why}; `workers`, what each of
      them did; and `audits`.

    Raises:
      WavgError: what `wavg_jax.fit` raises.
      MissingExtra: Ray is not installed; it comes with the extra `ray`.
      SettingsError: workers cannot be started, or the cluster not be joined.
      TooFew: fewer than `Workers.min_replicas` came for longer than `Workers.patience`.
    """
    given = inspect.signature(in_process.fit).bind(task, data, averager, **settings)
    given.apply_defaults()
    checked = _checked(given.arguments, workers)
    with contextlib.ExitStack() as stack:
        return carry_out(functools.partial(_start, stack, workers, checked), **checked)


def _checked(given: dict[str, Any], workers: Workers) -> dict[str, Any]:
    """The arguments of `fit`, as an elastic run has them.

    Raises:
      SettingsError: one of them cannot work here.
    """
    check("workers", workers, WORKERS)
    data, layout, at_sync, store = (given[name] for name in ("data", "layout", "at_sync", "store"))
    if isinstance(data, ShardedData):  # else `fit` refuses it
        check_workers(workers, len(data.shards))
        size_in(workers, 1, len(data.shards))
    if processes.count() > 1:
        raise SettingsError("elastic.fit runs in one process, which starts workers: leave out wavg_jax.initialize")
    if getattr(layout, "devices", None) is not None or getattr(layout, "resident", None) is False:
        raise SettingsError("layout=: workers have a device each and hold their shards; give replica_map= alone")
    if getattr(at_sync, "fragments", 1) != 1 or getattr(at_sync, "wire", "float32") != "float32":
        raise SettingsError("at_sync=: workers send whole replicas in float32; leave out wire= and fragments=")
    if getattr(given["scoring"], "guard", None) is not None:
        raise SettingsError("scoring=: workers do not hear of a lowered rate; leave out guard=")
    faults = given["faults"] if isinstance(given["faults"], Faults) else None  # else `fit` refuses it
    check_apart(faults, "workers")
    if workers.audit and lies(faults):
        raise SettingsError("audit= with faults that change what is sent: workers score that, auditors the truth")
    chosen = getattr(layout, "replica_map", "auto")
    if chosen == "auto":
        chosen = "map" if jax.default_backend() == "cpu" else "vmap"
    own = {"layout": Layout(1, chosen, True) if isinstance(layout, Layout) else layout}
    if isinstance(store, Store):
        own["store"] = store._replace(facts={**(store.facts or {}), "elastic": _described(workers)})
    return given | own


def _described(workers: Workers) -> Row:
    """What a run's first row says of its workers."""
    names = ("min_replicas", "audit", "fill", "norm_bound", "patience", "away")
    varies = callable(workers.size)
    numbers = {name: getattr(workers, name) for name in names}
    return {"workers": "varies" if varies else workers.size, "late": workers.late is not None, **numbers}


def _start(
    stack: contextlib.ExitStack,
    workers: Workers,
    given: dict[str, Any],
    recipe: Recipe,
    first: tuple,
    request: tuple,
) -> tuple[Step, Compiled]:
    """Starts the workers of a run that has been checked; see `wavg_jax.training.engine.Engine`."""
    ray, begun = stack.enter_context(connected(workers.address)), time.perf_counter()
    state, work, _, _ = first
    kit = _kit(recipe, given, workers, work.items.shape[1], work.pace.steps is not None or workers.fill)
    crew = Crew(ray, workers, kit, functools.partial(shapes_of, state), _shards(ray, given["data"]))
    stack.callback(crew.close)
    crew.muster(1)  # they compile at the same time
    elastic = Elastic(crew, workers, kit, recipe, first, given["seed"])
    program = Compiled(elastic.step, time.perf_counter() - begun)
    return Step(program, True, elastic.entries), compiled(*request)


def _kit(recipe: Recipe, given: dict[str, Any], workers: Workers, longest: int, dynamic: bool) -> Kit:
    count = size_in(workers, 1, len(given["data"].shards))
    return Kit(
        recipe.task,
        recipe.averager,
        recipe.inner,
        recipe.scoring,
        recipe.at_sync,
        recipe.faults,
        recipe.prepare,
        recipe.augment,
        recipe.placement.replica_map,
        scored_samples(recipe, given["data"]),
        len(given["data"].shards),
        given["batch_size"],
        longest,
        dynamic,
        {name: jax.config.values[name] for name in CONFIG},
        max(machine.cores() // count if workers.address is None else int(workers.cpus), 1),
        workers.audit > 0,
        workers.hook,
    )


def _shards(ray: Any, data: ShardedData) -> list[Any]:
    """Ray's references to the shards; the driver owns them, so that they outlive every worker."""
    refs = []
    for shard in data.shards:
        indices = np.unique(shard)
        refs.append(ray.put(Shard(indices, data.train.x[indices], as_targets(data.train.y[indices]))))
    return refs
