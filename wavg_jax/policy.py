"""What becomes of the inner optimizer's state and of BatchNorm statistics when the replicas are blended.

The parameters are replaced by the blend, or pulled toward it (`averager(pull=...)`; replicas that stay apart should
`keep` their statistics, since the mean's are another network's). A policy decides for one further stacked tree; `fit`
takes one for the optimizer state (default `keep`, as DiLoCo does) and one for the mutable collections (default
`average`, as for the parameters, so that every replica starts the round with the statistics that evaluation uses).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from wavg_jax import tree
from wavg_jax.base import PyTree, SettingsError


class Sync(NamedTuple):
    """What a policy may use.

    Attributes:
      alive: bool [K], the replicas that took part in the blend.
      mean: the weighted mean over the living [...], with the weights of the blend.
      initial: what training starts from, stacked [K, ...]: a fresh optimizer state, or `Task.init`'s collections (those
        of key 0, which matters only where they are random).
      restart: what a dead replica gets, stacked [K, ...]: a fresh optimizer state, or the mean statistics.
      refresh: `steps -> tree`: runs the blended network in training mode over each replica's last batches of the round,
        from the mean on, and returns the equal mean of what the collections became.
    """

    alive: jax.Array
    mean: PyTree
    initial: PyTree
    restart: PyTree
    refresh: Callable[[int], PyTree] | None


Policy = Callable[[PyTree, Sync], tuple[PyTree, PyTree]]
"""`(stacked, sync) -> (stacked, evaluated)`: what the replicas start the next round with, and what the global
parameters are evaluated with."""


def keep(stacked: PyTree, sync: Sync) -> tuple[PyTree, PyTree]:
    """Every replica keeps its own; a dead one restarts. Evaluation uses the weighted mean."""
    return tree.select_replicas(sync.alive, stacked, sync.restart), sync.mean


def average(stacked: PyTree, sync: Sync) -> tuple[PyTree, PyTree]:
    """Every replica gets the weighted mean, with the weights of the blend."""
    del stacked
    return tree.replicate(sync.mean, sync.alive.shape[0]), sync.mean


def reset(stacked: PyTree, sync: Sync) -> tuple[PyTree, PyTree]:
    """Every replica starts afresh. Evaluation uses the weighted mean of what they had."""
    del stacked
    return sync.initial, sync.mean


def reestimate(steps: int = 8) -> Policy:
    """Statistics are re-estimated on data after the blend (Izmailov et al. 2018, SWA, section 3.2).

    From the weighted mean on, the blended network runs forward over each replica's last `steps` batches of the round;
    the results are averaged equally over the living. With BatchNorm's momentum m the old statistics count m^steps.

    Args:
      steps: batches per replica, at most the local steps H (`fit` raises SettingsError otherwise).

    Raises:
      SettingsError: `steps` is not positive.
    """
    if steps < 1:
        raise SettingsError(f"reestimate(steps={steps}): at least 1 batch is needed")

    def policy(stacked: PyTree, sync: Sync) -> tuple[PyTree, PyTree]:
        del stacked
        if sync.refresh is None:
            raise SettingsError("reestimate is for BatchNorm-style statistics; use keep, average or reset here")
        refreshed = sync.refresh(steps)
        return tree.replicate(refreshed, sync.alive.shape[0]), refreshed

    return policy
