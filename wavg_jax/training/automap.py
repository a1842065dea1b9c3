"""Chooses how the replicas of a device run by timing each way on the real local steps, once.

One way is kept unless another is faster by more than the noise of the trial: on a CPU one replica after another, which
was ahead more often than not, elsewhere all at once.

The process remembers the choice, and so does a file beside JAX's compiled programs if `jax_compilation_cache_dir` is
set: one per network with its shapes, optimizer state, number of replicas, devices and version of JAX.
"""

import contextlib
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from wavg_jax.averaging.averager import averager
from wavg_jax.base import Batch, WorkdirError
from wavg_jax.data import ShardedData
from wavg_jax.data.arrays import Split
from wavg_jax.devices import machine, placement, processes
from wavg_jax.rounds.sync import AtSync
from wavg_jax.storage.rows import write_atomically
from wavg_jax.training import progress
from wavg_jax.training.batches import as_targets, make_work, put_shared
from wavg_jax.training.footprint import check_fits, fits, held_bytes
from wavg_jax.training.operations import training_flops
from wavg_jax.training.phases import local_phase
from wavg_jax.training.programs import compiled_together, programs_of
from wavg_jax.training.recipe import Recipe
from wavg_jax.weighting.scores import uniform

FILE = "replica_maps.json"

_FEWEST, _MOST = 2, 10
"""Local steps in a trial: as many as take `_FLOPS` operations. Small networks need several, since a way that is fast by
the step may copy more in every round."""

_SECONDS = 0.3
"""How long to time the ways in turn."""

_TURNS = 6
"""Turns to take at least: as many wins are chance once in 64 times."""

_LONGEST = 10.0
"""Seconds after which no further turn begins, however few there were."""

_LEAD = 1.05
"""How many times faster than the way that is kept another must be."""

_CHANCE = 0.02
"""Highest probability that so many turns are won where both ways are equally fast."""

_FEW = 2
"""Most replicas on a device for which `unroll` is tried; its program takes that many times as long to compile."""

_HOPELESS = 2.0
"""A way this many times slower than the best in the better of its first two turns is dropped."""

_FLOPS = 1e10
"""Floating-point operations of a run below which a trial cannot pay: compiling the ways takes two seconds or more, in
which this many are done."""

_PLAIN = averager(uniform())
_known: dict[str, str] = {}


def settle(
    recipe: Recipe, data: ShardedData, *, batch_size: int, steps: int | None = None, decided: str | None = None
) -> Recipe:
    """Returns the recipe with the fastest replica map.

    Args:
      recipe: of the rounds; only its local steps matter.
      data: the shards.
      batch_size: samples per replica and step.
      steps: local steps of a replica in the whole run, if known; too few gain nothing, and the replicas run by vmap.
      decided: the map chosen before, such as in the first part of a resumed run, which needs the same map to be the
        same bit for bit; None chooses.

    Returns:
      The recipe with its placement changed; unchanged if every device has one replica, which all maps run alike. In
      several processes always "vmap".
    """
    if decided is not None:
        return _mapped(recipe, decided)
    if processes.count() > 1:  # all must run the same program
        return _mapped(recipe, "vmap")
    here = len(data.shards) // recipe.placement.parts
    if here == 1:
        return recipe
    # Runs that differ in their weighting alone are mapped alike.
    bare = recipe._replace(averager=_PLAIN, at_sync=AtSync(), faults=None, resident=True)
    few = _first_samples(data, batch_size)
    network = jax.eval_shape(bare.task.init, jax.random.key(0))
    batch = _shapes(bare, few, batch_size)
    flops = training_flops(bare.task, batch) * len(data.shards)
    if steps is not None and flops * steps < _FLOPS:
        return _mapped(recipe, "vmap")
    loss = jax.jit(bare.task.loss).lower(*network, batch, jax.random.key(0))
    key = _fingerprint(bare, loss, len(data.shards))
    if key not in _known:
        # The first is kept unless another is clearly faster.
        first = ["map", "vmap"] if bare.placement.devices[0].platform == "cpu" else ["vmap", "map"]
        names = [*first, *(["unroll"] if here <= _FEW else [])]
        found = _recall(key)
        progress.doing("timing the ways to run replicas")
        ways = {name: _mapped(bare, name) for name in names}
        trials = {} if found in names else _trials(ways, few, batch_size, _steps(flops))
        _known[key] = _fastest(trials) if trials else str(found)
        if len(trials) in (0, len(names)):  # else memory decided, of which another run may have more
            _remember(key, _known[key])
    return _mapped(recipe, _known[key])


