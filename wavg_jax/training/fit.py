"""fit(): the whole run, round after round, with rows, checkpoints and resumption."""

import contextlib
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax.arguments import (
    FUNCTION,
    JSON,
    MAPPING,
    NONE,
    OPTIMIZER,
    PATH,
    TEXT,
    YES_OR_NO,
    Rule,
    as_whole,
    check,
    check_all,
    check_fields,
    each,
    either,
    instance,
    takes,
    whole,
)
from wavg_jax.base import Averager, Batch, Diverged, PyTree, SettingsError, Stopped, Task, TrainState, WavgWarning
from wavg_jax.data import ShardedData, Split, round_indices
from wavg_jax.devices import mapping, processes
from wavg_jax.rounds import guard, score
from wavg_jax.rounds.exchange import warn_of_wire
from wavg_jax.rounds.faults import Faults, check_replicas
from wavg_jax.rounds.forward import Forward, metrics, metrics_and_logits
from wavg_jax.rounds.round import AVERAGER, TASK
from wavg_jax.rounds.score import SCORING, Scoring
from wavg_jax.rounds.sync import AT_SYNC, AtSync
from wavg_jax.storage.journal import open_journal
from wavg_jax.storage.rows import check_name, check_writable, recorded_run
from wavg_jax.storage.schema import ROUND_ENTRIES, Row, lost_at_the_end, plain
from wavg_jax.training import automap, liveness, loop
from wavg_jax.training import progress as bars
from wavg_jax.training.batches import as_targets, check_room
from wavg_jax.training.callbacks import Callback, as_callbacks, started
from wavg_jax.training.engine import Engine, in_process
from wavg_jax.training.interrupt import stop_requests
from wavg_jax.training.recipe import Layout, Recipe, make_recipe
from wavg_jax.training.run import Plan, Run, evaluated
from wavg_jax.training.schedule import Schedule, fixed


class Store(NamedTuple):
    """What a run writes to its `workdir`.

    Attributes:
      name: of the run within the folder; no path.
      checkpoint_every: rounds between checkpoints; the end of the run and SIGTERM or Ctrl-C save one too.
      facts: further entries of the run's first row, such as `arm`.
      settings: further settings that must agree when the run resumes.
      at_end: `(params, mutable) -> entries` of the run's last row, made of what the run is judged by, such as a sample
        of what a language model writes; every process calls it. Entries of the row's own stay as they are.
    """

    name: str = "run"
    checkpoint_every: int = 10
    facts: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None
    at_end: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None


class Result(NamedTuple):
    """What a run leaves.

    Attributes:
      params: the global parameters after the last blend, or their average over rounds if the run keeps one.
      mutable: the mutable collections that belong to them, such as BatchNorm statistics.
      state: the whole training state.
      rows: the run's rows, as in `rows.jsonl`; see `wavg_jax.storage.schema`.
      stopped: whether SIGTERM or Ctrl-C has come, so that nothing further should begin.
    """

    params: PyTree
    mutable: PyTree
    state: TrainState
    rows: list[Row]
    stopped: bool = False


_ARGUMENTS = {
    "task": TASK,
    "data": instance(ShardedData, "sharded data: wavg_jax.data.shard makes them of a data set"),
    "averager": AVERAGER,
    "inner": OPTIMIZER,
    "local_steps": either(whole(1), instance(Schedule, "one of wavg_jax.schedule")),
    "rounds": whole(1),
    "batch_size": whole(1),
    "seed": whole(0, 2**32 - 1),  # larger ones would repeat smaller ones
    "scoring": instance(Scoring, "a wavg_jax.Scoring"),
    "at_sync": instance(AtSync, "a wavg_jax.AtSync"),
    "layout": instance(Layout, "a wavg_jax.Layout"),
    "faults": either(NONE, instance(Faults, "made by wavg_jax.faults.simulate")),
    "workdir": either(NONE, PATH),
    "resume": YES_OR_NO,
    "store": instance(Store, "a wavg_jax.Store"),
    "progress": either(YES_OR_NO, FUNCTION),
}
_DEVICES = each(instance(jax.Device, "a jax.Device"), "a number of devices, or the devices themselves", least=1)
_GROUPED: dict[str, dict[str, Rule]] = {
    "scoring": SCORING,
    "at_sync": AT_SYNC,
    "layout": {"devices": either(NONE, whole(1), _DEVICES), "resident": either(NONE, YES_OR_NO)},
    "store": {
        "name": TEXT,
        "checkpoint_every": whole(1),
        "facts": either(NONE, MAPPING),
        "settings": either(NONE, MAPPING),
        "at_end": either(NONE, FUNCTION),
    },
}


