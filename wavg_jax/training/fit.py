"""fit(): the whole run, round after round, with rows, checkpoints and resumption."""

import contextlib
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from wavg_jax.arguments import (
    FLOATING,
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
    each,
    either,
    has,
    instance,
    takes,
    whole,
)
from wavg_jax.base import Averager, Diverged, PyTree, SettingsError, Task, TrainState, WavgWarning
from wavg_jax.data import ShardedData, round_indices
from wavg_jax.devices import mapping
from wavg_jax.devices.placement import has_room, place
from wavg_jax.rounds import policy
from wavg_jax.rounds import score as scoring
from wavg_jax.rounds.faults import Faults
from wavg_jax.rounds.recipe import Recipe, check_room
from wavg_jax.storage.journal import open_journal
from wavg_jax.storage.rows import Row, check_name, check_writable, lost_at_the_end, recorded_run
from wavg_jax.training import automap, liveness, loop, progress
from wavg_jax.training.interrupt import stop_requests
from wavg_jax.training.run import Plan, Run, evaluated
from wavg_jax.training.schedule import Schedule, fixed


class Result(NamedTuple):
    """What a run leaves.

    Attributes:
      params: the global parameters after the last blend; their average over rounds if the run keeps one.
      mutable: the mutable collections that belong to them, such as BatchNorm statistics.
      state: the whole training state.
      rows: the run's rows, as in `rows.jsonl`; see `wavg_jax.storage.rows`.
      stopped: whether SIGTERM or Ctrl-C came in the last round, so that nothing further should be begun.
    """

    params: PyTree
    mutable: PyTree
    state: TrainState
    rows: list[Row]
    stopped: bool = False


