"""What happens at a sync beside the blend: optimizer state, BatchNorm statistics, and the average over rounds."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.base import PyTree, SettingsError, Smoothed
from wavg_jax.rounds import keys, policy
from wavg_jax.rounds.recipe import Recipe, Shared, Work, fetch, longest_round, steps_taken
from wavg_jax.rounds.reestimation import reestimate


def equal(alive: jax.Array) -> jax.Array:
    """Equal weights [K] over the living."""
    alive = alive.astype(jnp.float32)
    return alive / jnp.maximum(alive.sum(), 1)


def mean_over_living(recipe: Recipe, stacked: PyTree, weights: jax.Array, otherwise: PyTree) -> PyTree:
    """The weighted mean in the dtypes of `stacked`, or `otherwise` when all weights [K] are 0.

    Counts, flags and random keys have no mean: those of the first replica with weight stand for all.
    """
    leaves, structure = jax.tree.flatten(stacked)
    means = iter(recipe.placement.reduce(weighted_mean)(tree.floats(stacked), weights))
    first = jnp.argmax(weights > 0)
    chosen = [next(means).astype(x.dtype) if tree.is_float(x) else x[first] for x in leaves]
    return tree.select((weights > 0).any(), jax.tree.unflatten(structure, chosen), otherwise)


def blend_opt_state(recipe: Recipe, opt_state: PyTree, params: PyTree, alive: jax.Array, weights: jax.Array) -> PyTree:
    """The optimizer state [K, ...] with which the replicas go on from the global `params`, by the recipe's policy."""

    def fresh() -> PyTree:
        return jax.tree.map(jnp.asarray, recipe.inner.init(params))

    def mean() -> PyTree:
        return mean_over_living(recipe, opt_state, weights, fresh())

    return recipe.opt_state_at_sync(opt_state, policy.Sync(alive, mean, fresh, fresh, None))[0]


def averages(how: policy.Policy, stacked: PyTree) -> bool:
    """Whether a policy gives the replicas their mean, for which they must exchange [K, ...]. Nothing is computed."""
    asked = []

    def mean(one: PyTree) -> PyTree:
        asked.append(True)
        return one

    def trace(stacked: PyTree) -> PyTree:
        one = tree.replica(stacked, 0)
        alive = jnp.ones(tree.count_replicas(stacked), bool)
        return how(stacked, policy.Sync(alive, lambda: mean(one), lambda: one, lambda: one, None))[0]

    if jax.tree.leaves(stacked):
        jax.eval_shape(trace, stacked)
    return bool(asked)


def refresher(
    recipe: Recipe, alive: jax.Array, work: Work, shared: Shared
) -> Callable[[jax.Array, PyTree, PyTree, int], PyTree]:
    """Builds `(rng [K], params, mutable, steps) -> mutable`: re-estimates a network's mutable collections on each
    replica's last batches of the round, and returns the equal mean over the living."""
    rerun = reestimate(recipe.task, fetch(recipe))
    replicas, longest = alive.shape[0], longest_round(work)

    def refresh(rng: jax.Array, params: PyTree, mutable: PyTree, steps: int) -> PyTree:
        def one(item: PyTree, everywhere: PyTree) -> PyTree:
            mutable, items, rng, taken = item
            data, params = everywhere
            start = jnp.maximum(taken - steps, 0)
            last = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, steps), items)
            state_rng, batches_rng = jax.random.split(rng)
            return rerun(params, keys.own(mutable, state_rng), last, jnp.minimum(taken, steps), data, batches_rng)

        if steps > longest:
            raise SettingsError(f"reestimate({steps}) needs {steps} batches, a round has {longest} (--local_steps)")
        items = (tree.replicate(mutable, replicas), work.items, rng, steps_taken(work))
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

    @functools.cache
    def mean() -> PyTree:
        return mean_over_living(recipe, stacked, weights, before)

    def initial() -> PyTree:
        return recipe.task.init(keys.roots(jax.random.key(0)).init)[1]

    sync = policy.Sync(alive, mean, initial, mean, lambda steps: refresh(mean(), steps))
    mutable, evaluated = recipe.stats_at_sync(stacked, sync)
    return mutable, evaluated()


REESTIMATED = 8
"""Batches per replica on which the statistics of smoothed parameters are re-estimated in every round."""


def smooth(
    recipe: Recipe,
    before: Smoothed | None,
    taken: jax.Array,
    params: PyTree,
    mutable: PyTree,
    refresh: Callable,
    longest: int,
) -> Smoothed | None:
    """Takes the new global parameters into their average over rounds if the blend was `taken`, a bool scalar.

    `refresh` is `(params, mutable, steps) -> mutable`.
    """
    if recipe.smoothing is None or before is None:
        return None
    smooth, state = recipe.smoothing.update(params, before.state)
    if jax.tree.leaves(mutable):
        mutable = refresh(smooth, mutable, min(REESTIMATED, longest))
    return tree.select(taken, Smoothed(smooth, mutable, state), before)