def _is_array(value: Any) -> bool:
    """Whether JAX takes it as an array of samples as it is."""
    plain = isinstance(value, np.ndarray | jax.Array) and not isinstance(value, np.ma.MaskedArray)
    if not (plain and value.ndim > 0 and value.dtype.isnative and value.dtype.kind not in "mc"):
        return False
    return bool(jnp.issubdtype(value.dtype, jnp.number)) or value.dtype == bool


def _is_split(value: Any) -> bool:
    pair = isinstance(value, Split | Batch)
    return pair and all(map(_is_array, value)) and len(value.x) == len(value.y)


_SPLIT = Rule(_is_split, "a data.Split of two arrays of plain numbers, as many targets as inputs")
_INDICES = Rule(lambda shard: _is_array(shard) and shard.ndim == 1 and shard.dtype.kind in "iu", "indices")
_DATA = {
    "name": instance(str, "a text"),
    **dict.fromkeys(("train", "heldout", "test"), _SPLIT),
    "shards": each(_INDICES, "K arrays of indices, such as wavg_jax.data.iid makes", least=1),
    "classes": either(NONE, whole(1)),
    "prepare": takes(1, "a function of inputs"),
    "augment": either(NONE, takes(2, "a function (rng, x) -> x")),
}


def fit(
    task: Task,
    data: ShardedData,
    averager: Averager,
    *,
    inner: optax.GradientTransformation,
    local_steps: int | Schedule = 50,
    rounds: int = 20,
    batch_size: int = 32,
    seed: int = 0,
    scoring: Scoring = Scoring(),  # noqa: B008 - immutable
    at_sync: AtSync = AtSync(),  # noqa: B008
    layout: Layout = Layout(),  # noqa: B008
    faults: Faults | None = None,
    workdir: str | pathlib.Path | None = None,
    resume: bool = False,
    store: Store = Store(),  # noqa: B008
    on_round: Callback | Sequence[Callback] = (),
    progress: bool | Callable[[str], None] = True,
) -> Result:
    """Trains K replicas, one per shard of `data`, and blends them after every H local steps: a loop over rounds.

    In several processes (`wavg_jax.initialize`) each calls it with the same arguments and data (else all refuse),
    trains its share of the replicas, and gets the same result; process 0 writes rows and shows progress. Callbacks and
    `progress` may differ.

    Args:
      task: the network; see `wavg_jax.models`.
      data: shards, held-out split and test split; see `wavg_jax.data.shard`. Replicas and blends are scored on the
        held-out split alone; the test split is only reported.
      averager: how the replicas become the next global parameters; see `wavg_jax.averager`.
      inner: the inner optimizer, any optax transformation. Random keys in its state become each replica's own.
      local_steps: H, steps between two blends, or a schedule of it; see `wavg_jax.schedule`.
      rounds: how many blends.
      batch_size: samples per replica and step.
      seed: of the initial parameters, the order of samples, dropout and augmentation; see `wavg_jax.rounds.keys`.
      scoring: how replicas and blends are scored, and how often the test split is evaluated.
      at_sync: how optimizer state and BatchNorm statistics carry across a blend, and smoothing over rounds.
      layout: where replicas and data live.
      faults: simulated faults of the replicas; see `wavg_jax.faults.simulate`.
      workdir: folder for `rows.jsonl` and `checkpoints/`, which needs the extra `run`; None keeps the rows in memory
        and saves nothing.
      resume: continue from the newest whole checkpoint in `workdir`, bit for bit on the same machine; start if the
        folder has no such run. Data and sizes must be those of the first part; learning rates and schemes cannot be
        compared, so put them in `Store(settings=...)`.
      store: the run's name, and what it writes.
      on_round: one callback or several, called after every round: `f(row)`, or one made by `wavg_jax.with_state`. If
        one returns True, the run is complete after that round: its last row has `stopped_early`, and `resume` returns
        it as it is. With callbacks the next round waits for them; loggers (`wavg_jax.live`) it does not wait for.
      progress: True shows a progress bar if rich is installed, False none; a function is called with one line of text
        after every round.

    Returns:
      A `Result`.

    Raises:
      SettingsError, DataError, WorkdirError, ResumeError: bad input, before anything is trained or written where
        possible.
      MissingExtra: `workdir` is given, and the extra `run` is not installed.
      Diverged: two rounds in a row, or the last one, left no replica finite, or the outer step was not finite. Its
        `result` has the last finite parameters, and a checkpoint of them is saved.
      Stopped: SIGTERM or Ctrl-C came before the last round; the round was finished and a checkpoint saved. Its `result`
        is the run so far. Only runs with a `workdir` in the main thread catch them.
    """
    return carry_out(in_process, **locals())


