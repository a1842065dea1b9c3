"""The phases of a recipe's round as functions of their own, to be timed one by one."""

from collections.abc import Callable

import jax

from wavg_jax.base import Batch, PyTree, Replicas, TrainState
from wavg_jax.rounds import keys, score
from wavg_jax.rounds.exchange import Sent, make_exchange
from wavg_jax.rounds.forward import Forward
from wavg_jax.rounds.local import local_steps, train
from wavg_jax.training.batches import Shared, Work
from wavg_jax.training.recipe import Recipe, fetch_of


def local_phase(recipe: Recipe) -> Callable[..., tuple[Replicas, jax.Array]]:
    """Builds `(replicas, work, shared, mean=()) -> (replicas, loss [K])`: the local steps; `mean` is
    `TrainState.drift`."""
    steps = local_steps(recipe.task, recipe.inner, fetch_of(recipe), recipe.placement, recipe.at_sync.drift)

    def run(replicas: Replicas, work: Work, shared: Shared, mean: PyTree = ()) -> tuple[Replicas, jax.Array]:
        return train(steps, recipe.placement.advance, replicas, work.items, shared.train, work.pace, mean)[:2]

    return run


def window_phase(recipe: Recipe) -> Callable[[jax.Array, Batch | None], Batch | None]:
    """Builds `(round, held_out) -> held_out`: the samples that the round scores."""
    samples = recipe.scoring.samples
    return lambda round, held_out: score.window(held_out, round, samples)


def score_phase(recipe: Recipe) -> Callable[[Replicas, Batch | None, jax.Array], dict[str, PyTree]]:
    """Builds `(replicas, held_out, alive) -> {signal: [K] or tree}`; `{}` if the weighting needs no score."""
    where, needs = recipe.placement, recipe.averager.needs
    measured = score.measure(_forward(recipe), needs)

    def run(replicas: Replicas, held_out: Batch | None, alive: jax.Array) -> dict[str, PyTree]:
        near = {"distance": score.distances(replicas.params, alive)} if "distance" in needs else {}
        return score.of_replicas(measured, where.map, replicas, held_out) | near

    return run


def blend_phase(recipe: Recipe) -> Callable[..., tuple[PyTree, PyTree, PyTree]]:
    """Builds `(state, replicas, alive, held_out, signals) -> (params, averager state, weights)`: the whole update."""
    exchange = make_exchange(recipe.averager, _forward(recipe), recipe.placement, recipe.at_sync.wire)

    def run(
        state: TrainState, replicas: Replicas, alive: jax.Array, held_out: Batch | None, signals: dict[str, PyTree]
    ) -> tuple[PyTree, PyTree, PyTree]:
        sent = Sent(replicas.params, replicas.mutable, alive, signals)
        blended, _, _ = exchange(state, sent, replicas.residual, keys.at_sync(replicas.rng).wire, held_out)
        return blended[:3]

    return run


def _forward(recipe: Recipe) -> Forward:
    scoring = recipe.scoring
    return Forward(recipe.task, recipe.prepare, scoring.dtype, scoring.chunk, recipe.placement.over_samples)
