"""Wrappers that smooth, temper or narrow any weighting.

They nest and keep the weighting's granularity.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.arguments import as_whole, check, number
from wavg_jax.base import PyTree, SettingsError, Weighting
from wavg_jax.weighting.make import make_weighting, weights_like
from wavg_jax.weighting.scores import inverse, normalise, usable
from wavg_jax.weighting.signals import OF_SAMPLES, direction, values_of, zeros

_HUGE = float(jnp.finfo(jnp.float32).max) / 4


def _columns(mask: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes a mask or number per replica [K] to broadcast against [K, ...]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - 1))


def uniform_floor(weighting: Weighting, floor: float) -> Weighting:
    """Mixes the weights with equal weights: `w_k <- (1 - floor) w_k + floor / n` over the n living.

    Every living replica gets at least floor / n, so one bad score cannot shut it out.

    Args:
      weighting: any weighting.
      floor: from 0 (weights unchanged) to 1 (equal weights).

    Raises:
      SettingsError: `floor` is not a number from 0 to 1.

    >>> from wavg_jax.weighting.scores import proportional
    >>> mixed = uniform_floor(proportional("accuracy"), 0.5)
    >>> weights, _ = mixed.update(None, (), None, alive=jnp.ones(2, bool), accuracy=jnp.array([1.0, 0.0]))
    >>> weights.tolist()
    [0.75, 0.25]
    """
    check("uniform_floor: floor", floor, number(0, 1))
    floor = float(floor)

    def update(
        stacked: PyTree, state: PyTree, params: PyTree, *, alive: jax.Array, **signals: Any
    ) -> tuple[PyTree, PyTree]:
        weights, state = weighting.update(stacked, state, params, alive=alive, **signals)
        equal = tree.equal_weights(alive)
        return jax.tree.map(lambda w: w + floor * (_columns(equal, w) - w), weights), state

    return make_weighting(update, needs=weighting.needs, init=weighting.init, reads_replicas=weighting.reads_replicas)


class MomentumState(NamedTuple):
    """The wrapped weighting's state, the smoothed weights (leaves [K, ...]) and which replicas have any: bool [K]."""

    weighting: PyTree
    weights: PyTree
    seen: jax.Array


def momentum(weighting: Weighting, decay: float) -> Weighting:
    """Smooths the weights over rounds: `m_k <- decay m_k + (1 - decay) w_k`, then normalises over the living.

    A replica's first weight becomes its average. A dead replica keeps its average until it returns.

    Args:
      weighting: any weighting, if its signals have the same shapes as in `fit`.
      decay: share of the old average, at least 0 (no smoothing) and less than 1.

    Raises:
      SettingsError: `decay` is outside that range.
    """
    check("momentum: decay", decay, number(0, below=1))
    decay = float(decay)

    def init(params: PyTree, replicas: int) -> MomentumState:
        state = weighting.init(params, replicas)
        like = weights_like(weighting, state, params, replicas)
        weights = jax.tree.map(lambda w: jnp.zeros(w.shape, w.dtype), like)
        return MomentumState(state, weights, jnp.zeros(replicas, bool))

    def update(
        stacked: PyTree, state: MomentumState, params: PyTree, *, alive: jax.Array, **signals: Any
    ) -> tuple[PyTree, MomentumState]:
        weights, inner = weighting.update(stacked, state.weighting, params, alive=alive, **signals)
        mixed = jax.tree.map(lambda m, w: m + (1 - decay) * (w - m), state.weights, weights)
        entered = tree.select_replicas(state.seen, mixed, weights)
        memory = tree.select_replicas(alive, entered, state.weights)
        return jax.tree.map(lambda m: normalise(m, alive), memory), MomentumState(inner, memory, state.seen | alive)

    return make_weighting(update, needs=weighting.needs, init=init, reads_replicas=weighting.reads_replicas)


class SmoothState(NamedTuple):
    """The wrapped weighting's state, the moving averages of its signals, and their total weights (leaves [K])."""

    weighting: PyTree
    sums: dict[str, PyTree]
    mass: dict[str, PyTree]