_POLICY = takes(2, "a policy (stacked, sync), such as policy.keep; reestimate makes one: call it, policy.reestimate(8)")
_ARGUMENTS = {
    "task": has("a Task: wavg_jax.models.from_linen, from_nnx and classifier make one", "init", "loss", "predict"),
    "data": instance(ShardedData, "sharded data: wavg_jax.data.shard cuts a data set into them"),
    "averager": has("an Averager: wavg_jax.averager(weighting) makes one", "init", "update", "needs", "restart"),
    "inner": OPTIMIZER,
    "--local_steps": either(whole(1), instance(Schedule, "one of wavg_jax.schedule")),
    "--rounds": whole(1),
    "--batch_size": whole(1),
    "--seed": whole(0, 2**32 - 1),  # larger ones would repeat smaller ones
    "--score_samples": either(NONE, whole(1)),
    "score_dtype": either(NONE, FLOATING),
    "smoothing": either(NONE, OPTIMIZER),
    "faults": either(NONE, instance(Faults, "one of wavg_jax.faults.faults")),
    "opt_state_at_sync": _POLICY,
    "stats_at_sync": _POLICY,
    "--devices": either(NONE, whole(1)),
    "resident": either(NONE, YES_OR_NO),
    "--workdir": either(NONE, PATH),
    "name": TEXT,
    "--checkpoint_every": whole(1),
    "evaluate_every": whole(1),
    "resume": YES_OR_NO,
    "facts": either(NONE, MAPPING),
    "settings": either(NONE, MAPPING),
    "on_round": either(NONE, FUNCTION),
    "chunk": whole(1),
}
_INDICES = Rule(lambda shard: isinstance(shard, np.ndarray) and shard.ndim == 1 and shard.dtype.kind in "iu", "indices")
_SHARDS = each(_INDICES, "K arrays of indices, as those of wavg_jax.data.iid", least=1)


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
    score_samples: int | None = None,
    score_dtype: Any = None,
    smoothing: optax.GradientTransformation | None = None,
    faults: Faults | None = None,
    opt_state_at_sync: policy.Policy = policy.keep,
    stats_at_sync: policy.Policy = policy.average,
    devices: int | None = None,
    replica_map: str = "auto",
    resident: bool | None = None,
    workdir: str | pathlib.Path | None = None,
    name: str = "run",
    checkpoint_every: int = 10,
    evaluate_every: int = 1,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    on_round: Callable[[Row], None] | None = None,
    chunk: int = 1000,
) -> Result:
    """Trains K replicas, one per shard of `data`, and blends them after every H local steps.

    Args:
      task: the network; see `wavg_jax.models`.
      data: shards, held-out split and test split; see `wavg_jax.data.shard`. The held-out split alone is scored; the
        test split is only reported.
      averager: how the replicas become the next global parameters; see `wavg_jax.averager`.
      inner: the inner optimizer, any optax transformation. Random keys in its state become each replica's own.
      local_steps: H, steps between two blends, or a schedule of it; see `wavg_jax.schedule`.
      rounds: how many blends.
      batch_size: samples per replica and step.
      seed: of the initial parameters, the order of samples, dropout and augmentation; see `wavg_jax.rounds.keys`.
      score_samples: held-out samples on which a round's replicas and blends are scored, another subset in each round;
        None scores all of them. Scoring costs time in proportion.
      score_dtype: dtype of the scoring passes, such as `jnp.bfloat16` where the hardware is faster in it; None is the
        parameters' own.
      smoothing: average of the global parameters over rounds, such as `optax.ema(0.9)` or `wavg_jax.smoothing.swa()`;
        it is what is evaluated and returned, with BatchNorm-style statistics re-estimated for it.
      faults: simulated faults of the replicas; see `wavg_jax.faults`.
      opt_state_at_sync: `policy.keep`, `average` or `reset` for the inner optimizer's state.
      stats_at_sync: `policy.average`, `keep`, `reset` or `reestimate(steps)` for BatchNorm-style statistics.
      devices: number of devices; by default as many of those at hand as divide K.
      replica_map: how the replicas of one device are run, a name in `devices.mapping.MAPS`; "auto" times the ways once
        and takes the fastest. The results are equal up to rounding.
      resident: whether the training split is copied to the devices as a whole; if not, every round's batches are sent
        there while the round before runs. None decides by its size.
      workdir: folder for `rows.jsonl` and `checkpoints/`; None keeps the rows in memory and saves nothing.
      name: of this run within the folder; no path.
      checkpoint_every: rounds between checkpoints; one is also saved at the end and at SIGTERM or Ctrl-C.
      evaluate_every: rounds between evaluations on the test split; the last round is always evaluated. Rows in between
        have no test metrics.
      resume: go on from the newest whole checkpoint in `workdir`, bit for bit on the same machine; start if there is no
        such run. Data and sizes are compared with the first part's; learning rates and schemes cannot be, so put them
        in `settings`.
      facts: further entries of the run's first row, such as `arm`.
      settings: further settings that must agree when the run is resumed.
      on_round: called with every new row; None shows a progress bar.
      chunk: samples at a time when scoring and testing, for memory.

    Returns:
      A `Result`.

    Raises:
      SettingsError, DataError, WorkdirError, ResumeError: bad input, before anything is trained or written where that
        can be known.
      Diverged: no replica came through two rounds in a row, or the last one, with finite numbers, or the outer step was
        not finite. Its `result` has the last parameters that were, and a checkpoint of them is saved.
      Stopped: SIGTERM or Ctrl-C came before the last round; the round was finished and a checkpoint saved.
    """
    check_all(_ARGUMENTS, locals())
    check("data.shards", data.shards, _SHARDS)
    mapping.check(replica_map, "auto")
    check_name(name)
    extra = _entries("facts", facts) | {"settings": _entries("settings", settings)}
    if resume and workdir is None:
        raise SettingsError("resume needs a workdir (--workdir), the folder that the first part of the run wrote")
    plan = _plan(local_steps, rounds, batch_size, seed, checkpoint_every, evaluate_every, chunk)
    recipe = make_recipe(
        task,
        data,
        averager,
        inner,
        opt_state_at_sync,
        stats_at_sync,
        devices,
        "vmap" if replica_map == "auto" else replica_map,
        resident=resident,
        score_samples=score_samples,
        score_dtype=score_dtype,
        smoothing=smoothing,
        faults=faults,
    )
    _check(plan, recipe, data)
    folder = None if workdir is None else pathlib.Path(workdir)
    check_writable(folder)
    with contextlib.ExitStack() as stack:
        if on_round is None:
            on_round = stack.enter_context(_shown_by_a_bar(plan.rounds))
        if replica_map == "auto":
            recipe = _settled(recipe, data, plan, recorded_run(folder, name) if resume else None)
        # Compiles, and so finds what does not fit together, before anything is written.
        run = Run(recipe, data, plan, name)
        journal = stack.enter_context(open_journal(folder, name))
        stopped = stack.enter_context(stop_requests()) if workdir is not None else lambda: False
        state = journal.begin(run.describe() | extra, run.initial, resume)
        state = loop.train(run, journal, state, on_round, stopped)
    result = Result(*evaluated(state), state, journal.rows(), stopped())
    if lost_at_the_end(result.rows):
        raise Diverged(
            liveness.explain(result.rows, folder, outer=getattr(state.averager, "outer", None) is not None), result
        )
    return result


