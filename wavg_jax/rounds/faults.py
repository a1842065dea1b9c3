"""Simulated faults, to try schemes on: replicas that are slow, badly tuned or hostile."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.arguments import MAPPING, NONE, as_whole, check, either, number, whole
from wavg_jax.base import PyTree, SettingsError
from wavg_jax.rounds.local import Pace

__all__ = ["Faults", "simulate"]


def __dir__() -> list[str]:
    return __all__


class Faults(NamedTuple):
    """The faults of K replicas; 1 everywhere is none.

    Attributes:
      speed: share of a round's local steps that the replica takes; below 1 it is a straggler.
      rate: multiplies the updates of its inner optimizer, as a learning rate does.
      sent: multiplies the change `x_k - params` that it sends; -1 flips its sign.
    """

    speed: tuple[float, ...]
    rate: tuple[float, ...]
    sent: tuple[float, ...]


_SPEED = number(above=0, most=1)


def simulate(
    replicas: int,
    *,
    speed: Mapping[int, float] | None = None,
    rate: Mapping[int, float] | None = None,
    sent: Mapping[int, float] | None = None,
) -> Faults:
    """Gives some of K replicas faults; see `Faults` for what the factors mean.

    Args:
      replicas: K.
      speed, rate, sent: number of the replica -> factor; speed is above 0 and at most 1.

    Raises:
      SettingsError: there is no such replica, or a factor is out of range.

    >>> simulate(3, speed={0: 0.25}, sent={2: -1.0})
    Faults(speed=(0.25, 1.0, 1.0), rate=(1.0, 1.0, 1.0), sent=(1.0, 1.0, -1.0))
    """
    replicas = as_whole("simulate: replicas", replicas, 1)

    def row(name: str, factors: Mapping[int, float] | None) -> tuple[float, ...]:
        check(f"simulate: {name}", factors, either(NONE, MAPPING))
        for k, factor in (factors or {}).items():
            check(f"simulate: the replica that {name} names", k, whole(0, replicas - 1))
            check(f"simulate: {name} of replica {k}", factor, _SPEED if name == "speed" else number())
        return tuple(float((factors or {}).get(k, 1.0)) for k in range(replicas))

    return Faults(row("speed", speed), row("rate", rate), row("sent", sent))


def check_replicas(faults: Faults | None, replicas: int) -> None:
    """Raises SettingsError if the faults are not those of K replicas."""
    if faults is not None and len(faults.speed) != replicas:
        raise SettingsError(f"faults= are of {len(faults.speed)} replicas, there are {replicas}")


def slow_down(faults: Faults | None, pace: Pace, longest: int) -> Pace:
    """The pace [K] of replicas with these faults, in a round of `longest` steps or as many as `pace` has."""
    steps, rate = pace
    if faults is not None and set(faults.speed) != {1.0}:
        taken = jnp.asarray(faults.speed, jnp.float32) * jnp.float32(longest if steps is None else steps)
        steps = jnp.maximum(jnp.round(taken), 1).astype(jnp.int32)
    if faults is not None and set(faults.rate) != {1.0}:
        rate = jnp.asarray(faults.rate, jnp.float32) * jnp.float32(1 if rate is None else rate)
    return Pace(steps, rate)


def distort(faults: Faults | None, stacked: PyTree, before: PyTree) -> PyTree:
    """The parameters [K, ...] that the replicas send: their own, with the change since `before` multiplied."""
    if faults is None or not _distorts(faults):
        return stacked
    factors = jnp.asarray(faults.sent, jnp.float32)

    def leaf(x: jax.Array, start: jax.Array) -> jax.Array:
        factor = factors.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(factor == 1, x, start + factor * (x - start))

    return jax.tree.map(leaf, stacked, before)


def finite_after(faults: Faults | None, alive: jax.Array, sent: PyTree) -> jax.Array:
    """Which of the `alive` replicas [K] still have finite parameters [K, ...] after `distort`."""
    return alive & tree.all_finite(sent) if _distorts(faults) else alive


def _distorts(faults: Faults | None) -> bool:
    return faults is not None and set(faults.sent) != {1.0}
