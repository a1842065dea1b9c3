"""What rounds of every form are made of."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.arguments import shown
from wavg_jax.base import Averager, Batch, PyTree, Replicas, SettingsError, Smoothed, Task, TrainState
from wavg_jax.devices.placement import Placement
from wavg_jax.rounds import keys, local, score, sync
from wavg_jax.rounds.diagnosis import diagnose
from wavg_jax.rounds.faults import Faults
from wavg_jax.rounds.forward import Forward, labels
from wavg_jax.rounds.score import Scoring
from wavg_jax.rounds.sync import REESTIMATED, AtSync, Trained
from wavg_jax.weighting.scores import effective_replicas
from wavg_jax.weighting.signals import FREE


class RoundLog(NamedTuple):
    """What a round reports.

    Attributes:
      train_loss: [K], mean over the local steps.
      scores: {signal: [K]}, those that the weighting needed; with `Scoring(diagnose=True)` every one.
      weights: [K], of each replica in the blend.
      effective_replicas: `1 / sum(weights^2)`.
      alive: bool [K], who took part.
      steps: int32 [K], local steps taken.
      diagnosis: of `wavg_jax.rounds.diagnosis`, where logits were kept; else `{}`. NaN in a round that was not
        scored, as scores are.
      guard: with `Scoring(guard=)`, scalars: the blend's held-out `loss`, its `bound`, `rolled_back`, and the `rate` of
        the next round; else `{}`.
    """

    train_loss: jax.Array
    scores: dict[str, jax.Array]
    weights: jax.Array
    effective_replicas: jax.Array
    alive: jax.Array
    steps: jax.Array
    diagnosis: dict[str, jax.Array]
    guard: dict[str, jax.Array]


class Brought(NamedTuple):
    """What replicas bring to a blend.

    Attributes:
      replicas: [K, ...], after their local steps.
      train_loss: float32 [K].
      alive: bool [K], whose numbers are finite.
      steps: int32 [K], local steps taken.
      signals: {name: [K, ...]}, what held-out data were needed for.
    """

    replicas: Replicas
    train_loss: jax.Array
    alive: jax.Array
    steps: jax.Array
    signals: dict[str, PyTree]


class Apart(NamedTuple):
    """`Rounds.step` in two, for replicas that train elsewhere.

    Attributes:
      locally: `(replicas, batches, held_out, round, drift=(), *, shared=(), pace=EVERY_STEP) -> Brought`, of any number
        of replicas; `round` and `drift` are those of the `TrainState`.
      together: `(state, brought, batches, held_out, *, shared=(), sizes=None) -> (TrainState, RoundLog)`, of all K. A
        replica that is not alive there needs no more than the right shapes.
    """

    locally: Callable[..., Brought]
    together: Callable[..., tuple[TrainState, RoundLog]]


_NO_SCORES = ("samples", "steps")


class Setup(NamedTuple):
    """The arguments of `make_rounds`, and what is made of them; `every` is of `score.weighs_every`."""

    forward: Forward
    task: Task
    averager: Averager
    inner: optax.GradientTransformation
    scoring: Scoring
    at_sync: AtSync
    faults: Faults | None
    where: Placement
    batches: type
    steps: local.LocalSteps
    measured: Callable
    exchange: Callable
    every: int
    rerun: Callable


def report(
    setup: Setup,
    signals: Mapping[str, PyTree],
    weights: jax.Array,
    alive: jax.Array,
    steps: jax.Array,
    diagnosis: dict[str, jax.Array],
) -> RoundLog:
    """What a round reports, given its signals, and the weights [K] of the replicas."""
    needs = {*setup.averager.needs} - {*FREE}
    everything = setup.scoring.diagnose  # then also what else was measured, and the loss in training
    scores = {name: x for name, x in signals.items() if name in needs or (everything and name not in _NO_SCORES)}
    logged = {name: x for name, x in scores.items() if isinstance(x, jax.Array) and x.ndim == 1}
    return RoundLog(signals["train_loss"], logged, weights, effective_replicas(weights), alive, steps, diagnosis, {})


def diagnosed(
    setup: Setup,
    round: jax.Array,
    signals: Mapping[str, PyTree],
    window: Batch | None,
    weights: jax.Array,
    alive: jax.Array,
) -> dict[str, jax.Array]:
    """The diagnosis of a round from its logits, by every device alike; `{}` if it kept none."""
    if window is None or "logits" not in signals:
        return {}
    logits = signals["logits"]

    def now() -> dict[str, jax.Array]:
        return diagnose(logits, labels(setup.forward, window, logits.shape[-1]), weights, alive)

    return score.when(score.due(setup.scoring.every, round), now)


def carry_statistics(
    setup: Setup,
    state: TrainState,
    stacked: PyTree,
    split: keys.AtSyncKeys,
    params: PyTree,
    weights: jax.Array,
    trained: Trained,
) -> tuple[PyTree, PyTree, Smoothed | None]:
    """What belongs to the new global parameters.

    Args:
      setup: of the rounds.
      state: before the round.
      stacked: the replicas' mutable collections after their local steps.
      split: their keys.
      params: the global parameters after the blend.
      weights: [K], of the replicas in it.
      trained: what they trained on, and who is alive.

    Returns:
      The replicas' mutable collections, the global ones, and the average over rounds.
    """
    at_sync, where = setup.at_sync, setup.where
    refresh = functools.partial(sync.refresh, setup.rerun, where.map, where.reduce, trained)
    pull = functools.partial(setup.averager.restart, alive=trained.alive, check_finite=False, round=state.round)
    stats, mutable = sync.carry_stats(
        at_sync.stats,
        setup.task,
        where.reduce,
        stacked,
        state.mutable,
        trained.alive,
        weights,
        lambda mutable, steps: refresh(params, mutable, split.statistics, steps),
        pull,
    )
    few = min(REESTIMATED, local.longest(trained.batches))
    smoothed = sync.smooth(
        at_sync.smoothing,
        state.smoothed,
        weights.sum() > 0,
        params,
        mutable,
        lambda params, mutable: refresh(params, mutable, split.smoothing, few),
    )
    return stats, mutable, smoothed


def place_state(placement: Placement, state: TrainState) -> TrainState:
    """Keeps the replicas spread over the devices and all else on every one; nothing to do on one device."""
    placed = [
        constrained(placement, placement.stacked if part is state.replicas else placement.shared, part)
        for part in state
    ]
    return TrainState(*placed)


def everywhere(placement: Placement, part: PyTree) -> PyTree:
    """Copies a tree to every device, where each process can read it."""
    return constrained(placement, placement.shared, part)


def constrained(placement: Placement, sharding: Any, part: PyTree) -> PyTree:
    """Lays a tree out over the devices."""
    return part if len(placement.devices) == 1 else jax.lax.with_sharding_constraint(part, sharding)


def check_data(state: TrainState, batches: PyTree, held_out: Batch | None, needs: Iterable[str], kind: type) -> None:
    """Checks what a step reads.

    Raises:
      SettingsError: the batches are not of this `kind`, or a leaf is not [K, H, ...]; or the held-out data are no whole
        `Batch`, or missing where the weighting reads them.
    """
    k, shapes = tree.count_replicas(state.replicas.params), [jnp.shape(x) for x in jax.tree.leaves(batches)]
    if not isinstance(batches, kind) or not shapes:
        raise SettingsError(f"batches= is {shown(batches)}; give a wavg_jax.Batch with leaves [K, H, B, ...]")
    for shape in shapes:
        if len(shape) < 2 or shape[:2] != (k, shapes[0][1]):
            raise SettingsError(
                f"batches= has a leaf of shape {shape}; with {k} replicas every leaf must be [{k}, H, ...], H batches "
                "for each replica"
            )
    if held_out is None:
        if score.reads_heldout(needs):
            raise SettingsError("the rounds score held-out data and there is none: give held_out=Batch(x, y)")
    elif not isinstance(held_out, Batch) or not len(held_out.y) or len(held_out.x) != len(held_out.y):
        raise SettingsError("held_out= must be a wavg_jax.Batch of at least one sample, x [N, ...] and y [N, ...]")
