"""What else carries across a blend: optimizer state, BatchNorm statistics, and the average over rounds."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.arguments import NONE, OPTIMIZER, either, has, one_of, takes, whole
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.base import PyTree, SettingsError, Smoothed, Task
from wavg_jax.rounds import keys, policy, wire
from wavg_jax.rounds.drift import Correction
from wavg_jax.rounds.local import longest

Over = Callable[[Callable], Callable]
"""`Placement.map` or `Placement.reduce`."""


class AtSync(NamedTuple):
    """What happens beside the blend.

    Attributes:
      opt_state: `policy.keep`, `average` or `reset` for the inner optimizer's state.
      stats: `policy.average`, `keep`, `reset`, `pull` or `reestimate(steps)` for BatchNorm-style statistics.
      smoothing: average of the global parameters over rounds, such as `optax.ema(0.9)` or `wavg_jax.smoothing.swa()`.
        Runs evaluate and return it, with statistics re-estimated for it.
      wire: in which format replicas send their parameters, "float32", "bfloat16" or "int8"; see `wavg_jax.rounds.wire`.
        Narrow ones send less for few replicas, or where the weighting reads all of them; else `fit` warns.
      fragments: in how many fragments, one after another, each while the next local steps compute; see
        `wavg_jax.rounds.streaming`. 1 sends all parameters at the end of the round. It must divide the local steps.
      drift: a correction of the local steps, such as `wavg_jax.drift.scaffold(0.05)`; its control variates are averaged
        at the sync.
    """

    opt_state: policy.Policy = policy.keep
    stats: policy.Policy = policy.average
    smoothing: optax.GradientTransformation | None = None
    wire: str = "float32"
    fragments: int = 1
    drift: Correction | None = None


_POLICY = takes(2, "a policy (stacked, sync), such as policy.keep; reestimate makes one: call it, policy.reestimate(8)")
_WIRE = one_of(wire.FORMATS)
AT_SYNC = {
    "opt_state": _POLICY,
    "stats": _POLICY,
    "smoothing": either(NONE, OPTIMIZER),
    "wire": _WIRE,
    "fragments": whole(1),
    "drift": either(NONE, has("a Correction, such as wavg_jax.drift.scaffold(0.05)", *Correction._fields)),
}
"""What the fields of `AtSync` must be."""


def mean_over_living(reduce: Over, stacked: PyTree, weights: jax.Array, otherwise: PyTree) -> PyTree:
    """The weighted mean in the dtypes of `stacked`, or `otherwise` if all weights [K] are 0.

    Counts, flags and random keys have no mean: the result takes those of the first replica that has weight.
    """
    leaves, structure = jax.tree.flatten(stacked)
    means = iter(reduce(weighted_mean)(tree.floats(stacked), weights))
    first = jnp.argmax(weights > 0)
    chosen = [next(means).astype(x.dtype) if tree.is_float(x) else x[first] for x in leaves]
    return tree.select((weights > 0).any(), jax.tree.unflatten(structure, chosen), otherwise)


def carry_opt_state(
    how: policy.Policy,
    inner: optax.GradientTransformation,
    reduce: Over,
    opt_state: PyTree,
    params: PyTree,
    alive: jax.Array,
    weights: jax.Array,
) -> PyTree:
    """The optimizer state [K, ...] with which the replicas start the next round from the global `params`."""

    def fresh() -> PyTree:
        return jax.tree.map(jnp.asarray, inner.init(params))

    def mean() -> PyTree:
        return mean_over_living(reduce, opt_state, weights, fresh())

    return how(opt_state, policy.Sync(alive, mean, fresh, fresh, None))[0]


def averages(how: policy.Policy, stacked: PyTree) -> bool:
    """Whether a policy reads the mean of the replicas, so that they exchange [K, ...]. Traces, computes nothing."""
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


def carry_drift(
    reduce: Over, stacked: PyTree, before: PyTree, alive: jax.Array, weights: jax.Array
) -> tuple[PyTree, PyTree]:
    """The control variates of the replicas [K, ...] for the next round, and their mean by the weights of the blend [K].

    A dead replica takes the mean for its own, so that nothing corrects its next steps. `before` is the last mean, which
    stays where nobody has weight.
    """
    if not jax.tree.leaves(stacked):
        return stacked, before
    mean = mean_over_living(reduce, stacked, weights, before)
    return tree.select_replicas(alive, stacked, tree.replicate(mean, len(alive))), mean


class Trained(NamedTuple):
    """What the replicas trained on in a round.

    Attributes:
      batches: [K, H, ...].
      shared: what every replica reads.
      steps: local steps taken, int32 [K].
      alive: bool [K], who took part in the blend.
    """

    batches: PyTree
    shared: PyTree
    steps: jax.Array
    alive: jax.Array


def refresh(
    rerun: Callable,
    over_replicas: Over,
    reduce: Over,
    trained: Trained,
    params: PyTree,
    mutable: PyTree,
    rng: jax.Array,
    steps: int,
) -> PyTree:
    """Re-estimates a network's mutable collections on the last batches that each replica took.

    Args:
      rerun: re-estimates for one replica; see `wavg_jax.rounds.reestimation.reestimate`.
      over_replicas, reduce: of the placement.
      trained: the round's batches.
      params, mutable: of the network.
      rng: a key per replica [K].
      steps: batches per replica, or as many as it took.

    Returns:
      The equal mean over the living; `mutable` if there are none.
    """
    if steps > longest(trained.batches):
        raise SettingsError(
            f"reestimate({steps}) needs {steps} batches, a round has {longest(trained.batches)}: reestimate on fewer, "
            "or take more local_steps="
        )

    def one(item: PyTree, everywhere: PyTree) -> PyTree:
        mutable, items, taken, rng = item
        shared, params = everywhere
        start = jnp.maximum(taken - steps, 0)
        last = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, steps), items)
        state_rng, batches_rng = jax.random.split(rng)
        return rerun(params, keys.own(mutable, state_rng), last, jnp.minimum(taken, steps), shared, batches_rng)

    own = (tree.replicate(mutable, len(trained.alive)), trained.batches, trained.steps, rng)
    refreshed = over_replicas(one)(own, (trained.shared, params))
    return mean_over_living(reduce, refreshed, tree.equal_weights(trained.alive), mutable)


def carry_stats(
    how: policy.Policy,
    task: Task,
    reduce: Over,
    stacked: PyTree,
    before: PyTree,
    alive: jax.Array,
    weights: jax.Array,
    refresh: Callable[[PyTree, int], PyTree],
    pull: Callable[[PyTree, PyTree, PyTree], PyTree],
) -> tuple[PyTree, PyTree]:
    """The replicas' mutable collections for the next round, and the global ones for evaluation.

    Args:
      how: the policy.
      task: whose `init` makes fresh collections.
      reduce: lays a reduction out over devices.
      stacked: the replicas' collections [K, ...] after the round.
      before: the global ones before it.
      alive, weights: [K], of the blend.
      refresh: `(mutable, steps) -> mutable`: re-estimates collections for the new global parameters.
      pull: `(stacked, old, new) -> stacked`, what `Averager.restart` does with the parameters.
    """

    @functools.cache
    def mean() -> PyTree:
        return mean_over_living(reduce, stacked, weights, before)

    def initial() -> PyTree:
        return task.init(keys.roots(jax.random.key(0)).init)[1]

    def pulled() -> PyTree:
        own = tree.floats(stacked)
        return tree.put_floats(stacked, pull(own, tree.floats(before), tree.floats(mean()))) if own else stacked

    following = policy.Sync(alive, mean, initial, mean, lambda steps: refresh(mean(), steps), pulled)
    mutable, evaluated = how(stacked, following)
    return mutable, evaluated()


REESTIMATED = 8
"""Batches per replica on which each round re-estimates the statistics of smoothed parameters."""


def smooth(
    smoothing: optax.GradientTransformation | None,
    before: Smoothed | None,
    taken: jax.Array,
    params: PyTree,
    mutable: PyTree,
    refresh: Callable[[PyTree, PyTree], PyTree],
) -> Smoothed | None:
    """Adds the new global parameters to their average over rounds, if the blend was `taken`, a bool scalar.

    `refresh` is `(params, mutable) -> mutable`.
    """
    if smoothing is None or before is None:
        return None
    average, state = smoothing.update(params, before.state)
    if jax.tree.leaves(mutable):
        mutable = refresh(average, mutable)
    return tree.select(taken, Smoothed(average, mutable, state), before)
