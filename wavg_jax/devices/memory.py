"""The memory of the devices: how much there is, how much is taken, and the most that was."""

import contextlib
import pathlib
from typing import NamedTuple

import jax

from wavg_jax.devices import machine

_STATUS = pathlib.Path("/proc/self/status")


class Memory(NamedTuple):
    """Memory of a device, in bytes. CPU devices share the host's, and each counts as holding its share.

    Attributes:
      limit: what it has.
      taken: what this process holds of it; 0 if the system does not tell.
      peak: the most that this process has held of it; 0 if the system does not tell.
    """

    limit: int
    taken: int
    peak: int


def memory_of(devices: tuple[jax.Device, ...]) -> Memory | None:
    """The memory of those among these devices that are this process's: of the one with the least left, and the highest
    peak; None if they do not tell."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    found = [device.memory_stats() or {} for device in here]
    if all("bytes_limit" in stats for stats in found):
        names = ("bytes_limit", "bytes_in_use", "peak_bytes_in_use")
        each = [Memory(*(int(stats.get(name, 0)) for name in names)) for stats in found]
        least = min(each, key=lambda one: one.limit - one.taken)
        return least._replace(peak=max(one.peak for one in each))
    if any(device.platform != "cpu" for device in here):
        return None
    return Memory(*(part // len(here) for part in (machine.memory(), _told("VmRSS"), _told("VmHWM"))))


def _told(name: str) -> int:
    """What Linux says of this process under this name, in bytes; 0 elsewhere."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            key, _, amount = line.partition(":")
            if key == name:
                return 1024 * int(amount.split()[0])
    return 0


_ROOM = 0.25
"""Share of a device's memory that the training split may take; the rest is for replicas and their activations."""


def room(devices: tuple[jax.Device, ...]) -> int:
    """Bytes of data that each of this process's devices among these can hold for a whole run."""
    memory = memory_of(devices)
    return int(_ROOM * (machine.memory() // len(devices) if memory is None else memory.limit))
