"""What becomes of the inner optimizer's state and of BatchNorm statistics when the replicas are blended.

The parameters are always replaced by the blend. A policy decides for one further stacked tree; `fit` takes one for the
optimizer state (default `keep`, as DiLoCo does) and one for the mutable collections (default `average`, as for the
parameters, so that every replica starts the round with the statistics that evaluation uses).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from wavg_jax import tree
from wavg_jax.base import PyTree, SettingsError


class Sync(NamedTuple):
    """What a policy may use; every tree but `mean` is stacked [K, ...].

    Attributes:
      alive: bool [K], the replicas that took part in the blend.
      mean: the weighted mean over the living [...], with the weights of the blend.
      initial: the tree as at the start of training.
      restart: what a dead replica gets: a fresh optimizer state, or the mean statistics.
      refresh: `(stacked, steps) -> stacked`: runs the blended network in training mode over each replica's last batches
        of the round and returns what the mutable collections became.
    """

    alive: jax.Array
    mean: PyTree
    initial: PyTree
    restart: PyTree
    refresh: Callable[[PyTree, int], PyTree] | None


Policy = Callable[[PyTree, Sync], PyTree]


def keep(stacked: PyTree, sync: Sync) -> PyTree:
    """Every replica keeps its own; a dead one restarts."""
    return tree.select_replicas(sync.alive, stacked, sync.restart)


def average(stacked: PyTree, sync: Sync) -> PyTree:
    """Every replica gets the weighted mean, with the weights of the blend."""
    del stacked
    return tree.replicate(sync.mean, sync.alive.shape[0])


def reset(stacked: PyTree, sync: Sync) -> PyTree:
    """Every replica starts afresh."""
    del stacked
    return sync.initial


def reestimate(steps: int = 8) -> Policy:
    """Statistics are re-estimated on data after the blend (Izmailov et al. 2018, SWA, section 3.2).

    From the weighted mean on, the blended network runs forward over each replica's last `steps` batches of the round;
    the results are averaged equally over the living. With BatchNorm's momentum m the old statistics count m^steps.

    Args:
      steps: batches per replica, at most the local steps H.

    Raises:
      SettingsError: `steps` is not positive.
    """
    if steps < 1:
        raise SettingsError(f"reestimate(steps={steps}): at least 1 batch is needed")

    def policy(stacked: PyTree, sync: Sync) -> PyTree:
        if sync.refresh is None:
            raise SettingsError("reestimate is for BatchNorm-style statistics; use keep, average or reset here")
        return sync.refresh(average(stacked, sync), steps)

    return policy
