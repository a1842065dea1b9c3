"""What happens at a sync beside the blend: optimizer state, BatchNorm statistics, and the average over rounds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from wavg_jax import local, policy, tree
from wavg_jax.base import PyTree, Replicas, SettingsError, Smoothed
from wavg_jax.recipe import Recipe, Shared, Work, fetch, longest_round, steps_taken
from wavg_jax.reduce import weighted_mean


def equal(alive: jax.Array) -> jax.Array:
    """Equal weights [K] over the living."""
    alive = alive.astype(jnp.float32)
    return alive / jnp.maximum(alive.sum(), 1)


def mean_over_living(recipe: Recipe, stacked: PyTree, weights: jax.Array, otherwise: PyTree) -> PyTree:
    """The weighted mean in the dtypes of `otherwise`, which it is when all weights [K] are 0."""
    mean = tree.cast_like(recipe.placement.reduce(weighted_mean)(stacked, weights), otherwise)
    return tree.select(weights.sum() > 0, mean, otherwise)


def blend_opt_state(recipe: Recipe, opt_state: PyTree, params: PyTree, alive: jax.Array, weights: jax.Array) -> PyTree:
    """The optimizer state [K, ...] with which the replicas go on from the global `params`, by the recipe's policy."""
    fresh = recipe.inner.init(params)
    stacked_fresh = tree.replicate(fresh, alive.shape[0])
    mean = mean_over_living(recipe, opt_state, weights, fresh)
    return recipe.opt_state_at_sync(opt_state, policy.Sync(alive, mean, stacked_fresh, stacked_fresh, None))[0]


def refresher(
    recipe: Recipe, after: Replicas, alive: jax.Array, work: Work, shared: Shared
) -> Callable[[PyTree, PyTree, int], PyTree]:
    """Builds `(params, mutable, steps) -> mutable`: runs a network in training mode over each replica's last batches of
    the round, and returns the equal mean over the living of what its mutable collections became."""
    rerun = local.refresh(recipe.task, fetch(recipe))
    replicas, longest = alive.shape[0], longest_round(work)

    def refresh(params: PyTree, mutable: PyTree, steps: int) -> PyTree:
        def one(item: PyTree, everywhere: PyTree) -> PyTree:
            mutable, items, rng, taken = item
            data, params = everywhere
            start = jnp.maximum(taken - steps, 0)
            last = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, steps), items)
            # Not the key itself, with which the next round starts.
            return rerun(params, mutable, last, data, jax.random.fold_in(rng, 1))

        if steps > longest:
            raise SettingsError(f"reestimate({steps}) needs {steps} batches, a round has {longest} (--local_steps)")
        items = (tree.replicate(mutable, replicas), work.items, after.rng, steps_taken(work))
        refreshed = recipe.placement.map(one)(items, (shared, params))
        return mean_over_living(recipe, refreshed, equal(alive), mutable)

    return refresh


def blend_stats(
    recipe: Recipe, stacked: PyTree, before: PyTree, alive: jax.Array, weights: jax.Array, refresh: Callable
) -> tuple[PyTree, PyTree]:
    """The mutable collections of the replicas and the global ones, which evaluation uses, by the recipe's policy.

    Args:
      recipe: holds the policy.
      stacked: the replicas' collections [K, ...] after the round.
      before: the global ones before it.
      alive, weights: [K], of the blend.
      refresh: `(mutable, steps) -> mutable`: re-estimates collections for the new global parameters.
    """
    replicas = alive.shape[0]
    mean = mean_over_living(recipe, stacked, weights, before)
    _, initial = recipe.task.init(jax.random.key(0))
    sync = policy.Sync(
        alive,
        mean,
        tree.replicate(initial, replicas),
        tree.replicate(mean, replicas),
        lambda steps: refresh(mean, steps),
    )
    return recipe.stats_at_sync(stacked, sync)


REESTIMATED = 8
"""Batches per replica on which the statistics of smoothed parameters are re-estimated in every round."""


def smooth(
    recipe: Recipe, before: Smoothed | None, params: PyTree, mutable: PyTree, refresh: Callable, longest: int
) -> Smoothed | None:
    """Takes the new global parameters into their average over rounds."""
    if recipe.smoothing is None or before is None:
        return None
    smooth, state = recipe.smoothing.update(params, before.state)
    if jax.tree.leaves(mutable):
        mutable = refresh(smooth, mutable, min(REESTIMATED, longest))
    return Smoothed(smooth, mutable, state)
