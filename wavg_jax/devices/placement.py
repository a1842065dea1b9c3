"""Where the replicas live: on one device, or spread over the devices of one process or many. No other module needs to
know which."""

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from wavg_jax.base import PyTree, SettingsError
from wavg_jax.devices import mapping
from wavg_jax.devices.collectives import gather_rows, sum_over_samples, sum_trees
from wavg_jax.devices.transfer import own_part, put_own

_AXIS = "replicas"


class Parts(NamedTuple):
    """Data of which every device has a part of its own, among what all replicas read.

    Attributes:
      values: leaves [parts, ...], `Placement.parts` of them; a replica's function sees its device's part, [...].
    """

    values: PyTree


class Items(NamedTuple):
    """Batches among what is mapped over replicas, of which the devices of a data-parallel placement take a share each.

    Attributes:
      values: leaves [K, H, B, ...].
    """

    values: PyTree


class Placement(NamedTuple):
    """How K replicas are mapped, exchanged and reduced.

    Attributes:
      map: turns `f(one, shared) -> out` for one replica into `g(stacked, shared) -> stacked out`.
      advance: the same for `f((held, given), shared) -> (held, out)`, overwriting what is held where a loop can.
      average: inside `map`, the mean over the devices that share a replica's batches, in one exchange.
      apart: inside `map`, makes a random key differ between the devices that share a replica's batches.
      reduce: turns a reduction `(stacked, weights) -> tree` into the same reduction over all devices, one all-reduce.
      gather: `stacked -> stacked`, all replicas on every device, in one exchange.
      together: turns `f(*arrays)` of gathered arrays into the same function run by every device, which may share the
        work in `over_samples`.
      over_samples: inside `together`, turns `f(given, samples [N, ...]) -> sums over the samples` into the same
        function with the samples spread over the devices.
      stacked: the sharding of a stacked tree, its leading axis over the devices.
      items: the sharding of what the replicas train on, [K, H, B].
      shared: the sharding of what all replicas read (global parameters), a copy on every device.
      each: the sharding of one entry per device [D].
      parts: into how many `Parts` data are cut.
      devices: the devices in use.
      replica_map: how a device runs its replicas; see `wavg_jax.devices.mapping`.
    """

    map: Callable[[Callable], Callable]
    advance: Callable[[Callable], Callable]
    average: Callable[[PyTree], PyTree]
    apart: Callable[[jax.Array], jax.Array]
    reduce: Callable[[Callable], Callable]
    gather: Callable[[PyTree], PyTree]
    together: Callable[[Callable], Callable]
    over_samples: Callable[[Callable], Callable]
    stacked: Sharding
    items: Sharding
    shared: Sharding
    each: Sharding
    parts: int
    devices: tuple[jax.Device, ...]
    replica_map: str

    def mine(self, replicas: int) -> slice:
        """Which of K replicas live on the devices of this process."""
        return own_part(self.stacked, (replicas,))[0]

    def share(self, own: PyTree) -> PyTree:
        """Makes stacked arrays [K, ...] of what each process has for its own replicas, [K / processes, ...]."""
        each = len(jax.tree.leaves(own)[0])
        count = len({device.process_index for device in self.devices}) if self.parts > 1 else 1
        return put_own(own, self.stacked, (each * count,))


_PATIENCE = {"xla_cpu_collective_call_terminate_timeout_seconds": 7 * 86400}
"""XLA aborts the process when one CPU device waits 40 seconds for another at a collective; replicas that meet only once
a round, on shared cores, can easily be that far apart."""


def compiler_options(placement: Placement) -> dict[str, int]:
    """Compiler options that a program over this placement needs."""
    return _PATIENCE if len(placement.devices) > 1 and placement.devices[0].platform == "cpu" else {}


def _as_is(x: Any) -> Any:
    return x


def _is_parts(x: Any) -> bool:
    return isinstance(x, Parts)


def _is_items(x: Any) -> bool:
    return isinstance(x, Items)


def _own(shared: PyTree) -> PyTree:
    """What all replicas read, with this device's part of every `Parts`."""
    return jax.tree.map(
        lambda x: jax.tree.map(lambda v: v[0], x.values) if _is_parts(x) else x, shared, is_leaf=_is_parts
    )


def _here(replica_map: str, function: Callable, in_place: bool) -> Callable:
    """Maps over the replicas of one device."""

    def run(stacked: PyTree, shared: PyTree) -> PyTree:
        return mapping.mapped(replica_map, function, in_place=in_place)(stacked, _own(shared))

    return run


