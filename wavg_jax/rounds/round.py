"""One round as one program: local steps, scoring, blend, and what the replicas start the next round with."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.base import PyTree, Replicas, TrainState
from wavg_jax.rounds import keys, local, sync
from wavg_jax.rounds import score as scoring
from wavg_jax.rounds.local import Pace
from wavg_jax.rounds.recipe import Recipe, Shared, Work, fetch, longest_round, steps_taken
from wavg_jax.weighting.scores import effective_replicas, per_replica


class RoundLog(NamedTuple):
    """What a round reports.

    Attributes:
      train_loss: [K], mean over the local steps.
      scores: {signal: [K]}, those that were measured.
      weights: [K], of each replica in the blend.
      effective_replicas: `1 / sum(weights^2)`.
      alive: bool [K], who took part.
      steps: int32 [K], local steps taken.
    """

    train_loss: jax.Array
    scores: dict[str, jax.Array]
    weights: jax.Array
    effective_replicas: jax.Array
    alive: jax.Array
    steps: jax.Array


class Pieces(NamedTuple):
    """The parts of a round, in the order they run.

    Attributes:
      train: `(Replicas, work, shared) -> (Replicas, loss [K])`.
      window: `(round, held_out) -> held_out`: the chunks that this round scores; None when nothing reads them.
      score: `(Replicas, held_out, alive) -> {signal: [K] or tree}`; `{}` when the weighting needs none.
      blend: `(Replicas, state, alive, held_out, signals) -> (params, averager state, weights)`.
    """

    train: Callable
    window: Callable
    score: Callable
    blend: Callable


def _train(recipe: Recipe) -> Callable:
    steps = local.local_steps(recipe.task, recipe.inner, fetch(recipe))

    def train(replicas: Replicas, work: Work, shared: Shared) -> tuple[Replicas, jax.Array]:
        pace = {name: x for name, x in work.pace._asdict().items() if x is not None}
        # A number common to all stays out of the mapping: a loop of one length needs no holding still.
        own = {name: x for name, x in pace.items() if x.ndim}
        common = {name: x for name, x in pace.items() if not x.ndim}

        def one(item: PyTree, everywhere: PyTree) -> tuple[Replicas, jax.Array]:
            replica, items, own = item
            shared, common = everywhere
            return steps(replica, items, shared, Pace(**own, **common))

        return recipe.placement.map(one)((replicas, work.items, own), (shared, common))

    return train


def _score(recipe: Recipe) -> Callable:
    needs = recipe.averager.needs
    passes = scoring.measured(needs)
    measure = recipe.placement.map(scoring.measure(recipe.task, recipe.prepare, passes, recipe.score_dtype))

    def score(replicas: Replicas, held_out: scoring.Chunks | None, alive: jax.Array) -> dict[str, PyTree]:
        scores = measure((replicas.params, replicas.mutable), held_out) if passes else {}
        if "distance" in needs:
            mean = recipe.placement.reduce(weighted_mean)(replicas.params, sync.equal(alive))
            scores["distance"] = recipe.placement.map(scoring.distance)(replicas.params, mean)
        return scores

    return score


def pieces(recipe: Recipe) -> Pieces:
    """Builds the parts of a round."""
    evaluator = scoring.evaluator(recipe.task, recipe.prepare, recipe.score_dtype, recipe.placement.over_samples)

    def window(round: jax.Array, held_out: scoring.Chunks | None) -> scoring.Chunks | None:
        if held_out is None or recipe.score_samples is None:
            return held_out
        return scoring.window(held_out, round, -(-recipe.score_samples // held_out.y.shape[1]))

    def blend(
        replicas: Replicas,
        state: TrainState,
        alive: jax.Array,
        held_out: PyTree,
        measured: dict[str, PyTree],
    ) -> tuple[PyTree, PyTree, PyTree]:
        def evaluate(params: PyTree, weights: jax.Array) -> dict[str, jax.Array]:
            mutable = sync.mean_over_living(recipe, replicas.mutable, weights, state.mutable)
            return evaluator(params, mutable, held_out)

        return recipe.averager.update(
            replicas.params,
            state.averager,
            state.params,
            alive=alive,
            place=recipe.placement.reduce,
            evaluate=evaluate,
            **measured,
        )

    return Pieces(_train(recipe), window, _score(recipe), blend)


def _alive(before: Replicas, after: Replicas, train_loss: jax.Array) -> jax.Array:
    """Who came through the local steps with finite numbers: bool [K].

    What was not finite before, such as a mask of -inf among the collections, is not held against a replica.
    """

    def finite(replicas: Replicas) -> jax.Array:
        return tree.all_finite((replicas.opt_state, replicas.mutable, replicas.rng))

    return tree.all_finite((after.params, train_loss)) & (finite(after) | ~finite(before))


def _sent(recipe: Recipe, stacked: PyTree, before: PyTree) -> PyTree:
    """The parameters [K, ...] that the replicas send: theirs, but for simulated faults in the change since `before`."""
    if recipe.faults is None or set(recipe.faults.sent) == {1.0}:
        return stacked
    factors = jnp.asarray(recipe.faults.sent, jnp.float32)

    def leaf(x: jax.Array, start: jax.Array) -> jax.Array:
        factor = factors.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(factor == 1, x, start + factor * (x - start))

    return jax.tree.map(leaf, stacked, before)


def make_round(recipe: Recipe) -> Callable[[TrainState, Work, Shared], tuple[TrainState, RoundLog]]:
    """Builds one round as a pure function `(state, work, shared) -> (state, RoundLog)`."""
    part = pieces(recipe)

    def run(state: TrainState, work: Work, shared: Shared) -> tuple[TrainState, RoundLog]:
        after, train_loss = part.train(state.replicas, work, shared)
        sent = after._replace(params=_sent(recipe, after.params, state.replicas.params))
        alive = _alive(state.replicas, sent, train_loss)
        held_out = part.window(state.round, shared.held_out)
        scores = part.score(sent, held_out, alive)
        steps = steps_taken(work)
        free = {"train_loss": train_loss, "samples": shared.sizes, "steps": steps.astype(jnp.float32)}
        params, averager_state, weights = part.blend(sent, state, alive, held_out, free | scores)
        mean_weights = per_replica(weights)
        logged = {name: score for name, score in scores.items() if isinstance(score, jax.Array) and score.ndim == 1}
        log = RoundLog(train_loss, logged, mean_weights, effective_replicas(mean_weights), alive, steps)
        taken = mean_weights.sum() > 0
        alive &= taken  # after a blend that was not taken all restart from what there was
        rng, stats_rng, smooth_rng = keys.split_each(after.rng, 3)
        refresh = sync.refresher(recipe, alive, work, shared)
        mutable, global_mutable = sync.blend_stats(
            recipe, after.mutable, state.mutable, alive, mean_weights, functools.partial(refresh, stats_rng, params)
        )
        replicas = Replicas(
            recipe.averager.restart(after.params, state.params, params, alive=alive),
            sync.blend_opt_state(recipe, after.opt_state, params, alive, mean_weights),
            mutable,
            rng,
        )
        refresh_smooth = functools.partial(refresh, smooth_rng)
        smoothed = sync.smooth(
            recipe, state.smoothed, taken, params, global_mutable, refresh_smooth, longest_round(work)
        )
        return TrainState(params, global_mutable, replicas, averager_state, state.round + 1, smoothed), log

    return run