def _steps(flops: float) -> int:
    """Local steps in a trial of a network whose steps take so many operations."""
    return int(min(max(_FLOPS // flops, _FEWEST), _MOST)) if flops else _MOST


def _mapped(recipe: Recipe, name: str) -> Recipe:
    return recipe._replace(placement=placement.remapped(recipe.placement, name))


def _first_samples(data: ShardedData, batch_size: int) -> ShardedData:
    """The first batch of every shard, so that a trial does not copy the whole split."""
    chosen = np.concatenate([shard[:batch_size] for shard in data.shards])
    shards = np.split(np.arange(len(chosen)), len(data.shards))
    return data._replace(train=Split(data.train.x[chosen], data.train.y[chosen]), shards=tuple(shards))


def _shapes(recipe: Recipe, data: ShardedData, batch_size: int) -> Batch:
    """Shapes and dtypes of one replica's batch, as the network gets it."""
    x, y = data.train.x[:batch_size], as_targets(data.train.y[:batch_size])
    return jax.eval_shape(lambda x, y: Batch(recipe.prepare(x), y), x, y)


def _where() -> list[dict]:
    """What else the speed of a program depends on: the release of this library, say, but not its commit, which seldom
    changes what is fastest."""
    return [machine.hardware(), machine.versions() | {"wavg-jax": machine.release()}, machine.environment()]


def _fingerprint(recipe: Recipe, loss: jax.stages.Lowered, replicas: int) -> str:
    """Differs for programs that may differ in their fastest map."""
    optimizer = jax.eval_shape(recipe.inner.init, loss.in_avals[0][0])
    what = [replicas, len(recipe.placement.devices), recipe.augment is not None, recipe.task.cpu_forms]
    text = json.dumps([loss.as_text(), str(optimizer), what, _where()])
    return hashlib.sha256(text.encode()).hexdigest()


def _trials(
    recipes: dict[str, Recipe], data: ShardedData, batch_size: int, steps: int
) -> dict[str, Callable[[], float]]:
    """For recipes that differ only in their map: functions that take a few local steps and return the seconds.

    They go on from one another's, so that one copy of the replicas is held, as in a round; those without room are left
    out.
    """
    one = next(iter(recipes.values()))
    work = make_work(one, data, seed=0, first_step=0, longest=steps, batch_size=batch_size)
    shapes, state = programs_of(one, len(data.shards)).begin(jax.random.key(0))
    where, held = one.placement.devices, held_bytes(shapes)
    check_fits(where, held)
    given = (work, put_shared(one, data))
    requests = (
        (jax.jit(local_phase(recipe), donate_argnums=0), shapes.replicas, *given) for recipe in recipes.values()
    )
    trains = compiled_together(*requests, keep=False)
    needs = [held + (train.temporary or 0) for train in trains]
    check_fits(where, min(needs))
    fitting = [fits(where, need) for need in needs]
    replicas = state().replicas

    def trial(train: Callable) -> Callable[[], float]:
        def run() -> float:
            nonlocal replicas
            start = time.perf_counter()
            replicas, _ = jax.block_until_ready(train(replicas, *given))
            return time.perf_counter() - start

        return run

    return {name: trial(train.call) for name, train, small in zip(recipes, trains, fitting, strict=True) if small}


def _fastest(trials: dict[str, Callable[[], float]]) -> str:
    """The name of the first trial, or of the fastest of those that are faster beyond chance, by runs in turn."""
    for run in trials.values():
        run()  # the first is slower: memory is touched for the first time
    begun, turns = time.perf_counter(), 0
    times: dict[str, list[float]] = {name: [] for name in trials}
    while len(times) > 1:
        for name in list(times)[:: 1 if turns % 2 else -1]:  # in either order, lest one way profit from its place
            times[name].append(trials[name]())
        turns += 1
        if turns == 2:  # the better of two, since a busy machine may double the time of one
            best = min(min(seconds) for seconds in times.values())
            times = {name: seconds for name, seconds in times.items() if min(seconds) <= _HOPELESS * best}
        passed = time.perf_counter() - begun
        if (passed >= _SECONDS and turns >= _TURNS) or passed >= _LONGEST:
            break
    kept, *others = times
    leads = {name: np.array(times[kept]) / np.array(times[name]) for name in others}
    leads = {name: lead for name, lead in leads.items() if _clear(lead)}
    return max(leads, key=lambda name: float(np.median(leads[name])), default=kept)


def _clear(lead: np.ndarray) -> bool:
    """Whether paired ratios of times tell of a lead: large enough, and won too often for chance (a sign test)."""
    turns, won = len(lead), int((lead > 1).sum())
    chance = sum(math.comb(turns, wins) for wins in range(won, turns + 1)) / 2**turns
    return bool(np.median(lead) >= _LEAD) and chance <= _CHANCE


def _file() -> pathlib.Path | None:
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return None if not folder or "://" in folder else pathlib.Path(folder) / FILE


def _stored() -> dict[str, Any]:
    path = _file()
    # A file that cannot be read is no loss: the ways are timed again.
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text()) if path is not None else {}
        return found if isinstance(found, dict) else {}
    return {}


def _recall(key: str) -> str | None:
    return _stored().get(key)


def _remember(key: str, name: str) -> None:
    path = _file()
    if path is None or _recall(key) == name:
        return
    # A concurrent write may get lost; that process times again.
    with contextlib.suppress(WorkdirError):
        write_atomically(path, json.dumps(_stored() | {key: name}, indent=0).encode())