def _grid(devices: tuple[jax.Device, ...]) -> jax.sharding.Mesh:
    # Auto, not make_mesh's default Explicit: on an Explicit axis, sorting over the replicas raises.
    return jax.sharding.Mesh(np.asarray(devices), (_AXIS,), axis_types=(AxisType.Auto,))


_ALONG, _EVERYWHERE = PartitionSpec(_AXIS), PartitionSpec()


def _together(grid: jax.sharding.Mesh, function: Callable) -> Callable:
    return jax.shard_map(function, mesh=grid, in_specs=_EVERYWHERE, out_specs=_EVERYWHERE, check_vma=False)


def _single(device: jax.Device, replica_map: str) -> Placement:
    """All replicas on one device."""
    here = SingleDeviceSharding(device)

    def spread(function: Callable, in_place: bool = False) -> Callable:
        return _here(replica_map, function, in_place)

    same = (_as_is,) * 6
    return Placement(
        spread, functools.partial(spread, in_place=True), *same, here, here, here, here, 1, (device,), replica_map
    )


def _data_parallel(devices: tuple[jax.Device, ...], replica_map: str) -> Placement:
    """One replica on all devices, which share the samples of every batch and average their gradients at every step."""
    grid, split = _grid(devices), PartitionSpec(None, None, _AXIS)
    shared = NamedSharding(grid, _EVERYWHERE)

    def spread(function: Callable, in_place: bool = False) -> Callable:
        here = _here(replica_map, function, in_place)

        def run(stacked: PyTree, shared: PyTree) -> PyTree:
            specs = jax.tree.map(lambda x: split if _is_items(x) else _EVERYWHERE, stacked, is_leaf=_is_items)
            return jax.shard_map(
                here, mesh=grid, in_specs=(specs, _EVERYWHERE), out_specs=_EVERYWHERE, check_vma=False
            )(stacked, shared)

        return run

    def average(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x / len(devices), sum_trees(_AXIS, tree))

    def apart(rng: jax.Array) -> jax.Array:
        return jax.random.fold_in(rng, jax.lax.axis_index(_AXIS))

    return Placement(
        map=spread,
        advance=functools.partial(spread, in_place=True),
        average=average,
        apart=apart,
        reduce=_as_is,
        gather=_as_is,
        together=functools.partial(_together, grid),
        over_samples=functools.partial(sum_over_samples, _AXIS, len(devices)),
        stacked=shared,
        items=NamedSharding(grid, split),
        shared=shared,
        each=NamedSharding(grid, _ALONG),
        parts=1,
        devices=devices,
        replica_map=replica_map,
    )


def _mesh(devices: tuple[jax.Device, ...], replica_map: str) -> Placement:
    """Replicas spread evenly over several devices: `jax.shard_map` over the mesh, `replica_map` inside each device."""
    grid = _grid(devices)

    def spread(function: Callable, in_place: bool = False) -> Callable:
        here = _here(replica_map, function, in_place)

        def run(stacked: PyTree, shared: PyTree) -> PyTree:
            specs = jax.tree.map(lambda x: _ALONG if _is_parts(x) else _EVERYWHERE, shared, is_leaf=_is_parts)
            return jax.shard_map(here, mesh=grid, in_specs=(_ALONG, specs), out_specs=_ALONG, check_vma=False)(
                stacked, shared
            )

        return run

    def reduce(reduction: Callable) -> Callable:
        def own(stacked: PyTree, weights: PyTree) -> PyTree:
            each = len(jax.tree.leaves(weights)[0]) // len(devices)
            start = jax.lax.axis_index(_AXIS) * each
            mine = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, start, each), weights)
            return reduction(stacked, mine, sum_over=_AXIS)

        # Every device knows all weights: spread over the devices, XLA would normalise them in an exchange for each.
        return jax.shard_map(own, mesh=grid, in_specs=(_ALONG, _EVERYWHERE), out_specs=_EVERYWHERE, check_vma=False)

    gather = jax.shard_map(
        functools.partial(gather_rows, _AXIS), mesh=grid, in_specs=_ALONG, out_specs=_EVERYWHERE, check_vma=False
    )
    stacked = NamedSharding(grid, _ALONG)
    return Placement(
        map=spread,
        advance=functools.partial(spread, in_place=True),
        average=_as_is,
        apart=_as_is,
        reduce=reduce,
        gather=gather,
        together=functools.partial(_together, grid),
        over_samples=functools.partial(sum_over_samples, _AXIS, len(devices)),
        stacked=stacked,
        items=stacked,
        shared=NamedSharding(grid, _EVERYWHERE),
        each=stacked,
        parts=len(devices),
        devices=devices,
        replica_map=replica_map,
    )


