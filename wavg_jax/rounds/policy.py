"""What becomes of the inner optimizer's state and of BatchNorm statistics when the replicas are blended.

The parameters are replaced by the blend, or pulled toward it (`averager(pull=...)`; replicas that stay apart should
`keep` their statistics, since the mean's are another network's). A policy decides for one further stacked tree; `fit`
takes one for the optimizer state (default `keep`, as DiLoCo does) and one for the mutable collections (default
`average`, as for the parameters, so that every replica starts the round with the statistics that evaluation uses).

A policy is about floating-point numbers. Counts, flags and typed random keys are each replica's own under every policy
and go on as they are, also where a replica was dead or is reset, since its steps were taken: a learning rate's schedule
runs through. Optimizers of optax then do this when their floating-point numbers start afresh:

- `scale_by_schedule`, `sgd(schedule)`: the rate is that of the count. So it is with `inject_hyperparams`: it stores the
  rate too, but computes it from the count before it is used.
- `MultiSteps`: the gradients of unfinished steps are lost; what was gathered counts as zeros in the next update.
- `apply_if_finite`: its count of errors goes on; a finite gradient sets it to 0.
- `adam` and what else corrects moments by a count: fresh moments are taken for those of a long past. With b1 = 0.9 and
  b2 = 0.999 the n-th step from then on is (1 - b1^n) / sqrt(1 - b2^n) times too long: the first 3.2 times, the 12th
  6.6, the 300th 2 times. So `reset` in every round is not for such optimizers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from wavg_jax import tree
from wavg_jax.arguments import as_whole
from wavg_jax.base import PyTree, SettingsError


class Sync(NamedTuple):
    """What a policy may use. What is a function is computed only if a policy calls it.

    Attributes:
      alive: bool [K], the replicas that took part in the blend.
      mean: `() -> tree`: the weighted mean over the living [...], with the weights of the blend. In place of a mean,
        what is not floating-point is that of the first replica with weight.
      initial: `() -> tree`: what training starts from: a fresh optimizer state, or `Task.init`'s collections (those of
        seed 0, which matters only where they are random).
      restart: `() -> tree`: what a dead replica starts from: a fresh optimizer state, or the mean statistics.
      refresh: `steps -> tree`: re-estimates the mean statistics for the blended network on each replica's last batches
        of the round, and returns the equal mean over the living; None for an optimizer state.
    """

    alive: jax.Array
    mean: Callable[[], PyTree]
    initial: Callable[[], PyTree]
    restart: Callable[[], PyTree]
    refresh: Callable[[int], PyTree] | None


Policy = Callable[[PyTree, Sync], tuple[PyTree, Callable[[], PyTree]]]
"""`(stacked, sync) -> (stacked, evaluated)`: what the replicas start the next round with, and a function without
arguments that returns what the global parameters are evaluated with."""


def keep(stacked: PyTree, sync: Sync) -> tuple[PyTree, Callable[[], PyTree]]:
    """Every replica keeps its own; a dead one restarts. Evaluation uses the weighted mean."""
    return tree.select_replicas(sync.alive, stacked, tree.with_floats(stacked, sync.restart())), sync.mean


def average(stacked: PyTree, sync: Sync) -> tuple[PyTree, Callable[[], PyTree]]:
    """Every replica gets the weighted mean, with the weights of the blend."""
    return tree.with_floats(stacked, sync.mean()), sync.mean


def reset(stacked: PyTree, sync: Sync) -> tuple[PyTree, Callable[[], PyTree]]:
    """Every replica starts afresh, but for its counts. Evaluation uses the weighted mean of what they had."""
    return tree.with_floats(stacked, sync.initial()), sync.mean


def reestimate(steps: int = 8) -> Policy:
    """Statistics are taken anew on data after the blend (Izmailov et al. 2018, SWA, section 3.2).

    The blended network runs forward over each replica's last `steps` batches of the round, or as many as it took. The
    statistics become the mean over these batches, in which the old ones have no part (torch's `update_bn`), and then
    the equal mean over the living; see `wavg_jax.rounds.reestimation`. It costs `steps + 4` forward passes per replica.

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
