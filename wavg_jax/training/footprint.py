"""How much memory a run takes, told before its first round."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from wavg_jax.base import PyTree, SettingsError
from wavg_jax.devices import processes
from wavg_jax.devices.memory import memory_of
from wavg_jax.storage.schema import Row


def held_bytes(arrays: PyTree) -> int:
    """Bytes of arrays, or of what their shapes promise, on each of their devices."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def fits(devices: Sequence[jax.Device], more: int) -> bool:
    """Whether each of these devices has room for so many bytes, beside what this process has taken already."""
    now = memory_of(tuple(devices))
    return now is None or now.taken + more <= now.limit


def check_fits(devices: Sequence[jax.Device], more: int) -> Row | None:
    """What the memory of each device will come to: {predicted, limit}, in bytes; None if the devices do not tell.

    All processes of a run call it together, and all refuse if one has too little.

    Args:
      devices: of the run.
      more: bytes that it will take of each, beside what this process has taken already.

    Raises:
      SettingsError: they have less.
    """
    now = memory_of(tuple(devices))
    short = not fits(devices, more)
    if processes.gather(np.bool_(short)).any():
        said = _shortage(devices, more) if short else "another process of the run has too little memory"
        raise SettingsError(
            f"{said}; take fewer replicas, a smaller network or batch_size=, replica_map='map', or more devices"
        )
    return None if now is None else {"predicted": now.taken + more, "limit": now.limit}


def _shortage(devices: Sequence[jax.Device], more: int) -> str:
    now = memory_of(tuple(devices))
    assert now is not None
    here = [device for device in devices if device.process_index == jax.process_index()]
    times, where = (len(here), "of memory") if here[0].platform == "cpu" else (1, "on each device")
    taken, limit = times * (now.taken + more) / 1e9, times * now.limit / 1e9
    return f"the run would take {taken:.1f} GB {where}, and there are {limit:.1f} GB"
