"""Simulated faults: replicas that are slow, badly tuned or hostile, to try schemes on before the real ones come."""

from collections.abc import Mapping
from typing import NamedTuple

from wavg_jax.arguments import MAPPING, NONE, as_whole, check, either, number, whole


class Faults(NamedTuple):
    """What is wrong with each of K replicas; 1 everywhere is none.

    Attributes:
      speed: share of a round's local steps that the replica does; below 1 it is a straggler.
      rate: multiplies what its inner optimizer adds to the parameters, as a learning rate does.
      sent: multiplies the change `x_k - params` that it sends; -1 flips its sign.
    """

    speed: tuple[float, ...]
    rate: tuple[float, ...]
    sent: tuple[float, ...]


_SPEED = number(above=0, most=1)


def faults(
    replicas: int,
    *,
    speed: Mapping[int, float] | None = None,
    rate: Mapping[int, float] | None = None,
    sent: Mapping[int, float] | None = None,
) -> Faults:
    """Gives some of K replicas faults; see `Faults` for what the numbers mean.

    Args:
      replicas: K.
      speed, rate, sent: number of the replica -> factor; speed above 0 and at most 1.

    Raises:
      SettingsError: there is no such replica, or a factor cannot be.

    >>> faults(3, speed={0: 0.25}, sent={2: -1.0})
    Faults(speed=(0.25, 1.0, 1.0), rate=(1.0, 1.0, 1.0), sent=(1.0, 1.0, -1.0))
    """

    replicas = as_whole("faults: replicas", replicas, 1)

    def row(name: str, factors: Mapping[int, float] | None) -> tuple[float, ...]:
        check(f"faults: {name}", factors, either(NONE, MAPPING))
        for k, factor in (factors or {}).items():
            check(f"faults: the replica that {name} names", k, whole(0, replicas - 1))
            check(f"faults: {name} of replica {k}", factor, _SPEED if name == "speed" else number())
        return tuple(float((factors or {}).get(k, 1.0)) for k in range(replicas))

    return Faults(row("speed", speed), row("rate", rate), row("sent", sent))
