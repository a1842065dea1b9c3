"""From flags to runs: the arms of the comparison."""

import contextlib
import datetime
import functools
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from absl import flags

import wavg_jax as wavg
from experiments.setup import shared_flags
from experiments.setup.choices import (
    DRIFTS,
    FEEDS,
    PULLS,
    REDUCES,
    SCHEDULES,
    SMOOTHINGS,
    make_diloco,
    make_outer,
)
from experiments.setup.conditions import Condition, read_condition, settings_of
from experiments.setup.optimizers import Course, make_inner, read_course
from experiments.setup.problem import writer
from experiments.setup.shared_flags import COMPARED, DILOCO, RUN
from experiments.setup.simulation import exchange
from experiments.setup.weightings import WEIGHTINGS
from wavg_jax import data, tree
from wavg_jax.base import DataError, SettingsError
from wavg_jax.devices import network, processes
from wavg_jax.rounds import policy
from wavg_jax.rounds.drift import Correction
from wavg_jax.rounds.exchange import gathers
from wavg_jax.rounds.score import reads_heldout
from wavg_jax.storage.rows import read_rows
from wavg_jax.storage.schema import FILE, Row
from wavg_jax.training import timing
from wavg_jax.training.batches import check_room
from wavg_jax.training.callbacks import Callback
from wavg_jax.training.recipe import Recipe, make_recipe, rounds_of
from wavg_jax.training.run import blended_bytes

F = flags.FLAGS

POLICIES = {
    "keep": policy.keep,
    "average": policy.average,
    "reset": policy.reset,
    "pull": policy.pull,
    "reestimate": policy.reestimate(),
}
"""One object each: runs share compiled programs only if they get the same objects."""


class Arm(NamedTuple):
    """One arm of the comparison, as the arguments of `fit`.

    Attributes:
      name: one of `ARMS`.
      averager, inner: as for `fit`.
      pooled: whether one replica trains on all shards together.
      local_steps, batch_size: such that all arms see the same number of samples per round.
      drift: the correction of the local steps, if any.
    """

    name: str
    averager: wavg.Averager
    inner: optax.GradientTransformation
    pooled: bool
    local_steps: int
    batch_size: int
    drift: Correction | None = None


def check_heldout(averagers: Mapping[str, wavg.Averager]) -> None:
    """Raises SettingsError if a weighting scores held-out data and --heldout is 0."""
    reading = [name for name, averager in averagers.items() if reads_heldout(averager.needs)]
    if reading and not F.heldout:
        raise SettingsError(
            f"--heldout=0: {', '.join(reading)} would score held-out samples; hold some out, or choose other weightings"
        )


def make_arms(names: tuple[str, ...] = COMPARED, condition: Condition | None = None) -> list[Arm]:
    """Builds the arms at an equal budget of K*H*B training samples per round, by default at the rates of the flags."""
    rates = (condition or read_condition()).rates
    replicas, steps, batch = F.replicas, F.local_steps, F.batch_size
    options: dict[str, Any] = {
        "outer": make_outer(F),
        "pull": PULLS[F.pull_toward](F.pull),
        "reduce": REDUCES[F.reduce],
    }
    plain = wavg.averager(wavg.uniform(), **options)
    weighted = options | WEIGHTINGS[F.weighting](F)
    alone = wavg.averager(wavg.uniform())
    if F.schedule != "fixed" and not {*DILOCO, *DILOCO.values()}.issuperset(names):
        raise SettingsError(
            f"--schedule={F.schedule} is for plain, weighted and {', '.join(DILOCO)}; the other arms would see more "
            "samples (--arms)"
        )
    # Blending the steps of a rate of 1 gives the mean gradient, which the outer optimizer takes a step with.
    summed = optax.MultiSteps(optax.sgd(1.0), steps).gradient_transformation()
    large = wavg.averager(wavg.uniform(), outer=make_inner(F.inner, rates["accumulate"], _course("accumulate")))
    arms = {
        "sequential": (alone, True, replicas * steps, batch),
        "sync": (alone, True, steps, replicas * batch),
        "accumulate": (large, False, steps, batch),
        "plain": (plain, False, steps, batch),
        "weighted": (wavg.averager(**weighted), False, steps, batch),
        **{name: (averager, False, steps, batch) for name, averager in _diloco(names, options, weighted).items()},
    }
    made = [
        Arm(name, arms[name][0], make_inner(F.inner, rates[name], _course(name)), *arms[name][1:]) for name in names
    ]
    made = [arm._replace(drift=_drift_of(arm.name, rates)) for arm in made]
    return [arm._replace(inner=summed) if arm.name == "accumulate" else arm for arm in made]


