"""The sync: what replicas send travels between devices once, and becomes the next global parameters."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.base import Averager, Batch, PyTree, TrainState, WavgWarning
from wavg_jax.devices.network import WIRES
from wavg_jax.devices.placement import Placement
from wavg_jax.rounds import score, sync, wire
from wavg_jax.rounds.forward import Forward
from wavg_jax.weighting.scores import normalise, per_replica


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
    """What the blend reads of the state before the round; the same on every device.

    Attributes:
      params, mutable, averager, weights: of `TrainState`.
      due: whether the round is scored, a bool scalar; None if every round is.
    """

    params: PyTree
    mutable: PyTree
    averager: PyTree
    weights: PyTree
    due: jax.Array | None


Blended = tuple[PyTree, PyTree, PyTree, dict[str, jax.Array]]
"""`(params, averager state, weights, {"distance": [K]} if the weighting needs it)`."""


def gathers(averager: Averager, how: str) -> bool:
    """Whether all replicas travel to every device, in the format `how`, rather than one weighted sum of them."""
    return averager.reads_replicas or "distance" in averager.needs or how != "float32"


def wider(averager: Averager, how: str, replicas: int) -> float:
    """How many times the bytes of float32 a device sends in the format `how`, where there are several devices.

        w / 4   if replicas are gathered in float32 too, with w bytes a number, see `wavg_jax.devices.network.WIRES`;
        K w / 8   else: (D-1) K/D trees are gathered, where float32 sends 2 (D-1)/D trees of 4 bytes in a ring.

    Args:
      averager: says whether replicas are gathered in float32.
      how: the format.
      replicas: K.

    >>> from wavg_jax import averager, learned, uniform
    >>> [wider(averager(uniform()), "int8", k) for k in (2, 4, 8)], wider(averager(learned()), "int8", 8)
    ([0.25390625, 0.5078125, 1.015625], 0.25390625)
    """
    if how == "float32":
        return 1.0
    return WIRES[how] / 4 if gathers(averager, "float32") else replicas * WIRES[how] / 8


def warn_of_wire(averager: Averager, how: str, replicas: int, where: Placement) -> None:
    """Warns if a narrow wire sends more than float32 would."""
    ratio = wider(averager, how, replicas)
    if where.parts > 1 and ratio > 1:
        warnings.warn(
            f"wire={how!r} sends {ratio:.2f} times the bytes of wire='float32': it gathers all {replicas} replicas, "
            "where float32 sends one sum; it pays with fewer replicas, or with a weighting that reads them all",
            WavgWarning,
            stacklevel=4,
        )


def make_exchange(averager: Averager, forward: Forward, where: Placement, how: str, every: int = 1) -> Callable:
    """Builds the sync: what the replicas send travels between devices once, and becomes a blend.

    If the averager reads replicas, or the wire is narrow, all of them travel to every device, which then blends them by
    itself: a search may try many blends, and the weights need not be known before the exchange. Otherwise only scores
    travel, and then one weighted sum. `every` is that of `Scoring`.

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
        due = score.due(every, state.round)
        before = Before(state.params, state.mutable, state.averager, state.weights, due)
        if not all_travel:
            told = where.gather(sent._replace(params=(), mutable=()))
            blended = blend(averager, forward, where.reduce, before, told._replace(params=sent.params), window)
            return (*blended, {}), told, residual
        packed, left = where.map(pack)((sent.params, residual, rng), state.params)
        alive = wire.arriving(how, packed, sent.alive)
        told = where.gather(sent._replace(params=packed, alive=alive))
        blended = where.together(gathered)(before, told, window)
        if how == "int8":  # a change that was not blended in leaves nothing to send
            left = tree.select(per_replica(blended[2]).sum() > 0, left, residual)
            left = tree.select_replicas(alive, left, jnp.zeros_like(left))
        return blended, told, left

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
      before: the global parameters and the averager's state before the round, and whether it is scored.
      sent: the replicas [K, ...]; a dead one has no weight.
      window: the held-out samples [N, ...] of this round.

    Returns:
      `(params, averager state, weights)`; see `Averager.update`.
    """

    def mean(weights: PyTree) -> PyTree:
        return sync.mean_over_living(reduce, sent.mutable, weights, before.mutable)

    shared = score.of_blends(averager.needs, forward, mean, window, sent.signals)
    given: dict[str, Any] = {"alive": sent.alive, "place": reduce}
    signals = sent.signals | shared
    if before.due is None:
        return averager.update(sent.params, before.averager, before.params, check_finite=False, **given, **signals)
    assert averager.halves is not None  # `make_rounds` has checked
    weigh, step = averager.halves.weigh, averager.halves.step
    own = before.averager.weighting
    weights, weighting = jax.lax.cond(
        before.due,
        lambda: weigh(sent.params, own, before.params, **given, **signals),
        lambda: (tree.cast_like(among(sent.alive, before.weights), before.weights), own),
    )
    params, state, taken = step(sent.params, weights, before.averager, before.params, **given)
    state = state._replace(weighting=tree.select(taken, weighting, own))
    return params, state, tree.select(taken, weights, optax.tree.zeros_like(weights))


def among(alive: jax.Array, weights: PyTree) -> PyTree:
    """Divides weights, leaves [K, ...], among those who are alive."""
    return jax.tree.map(lambda w: normalise(w, alive), weights)