def carry_out(
    engine: Engine,
    *,
    task: Task,
    data: ShardedData,
    averager: Averager,
    inner: optax.GradientTransformation,
    local_steps: int | Schedule,
    rounds: int,
    batch_size: int,
    seed: int,
    scoring: Scoring,
    at_sync: AtSync,
    layout: Layout,
    faults: Faults | None,
    workdir: str | pathlib.Path | None,
    resume: bool,
    store: Store,
    on_round: Callback | Sequence[Callback],
    progress: bool | Callable[[str], None],
) -> Result:
    """`fit`, its rounds run by `engine`; all other arguments are those of `fit`."""
    _check_arguments(locals())
    for name, rule in _DATA.items():
        check(f"data.{name}", getattr(data, name), rule)
    callbacks = as_callbacks(on_round)
    extra = _entries("facts", store.facts) | {"settings": _entries("settings", store.settings)}
    if resume and workdir is None:
        raise SettingsError("resume=True needs workdir=, the folder that the first part of the run wrote")
    plan = _plan(local_steps, rounds, batch_size, seed, store.checkpoint_every, scoring.test_every)
    given = {
        "workdir": workdir and "...",
        "resume": resume,
        **store._asdict(),
        **scoring._asdict(),
        **at_sync._asdict(),
    }
    _agree(data, plan, given | layout._asdict(), extra["settings"])
    recipe = make_recipe(task, data, averager, inner, scoring=scoring, at_sync=at_sync, layout=layout, faults=faults)
    scalars = _check(plan, recipe, data)
    folder = None if workdir is None else pathlib.Path(workdir)
    check_writable(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.guarded())
        show = stack.enter_context(_shown(processes.first() and progress, plan.rounds))
        if layout.replica_map == "auto":
            recipe = _settled(recipe, data, plan, recorded_run(folder, store.name) if resume else None)
        # Compiles, and so finds what does not fit together, before anything is written.
        run = Run(recipe, data, plan, store.name, scalars, store.at_end, engine, stored=folder is not None)
        journal = stack.enter_context(open_journal(folder, store.name))
        stopped = stack.enter_context(stop_requests()) if workdir is not None else lambda: False
        with processes.meeting():
            state = journal.begin(run.describe() | extra, run.first(), resume)
            with started(callbacks, journal.rows(), show, first=processes.first()) as (waiting, tell):
                state, message = loop.train(run, journal, state, waiting, tell, stopped)
        asked = bool(processes.gather(stopped()).any())
    result = Result(*evaluated(state), state, journal.rows(), asked)
    if message is not None:
        raise Stopped(message, result)
    if lost_at_the_end(result.rows):
        outer = getattr(state.averager, "outer", None) is not None
        raise Diverged(liveness.explain(result.rows, folder, outer=outer), result)
    return result


def _agree(data: ShardedData, plan: Plan, given: dict[str, Any], settings: Row) -> None:
    """Raises SettingsError unless all processes were given the same, as far as it can be compared before compiling."""
    numbers = {name: value for name, value in (given | plan._asdict()).items() if isinstance(value, _PLAIN)}
    sizes = {
        "local_steps": plan.schedule.longest,
        "data.name": data.name,
        "data.shards of sizes": [len(shard) for shard in data.shards],
        "data.train.x of": (data.train.x.shape, str(data.train.x.dtype)),
        "data.heldout.x of": data.heldout.x.shape,
        "data.test.x of": data.test.x.shape,
    }
    processes.agree(numbers | sizes)
    processes.agree(plain(settings))


_PLAIN = (int, str, type(None))
"""Types that can be compared; functions and optimizers come with the programs made of them."""


