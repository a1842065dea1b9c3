"""Averages of the global parameters over rounds, for evaluation and deployment; they do not affect training.

Each is an `optax.GradientTransformation` applied to parameters instead of gradients, once after every round:
`update(params, state) -> (smoothed params, state)`. `optax.ema` has the same interface, so optax's averages and your
own work too.

Every round re-estimates the average's statistics, such as BatchNorm's, on each replica's last batches; see
`wavg_jax.rounds.reestimation`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.arguments import INT32, as_number, as_whole, number
from wavg_jax.base import PyTree

__all__ = ["ema", "lawa", "swa"]


def __dir__() -> list[str]:
    return __all__


class SwaState(NamedTuple):
    """State of `swa`.

    Attributes:
      seen: rounds seen, int32 scalar.
      averaged: rounds in the mean, int32 scalar.
      mean: mean of their parameters, in the accumulator dtypes.
    """

    seen: jax.Array
    averaged: jax.Array
    mean: PyTree


def ema(decay: float) -> optax.GradientTransformation:
    """Exponential moving average of the global parameters, with bias correction (Kingma and Ba 2015).

        m_r = decay * m_(r-1) + (1 - decay) * params_r,   m_0 = 0
        smoothed = m_r / (1 - decay^r)

    This is `optax.ema` with accumulators of at least float32. The bias correction of `optax.ema` itself raises a float
    to an integer power, which strict dtype promotion refuses.

    Args:
      decay: between 0 and 1; the average spans about 1 / (1 - decay) rounds.

    Returns:
      A transformation whose `update(params, state)` gives `(smoothed, state)`, in the dtypes of `params`.

    Raises:
      SettingsError: the decay is not between 0 and 1.

    >>> smoothing = ema(0.5)
    >>> state = smoothing.init({"w": jnp.zeros(1)})
    >>> smoothed, state = smoothing.update({"w": jnp.array([3.0])}, state)
    >>> smoothed, state = smoothing.update({"w": jnp.array([6.0])}, state)
    >>> smoothed["w"].tolist()  # (0.5 * 1.5 + 0.5 * 6) / (1 - 0.5^2)
    [5.0]
    """
    decay = as_number("decay", decay, number(above=0, below=1))
    moment = optax.ema(decay, debias=False)

    def init(params: PyTree) -> optax.EmaState:
        return moment.init(tree.as_accumulators(params))

    def update(params: PyTree, state: optax.EmaState, _: PyTree = None) -> tuple[PyTree, optax.EmaState]:
        mean, state = moment.update(tree.as_accumulators(params), state)
        # 1 - decay^r, accurate to the last bit: in float32 the plain difference loses digits when decay is near 1.
        total = -jnp.expm1(state.count.astype(jnp.float32) * math.log(decay))
        return tree.cast_like(jax.tree.map(lambda m: m / total.astype(m.dtype), mean), params), state

    return optax.GradientTransformation(init, update)


def swa(start: int = 0, every: int = 1) -> optax.GradientTransformation:
    """Equally weighted mean of the global parameters over rounds (SWA; Izmailov et al. 2018, arXiv:1803.05407).

        smoothed = mean of params_r over r = start, start + every, start + 2 every, ...

    Before round `start` it returns the newest parameters. Rounds count from 0.

    Args:
      start: the first round in the mean.
      every: number of rounds between samples, such as the length of a learning-rate cycle, to sample the end of each.

    Returns:
      A transformation whose `update(params, state)` gives `(smoothed, state)`, in the dtypes of `params`.

    Raises:
      SettingsError: `start` is negative, or `every` less than 1.

    >>> smoothing = swa(start=1)
    >>> state = smoothing.init({"w": jnp.zeros(1)})
    >>> for value in (9.0, 2.0, 4.0):
    ...     smoothed, state = smoothing.update({"w": jnp.array([value])}, state)
    ...     smoothed["w"].tolist()
    [9.0]
    [2.0]
    [3.0]
    """
    start, every = as_whole("start", start, 0, INT32), as_whole("every", every, 1, INT32)

    def init(params: PyTree) -> SwaState:
        zero = jnp.zeros((), jnp.int32)
        return SwaState(zero, zero, optax.tree.zeros_like(tree.as_accumulators(params)))

    def update(params: PyTree, state: SwaState, _: PyTree = None) -> tuple[PyTree, SwaState]:
        due = (state.seen >= start) & ((state.seen - start) % every == 0)
        averaged = state.averaged + due.astype(jnp.int32)
        share = 1 / jnp.maximum(averaged, 1).astype(jnp.float32)
        newest = tree.as_accumulators(params)
        moved = jax.tree.map(lambda m, x: m + share.astype(m.dtype) * (x - m), state.mean, newest)
        mean = tree.select(due, moved, state.mean)
        smoothed = tree.select(averaged > 0, mean, newest)
        return tree.cast_like(smoothed, params), SwaState(state.seen + 1, averaged, mean)

    return optax.GradientTransformation(init, update)


class LawaState(NamedTuple):
    """State of `lawa`.

    Attributes:
      seen: rounds seen, int32 scalar.
      latest: parameters of the last rounds, leaves [window, ...], each round in the place of the oldest; 0 where none
        is yet.
    """

    seen: jax.Array
    latest: PyTree


def lawa(window: int) -> optax.GradientTransformation:
    """Equally weighted mean of the latest global parameters (LAWA; Kaddour 2022, arXiv:2209.14981).

        smoothed = mean of params_r, ..., params_(r - window + 1)

    In the first rounds it is the mean of those there are. The state holds `window` copies of the parameters.

    Args:
      window: rounds in the mean, the paper's k.

    Returns:
      A transformation whose `update(params, state)` gives `(smoothed, state)`, in the dtypes of `params`.

    Raises:
      SettingsError: `window` is not a whole number, 1 or more.

    >>> smoothing = lawa(2)
    >>> state = smoothing.init({"w": jnp.zeros(1)})
    >>> for value in (9.0, 2.0, 4.0):
    ...     smoothed, state = smoothing.update({"w": jnp.array([value])}, state)
    ...     smoothed["w"].tolist()
    [9.0]
    [5.5]
    [3.0]
    """
    window = as_whole("window", window, 1, INT32)

    def init(params: PyTree) -> LawaState:
        empty = jax.tree.map(lambda x: jnp.zeros((window, *jnp.shape(x)), jnp.result_type(x)), params)
        return LawaState(jnp.zeros((), jnp.int32), empty)

    def update(params: PyTree, state: LawaState, _: PyTree = None) -> tuple[PyTree, LawaState]:
        latest = jax.tree.map(lambda old, x: old.at[state.seen % window].set(x), state.latest, params)
        count = jnp.minimum(state.seen + 1, window)

        def mean(kept: jax.Array) -> jax.Array:  # summed anew each round: a running sum would gather rounding errors
            wide = tree.accumulator_dtype(kept.dtype)
            return kept.sum(axis=0, dtype=wide) / count.astype(wide)

        return tree.cast_like(jax.tree.map(mean, latest), params), LawaState(state.seen + 1, latest)

    return optax.GradientTransformation(init, update)
