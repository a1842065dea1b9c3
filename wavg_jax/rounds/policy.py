"""How optimizer state and BatchNorm statistics carry across a blend.

The blend replaces the parameters, or pulls them toward itself (`averager(pull=...)`; replicas that stay apart should
`pull` or `keep` their statistics, since the mean belongs to another network). A policy decides for one further stacked
tree: `AtSync` has one for the optimizer state (default `keep`, as in DiLoCo) and one for the mutable collections
(default `average`, as for the parameters, so that every replica starts the round with the statistics that evaluation
uses).

A policy is about floating-point numbers. Counts, flags and typed random keys stay each replica's own under every policy
and run on, also for a replica that died or is reset, since it took its steps: a learning-rate schedule continues. When
their floating-point numbers start afresh, optax optimizers do this:

- `scale_by_schedule`, `sgd(schedule)`: the rate follows the count. So does that of `inject_hyperparams`, which stores
  the rate too but computes it from the count before each use.
- `MultiSteps`: gradients accumulated so far are lost; they count as zeros in the next update.
- `apply_if_finite`: the count of errors runs on; a finite gradient resets it.
- `adam` and others that correct moments by a count: they take fresh moments for old ones. With b1 = 0.9 and b2 = 0.999
  the n-th step after is (1 - b1^n) / sqrt(1 - b2^n) times too long: the first 3.2 times, the 12th 6.6, the 300th 2. Do
  not `reset` them in every round.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from wavg_jax import tree
from wavg_jax.arguments import as_whole
from wavg_jax.base import PyTree, SettingsError

__all__ = ["Policy", "average", "keep", "pull", "reestimate", "reset"]


def __dir__() -> list[str]:
    return __all__


class Sync(NamedTuple):
    """What a policy may use; functions compute only if it calls them.

    Attributes:
      alive: bool [K], the replicas that took part in the blend.
      mean: `() -> tree`: the weighted mean over the living [...], with the weights of the blend. Leaves that are not
        floating-point are those of the first replica with weight.
      initial: `() -> tree`: what training starts from: a fresh optimizer state, or the collections of `Task.init` (at
        seed 0, which matters only if they are random).
      restart: `() -> tree`: what a dead replica restarts from: a fresh optimizer state, or the mean statistics.
      refresh: `steps -> tree`: the mean statistics, re-estimated for the blended network on each replica's last batches
        of the round, as an equal mean over the living; None for an optimizer state.
      pulled: `() -> stacked`: the replicas' statistics [K, ...], pulled as `averager(pull=...)` pulls their parameters;
        None for an optimizer state.
    """

    alive: jax.Array
    mean: Callable[[], PyTree]
    initial: Callable[[], PyTree]
    restart: Callable[[], PyTree]
    refresh: Callable[[int], PyTree] | None
    pulled: Callable[[], PyTree] | None = None


Policy = Callable[[PyTree, Sync], tuple[PyTree, Callable[[], PyTree]]]
"""`(stacked, sync) -> (stacked, evaluated)`: the replicas' trees for the next round, and a function `() -> tree`: the
global tree, for evaluation."""


def keep(stacked: PyTree, sync: Sync) -> tuple[PyTree, Callable[[], PyTree]]:
    """Every replica keeps its own; a dead one restarts. Evaluation uses the weighted mean."""
    return tree.select_replicas(sync.alive, stacked, tree.with_floats(stacked, sync.restart())), sync.mean


def average(stacked: PyTree, sync: Sync) -> tuple[PyTree, Callable[[], PyTree]]:
    """Every replica gets the weighted mean, with the weights of the blend."""
    return tree.with_floats(stacked, sync.mean()), sync.mean


def reset(stacked: PyTree, sync: Sync) -> tuple[PyTree, Callable[[], PyTree]]:
    """Every replica starts afresh, except for its counts. Evaluation uses the weighted mean from before."""
    return tree.with_floats(stacked, sync.initial()), sync.mean


def pull(stacked: PyTree, sync: Sync) -> tuple[PyTree, Callable[[], PyTree]]:
    """Every replica's statistics are pulled as `averager(pull=...)` pulls its parameters; a dead one gets the mean.

    `s_k <- s_k + factor (mean - s_k)` for a number, with the weights of the blend. Where the blend replaces parameters
    this is `average`. Evaluation uses the weighted mean.
    """
    if sync.pulled is None:
        raise SettingsError("pull is for BatchNorm-style statistics; use keep, average or reset here")
    return sync.pulled(), sync.mean


def reestimate(steps: int = 8) -> Policy:
    """Statistics are re-estimated on data after the blend (Izmailov et al. 2018, SWA, section 3.2).

    The blended network runs forward over each replica's last `steps` batches of the round, or as many as it took. The
    statistics become the mean over these batches, independent of the old ones (torch's `update_bn`), and then the equal
    mean over the living; see `wavg_jax.rounds.reestimation`. It costs `steps + 4` forward passes per replica.

    Args:
      steps: batches per replica, at most the local steps H (`fit` raises SettingsError otherwise).

    Raises:
      SettingsError: `steps` is not a whole number, 1 or more.
    """
    steps = as_whole("reestimate: steps", steps, 1)

    def policy(stacked: PyTree, sync: Sync) -> tuple[PyTree, Callable[[], PyTree]]:
        if sync.refresh is None:
            raise SettingsError("reestimate is for BatchNorm-style statistics; use keep, average or reset here")
        refreshed = sync.refresh(steps)
        return tree.with_floats(stacked, refreshed), lambda: refreshed

    return policy
