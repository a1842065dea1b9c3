"""Simulated faults, to try schemes on: replicas that are slow, badly tuned or hostile."""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.arguments import MAPPING, NONE, as_whole, check, either, number, whole
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.base import PyTree, SettingsError
from wavg_jax.devices.placement import Placement
from wavg_jax.rounds import keys
from wavg_jax.rounds.local import Pace

__all__ = ["Faults", "little_is_enough", "simulate"]


def __dir__() -> list[str]:
    return __all__


class Faults(NamedTuple):
    """The faults of K replicas.

    Replica k starts a round at p_k and trains to x_k. It sends

        p_k + sent_k (x_k - p_k) + mean_k (mu - p_k) + deviation_k sigma + noise_k n

    mu and sigma are the mean and the standard deviation, element by element, of the living replicas that send their own
    x_k; replicas with `mean` or `deviation` collude, as they know it. n is standard normal, drawn for every replica,
    element and round.

    Attributes:
      speed: share of a round's local steps that the replica takes; below 1 it is a straggler.
      rate: multiplies the updates of its inner optimizer, as a learning rate does.
      sent: multiplies the change that it sends; 1 is none, -1 flips its sign.
      mean: multiplies the mean change of the honest; 0 is none.
      deviation: multiplies their standard deviation, in units of the parameters; 0 is none.
      noise: standard deviation of normal noise, in units of the parameters; 0 is none.
    """

    speed: tuple[float, ...]
    rate: tuple[float, ...]
    sent: tuple[float, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    noise: tuple[float, ...]


_NONE = Faults(*((1.0,),) * 3, *((0.0,),) * 3)
"""What a factor is where there is no fault."""
_SPEED = number(above=0, most=1)


def simulate(
    replicas: int,
    *,
    speed: Mapping[int, float] | None = None,
    rate: Mapping[int, float] | None = None,
    sent: Mapping[int, float] | None = None,
    mean: Mapping[int, float] | None = None,
    deviation: Mapping[int, float] | None = None,
    noise: Mapping[int, float] | None = None,
) -> Faults:
    """Gives some of K replicas faults; see `Faults` for what the factors mean.

    A flipped sign is `sent` -1, random weights `sent` 0 and `noise` 1. "A little is enough" is `sent` 0, `mean` 1 and
    `deviation` `-little_is_enough(K, m)` of m replicas.

    Args:
      replicas: K.
      speed, rate, sent, mean, deviation, noise: number of the replica -> factor; speed is above 0 and at most 1.

    Raises:
      SettingsError: there is no such replica, or a factor is out of range.

    >>> simulate(3, speed={0: 0.25}, sent={2: -1.0})[:3]
    ((0.25, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, -1.0))
    """
    replicas = as_whole("simulate: replicas", replicas, 1)
    given = {"speed": speed, "rate": rate, "sent": sent, "mean": mean, "deviation": deviation, "noise": noise}

    def row(name: str, factors: Mapping[int, float] | None) -> tuple[float, ...]:
        check(f"simulate: {name}", factors, either(NONE, MAPPING))
        for k, factor in (factors or {}).items():
            check(f"simulate: the replica that {name} names", k, whole(0, replicas - 1))
            check(f"simulate: {name} of replica {k}", factor, _SPEED if name == "speed" else number())
        (none,) = getattr(_NONE, name)
        return tuple(float((factors or {}).get(k, none)) for k in range(replicas))

    return Faults(**{name: row(name, factors) for name, factors in given.items()})


def little_is_enough(replicas: int, liars: int) -> float:
    """How many standard deviations from the mean of the honest m of n replicas may send, unnoticed by a majority.

        s = floor(n / 2 + 1) - m,    z = max {z: phi(z) < (n - m - s) / (n - m)}

    phi is the cumulative standard normal distribution. With s honest replicas farther from the mean than they are, the
    liars are part of a majority (Baruch, Baruch and Goldberg 2019, "A little is enough: circumventing defenses for
    distributed learning", arXiv:1902.06156). Few liars need so many supporters that z is below 0.

    Args:
      replicas: n, at least 3.
      liars: m, from 1 to half of them.

    Raises:
      SettingsError: there are fewer replicas, or more liars, who have the majority without this.

    >>> round(little_is_enough(50, 24), 2), round(little_is_enough(8, 3), 4)  # s = 2: phi(z) = 24 / 26, 3 / 5
    (1.43, 0.2533)
    """
    n = as_whole("little_is_enough: replicas", replicas, 3)
    check("little_is_enough: liars", liars, whole(1, n // 2))
    supporters = n // 2 + 1 - liars
    return statistics.NormalDist().inv_cdf((n - liars - supporters) / (n - liars))


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


def lies(faults: Faults | None) -> bool:
    """Whether a replica sends anything but its own parameters."""
    return any(_liars(faults))


def check_apart(faults: Faults | None, where: str) -> None:
    """Raises SettingsError if replicas that send their parameters one by one cannot have these faults."""
    if faults is not None and any((*faults.mean, *faults.deviation, *faults.noise)):
        raise SettingsError(
            f"faults= with mean=, deviation= or noise= need all replicas at once, which {where} never have: give "
            "speed=, rate= or sent= alone, or train without"
        )


def distort(
    faults: Faults | None, where: Placement, stacked: PyTree, before: PyTree, alive: jax.Array, rng: jax.Array
) -> PyTree:
    """The parameters that the replicas send.

    Args:
      faults: theirs.
      where: how to reduce over them.
      stacked: their own [K, ...].
      before: where they started [K, ...], or [1, ...] if that is one place.
      alive: bool [K].
      rng: their keys [K], as `keys.at_sync` splits them.
    """
    if faults is None or not lies(faults):
        return stacked
    leaves, structure = jax.tree.flatten(stacked)
    honest = alive & ~jnp.array(_liars(faults))
    known = _honest(where, stacked, honest) if _collude(faults) else None
    some = where.gather(honest).any()  # else there is nobody to imitate
    rngs = jax.vmap(lambda key: jax.random.split(key, len(leaves)), out_axes=1)(keys.at_sync(rng).lie)

    def lie(i: int, x: jax.Array, start: jax.Array) -> jax.Array:
        def over(factors: tuple[float, ...]) -> jax.Array:
            return jnp.asarray(factors).astype(wide).reshape(-1, *[1] * (x.ndim - 1))

        wide = tree.accumulator_dtype(x.dtype)
        start = start.astype(wide)
        told = start + over(faults.sent) * (x.astype(wide) - start)
        if known is not None:
            mean, deviation = (jax.tree.leaves(one)[i][None] for one in known)
            told += jnp.where(some, over(faults.mean) * (mean - start) + over(faults.deviation) * deviation, 0)
        if any(faults.noise):
            told += over(faults.noise) * jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], wide))(rngs[i])
        return jnp.where(over(_liars(faults)) > 0, told.astype(x.dtype), x)

    starts = jax.tree.leaves(before)
    return jax.tree.unflatten(structure, [lie(i, *both) for i, both in enumerate(zip(leaves, starts, strict=True))])


def finite_after(faults: Faults | None, alive: jax.Array, sent: PyTree) -> jax.Array:
    """Which of the `alive` replicas [K] still have finite parameters [K, ...] after `distort`."""
    return alive & tree.all_finite(sent) if lies(faults) else alive


def _liars(faults: Faults | None) -> tuple[bool, ...]:
    """Which replicas [K] send anything but their own parameters."""
    told = () if faults is None else zip(*faults[2:], strict=True)
    return tuple(one != (1.0, 0.0, 0.0, 0.0) for one in told)


def _collude(faults: Faults) -> bool:
    return any((*faults.mean, *faults.deviation))


def _honest(where: Placement, stacked: PyTree, honest: jax.Array) -> tuple[PyTree, PyTree]:
    """Mean and standard deviation of the `honest` replicas [K], element by element; zeros if there are none."""
    weights, mean_of = tree.equal_weights(where.gather(honest)), where.reduce(weighted_mean)
    mean = mean_of(stacked, weights)
    squares = jax.tree.map(lambda x, m: jnp.square(x.astype(m.dtype) - m[None]), stacked, mean)
    return mean, jax.tree.map(jnp.sqrt, mean_of(squares, weights))
