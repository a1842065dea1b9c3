"""The machine's limits: large matrix products, and memory copies."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from experiments.benchmarks.harness import Case, in_place, timed
from wavg_jax.devices.placement import place


class Limit(NamedTuple):
    """A case, and the operations, or bytes read and written, of each call."""

    case: Case
    amount: float


def matmul(devices: int, size: int = 2048, products: int | None = None) -> Limit:
    """Multiplies float32 matrices of size x size on each device, in the precision that networks get.

    Args:
      devices: how many, each with its own product.
      size: rows and columns.
      products: in a row per call; by default 2 on a CPU and 50 elsewhere.
    """
    count = products or (2 if jax.default_backend() == "cpu" else 50)
    placement = place(devices, devices)
    rng = np.random.default_rng(0)
    # Standard deviation 1/sqrt(size), so that the numbers neither grow nor vanish.
    factor = jax.device_put((rng.standard_normal((size, size)) / size**0.5).astype(np.float32), placement.shared)
    start = jax.device_put(rng.standard_normal((devices, size, size)).astype(np.float32), placement.stacked)

    def chain(x: jax.Array, factor: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, x: x @ factor, x)

    run = jax.jit(placement.map(chain), donate_argnums=0)
    return Limit(in_place(run, start, factor), 2.0 * size**3 * count * devices)


@functools.cache
def rate() -> float:
    """Operations per second of large products on one device, measured once, for planning."""
    limit = matmul(1)
    limit.case()
    return limit.amount / limit.case()


def copy(amount: float, devices: int = 1) -> Limit:
    """Copies memory on several devices at once, in a compiled program that donates its target.

    Args:
      amount: bytes read plus bytes written; half of it is copied.
      devices: how many, each copying its part.
    """
    placement = place(devices, devices)
    each = max(int(amount / 8 / devices), 1)
    source = jax.device_put(np.ones((devices, each), np.float32), placement.stacked)
    target = jax.device_put(np.zeros((devices, each), np.float32), placement.stacked)
    # Negated, since a compiled program passes on unchanged values without a copy.
    run = jax.jit(lambda target, source: -source, donate_argnums=0, keep_unused=True)
    return Limit(in_place(run, target, source), 8.0 * each * devices)


def memcpy(amount: float) -> Limit:
    """Copies memory with numpy, on one core of the host; see `copy`."""
    source = np.ones(max(int(amount / 8), 1), np.float32)
    target = np.zeros_like(source)
    return Limit(timed(np.copyto, target, source), 8.0 * source.size)