def _check_arguments(given: Mapping[str, Any]) -> None:
    check_all(_ARGUMENTS, given)
    for group, rules in _GROUPED.items():
        check_fields(given[group], rules)
    guard.check(given["scoring"].guard, given["at_sync"].fragments)
    mapping.check(given["layout"].replica_map, "auto")
    check_name(given["store"].name)


def _plan(local_steps: int | Schedule, *counts: int) -> Plan:
    schedule = local_steps if isinstance(local_steps, Schedule) else fixed(local_steps)
    return Plan(schedule, *(as_whole(name, n) for name, n in zip(Plan._fields[1:], counts, strict=True)))


def _entries(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Entries of a row; SettingsError if JSON cannot hold one."""
    for key, value in (given or {}).items():
        check(f"a key of {name}", key, TEXT)
        check(f"{name}[{key!r}]", value, JSON)
    return dict(given or {})


@contextlib.contextmanager
def _shown(progress: bool | Callable[[str], None], rounds: int) -> Iterator[Callable[[Row], Any]]:
    """Yields the function to call with every new row, to show it."""
    if callable(progress):
        yield lambda row: progress(bars.caption(row))
    elif progress:
        with bars.bar(rounds) as advance:
            yield lambda row: advance(bars.caption(row))
    else:
        yield lambda row: None


def _settled(recipe: Recipe, data: ShardedData, plan: Plan, recorded: Row | None) -> Recipe:
    """The recipe with the fastest replica map, or with that of the first part of the run."""
    decided = None if recorded is None else recorded["replica_map"]
    steps = plan.rounds * plan.schedule.longest
    return automap.settle(recipe, data, batch_size=plan.batch_size, steps=steps, decided=decided)


_MANY = 256
"""Replicas above which a warning says that compiling takes long: 64 take 3 seconds on 2 cores, 256 take 12."""


def _check(plan: Plan, recipe: Recipe, data: ShardedData) -> tuple[str, ...]:
    """Refuses what cannot work before anything is compiled, and returns the names of the task's scalar metrics."""
    check_replicas(recipe.faults, len(data.shards))
    warn_of_wire(recipe.averager, recipe.at_sync.wire, len(data.shards), recipe.placement)
    check_room(recipe, data, plan.schedule.longest, plan.batch_size)
    if len(data.shards) > _MANY:
        warnings.warn(
            f"the program writes out the blend of {len(data.shards)} replicas one by one: compiling may take minutes",
            WavgWarning,
            stacklevel=3,
        )
    round_indices(data.shards, seed=plan.seed, first_step=0, local_steps=1, batch_size=plan.batch_size)  # its errors
    scalars = _metrics(recipe, data)
    score.check_measurable(score.asked(recipe.averager.needs, recipe.scoring), scalars)
    return scalars


def _metrics(recipe: Recipe, data: ShardedData) -> tuple[str, ...]:
    """Traces one sample through the network, and so finds what does not fit together."""
    one = Batch(
        *(jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for a in (data.train.x, as_targets(data.train.y[:1])))
    )

    def trace(rng: jax.Array, one: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        network, x = recipe.task.init(rng), recipe.prepare(one.x)
        forward = Forward(recipe.task, recipe.prepare)
        score.scalar_metrics(forward, *network, one)  # its errors
        if recipe.scoring.diagnose or "logits" in recipe.averager.needs:
            metrics_and_logits(forward, *network, one)  # its errors
        return recipe.task.predict(*network, x), metrics(forward, *network, one)

    logits, found = jax.eval_shape(trace, jax.random.key(0), one)
    arrays = [name for name, x in found.items() if x.ndim]
    if taken := sorted(set(arrays) & set(ROUND_ENTRIES)):
        raise SettingsError(
            f"the task's metric {taken[0]!r} has the name of an entry of rows; rename it in Task.measure"
        )
    # Hand-made tasks may predict anything; what has one more axis than its labels are logits over the classes.
    shape: tuple[int, ...] = getattr(logits, "shape", ())
    if data.classes is not None and shape[:-1] == one.y.shape and shape[-1] != data.classes:
        raise SettingsError(
            f"the network outputs {shape[1:]} for a sample, the data have {data.classes} classes; make "
            "them equal (the data set takes classes=)"
        )
    return tuple(name for name in found if name not in arrays)
