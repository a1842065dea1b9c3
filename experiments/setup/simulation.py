"""What K workers would achieve: the time of a round, what of it is communication, and what failures cost.

Expectations in closed form, nothing random and nothing measured; `ASSUMPTIONS` says what they leave out.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from wavg_jax.devices.network import COLLECTIVES, NOTHING, Exchange, Link

ASSUMPTIONS = (
    "Every worker computes at the same steady rate; scoring, blending and feeding take no time.",
    "Nothing overlaps: a worker computes, then exchanges. The rate that hides an exchange is what it would take to "
    "send the same bytes while computing.",
    "Every worker has a full-duplex link of its own to a network that never slows down, and every step of an exchange "
    "waits for the link's latency once. Headers of protocols are not counted.",
    "Workers fail independently, at a constant rate.",
    "Averaging: a lost worker loses its round, on average half of one that it had computed, restarts, and joins the "
    "next round; the others go on without it.",
    "Sync: one lost worker stops all. They restart together from the last checkpoint and repeat what came after it, on "
    "average half of the time between two. Writing checkpoints takes no time.",
    "Time alone is compared. How accurate a network is after as many samples depends on H, on K and on the data.",
)
"""What the figures take for granted, in sentences."""


class Load(NamedTuple):
    """What a worker does in a local step.

    Attributes:
      parameters: numbers of the network, N.
      flop_per_sample: floating-point operations of one sample, forward and backward.
      batch_size: samples of each worker and step.
    """

    parameters: float
    flop_per_sample: float
    batch_size: int


class Cluster(NamedTuple):
    """What the workers are like.

    Attributes:
      flops: floating-point operations a second that each worker achieves.
      link: of each worker; None for no network.
      failure_rate: failures per worker and hour.
      restart: seconds from a failure until the worker, or in sync all of them, can go on.
      checkpoint: seconds between two checkpoints of sync.
    """

    flops: float
    link: Link | None = None
    failure_rate: float = 0.0
    restart: float = 0.0
    checkpoint: float = 600.0


class Outcome(NamedTuple):
    """What comes out for one way of training.

    Attributes:
      round_seconds: H local steps and their exchanges, without failures.
      communication: share of that which is communication.
      hiding: bytes a second that each worker has to send to send a round's bytes while it computes that round.
      lost: expected share of the workers' time that failures cost.
      efficiency: share of the time in which workers compute what is kept.
      samples: expected samples a second of all workers that are kept.
    """

    round_seconds: float
    communication: float
    hiding: float
    lost: float
    efficiency: float
    samples: float


def exchange(
    arm: str, numbers: float, workers: int, local_steps: int, wire: str = "float32", collective: str = "ring"
) -> Exchange:
    """What each worker sends in a round of an arm.

    Args:
      arm: "sequential" exchanges nothing, "sync" reduces gradients at every local step, every other arm exchanges once.
      numbers: N, in a gradient or a replica.
      workers: K.
      local_steps: H.
      wire: a name in `wavg_jax.devices.network.WIRES`.
      collective: a name in `wavg_jax.devices.network.COLLECTIVES`.

    >>> [exchange(arm, 1_000_000, 4, 50).seconds(Link(48e6)) for arm in ("sequential", "sync", "weighted")]
    [0.0, 50.0, 1.0]
    """
    if arm == "sequential":
        return NOTHING
    once = COLLECTIVES[collective](numbers, workers, wire)
    return once._replace(times=local_steps) if arm == "sync" else once


def simulate(
    load: Load, cluster: Cluster, *, arm: str, workers: int, local_steps: int, wire: str, collective: str
) -> Outcome:
    """Computes the outcome of training in rounds of H local steps; the arguments are those of `exchange`.

    >>> load = Load(parameters=1e9, flop_per_sample=6e9, batch_size=1000)  # a second a step at 6 TFLOP/s
    >>> cluster = Cluster(flops=6e12, link=Link(16e9))
    >>> case = {"workers": 2, "wire": "float32", "collective": "ring"}  # 4 GB: 2 seconds
    >>> sync = simulate(load, cluster, arm="sync", local_steps=50, **case)
    >>> round(sync.round_seconds, 6), round(sync.efficiency, 4)
    (150.0, 0.3333)
    >>> average = simulate(load, cluster, arm="plain", local_steps=50, **case)
    >>> round(average.round_seconds, 6), round(average.communication, 4), average.hiding
    (52.0, 0.0385, 80000000.0)
    """
    computing = local_steps * load.batch_size * load.flop_per_sample / cluster.flops
    sends = exchange(arm, load.parameters, workers, local_steps, wire, collective)
    seconds = computing + sends.seconds(cluster.link)
    rate = cluster.failure_rate / 3600
    if arm == "sync":
        lost = lost_by_all(workers * rate, cluster.restart, cluster.checkpoint)
    else:
        lost = lost_by_one(rate, cluster.restart, seconds)
    kept = computing / seconds * (1 - lost)
    return Outcome(
        round_seconds=seconds,
        communication=1 - computing / seconds,
        hiding=sends.sent * sends.times / computing,
        lost=lost,
        efficiency=kept,
        samples=kept * workers * cluster.flops / load.flop_per_sample,
    )


_HOPELESS = 700.0
"""Expected failures in a stretch of work from which on it never ends; exp overflows at 710."""


def lost_by_one(rate: float, restart: float, seconds: float) -> float:
    """The expected share of its time that a worker loses if it fails alone.

    A round of T seconds counts if the worker lives through it, with probability exp(-rate T). If not, the worker is
    away until the first start of a round after its restart: T + restart seconds from the start of the round it failed
    in, on average, since failures fall anywhere in a round. With x = rate T,

        lost = 1 - T / (T + (T + restart) (exp(x) - 1)),   about rate (T + restart) if that is small.

    Args:
      rate: failures a second.
      restart: seconds.
      seconds: T.

    >>> lost_by_one(0.0, 300, 60), f"{lost_by_one(1e-6, 300, 60):.3g}"
    (0.0, '0.00036')
    """
    if rate * seconds > _HOPELESS:
        return 1.0
    return 1 - seconds / (seconds + (seconds + restart) * math.expm1(rate * seconds))


def lost_by_all(rate: float, restart: float, checkpoint: float) -> float:
    """The expected share of their time that workers lose if the failure of one stops all of them.

    Work counts once the checkpoint after it is written, C seconds of work later. With failures of any of them at `rate`
    a second, and none while they restart, C seconds of work take (1/rate + restart) (exp(rate C) - 1) on average (Daly
    2006), so

        lost = 1 - C / ((1/rate + restart) (exp(rate C) - 1)),   about rate (C/2 + restart) if that is small.

    Args:
      rate: failures a second, of all workers together.
      restart: seconds.
      checkpoint: C.

    >>> lost_by_all(0.0, 300, 600), f"{lost_by_all(1e-6, 300, 600):.3g}"
    (0.0, '0.0006')
    """
    if rate * checkpoint > _HOPELESS:
        return 1.0
    return 1 - checkpoint / ((1 / rate + restart) * math.expm1(rate * checkpoint)) if rate else 0.0


def collective_of(point: Mapping[str, Any]) -> str:
    """How a measured point exchanged: as it says, else in a ring in float32 and by gathering in narrower formats."""
    return point.get("collective", "ring" if point["wire"] == "float32" else "gather")


def predicted(point: Mapping[str, Any], link: Link) -> float:
    """The seconds of a round of a measured point: its local seconds, and what its exchanges take.

    Args:
      point: nodes, rate (bits a second; None for unlimited), local_steps, arm, wire, parameters, local_seconds, and
        maybe collective, see `collective_of`.
      link: whose latency and overhead count with the point's rate.

    >>> point = {"nodes": 2, "rate": 1e8, "local_steps": 50, "arm": "sync", "wire": "float32", "parameters": 1_000_000}
    >>> predicted(point | {"local_seconds": 4.0}, Link())
    20.0
    """
    arm, wire = point["arm"], point["wire"]
    sends = exchange(arm, point["parameters"], point["nodes"], point["local_steps"], wire, collective_of(point))
    rate = math.inf if point["rate"] is None else point["rate"]
    return point["local_seconds"] + sends.seconds(link._replace(bandwidth=rate))