def smooth_signals(weighting: Weighting, decay: float = 0.9**8) -> Weighting:
    """Smooths a weighting's array signals over rounds with a bias-corrected moving average.

        m_k <- decay m_k + (1 - decay) s_k,    signal_k = m_k / (1 - decay^t)    after t rounds of replica k

    A replica with a non-finite new value (anywhere in the tensor, for signals per element) is unusable in that round.
    Unusable and dead replicas keep their averages.

    Args:
      weighting: any weighting, if its signals have the same shapes as in `fit`.
      decay: share of the old average, at least 0 and less than 1; defaults to the value in GRAWA's code.

    Raises:
      SettingsError: `decay` is outside that range.
    """
    check("smooth_signals: decay", decay, number(0, below=1))
    decay = float(decay)
    names = tuple(name for name in weighting.needs if name not in OF_SAMPLES)

    def init(params: PyTree, replicas: int) -> SmoothState:
        sums = {name: zeros(name, params, replicas) for name in names}
        mass = jax.tree.map(lambda x: jnp.zeros(replicas, jnp.float32), sums)
        return SmoothState(weighting.init(params, replicas), sums, mass)

    def update(
        stacked: PyTree, state: SmoothState, params: PyTree, *, alive: jax.Array, **signals: Any
    ) -> tuple[PyTree, SmoothState]:
        values = {name: values_of(name, signals, alive) for name in names}
        fresh = jax.tree.map(lambda v: usable(v, alive).reshape(v.shape[0], -1).all(axis=1), values)

        def enter(new: jax.Array, memory: jax.Array, value: jax.Array) -> jax.Array:
            value = jnp.clip(value, -_HUGE, _HUGE)  # keeps differences from overflowing
            return jnp.where(_columns(new, memory), memory + (1 - decay) * (value - memory), memory)

        sums = jax.tree.map(enter, fresh, state.sums, values)
        mass = jax.tree.map(lambda new, m: enter(new, m, jnp.ones_like(m)), fresh, state.mass)

        def corrected(new: jax.Array, total: jax.Array, mass: jax.Array) -> jax.Array:
            mean = total / _columns(jnp.where(new, mass, 1), total)
            # The clip keeps XLA from fusing the product into later sums, as in `wavg_jax.weighting.scores`.
            return jnp.where(_columns(new, total), jnp.clip(mean, -_HUGE, _HUGE), jnp.nan)

        smooth = jax.tree.map(corrected, fresh, sums, mass)
        weights, inner = weighting.update(stacked, state.weighting, params, alive=alive, **(signals | smooth))
        return weights, SmoothState(inner, sums, mass)

    return make_weighting(update, needs=weighting.needs, init=init, reads_replicas=weighting.reads_replicas)


def shortlist(
    weighting: Weighting, keep: int, signal: str = "train_loss", *, higher_is_better: bool | None = None
) -> Weighting:
    """Restricts a weighting to the `keep` living replicas with the best signal; it sees the others as dead.

    Replicas that tie for last place all stay. If no replica has a usable signal, all living replicas stay. This narrows
    the choice of a weighting or a search, but does not save measurements: other signals still cover every replica.

    Args:
      weighting: any weighting.
      keep: number of replicas, at least 1.
      signal: name of a signal [K], such as a free one (`wavg_jax.signals.FREE`).
      higher_is_better: the signal's direction; optional for signals that the library measures.

    Raises:
      SettingsError: `keep` is not a whole number, 1 or more, or the direction of an unknown signal is missing; from
        `update`, the signal is not an array [K].
    """
    keep = as_whole("shortlist: keep", keep, 1)
    sign = direction(signal, higher_is_better)

    def chosen(values: jax.Array, alive: jax.Array) -> jax.Array:
        if not isinstance(values, jax.Array) or values.ndim != 1:
            raise SettingsError(f"shortlist needs one number per replica, but {signal!r} is not an array [K]")
        s, candidates = sign * values, usable(values, alive)
        better = candidates[:, None] & (s[:, None] > s[None, :])  # [j, k]: j is better than k
        return jnp.where(candidates.any(), candidates & (better.sum(axis=0) < keep), alive)

    def update(
        stacked: PyTree, state: PyTree, params: PyTree, *, alive: jax.Array, **signals: Any
    ) -> tuple[PyTree, PyTree]:
        listed = chosen(values_of(signal, signals, alive), alive)
        sent = tree.select_replicas(listed, stacked, tree.replicate(params, alive.shape[0]))
        return weighting.update(sent, state, params, alive=listed, **signals)

    needs = tuple(dict.fromkeys((*weighting.needs, signal)))
    return make_weighting(update, needs=needs, init=weighting.init, reads_replicas=weighting.reads_replicas)


def grawa(layerwise: bool = False) -> Weighting:
    """GRAWA: weights inversely proportional to the norm of each replica's gradient on one common batch.

        w_k = (1 / g_k) / sum_j (1 / g_j),    g_k smoothed over rounds

    A small gradient indicates a flat valley. `g_k` is the sum of the gradient norms of all tensors (MGRAWA) or, with
    weights per tensor, each tensor's own norm (LGRAWA). `smooth_signals` smooths it with decay 0.9^8, as in the
    authors' code (Dimlioglu and Choromanska 2024, arXiv:2403.04206, github.com/tolgadimli/GRAWA). Their algorithm pulls
    the replicas toward this blend: `averager(grawa(), pull=...)`.

    Args:
      layerwise: give weights per tensor (LGRAWA) instead of per replica (MGRAWA).
    """
    return smooth_signals(inverse("layer_grad_norm" if layerwise else "grad_norm"))
