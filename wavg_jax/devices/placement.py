"""Where the replicas live: all on one device, or spread over a mesh. No other module needs to know which."""

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from wavg_jax.base import PyTree, SettingsError
from wavg_jax.devices import machine, mapping

_AXIS = "replicas"


class Placement(NamedTuple):
    """How K replicas are mapped and reduced.

    Attributes:
      map: turns `f(one, shared) -> out` for one replica into `g(stacked, shared) -> stacked out`.
      reduce: turns a reduction `(stacked, weights) -> tree` into the same reduction over all devices.
      over_samples: turns `f(network, samples [N, ...]) -> sums over the samples` into the same function with the
        samples spread over the devices, if the number of devices divides N.
      stacked: the sharding of a stacked tree, its leading axis over the devices.
      shared: the sharding of what all replicas read (data, global parameters), a copy on every device.
      devices: the devices in use.
      replica_map: how a device runs its replicas; see `wavg_jax.devices.mapping`.
    """

    map: Callable[[Callable], Callable]
    reduce: Callable[[Callable], Callable]
    over_samples: Callable[[Callable], Callable]
    stacked: Sharding
    shared: Sharding
    devices: tuple[jax.Device, ...]
    replica_map: str


def put(values: PyTree, sharding: Sharding) -> PyTree:
    """Copies a tree of host arrays to devices; never aliases host memory, where a later write would reach the copy."""
    return jax.device_put(values, sharding, may_alias=False)


_ROOM = 0.25
"""Share of a device's memory that the training split may take; the rest is for replicas and their activations."""


def has_room(placement: Placement, nbytes: int) -> bool:
    """Whether every device of a placement can hold `nbytes` bytes of data for the whole run."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in placement.devices]
    if all(limits):
        return nbytes <= _ROOM * min(limits)
    # CPU devices share the host's memory, and each would hold a copy.
    return nbytes * len(placement.devices) <= _ROOM * machine.memory()


_PATIENCE = {"xla_cpu_collective_call_terminate_timeout_seconds": 7 * 86400}
"""XLA aborts the process when one CPU device waits 40 seconds for another at a collective; replicas that meet only once
a round, on shared cores, can easily be that far apart."""


def compiler_options(placement: Placement) -> dict[str, int]:
    """Compiler options that a program over this placement needs."""
    return _PATIENCE if len(placement.devices) > 1 and placement.devices[0].platform == "cpu" else {}


def _single(device: jax.Device, replica_map: str) -> Placement:
    """All replicas on one device."""
    here = SingleDeviceSharding(device)
    spread = functools.partial(mapping.mapped, replica_map)
    return Placement(spread, lambda reduce: reduce, lambda run: run, here, here, (device,), replica_map)


def _mesh(devices: tuple[jax.Device, ...], replica_map: str) -> Placement:
    """Replicas spread evenly over several devices: `jax.shard_map` over the mesh, `replica_map` inside each device."""
    # Auto, not make_mesh's default Explicit: on an Explicit axis, sorting over the replicas raises.
    grid = jax.sharding.Mesh(np.asarray(devices), (_AXIS,), axis_types=(AxisType.Auto,))
    over_replicas, everywhere = PartitionSpec(_AXIS), PartitionSpec()

    def spread(function: Callable) -> Callable:
        return jax.shard_map(
            mapping.mapped(replica_map, function),
            mesh=grid,
            in_specs=(over_replicas, everywhere),
            out_specs=over_replicas,
            check_vma=False,
        )

    def reduce(reduction: Callable) -> Callable:
        return jax.shard_map(
            functools.partial(reduction, sum_over=_AXIS),
            mesh=grid,
            in_specs=(over_replicas, over_replicas),
            out_specs=everywhere,
            check_vma=False,
        )

    def over_samples(function: Callable) -> Callable:
        def each(network: PyTree, samples: PyTree) -> PyTree:
            return jax.tree.map(lambda x: x[None], function(network, samples))

        split = jax.shard_map(
            each, mesh=grid, in_specs=(everywhere, over_replicas), out_specs=over_replicas, check_vma=False
        )

        def run(network: PyTree, samples: PyTree) -> PyTree:
            n = len(jax.tree.leaves(samples)[0])
            even = n - n % len(devices)
            parts = []
            if even:
                shares = split(network, jax.tree.map(lambda a: a[:even], samples))
                parts.append(jax.tree.map(lambda x: x.sum(0), shares))
            if even < n:  # the few that are left run on every device
                parts.append(function(network, jax.tree.map(lambda a: a[even:], samples)))
            return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)

        return run

    stacked, shared = NamedSharding(grid, over_replicas), NamedSharding(grid, everywhere)
    return Placement(spread, reduce, over_samples, stacked, shared, devices, replica_map)


@functools.cache
def on(devices: tuple[jax.Device, ...], replica_map: str = "vmap") -> Placement:
    """Spreads the replicas over these devices, whose number must divide K.

    Cached: the same arguments give the same placement, so that equal recipes share their programs.

    Args:
      devices: one or more.
      replica_map: how a device runs its replicas; see `wavg_jax.devices.mapping`.

    Raises:
      SettingsError: there is no such mapping.
    """
    mapping.check(replica_map)
    return _single(devices[0], replica_map) if len(devices) == 1 else _mesh(devices, replica_map)


def single() -> Placement:
    """All replicas on the default device, mapped by vmap."""
    return on((jax.devices()[0],))


def check_spread(replicas: int, devices: int) -> None:
    """Raises SettingsError unless K replicas spread evenly over so many devices."""
    if replicas % devices:
        divisors = [n for n in range(1, replicas + 1) if replicas % n == 0]
        at = bisect.bisect(divisors, devices)
        raise SettingsError(
            f"{replicas} replicas do not spread evenly over {devices} devices: set devices= to "
            f"{' or '.join(map(str, divisors[at - 1 : at + 1]))}"
        )


def place(replicas: int, devices: int | Sequence[jax.Device] | None = None, replica_map: str = "vmap") -> Placement:
    """Chooses the placement of K replicas.

    Args:
      replicas: K.
      devices: a number of devices, the devices themselves, or None for the largest available number that divides K.
      replica_map: how a device runs its replicas; see `wavg_jax.devices.mapping`.

    Raises:
      SettingsError: JAX sees fewer devices, their number does not divide K, or there is no such mapping.
    """
    at_hand = jax.devices()
    if devices is None:
        devices = max(n for n in range(1, len(at_hand) + 1) if replicas % n == 0)
    if not isinstance(devices, Sequence):
        if not 1 <= devices <= len(at_hand):
            raise SettingsError(
                f"devices={devices}: JAX sees {len(at_hand)} on this machine: set devices= between 1 and {len(at_hand)}"
            )
        devices = at_hand[:devices]
    check_spread(replicas, len(devices))
    return on(tuple(devices), replica_map)
