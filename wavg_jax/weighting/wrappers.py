"""Wrappers: each takes any weighting and returns one that behaves better over rounds or trusts it less.

They nest, and keep the weighting's granularity.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.arguments import as_whole, check, number
from wavg_jax.base import PyTree, SettingsError, Weighting
from wavg_jax.weighting.make import make_weighting
from wavg_jax.weighting.scores import inverse, normalise, usable
from wavg_jax.weighting.signals import direction, values_of, zeros

_HUGE = float(jnp.finfo(jnp.float32).max) / 4


def _columns(mask: jax.Array, like: jax.Array) -> jax.Array:
    """A mask or number per replica [K] in the shape in which it broadcasts against [K, ...]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - 1))


def uniform_floor(weighting: Weighting, floor: float) -> Weighting:
    """Mixes the weights with equal ones: `w_k <- (1 - floor) w_k + floor / n` over the n living.

    No living replica counts less than floor / n, so that none is shut out by a score that happens to be bad.

    Args:
      weighting: any weighting.
      floor: between 0 (the weights unchanged) and 1 (equal weights).

    Raises:
      SettingsError: the floor is not.

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

    return make_weighting(update, needs=weighting.needs, init=weighting.init)


class MomentumState(NamedTuple):
    """The wrapped weighting's state, the smoothed weights (a tree with leaves [K, ...]) and who has any: bool [K]."""

    weighting: PyTree
    weights: PyTree
    seen: jax.Array


def _weights_like(weighting: Weighting, state: PyTree, params: PyTree, replicas: int) -> PyTree:
    """Shapes of the weights that `weighting` returns for K replicas; computes nothing."""

    def run(state: PyTree, params: PyTree) -> PyTree:
        signals = {name: zeros(name, params, replicas) for name in weighting.needs}
        if "evaluate" in signals:
            signals["evaluate"] = lambda params, weights: {"loss": jnp.float32(0), "accuracy": jnp.float32(0)}
        return weighting.update(
            tree.replicate(params, replicas),
            state,
            params,
            alive=jnp.ones(replicas, bool),
            blend=lambda weights: tree.as_accumulators(params),
            **signals,
        )[0]

    return jax.eval_shape(run, state, params)


def momentum(weighting: Weighting, decay: float) -> Weighting:
    """Smooths the weights over rounds: `m_k <- decay m_k + (1 - decay) w_k`, then normalised over the living.

    A replica's first weight enters unchanged. A dead replica keeps its memory until it returns.

    Args:
      weighting: any weighting whose signals have the shapes that `fit` measures them in.
      decay: share of the memory, at least 0 (no memory) and less than 1.

    Raises:
      SettingsError: the decay is not.
    """
    check("momentum: decay", decay, number(0, below=1))
    decay = float(decay)

    def init(params: PyTree, replicas: int) -> MomentumState:
        state = weighting.init(params, replicas)
        like = _weights_like(weighting, state, params, replicas)
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

    return make_weighting(update, needs=weighting.needs, init=init)


class SmoothState(NamedTuple):
    """The wrapped weighting's state, the running sums of its signals, and their weights so far (leaves [K])."""

    weighting: PyTree
    sums: dict[str, PyTree]
    mass: dict[str, PyTree]


def smooth_signals(weighting: Weighting, decay: float = 0.9**8) -> Weighting:
    """Smooths every array signal that a weighting needs over rounds, by a bias-corrected moving average.

        m_k <- decay m_k + (1 - decay) s_k,    signal_k = m_k / (1 - decay^t)    after t rounds of replica k

    A replica whose new value is not finite (anywhere in the tensor, for signals per element) counts as unusable in that
    round, and it and dead replicas keep their memory.

    Args:
      weighting: any weighting whose signals have the shapes that `fit` measures them in.
      decay: share of the memory, at least 0 and less than 1; the default is that of GRAWA's code.

    Raises:
      SettingsError: the decay is not.
    """
    check("smooth_signals: decay", decay, number(0, below=1))
    decay = float(decay)
    names = tuple(name for name in weighting.needs if name != "evaluate")

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
            value = jnp.clip(value, -_HUGE, _HUGE)  # so that no difference of two values overflows
            return jnp.where(_columns(new, memory), memory + (1 - decay) * (value - memory), memory)

        sums = jax.tree.map(enter, fresh, state.sums, values)
        mass = jax.tree.map(lambda new, m: enter(new, m, jnp.ones_like(m)), fresh, state.mass)

        def corrected(new: jax.Array, total: jax.Array, mass: jax.Array) -> jax.Array:
            mean = total / _columns(jnp.where(new, mass, 1), total)
            # The bounds keep the product apart from what it enters, as in `wavg_jax.weighting.scores`.
            return jnp.where(_columns(new, total), jnp.clip(mean, -_HUGE, _HUGE), jnp.nan)

        smooth = jax.tree.map(corrected, fresh, sums, mass)
        weights, inner = weighting.update(stacked, state.weighting, params, alive=alive, **(signals | smooth))
        return weights, SmoothState(inner, sums, mass)

    return make_weighting(update, needs=weighting.needs, init=init)


def shortlist(
    weighting: Weighting, keep: int, signal: str = "train_loss", *, higher_is_better: bool | None = None
) -> Weighting:
    """Lets a weighting see only the `keep` living replicas that are best by a signal; the others count as dead to it.

    Replicas that tie for the last place all stay. If the signal is usable of no replica, all stay. It narrows what the
    weighting, or a search, chooses from; other signals are measured of every replica all the same.

    Args:
      weighting: any weighting.
      keep: how many replicas, at least 1.
      signal: name of a signal [K], such as one that is free (`wavg_jax.signals.FREE`).
      higher_is_better: which way the signal goes; may be left out for the signals that the library measures.

    Raises:
      SettingsError: `keep` is not a whole number, 1 or more, the direction of an unknown signal is not given, or, from
        `update`, the signal is not an array [K].
    """
    keep = as_whole("shortlist: keep", keep, 1)
    sign = direction(signal, higher_is_better)

    def chosen(values: jax.Array, alive: jax.Array) -> jax.Array:
        if not isinstance(values, jax.Array) or values.ndim != 1:
            raise SettingsError(f"shortlist needs one number per replica, and {signal!r} is not an array [K]")
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
    return make_weighting(update, needs=needs, init=weighting.init)


def grawa(layerwise: bool = False) -> Weighting:
    """Weights in inverse proportion to the norm of each replica's gradient on one common batch: GRAWA.

        w_k = (1 / g_k) / sum_j (1 / g_j),    g_k smoothed over rounds

    A small gradient stands for a flat valley. `g_k` is the sum over tensors of each tensor's gradient norm (MGRAWA), or
    that norm itself, with weights per tensor (LGRAWA), smoothed by `smooth_signals` with the decay 0.9^8, as in the
    authors' code (Dimlioglu and Choromanska 2024, arXiv:2403.04206, github.com/tolgadimli/GRAWA). Theirs pulls the
    replicas toward this blend: `averager(grawa(), pull=...)`.

    Args:
      layerwise: weights per tensor.
    """
    return smooth_signals(inverse("layer_grad_norm" if layerwise else "grad_norm"))
