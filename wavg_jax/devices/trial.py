"""Collectives are tried before anybody relies on them.

gloo has silently returned wrong values for large chunks (jax issue 40830), so what a run exchanges is tried in its own
size. Nothing is kept: the devices make what they send, and compare what they get, number by number.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from wavg_jax.base import WavgError
from wavg_jax.devices.collectives import after

_PRIME = 251
_SENDERS = 16
"""Whole numbers below these, so that sums in any order are exact in float32."""


@functools.cache
def try_collectives(devices: Sequence[jax.Device], gathered: int, summed: int) -> None:
    """Gathers and adds up numbers over devices, once for the same arguments.

    Args:
      devices: those that exchange, of all processes.
      gathered: float32 numbers that each sends to all.
      summed: float32 numbers in the sum.

    Raises:
      WavgError: what arrives on a device of this process is not what was sent, or not its sum.
    """
    along = PartitionSpec("all")
    mesh = Mesh(np.asarray(devices), ("all",), axis_types=(AxisType.Auto,))
    exchange = functools.partial(_wrong, len(devices), gathered, summed)
    wrong = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=(), out_specs=along, check_vma=False))()
    found = np.concatenate([shard.data for shard in wrong.addressable_shards])
    for column, name in enumerate(("gather", "sum")):
        if found[:, column].any():
            raise WavgError(f"a {name} over {len(devices)} devices returns wrong values: use another version of jaxlib")


def _wrong(devices: int, gathered: int, summed: int) -> jax.Array:
    """Whether (gather, sum) went wrong on this device, bool [1, 2]."""
    here = jax.lax.axis_index("all")
    rows = jax.lax.all_gather(_sent(here, gathered)[None], "all", tiled=True)
    every = jax.vmap(functools.partial(_sent, numbers=gathered))(jnp.arange(devices, dtype=jnp.int32))
    offset = sum(device % _SENDERS for device in range(devices))
    total = jax.lax.psum(after(_sent(here, summed), rows), "all")
    expected = devices * _sent(jnp.int32(0), summed) + offset
    return jnp.stack([(rows != every).any(), (total != expected).any()])[None]


def _sent(device: jax.Array, numbers: int) -> jax.Array:
    """What a device sends, float32 [numbers]."""
    return (jnp.arange(numbers, dtype=jnp.int32) % _PRIME + device % _SENDERS).astype(jnp.float32)