def _plan(local_steps: int | Schedule, *counts: int) -> Plan:
    schedule = local_steps if isinstance(local_steps, Schedule) else fixed(local_steps)
    return Plan(schedule, *(as_whole(name, n) for name, n in zip(Plan._fields[1:], counts, strict=True)))


def _entries(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Entries of a row; SettingsError if one could not be written."""
    for key, value in (given or {}).items():
        check(f"a key of {name}", key, TEXT)
        check(f"{name}[{key!r}]", value, JSON)
    return dict(given or {})


@contextlib.contextmanager
def _shown_by_a_bar(rounds: int) -> Iterator[Callable[[Row], None]]:
    """What is called with every new row, to show it."""
    with progress.bar(rounds) as advance:
        yield lambda row: advance(caption(row))


def _settled(recipe: Recipe, data: ShardedData, plan: Plan, recorded: Row | None) -> Recipe:
    """The recipe with its replicas run in the fastest way, or in that of the first part of the run."""
    decided = None if recorded is None else recorded["replica_map"]
    steps = plan.rounds * plan.schedule.longest
    return automap.settle(recipe, data, batch_size=plan.batch_size, steps=steps, decided=decided)


def caption(row: Row) -> str:
    """What a progress bar says after a round."""
    accuracy, loss = row["test_accuracy"], row["train_loss"]
    if accuracy is not None:
        return f"{row['run']}: test accuracy {100 * accuracy:.1f} %"
    return f"{row['run']}: " + ("no replica alive" if loss is None else f"training loss {loss:.3f}")


def make_recipe(
    task: Task,
    data: ShardedData,
    averager: Averager,
    inner: optax.GradientTransformation,
    opt_state_at_sync: policy.Policy = policy.keep,
    stats_at_sync: policy.Policy = policy.average,
    devices: int | None = None,
    replica_map: str = "vmap",
    resident: bool | None = None,
    **options: Any,
) -> Recipe:
    """Puts together what a round of `fit` with these arguments is made of; `replica_map` is not "auto", for which there
    is `wavg_jax.training.automap`.

    `options` are `fit`'s `score_samples`, `score_dtype`, `smoothing` and `faults`.
    """
    where = place(len(data.shards), devices, replica_map)
    return Recipe(
        task,
        averager,
        inner,
        data.prepare,
        data.augment,
        opt_state_at_sync,
        stats_at_sync,
        where,
        resident=has_room(where, data.train.x.nbytes) if resident is None else resident,
        **options,
    )


_MANY = 256
"""Replicas above which it is said that compiling takes long: 64 take 3 seconds on 2 cores, 256 take 12."""


def _check(plan: Plan, recipe: Recipe, data: ShardedData) -> None:
    """Refuses what cannot work before anything is compiled."""
    if recipe.faults is not None and len(recipe.faults.speed) != len(data.shards):
        raise SettingsError(f"the faults are of {len(recipe.faults.speed)} replicas, there are {len(data.shards)}")
    check_room(recipe, data, plan.schedule.longest, plan.batch_size)
    if len(data.shards) > _MANY:
        warnings.warn(
            f"the blend of {len(data.shards)} replicas is written out one by one: compiling it may take minutes",
            WavgWarning,
            stacklevel=3,
        )
    scoring.measurable(recipe.averager.needs)
    round_indices(data.shards, seed=plan.seed, first_step=0, local_steps=1, batch_size=plan.batch_size)  # its errors
    x = jax.eval_shape(recipe.prepare, jax.ShapeDtypeStruct((1, *data.train.x.shape[1:]), data.train.x.dtype))
    logits = jax.eval_shape(lambda rng, x: recipe.task.predict(*recipe.task.init(rng), x), jax.random.key(0), x)
    if logits.shape != (1, data.classes):
        raise SettingsError(
            f"the network outputs {logits.shape[1:]} for a sample, the data have {data.classes} classes"
        )