def _diloco(names: Collection[str], plain: dict[str, Any], weighted: dict[str, Any]) -> dict[str, wavg.Averager]:
    """The averagers of the arms with DiLoCo's outer step among those named.

    Raises:
      SettingsError: the weighting of --weighting has an outer step of its own.
    """
    wanted = [name for name in DILOCO if name in names]
    if not wanted:
        return {}
    step = {"outer": make_diloco(F)}
    if "weighted_diloco" in wanted and weighted["outer"] is not plain["outer"]:
        raise SettingsError(
            f"--weighting={F.weighting} has an outer step of its own: leave out the arm weighted_diloco, or choose "
            "another --weighting"
        )
    made = {"diloco": {**plain, "weighting": wavg.uniform()}, "weighted_diloco": weighted}
    return {name: wavg.averager(**(made[name] | step)) for name in wanted}


def at_rates(arm: Arm, condition: Condition) -> Arm:
    """The same arm at its learning rate under a condition; at equal rates it shares its programs."""
    if arm.name == "accumulate":
        return make_arms((arm.name,), condition)[0]
    rates = condition.rates
    inner = make_inner(F.inner, rates[arm.name], _course(arm.name))
    return arm._replace(inner=inner, drift=_drift_of(arm.name, rates))


def _course(arm: str) -> Course:
    """Clipping and the schedule of an arm's rate, which all arms go through over equally many samples."""
    stretch = {"sequential": F.replicas, "accumulate": 1 / F.local_steps}.get(arm, 1)
    return read_course(F, round(F.rounds * F.local_steps * stretch), stretch)


def _drift_of(arm: str, rates: Mapping[str, float]) -> Correction | None:
    """The correction of --drift, for the arms whose replicas drift."""
    return make_drift(F.drift, rates[arm]) if arm in (*DILOCO, *DILOCO.values()) else None


def make_drift(name: str, rate: float) -> Correction | None:
    """The correction of that name for an inner optimizer of that learning rate."""
    return _drift(name, rate, F.inner, F.prox_mu)


@functools.cache
def _drift(name: str, rate: float, *settings: Any) -> Correction | None:
    """One object per setting of the flags, so that runs share their programs."""
    del settings
    return DRIFTS[name](F, rate)


def recipe_of(arm: Arm, task: wavg.Task, sharded: data.ShardedData) -> Recipe:
    """The recipe of an arm's rounds."""
    source = data.pool(sharded) if arm.pooled else sharded
    return make_recipe(task, source, arm.averager, arm.inner, **_groups(arm))


def _groups(arm: Arm) -> dict[str, Any]:
    """How an arm scores, syncs and is laid out: groups of arguments of `fit`.

    The pooled arms have one replica, so every policy is `keep`.
    """
    smoothing = _smoothing(F.smoothing, F.ema_decay, F.swa_start, F.lawa_window)
    if arm.pooled:
        at_sync = wavg.AtSync(policy.keep, policy.keep, smoothing)
    else:
        keeps = policy.keep if arm.name == "accumulate" else POLICIES[F.opt_state_at_sync]
        fragments = 1 if arm.name == "accumulate" else F.fragments
        at_sync = wavg.AtSync(keeps, POLICIES[F.stats_at_sync], smoothing, F.wire, fragments, arm.drift)
    return {
        "scoring": wavg.Scoring(
            samples=F.score_samples,
            every=F.score_every,
            diagnose=F.diagnose and not arm.pooled,
            guard=_guard(F.guard),
            **chunk_of_texts(),
        ),
        "at_sync": at_sync,
        "layout": wavg.Layout(
            _devices_of_batch(arm.batch_size) if arm.pooled else F.devices, F.replica_map, FEEDS[F.feed]
        ),
    }


