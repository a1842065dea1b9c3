"""fit(): the whole run, round after round, with rows, checkpoints and resumption."""

import contextlib
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from wavg_jax import machine, metrics, policy, progress, signals, tree
from wavg_jax.base import Averager, PyTree, SettingsError, Stopped, Task, TrainState
from wavg_jax.data import ShardedData, round_indices
from wavg_jax.faults import Faults
from wavg_jax.interrupt import stop_requests
from wavg_jax.journal import Journal, open_journal
from wavg_jax.placement import place, put
from wavg_jax.programs import compiled, programs
from wavg_jax.recipe import Recipe, Work, make_work, put_shared, steps_taken
from wavg_jax.records import Row, check_writable
from wavg_jax.rounds import RoundLog
from wavg_jax.schedule import Past, Schedule, fixed


class Result(NamedTuple):
    """What a run leaves.

    Attributes:
      params: the global parameters after the last blend; their average over rounds if the run keeps one.
      mutable: the mutable collections that belong to them, such as BatchNorm statistics.
      state: the whole training state.
      rows: the run's rows, as in `rows.jsonl`; see `wavg_jax.records`.
    """

    params: PyTree
    mutable: PyTree
    state: TrainState
    rows: list[Row]


class Plan(NamedTuple):
    """The numbers of a run; see `fit` for each."""

    schedule: Schedule
    rounds: int
    batch_size: int
    seed: int
    checkpoint_every: int
    evaluate_every: int
    chunk: int


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
      inner: the inner optimizer, any optax transformation.
      local_steps: H, steps between two blends, or a schedule of it; see `wavg_jax.schedule`.
      rounds: how many blends.
      batch_size: samples per replica and step.
      seed: of the initial parameters, the order of samples, dropout and augmentation.
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
      workdir: folder for `rows.jsonl` and `checkpoints/`; None keeps the rows in memory and saves nothing.
      name: of this run within the folder.
      checkpoint_every: rounds between checkpoints; one is also saved at the end and at SIGTERM or Ctrl-C.
      evaluate_every: rounds between evaluations on the test split; the last round is always evaluated. Rows in between
        have no test metrics.
      resume: go on from the run's newest checkpoint in `workdir`, bit for bit; start if there is no such run. Data and
        sizes are compared with the first part's; learning rates and schemes cannot be, so put them in `settings`.
      facts: further entries of the run's first row, such as `arm`.
      settings: further settings that must agree when the run is resumed.
      on_round: called with every new row; None shows a progress bar.
      chunk: samples at a time when scoring and testing, for memory.

    Returns:
      A `Result`.

    Raises:
      SettingsError, DataError, WorkdirError, ResumeError: bad input, before anything is trained or written where that
        can be known.
      Stopped: SIGTERM or Ctrl-C came; the round was finished and a checkpoint saved.
    """
    schedule = local_steps if isinstance(local_steps, Schedule) else fixed(local_steps)
    plan = Plan(schedule, rounds, batch_size, seed, checkpoint_every, evaluate_every, chunk)
    recipe = make_recipe(
        task,
        data,
        averager,
        inner,
        opt_state_at_sync,
        stats_at_sync,
        devices,
        score_samples=score_samples,
        score_dtype=score_dtype,
        smoothing=smoothing,
        faults=faults,
    )
    _check(plan, recipe, data, resume and workdir is None)
    folder = None if workdir is None else pathlib.Path(workdir)
    check_writable(folder)
    run = _Run(
        recipe, data, plan, name
    )  # compiles, and so finds what does not fit together, before anything is written
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(open_journal(folder, name))
        stopped = stack.enter_context(stop_requests()) if workdir is not None else lambda: False
        if on_round is None:
            advance = stack.enter_context(progress.bar(rounds))
            on_round = lambda row: advance(caption(row))  # noqa: E731
        first = run.describe() | dict(facts or {})
        first["settings"] = dict(settings or {})
        state = journal.begin(first, run.initial, resume)
        state = _train(run, journal, state, on_round, stopped)
    return Result(*evaluated(state), state, journal.rows())


def evaluated(state: TrainState) -> tuple[PyTree, PyTree]:
    """The parameters and mutable collections that a run is judged by: the global ones, or their average over rounds."""
    return (state.params, state.mutable) if state.smoothed is None else state.smoothed[:2]


def caption(row: Row) -> str:
    """What a progress bar says after a round."""
    accuracy = row["test_accuracy"]
    tested = f"training loss {row['train_loss']:.3f}" if accuracy is None else f"test accuracy {100 * accuracy:.1f} %"
    return f"{row['run']}: {tested}"


def make_recipe(
    task: Task,
    data: ShardedData,
    averager: Averager,
    inner: optax.GradientTransformation,
    opt_state_at_sync: policy.Policy = policy.keep,
    stats_at_sync: policy.Policy = policy.average,
    devices: int | None = None,
    replica_map: str = "vmap",
    **options: Any,
) -> Recipe:
    """Puts together what a round of `fit` with these arguments is made of.

    `options` are `fit`'s `score_samples`, `score_dtype`, `smoothing` and `faults`.
    """
    return Recipe(
        task,
        averager,
        inner,
        data.prepare,
        data.augment,
        opt_state_at_sync,
        stats_at_sync,
        place(len(data.shards), devices, replica_map),
        **options,
    )


def _check(plan: Plan, recipe: Recipe, data: ShardedData, resume_without_workdir: bool) -> None:
    """Refuses what cannot work before anything is compiled."""
    lowest = {"rounds": 1, "batch_size": 1, "seed": 0, "checkpoint_every": 1, "evaluate_every": 1, "chunk": 1}
    given = plan._asdict() | {"score_samples": recipe.score_samples}
    for option, least in (lowest | {"score_samples": 1}).items():
        if given[option] is not None and given[option] < least:
            raise SettingsError(f"--{option} is {given[option]}; it must be at least {least}")
    if recipe.faults is not None and len(recipe.faults.speed) != len(data.shards):
        raise SettingsError(f"the faults are of {len(recipe.faults.speed)} replicas, there are {len(data.shards)}")
    if plan.seed >= 2**32:
        raise SettingsError(f"--seed is {plan.seed}; seeds are below 2**32, larger ones would repeat smaller ones")
    if resume_without_workdir:
        raise SettingsError("resume needs a workdir (--workdir), the folder that the first part of the run wrote")
    signals.measurable(recipe.averager.needs)
    round_indices(
        data.shards, seed=plan.seed, first_step=0, local_steps=plan.schedule.longest, batch_size=plan.batch_size
    )  # for its errors
    x = jax.eval_shape(recipe.prepare, jax.ShapeDtypeStruct((1, *data.train.x.shape[1:]), data.train.x.dtype))
    logits = jax.eval_shape(lambda rng, x: recipe.task.predict(*recipe.task.init(rng), x), jax.random.key(0), x)
    if logits.shape != (1, data.classes):
        raise SettingsError(
            f"the network puts out {logits.shape[1:]} for a sample, the data have {data.classes} classes"
        )


class _Run:
    """One run's data on the devices, and its compiled programs."""

    def __init__(self, recipe: Recipe, data: ShardedData, plan: Plan, name: str):
        self.recipe, self.data, self.plan, self.name = recipe, data, plan, name
        self.replicas = len(data.shards)
        self.shared = put_shared(recipe, data, plan.chunk)
        self.test = put(signals.chunked(data.test.x, data.test.y, plan.chunk), recipe.placement.shared)
        program = programs(recipe, self.replicas)
        rng = put(jax.random.key(plan.seed), recipe.placement.shared)
        self.initial: TrainState = program.init(rng)
        self.step = compiled(program.run, self.initial, self.work(0, 1), self.shared)
        self.predict = compiled(program.predict, *evaluated(self.initial), self.test)

    def work(self, first_step: int, steps: int) -> Work:
        """What the replicas are given to do in a round of so many steps, on the devices."""
        plan = self.plan
        return make_work(
            self.recipe,
            self.data,
            seed=plan.seed,
            first_step=first_step,
            longest=plan.schedule.longest,
            batch_size=plan.batch_size,
            steps=steps if plan.schedule.varies else None,
        )

    def evaluate(self, state: TrainState) -> metrics.Quality:
        """Quality on the test split of what the run is judged by. Off the clock."""
        labels = self.data.test.y
        logits = np.asarray(self.predict.call(*evaluated(state), self.test))
        return metrics.evaluate(logits.reshape(-1, logits.shape[-1])[: len(labels)], labels)

    def describe(self) -> Row:
        """The run's first row, but for what the caller adds."""
        data, plan, initial = self.data, self.plan, self.initial
        per_replica = tree.nbytes(initial.params) + tree.nbytes(initial.mutable)
        if self.recipe.opt_state_at_sync is policy.average:
            per_replica += tree.nbytes(self.recipe.inner.init(initial.params))
        return {
            "kind": "run",
            "run": self.name,
            "arm": self.name,
            "seed": plan.seed,
            "dataset": data.name,
            "classes": data.classes,
            "train_samples": len(data.train.y),
            "heldout_samples": len(data.heldout.y),
            "test_samples": len(data.test.y),
            "shard_sizes": [len(shard) for shard in data.shards],
            "noisy_shards": data.noisy,
            "data_crc": _fingerprint(data),
            "replicas": self.replicas,
            "devices": len(self.recipe.placement.devices),
            "replica_map": self.recipe.placement.replica_map,
            "local_steps": plan.schedule.longest,
            "batch_size": plan.batch_size,
            "rounds": plan.rounds,
            "samples_per_round": self.replicas * plan.schedule.longest * plan.batch_size,
            "parameters": tree.count(initial.params),
            "bytes_per_round": 2 * self.replicas * per_replica if self.replicas > 1 else 0,
            "compile_seconds": self.step.seconds + self.predict.seconds,
            "score_samples": self.recipe.score_samples,
            "faults": None if self.recipe.faults is None else self.recipe.faults._asdict(),
            "critical_path": None,
            "target_accuracy": None,
            "hardware": machine.hardware(),
            "versions": machine.versions(),
        }


