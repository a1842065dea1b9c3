"""EDiT's pseudo-gradient penalty: distrusts replicas that moved far, without held-out data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.arguments import INT32, as_number, as_whole, number
from wavg_jax.base import PyTree, Weighting
from wavg_jax.weighting import distances
from wavg_jax.weighting.make import make_weighting
from wavg_jax.weighting.scores import softmax, usable

_FAR = 1e18
"""Norms count as at most this in the averages, so that their squares do not overflow."""


class NormState(NamedTuple):
    """How far each replica moved in the rounds it was alive; each field is [K], or a tree of [K] with one per tensor.

    Attributes:
      mean: moving average of the norms.
      variance: moving average of the squared distances to it.
      rounds: number of norms that have entered, float32.
    """

    mean: PyTree
    variance: PyTree
    rounds: PyTree


def _anomalous(norm: jax.Array, state: NormState, threshold: float, warmup: int) -> jax.Array:
    """Which norms [K] are more than `threshold` standard deviations above their replica's average."""
    spread = jnp.sqrt(state.variance)
    far = (norm - state.mean > threshold * spread) & (spread > 0)
    return far & (state.rounds >= warmup)


def _entered(norm: jax.Array, state: NormState, alive: jax.Array, rate: float) -> NormState:
    """The averages with the norms [K] of the living in them."""
    new, norm = usable(norm, alive), jnp.minimum(norm, _FAR)
    rounds = state.rounds + 1
    a = jnp.maximum(rate, 1 / rounds)  # the mean and variance of all rounds, until there are 1 / rate
    change = norm - state.mean
    mean, variance = state.mean + a * change, (1 - a) * (state.variance + a * change * change)
    return tree.select_replicas(new, NormState(mean, variance, rounds), state)


def pseudo_gradient_penalty(
    temperature: float = 1.0,
    *,
    threshold: float = 3.0,
    rate: float = 0.02,
    warmup: int = 10,
    layerwise: bool = False,
) -> Weighting:
    """EDiT's penalty on pseudo-gradients: softmax of minus the norm, after screening by z-score.

        w_k ~ exp(-|d_k| / T) unless |d_k| > mu_k + threshold * sigma_k,    d_k = x_k - params

    mu_k and sigma_k^2 are moving averages over the rounds of replica k, `mu <- mu + a (|d| - mu)` and
    `sigma^2 <- (1 - a) (sigma^2 + a (|d| - mu)^2)` with a = max(rate, 1 / rounds), into which screened norms enter too.
    No held-out data, and nothing to compute but norms. Large norms count as bad, small ones never.

    The third step is to clip the averaged pseudo-gradient: an outer optimizer such as
    `optax.chain(optax.clip_by_global_norm(10.0), outer.nesterov())`.

    Cheng et al. 2025 ("EDiT", arXiv:2412.07210), by their code in ATorch's `local_sgd`, and with these departures. A
    layer here is a tensor, theirs a module. Their averages start at 0 and screen after 120 synchronisations; these
    start from the first norm. If all living replicas are screened, none is: their blend stays at the old parameters,
    while weights here sum to 1. They widen the threshold by the spread of recent z-scores.

    Args:
      temperature: T, in units of the parameters.
      threshold: number of standard deviations above its average from which a replica's norm is anomalous.
      rate: weight of the newest norm in the averages, greater than 0 and at most 1.
      warmup: number of rounds of a replica before it is screened; one whose norms have all been equal is not.
      layerwise: give weights per tensor, as the paper does per module, instead of per replica.

    Raises:
      SettingsError: `temperature` or `threshold` is not positive, `rate` is outside that range, or `warmup` is not a
        positive whole number.

    >>> import jax.numpy as jnp
    >>> import wavg_jax as wavg
    >>> avg = wavg.averager(pseudo_gradient_penalty())
    >>> stacked = {"w": jnp.array([[3.0, 4.0], [0.0, 5.0 + jnp.log(3.0)]])}
    >>> _, _, weights = avg.update(stacked, avg.init({"w": jnp.zeros(2)}, 2), {"w": jnp.zeros(2)})
    >>> weights.round(4).tolist()
    [0.75, 0.25]
    """
    threshold = as_number("pseudo_gradient_penalty: threshold", threshold, number(above=0))
    rate = as_number("pseudo_gradient_penalty: rate", rate, number(above=0, most=1))
    warmup = as_whole("pseudo_gradient_penalty: warmup", warmup, 1, INT32)
    by_norm = softmax("norm", temperature, higher_is_better=False)
    measure = distances.per_tensor if layerwise else distances.from_centre

    def init(params: PyTree, replicas: int) -> NormState:
        nothing = jnp.zeros(replicas, jnp.float32)
        return NormState(*(jax.tree.map(lambda x: nothing, params if layerwise else nothing) for _ in range(3)))

    def screened(norm: jax.Array, alive: jax.Array, *state: jax.Array) -> tuple[jax.Array, NormState]:
        before = NormState(*state)
        sane = usable(norm, alive) & ~_anomalous(norm, before, threshold, warmup)
        return jnp.where(sane | ~sane.any(), norm, jnp.inf), _entered(norm, before, alive, rate)

    def update(
        stacked: PyTree, state: NormState, params: PyTree, *, alive: jax.Array, blend: Callable, **signals: Any
    ) -> tuple[PyTree, NormState]:
        del signals
        norms = measure(stacked, params)
        done = jax.tree.map(lambda norm, *state: screened(norm, alive, *state), norms, *state)
        kept, state = jax.tree.transpose(jax.tree.structure(norms), None, done)
        weights, _ = by_norm.update(stacked, (), params, alive=alive, blend=blend, norm=kept)
        return weights, state

    return make_weighting(update, init=init)