def _guard(factor: float | None) -> wavg.SpikeGuard | None:
    """The guard of --guard; SettingsError if no loss could pass it."""
    if factor is not None and not factor > 1:
        raise SettingsError(f"--guard={factor:g}: give a multiple of the lowest loss that is above 1, such as 2")
    return None if factor is None else wavg.SpikeGuard(factor)


def chunk_of_texts() -> dict[str, Any]:
    """Windows of a text scored at a time: as many positions as samples of other data."""
    return {"chunk": max(_POSITIONS // F.context, 1)} if F.model == "transformer" else {}


_POSITIONS = 4096


def _devices_of_batch(batch_size: int) -> int:
    """The devices that the pooled arms split their batches over: as many as divide them, up to --devices, the same in
    every process.

    CPU devices of one process share its cores, and one of them computes faster than several that exchange gradients.
    """
    here = 1 if jax.default_backend() == "cpu" else jax.local_device_count()
    if F.devices is not None:
        here = max(min(here, F.devices // processes.count()), 1)
    counts = [n * processes.count() for n in range(1, here + 1) if not batch_size % (n * processes.count())]
    if not counts:
        raise SettingsError(
            f"batches of {batch_size} do not split over {processes.count()} processes: set --batch_size to a multiple, "
            "or leave out sequential and sync (--arms)"
        )
    return counts[-1]


def check_arm(arm: Arm, task: wavg.Task, sharded: data.ShardedData) -> None:
    """Raises SettingsError if an arm cannot work: for its recipe, lack of room, or a shard smaller than a batch."""
    source = data.pool(sharded) if arm.pooled else sharded
    check_room(recipe_of(arm, task, source), source, arm.local_steps, arm.batch_size)
    data.round_indices(source.shards, seed=0, first_step=0, local_steps=1, batch_size=arm.batch_size)


def critical_path(arms: list[Arm], task: wavg.Task, sharded: data.ShardedData) -> Callable[[str], Row | None]:
    """Returns a function of an arm's name: the seconds of its round on one of K devices, from parts measured with a
    single replica when they are first asked for.

    sequential stays on one device; sync exchanges gradients, as large as the parameters, at every step. All arms but
    sequential share one measurement of the local phase. What the exchanges take over the link of --link_bandwidth is
    computed. None where --schedule lets rounds differ.
    """
    if F.schedule != "fixed":
        return lambda name: None
    by_name, link = {arm.name: arm for arm in arms}, shared_flags.read_link()
    averaged = {arm.name: arm for arm in ([arm for arm in arms if not arm.pooled] or make_arms(("plain",)))}
    first = next(iter(averaged))
    for arm in averaged.values():  # an arm that cannot blend fails before the first run
        timing.check_parts(recipe_of(arm, task, sharded), sharded)

    @functools.cache
    def measured(name: str) -> timing.Parts:
        arm, source = averaged.get(name) or by_name[name], sharded if name in averaged else data.pool(sharded)
        local = measured(first).local if name in averaged and name != first else None
        recipe = recipe_of(arm, task, source)
        return timing.measure_parts(recipe, source, local_steps=arm.local_steps, batch_size=arm.batch_size, local=local)

    def path(name: str) -> Row:
        if name == "sync":
            one = measured(first)
            parts = one._replace(score=0.0, blend=F.local_steps * one.mean)
        else:
            parts = measured(name)
        return _path(parts, exchange_of(by_name[name], task, sharded), link)

    return functools.cache(path)


def _path(parts: timing.Parts, exchange: network.Exchange, link: network.Link | None) -> Row:
    path = {"local": parts.local, "score": parts.score, "blend": parts.blend, "exchange": exchange.seconds(link)}
    return path | {"round": sum(path.values()), "link": network.as_entry(link)}


def exchange_of(arm: Arm, task: wavg.Task, sharded: data.ShardedData) -> network.Exchange:
    """What each of K devices sends in a round of an arm.

    sync reduces gradients at every step, the others what they blend, once a round: in a ring, or gathered where the
    weighting looks at all replicas, to try blends out or to compare them, and on a narrow wire.
    """
    if arm.pooled:
        gradients, _ = jax.eval_shape(task.init, jax.random.key(0))
        return exchange(arm.name, tree.count(gradients), F.replicas, arm.local_steps)
    recipe = recipe_of(arm, task, sharded)
    state = jax.eval_shape(lambda rng: rounds_of(recipe).init(rng, F.replicas), jax.random.key(0))
    numbers = blended_bytes(recipe, state) / network.WIRES["float32"]
    collective = "gather" if gathers(arm.averager, F.wire) else "ring"
    return exchange(arm.name, numbers, F.replicas, arm.local_steps, F.wire, collective)


@functools.cache
def _smoothing(name: str, *numbers: float) -> optax.GradientTransformation | None:
    """One object per setting of the flags, so that runs share their programs."""
    del numbers
    return SMOOTHINGS[name](F)


def run_arm(
    arm: Arm,
    task: wavg.Task,
    sharded: data.ShardedData,
    condition: Condition,
    seed: int,
    progress: bool | Callable[[str], None],
    *,
    workdir: pathlib.Path | None = None,
    name: str | None = None,
    path: Row | None = None,
    fit: Callable[..., wavg.Result] | None = None,
    views: Sequence[Callback] = (),
) -> wavg.Result:
    """Runs one arm under one condition for one seed.

    Its rows and checkpoints go to `workdir`, by default as ARM-seedSEED. `progress` is as for `fit`, by default
    the library's, and `views` are its callbacks.
    """
    facts = {
        "arm": arm.name,
        "target_accuracy": None if F.model == "transformer" else F.target_accuracy,
        "critical_path": path,
        "weighting": F.weighting if DILOCO.get(arm.name, arm.name) == "weighted" else "uniform",
    }
    if arm.name == "sync":
        gradients, _ = jax.eval_shape(task.init, jax.random.key(0))
        facts["bytes_per_round"] = 2 * F.replicas * tree.nbytes(gradients) * arm.local_steps
    # A decay ends with the last round, so that their number is no longer free.
    settings = settings_of(RUN | {"rounds"} if F.decay != "none" else RUN, condition)
    return (fit or wavg.fit)(
        task,
        data.pool(sharded) if arm.pooled else sharded,
        arm.averager,
        inner=arm.inner,
        local_steps=arm.local_steps if arm.pooled else SCHEDULES[F.schedule](F),
        rounds=F.rounds,
        batch_size=arm.batch_size,
        seed=seed,
        **_groups(arm),
        workdir=workdir,
        resume=F.resume,
        store=wavg.Store(name or f"{arm.name}-seed{seed}", F.checkpoint_every, facts, settings, writer(sharded, seed)),
        on_round=views,
        progress=progress,
    )


def choose_workdir(binary: str) -> pathlib.Path:
    """Returns --workdir, or a new folder under runs/ named after the binary, the data set and the time.

    Raises:
      SettingsError: --resume is given without --workdir.
    """
    if F.workdir is not None:
        return pathlib.Path(F.workdir)
    if F.resume:
        raise SettingsError("--resume needs --workdir, the folder of the run's first part")
    name = pathlib.Path(F.dataset).stem
    return pathlib.Path("runs") / processes.broadcast(f"{binary}-{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}")


def rounds_done(workdir: pathlib.Path) -> int:
    """The number of rounds that an earlier part of the run recorded in `workdir`."""
    if not F.resume or not (workdir / FILE).exists():
        return 0
    with contextlib.suppress(DataError):  # no whole row yet; other faults raise later
        return sum(row["kind"] == "round" for row in read_rows(workdir))
    return 0