def _fingerprint(data: ShardedData) -> int:
    """Tells apart data that differ in labels, splits or shards."""
    return zlib.crc32(b"".join(part.tobytes() for part in (data.train.y, data.heldout.y, data.test.y, *data.shards)))


def _train(
    run: _Run,
    journal: Journal,
    state: TrainState,
    on_round: Callable[[Row], None],
    stopped: Callable[[], bool],
) -> TrainState:
    """The loop over rounds; a round's clock stops when its blend is done."""
    plan = run.plan
    done = int(state.round)
    elapsed = journal.rows()[-1]["elapsed"] if done else 0.0
    for number in range(done + 1, plan.rounds + 1):
        past = _past(journal.rows()[1:])
        steps = plan.schedule.steps(past)
        journal.wait()  # a checkpoint that is still being written would be on the clock of this round
        start = time.perf_counter()
        work = run.work(past.steps, steps)
        state, log = run.step.call(state, work, run.shared)
        jax.block_until_ready((state, log))
        seconds = time.perf_counter() - start
        elapsed += seconds
        row = _round_row(run, number, steps, jax.device_get((log, steps_taken(work))), state)
        row["samples"] += journal.rows()[-1].get("samples", 0)
        journal.append(row | {"seconds": seconds, "elapsed": elapsed})
        on_round(journal.rows()[-1])
        stop = stopped()
        if number % plan.checkpoint_every == 0 or number == plan.rounds or stop:
            journal.save(state)
        if stop:
            journal.wait()
            raise Stopped(
                f"stopped after round {number} of {run.name!r}, with a checkpoint; go on with the same settings, the "
                f"same --workdir ({journal.workdir}) and --resume"
            )
    return state


def _past(rows: list[Row]) -> Past:
    """What a schedule of H may look at, from the rows of the rounds done."""
    losses = tuple(float("nan") if row["train_loss"] is None else row["train_loss"] for row in rows)
    return Past(len(rows), sum(row["local_steps"] for row in rows), losses)


def _round_row(run: _Run, number: int, steps: int, reported: tuple[RoundLog, np.ndarray], state: TrainState) -> Row:
    """A round's row, but for the clocks; its samples are those of this round."""
    log, taken = reported
    living = log.train_loss[log.alive]
    last = number == run.plan.rounds
    quality = run.evaluate(state) if last or number % run.plan.evaluate_every == 0 else None
    row = {
        "kind": "round",
        "round": number,
        "local_steps": steps,
        "samples": int(taken.sum()) * run.plan.batch_size,
        "train_loss": float(living.mean()) if len(living) else float("nan"),
        **{f"test_{name}": getattr(quality, name, None) for name in ("accuracy", "loss", "macro_f1", "ece")},
        "weights": log.weights,
        "effective_replicas": float(log.effective_replicas),
        "alive": log.alive,
        "scores": log.scores,
    }
    if quality is not None and last:
        row["confusion"] = quality.confusion
    return row
