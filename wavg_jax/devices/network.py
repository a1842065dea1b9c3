"""What an exchange between workers costs: the bytes that each worker sends, and the seconds they take over a link.

K workers, each with one full-duplex link, exchange trees of N numbers in one of two ways:

- `all_reduce`: the mean reaches everyone, as reduce-scatter and all-gather in a ring, or, quantised, in two phases
  (all-to-all, sum in float32, all-gather). Each worker sends 2 N (K-1)/K numbers in 2 (K-1) steps; by recursive
  halving and doubling (Thakur, Rabenseifner and Gropp 2005), `halving`, as many in 2 log2 K.
- `all_gather`: every tree reaches everyone, who then sums at will. Each worker sends N (K-1) numbers in K-1 steps.

The library reduces in float32 alone, and gathers what is narrower (`wavg_jax.rounds.exchange`); the two phases are not
built. A worker receives as much as it sends. Links alone count: neither protocol headers (Ethernet and TCP add 5 %) nor
a switch that is slower than its links.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

BLOCK = 256
"""Numbers that share a float32 scale in int8."""
WIRES: Mapping[str, float] = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / BLOCK}
"""Wire format -> bytes per number."""


class Link(NamedTuple):
    """A worker's link.

    Attributes:
      bandwidth: bits per second, each way at once.
      latency: seconds from one worker to the next, once per step of an exchange.
      overhead: seconds that every exchange takes beside, such as launching it.
    """

    bandwidth: float = math.inf
    latency: float = 0.0
    overhead: float = 0.0

    def __str__(self) -> str:
        """
        >>> str(Link(1e8)), str(Link(latency=0.0005)), str(Link(1.5e9, 0.01, 0.002))
        ('100 Mbit/s', 'unlimited bandwidth, 0.5 ms latency', '1.5 Gbit/s, 10 ms latency, 2 ms overhead')
        """
        times = {"latency": self.latency, "overhead": self.overhead}
        return ", ".join([_rate(self.bandwidth), *(f"{1e3 * t:g} ms {name}" for name, t in times.items() if t)])


def _rate(bandwidth: float) -> str:
    if math.isinf(bandwidth):
        return "unlimited bandwidth"
    scale, unit = next((size for size in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if bandwidth >= size[0]), (1, ""))
    return f"{bandwidth / scale:g} {unit}bit/s"


class Exchange(NamedTuple):
    """One exchange.

    Attributes:
      sent: bytes that each worker sends.
      steps: messages one after another.
      times: how many such exchanges follow one another.
    """

    sent: float
    steps: int
    times: int = 1

    def seconds(self, link: Link | None) -> float:
        """The time of all of them; 0 without a link, or with nobody to exchange with.

        >>> mlp = all_reduce(1_000_000, 2)  # 4 MB each way
        >>> mlp.seconds(Link(1e8)), mlp.seconds(Link(1e8, latency=0.01)), mlp.seconds(None)
        (0.32, 0.34, 0.0)
        >>> all_reduce(1_000_000, 1).seconds(Link(1e8, overhead=1.0))
        0.0
        """
        if link is None or not self.steps:
            return 0.0
        return self.times * (self.sent * 8 / link.bandwidth + link.latency * self.steps + link.overhead)


NOTHING = Exchange(0.0, 0)
"""A worker that exchanges nothing."""


def all_reduce(numbers: float, workers: int, wire: str = "float32") -> Exchange:
    """The exchange that leaves the mean over K workers with each of them.

    sent = 2 N (K-1)/K w in 2 (K-1) steps, with w = 4 bytes a number in float32, 2 in bfloat16, 1 + 4/256 in int8.

    Args:
      numbers: N.
      workers: K.
      wire: a name in `WIRES`.

    >>> [all_reduce(1_000_000, 4, wire).sent for wire in WIRES]
    [6000000.0, 3000000.0, 1523437.5]
    >>> all_reduce(1_000_000, 4).steps
    6
    """
    return Exchange(2 * numbers * WIRES[wire] * (workers - 1) / workers, 2 * (workers - 1))


def halving(numbers: float, workers: int, wire: str = "float32") -> Exchange:
    """`all_reduce` by recursive halving and doubling: the same bytes in 2 ceil(log2 K) steps.

    >>> halving(1_000_000, 1024).sent == all_reduce(1_000_000, 1024).sent, halving(1_000_000, 1024).steps
    (True, 20)
    """
    return all_reduce(numbers, workers, wire)._replace(steps=2 * math.ceil(math.log2(workers)))


def all_gather(numbers: float, workers: int, wire: str = "float32") -> Exchange:
    """The exchange that leaves the trees of all K workers with each of them.

    sent = N (K-1) w in K-1 steps. In float32 it sends K/2 times as much as `all_reduce`; in int8 less than the ring in
    float32 for K < 8.

    Args:
      numbers, workers, wire: as for `all_reduce`.

    >>> [all_gather(1_000_000, 4, wire).sent for wire in WIRES]
    [12000000.0, 6000000.0, 3046875.0]
    >>> [k for k in range(2, 20) if all_gather(1, k, "int8").sent < all_reduce(1, k).sent]
    [2, 3, 4, 5, 6, 7]
    """
    return Exchange(numbers * WIRES[wire] * (workers - 1), workers - 1)


COLLECTIVES: Mapping[str, Callable[..., Exchange]] = {"ring": all_reduce, "halving": halving, "gather": all_gather}
"""How to exchange, by name."""


def as_entry(link: Link | None) -> dict[str, float] | None:
    """A link as a row's entry; unlimited bandwidth becomes null there."""
    return None if link is None else link._asdict()


def from_entry(entry: Mapping[str, Any] | None) -> Link | None:
    """The link of a row's entry.

    >>> from_entry({"bandwidth": None, "latency": 0.01, "overhead": 0.0}), from_entry(None)
    (Link(bandwidth=inf, latency=0.01, overhead=0.0), None)
    """
    return None if entry is None else Link(**{name: math.inf if x is None else x for name, x in entry.items()})
