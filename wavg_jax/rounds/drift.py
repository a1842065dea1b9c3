"""Corrections of the local steps, for shards that differ: alone, each replica drifts toward the optimum of its shard.

A correction changes the gradient of every local step; `AtSync(drift=...)` takes one:

    drift.fedprox(0.01)      a proximal term      Li et al. 2020
    drift.scaffold(0.05)     control variates     Karimireddy et al. 2020
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.arguments import check, number
from wavg_jax.base import PyTree

__all__ = ["Correction", "fedprox", "scaffold"]


def __dir__() -> list[str]:
    return __all__


class Correction(NamedTuple):
    """How the local steps of a replica are corrected; all trees are those of one replica.

    A correction may keep a *control variate* for every replica, a tree of floating-point numbers that says how its
    shard differs. At the sync all replicas get the mean of these, with the weights of the blend; a dead replica goes on
    with that mean as its own.

    Attributes:
      init: `params -> variate`; `()` keeps none.
      correct: `(gradient, params, start, own, mean) -> gradient`, in every local step. `start` are the parameters that
        the replica began the round with, the global ones unless `averager(pull=...)` keeps replicas apart; `own` and
        `mean` are control variates.
      finish: `(own, mean, start, params, steps) -> variate`, after the local steps. `steps` is their number, times
        the factor of their rate (`Pace.rate`), a float32 scalar.
    """

    init: Callable[[PyTree], PyTree]
    correct: Callable[[PyTree, PyTree, PyTree, PyTree, PyTree], PyTree]
    finish: Callable[[PyTree, PyTree, PyTree, PyTree, jax.Array], PyTree]


def fedprox(mu: float) -> Correction:
    """A proximal term that holds every replica near where it started (FedProx; Li et al. 2020, arXiv:1812.06127).

        loss_k(x) + mu / 2 |x - start|^2,    so    g <- g + mu (x - start)

    It keeps no control variate and costs no exchange.

    Args:
      mu: 0 or more; the paper tries 0.001 to 1. Steps of SGD are stable below `learning_rate = 2 / mu`.

    Raises:
      SettingsError: `mu` is not a finite number, 0 or more.

    >>> fedprox(0.5).correct(jnp.array(1.0), jnp.array(7.0), jnp.array(3.0), (), ()).item()  # 1 + 0.5 (7 - 3)
    3.0
    """
    check("fedprox: mu", mu, number(0))
    mu = float(mu)

    def correct(gradient: PyTree, params: PyTree, start: PyTree, own: PyTree, mean: PyTree) -> PyTree:
        del own, mean
        x, x0, g = tree.as_accumulators((params, start, gradient))
        return tree.cast_like(jax.tree.map(lambda g, x, x0: g + mu * (x - x0), g, x, x0), gradient)

    return Correction(lambda params: (), correct, lambda own, mean, start, params, steps: own)


def scaffold(learning_rate: float) -> Correction:
    """Control variates that cancel what a shard's gradient differs by (SCAFFOLD; Karimireddy et al. 2020,
    arXiv:1910.06378, option II).

        g   <- g - c_k + c                                      in every local step
        c_k <- c_k - c + (start - x_k) / (H learning_rate)      after H of them: the mean gradient on the way
        c   <- sum_k w_k c_k                                    at the sync, with the weights of the blend

    All start at 0, so the first round has no correction. With equal weights and all replicas alive c is the paper's.
    The control variates, float32 trees of the parameters' size, take part in every sync: it sends twice as much.

    Args:
      learning_rate: that of the inner optimizer, which c_k is measured with. For SGD with momentum m give
        learning_rate / (1 - m), which its steps amount to; weight decay counts as a part of the gradient. The steps of
        Adam and its kind are no multiples of the gradient: they do not fit.

    Raises:
      SettingsError: the learning rate is not a finite number above 0.

    >>> correction = scaffold(0.1)
    >>> c_k, c, start = jnp.array(3.0), jnp.array(1.0), jnp.array(5.0)
    >>> correction.correct(jnp.array(4.0), start, start, c_k, c).item()  # 4 - 3 + 1
    2.0
    >>> round(correction.finish(c_k, c, start, jnp.array(4.0), jnp.float32(2)).item(), 4)  # 3 - 1 + (5 - 4) / 0.2
    7.0
    """
    check("scaffold: learning_rate", learning_rate, number(above=0))
    rate = float(learning_rate)

    def init(params: PyTree) -> PyTree:
        return optax.tree.zeros_like(tree.as_accumulators(params))

    def correct(gradient: PyTree, params: PyTree, start: PyTree, own: PyTree, mean: PyTree) -> PyTree:
        del params, start
        wide = jax.tree.map(lambda g, c_k, c: g - c_k + c, tree.as_accumulators(gradient), own, mean)
        return tree.cast_like(wide, gradient)

    def finish(own: PyTree, mean: PyTree, start: PyTree, params: PyTree, steps: jax.Array) -> PyTree:
        def leaf(c_k: jax.Array, c: jax.Array, x0: jax.Array, x: jax.Array) -> jax.Array:
            gone = rate * jnp.maximum(steps, jnp.finfo(steps.dtype).tiny).astype(x.dtype)
            return jnp.where(steps > 0, c_k - c + (x0 - x) / gone, c_k)  # without a step nothing is known

        return jax.tree.map(leaf, own, mean, *tree.as_accumulators((start, params)))

    return Correction(init, correct, finish)