def on(devices: tuple[jax.Device, ...], replica_map: str = "vmap", *, batches: bool = False) -> Placement:
    """Spreads the replicas over these devices, whose number must divide K.

    Cached: the same arguments give the same placement, so that equal recipes share their programs.

    Args:
      devices: one or more.
      replica_map: how a device runs its replicas; see `wavg_jax.devices.mapping`.
      batches: spread the samples of each batch of one replica instead.

    Raises:
      SettingsError: there is no such mapping.
    """
    mapping.check(replica_map)
    return _made(devices, replica_map, batches and len(devices) > 1)


@functools.cache
def _made(devices: tuple[jax.Device, ...], replica_map: str, batches: bool) -> Placement:
    if len(devices) == 1:
        return _single(devices[0], replica_map)
    return (_data_parallel if batches else _mesh)(devices, replica_map)


def remapped(placement: Placement, replica_map: str) -> Placement:
    """The same placement with another way to run the replicas of a device."""
    return on(placement.devices, replica_map, batches=placement.parts == 1)


def single() -> Placement:
    """All replicas on this process's default device, mapped by vmap."""
    return on((jax.local_devices()[0],))


def check_spread(replicas: int, placement: Placement) -> None:
    """Raises SettingsError unless K replicas spread evenly over a placement's devices, or one over all of them."""
    if replicas != 1:
        _check_multiple(replicas, placement.parts)


def _check_multiple(replicas: int, devices: int) -> None:
    if replicas % devices:
        fitting = _fitting(replicas, len(jax.devices()), jax.process_count())
        at = bisect.bisect(fitting, devices)
        instead = " or ".join(map(str, fitting[max(at - 1, 0) : at + 1]))
        raise SettingsError(
            f"{replicas} replicas do not spread evenly over {devices} devices: set replicas= to "
            f"{_nearest(replicas, devices)}" + (f", or devices= to {instead}" if instead else "")
        )


def _nearest(replicas: int, divisor: int) -> str:
    """The numbers of replicas nearest to K that a number divides, in words."""
    below = replicas - replicas % divisor
    return " or ".join(str(k) for k in (below, below + divisor) if k)


def _fitting(replicas: int, at_hand: int, processes: int) -> list[int]:
    """The numbers of devices that divide K and are the same in every process."""
    return [n for n in range(processes, at_hand + 1, processes) if replicas == 1 or replicas % n == 0]


def _in_turn(devices: Sequence[jax.Device], count: int) -> tuple[jax.Device, ...]:
    """The first `count` devices, as many of every process, those of one process side by side."""
    each = count // jax.process_count()
    ranks = {
        device: rank
        for process in range(jax.process_count())
        for rank, device in enumerate(one for one in devices if one.process_index == process)
    }
    chosen = [device for device in devices if ranks[device] < each]
    return tuple(sorted(chosen, key=lambda device: (device.process_index, ranks[device])))


def _choose(replicas: int, at_hand: int, processes: int) -> int:
    """The largest number of devices that divides K and is the same in every process.

    Raises:
      SettingsError: the processes cannot share the replicas evenly.
    """
    counts = _fitting(replicas, at_hand, processes)
    if not counts:
        raise SettingsError(
            f"{replicas} replicas do not spread evenly over {processes} processes: set replicas= to "
            f"{_nearest(replicas, processes)}, or start another number of processes"
        )
    return max(counts) if replicas > 1 or processes > 1 else 1


def place(replicas: int, devices: int | Sequence[jax.Device] | None = None, replica_map: str = "vmap") -> Placement:
    """Chooses the placement of K replicas.

    One replica on several devices shares the samples of each batch among them; their number must divide B. Several
    processes (`wavg_jax.initialize`) take the same number of devices each.

    Args:
      replicas: K.
      devices: a number of devices, the devices themselves, or None for the largest available number that divides K; for
        K = 1 one device, or all of them in several processes.
      replica_map: how a device runs its replicas; see `wavg_jax.devices.mapping`.

    Raises:
      SettingsError: JAX sees fewer devices, their number does not divide K, or there is no such mapping.
    """
    at_hand, processes = jax.devices(), jax.process_count()
    if not isinstance(devices, Sequence):
        count = _choose(replicas, len(at_hand), processes) if devices is None else devices
        if not 1 <= count <= len(at_hand):
            raise SettingsError(
                f"devices={count}: JAX sees {len(at_hand)} on this machine: set devices= between 1 and {len(at_hand)}"
            )
        if count % processes:
            raise SettingsError(
                f"devices={count} for {processes} processes: every process takes the same number of devices, so set "
                f"devices= to a multiple of {processes}"
            )
        devices = _in_turn(at_hand, count)
    if replicas != 1:
        _check_multiple(replicas, len(devices))
    return on(tuple(devices), replica_map, batches=replicas == 1)
