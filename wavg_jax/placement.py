"""Where the replicas live: all on one device, or spread over a mesh. Nothing above or below knows."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from wavg_jax import tree
from wavg_jax.base import PyTree, SettingsError

_AXIS = "replicas"


class Placement(NamedTuple):
    """How K replicas are mapped and reduced.

    Attributes:
      map: `f(one, shared) -> out` for one replica becomes `g(stacked, shared) -> stacked out`.
      reduce: a reduction `(stacked, weights) -> tree` becomes the same over all devices.
      stacked: the sharding of a stacked tree, its leading axis over the devices.
      shared: the sharding of what all replicas read (data, global parameters): on every device.
      devices: how many devices are in use.
    """

    map: Callable[[Callable], Callable]
    reduce: Callable[[Callable], Callable]
    stacked: Sharding
    shared: Sharding
    devices: int


def put(values: PyTree, sharding: Sharding) -> PyTree:
    """Copies a tree of host arrays to devices; never an alias of host memory, which a later change would reach."""
    return jax.device_put(values, sharding, may_alias=False)


def _map_on_one_device(function: Callable) -> Callable:
    def mapped(stacked: PyTree, shared: PyTree) -> PyTree:
        if tree.count_replicas(stacked) == 1:  # one replica runs 1.3 times faster on CPU without vmap
            return jax.tree.map(lambda x: x[None], function(tree.replica(stacked, 0), shared))
        return jax.vmap(function, in_axes=(0, None))(stacked, shared)

    return mapped


@functools.cache
def single() -> Placement:
    """All replicas on the default device, mapped by vmap."""
    here = SingleDeviceSharding(jax.devices()[0])
    return Placement(_map_on_one_device, lambda reduce: reduce, here, here, 1)


@functools.cache
def mesh(devices: tuple[jax.Device, ...]) -> Placement:
    """Replicas spread evenly over several devices: `jax.shard_map` over the mesh, vmap inside each device.

    Args:
      devices: the devices; their number must divide the number of replicas.
    """
    # Auto, not make_mesh's Explicit axis: on that, sorting over the replicas raises.
    grid = jax.sharding.Mesh(np.asarray(devices), (_AXIS,), axis_types=(AxisType.Auto,))
    over_replicas, everywhere = PartitionSpec(_AXIS), PartitionSpec()

    def spread(function: Callable) -> Callable:
        def mapped(stacked: PyTree, shared: PyTree) -> PyTree:
            return jax.shard_map(
                _map_on_one_device(function),
                mesh=grid,
                in_specs=(over_replicas, everywhere),
                out_specs=over_replicas,
                check_vma=False,
            )(stacked, shared)

        return mapped

    def reduce(reduction: Callable) -> Callable:
        return jax.shard_map(
            functools.partial(reduction, sum_over=_AXIS),
            mesh=grid,
            in_specs=(over_replicas, over_replicas),
            out_specs=everywhere,
            check_vma=False,
        )

    return Placement(spread, reduce, NamedSharding(grid, over_replicas), NamedSharding(grid, everywhere), len(devices))


def place(replicas: int, devices: int | Sequence[jax.Device] | None = None) -> Placement:
    """Chooses the placement of K replicas.

    Args:
      replicas: K.
      devices: a number of devices, the devices themselves, or None for as many of those at hand as divide K.

    Raises:
      SettingsError: more devices are asked for than there are, or their number does not divide K.
    """
    at_hand = jax.devices()
    if devices is None:
        devices = max(n for n in range(1, len(at_hand) + 1) if replicas % n == 0)
    if isinstance(devices, int):
        if not 1 <= devices <= len(at_hand):
            raise SettingsError(f"--devices is {devices}; this machine shows {len(at_hand)} to JAX")
        devices = at_hand[:devices]
    if replicas % len(devices):
        raise SettingsError(f"{replicas} replicas do not spread evenly over {len(devices)} devices (--devices)")
    return single() if len(devices) == 1 else mesh(tuple(devices))
