"""The sync: what replicas send travels between devices once, and becomes the next global parameters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.base import Averager, Batch, PyTree, TrainState
from wavg_jax.devices.placement import Placement
from wavg_jax.rounds import score, sync, wire
from wavg_jax.rounds.score import Forward


class Sent(NamedTuple):
    """What replicas send at the sync, and what the blend reads.

    Attributes:
      params: leaves [K, ...]; in the format of the wire, where it travels.
      mutable: leaves [K, ...].
      alive: bool [K].
      signals: {name: [K] or tree}.
    """

    params: PyTree
    mutable: PyTree
    alive: jax.Array
    signals: dict[str, PyTree]


class Before(NamedTuple):
    """What the blend reads of the state before the round; the same on every device."""

    params: PyTree
    mutable: PyTree
    averager: PyTree


Blended = tuple[PyTree, PyTree, PyTree, dict[str, jax.Array]]
"""`(params, averager state, weights, {"distance": [K]} if the weighting needs it)`."""


def gathers(averager: Averager, how: str) -> bool:
    """Whether all replicas travel to every device, in the format `how`, rather than one weighted sum of them."""
    return averager.reads_replicas or "distance" in averager.needs or how != "float32"


def make_exchange(averager: Averager, forward: Forward, where: Placement, how: str) -> Callable:
    """Builds the sync: what the replicas send travels between devices once, and becomes a blend.

    If the averager reads replicas, or the wire is narrow, all of them travel to every device, which then blends them by
    itself: a search may try many blends, and the weights need not be known before the exchange. Otherwise only scores
    travel, and then one weighted sum.

    Returns:
      `(state, sent, residual, rng, window) -> (blended, sent, residual)`: `Blended`; what was sent, on every device;
      and the next residual.
    """
    all_travel = gathers(averager, how)

    def pack(one: tuple[PyTree, PyTree, jax.Array], start: PyTree) -> tuple[PyTree, PyTree]:
        params, residual, rng = one
        return wire.pack(how, params, start, residual, rng)

    def gathered(before: Before, sent: Sent, window: Batch | None) -> Blended:
        params = jax.vmap(lambda one: wire.unpack(how, one, before.params))(sent.params)
        near = {"distance": score.distances(params, sent.alive)} if "distance" in averager.needs else {}
        whole = sent._replace(params=params, signals=sent.signals | near)
        return *blend(averager, forward, _as_is, before, whole, window), near

    def exchange(
        state: TrainState, sent: Sent, residual: PyTree, rng: jax.Array, window: Batch | None
    ) -> tuple[Blended, Sent, PyTree]:
        before = Before(state.params, state.mutable, state.averager)
        if not all_travel:
            told = where.gather(sent._replace(params=(), mutable=()))
            blended = blend(averager, forward, where.reduce, before, told._replace(params=sent.params), window)
            return (*blended, {}), told, residual
        packed, residual = where.map(pack)((sent.params, residual, rng), state.params)
        told = where.gather(sent._replace(params=packed))
        if how == "int8":
            residual = tree.select_replicas(sent.alive, residual, jnp.zeros_like(residual))
        return where.together(gathered)(before, told, window), told, residual

    return exchange


def _as_is(reduction: Callable) -> Callable:
    return reduction


def blend(
    averager: Averager, forward: Forward, reduce: sync.Over, before: Before, sent: Sent, window: Batch | None
) -> tuple[PyTree, PyTree, PyTree]:
    """Blends what the replicas sent into the next global parameters.

    Args:
      averager: how.
      forward: how a blend runs over the held-out samples, for weightings that try weights out.
      reduce: lays a reduction out over devices.
      before: the global parameters and the averager's state before the round.
      sent: the replicas [K, ...]; a dead one has no weight.
      window: the held-out samples [N, ...] of this round.

    Returns:
      `(params, averager state, weights)`; see `Averager.update`.
    """

    def mean(weights: PyTree) -> PyTree:
        return sync.mean_over_living(reduce, sent.mutable, weights, before.mutable)

    evaluate = {} if window is None else {"evaluate": score.Evaluate(forward, mean, window)}
    return averager.update(
        sent.params,
        before.averager,
        before.params,
        alive=sent.alive,
        check_finite=False,
        place=reduce,
        **(sent.signals | evaluate),
    )
