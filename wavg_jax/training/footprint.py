"""How much memory a run takes, told before its first round."""

import math
from collections.abc import Sequence

import jax

from wavg_jax.base import PyTree, SettingsError
from wavg_jax.devices.memory import memory_of
from wavg_jax.storage.schema import Row


def held_bytes(arrays: PyTree) -> int:
    """Bytes of arrays, or of what their shapes promise, on each of their devices."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def saving(devices: Sequence[jax.Device], state: int, *, copied: bool) -> int:
    """Bytes that checkpoints take on each of these devices.

    Args:
      devices: of the run.
      state: bytes of the state on each of them.
      copied: whether a copy is saved while the next round runs, not the state itself.
    """
    buffers = devices[0].platform == "cpu"  # the writer's; elsewhere they are not in the devices' memory
    return state * (copied + buffers)


def fits(devices: Sequence[jax.Device], more: int) -> bool:
    """Whether each of these devices has room for so many bytes, beside what this process has taken already."""
    now = memory_of(tuple(devices))
    return now.taken + more <= now.limit


def check_fits(devices: Sequence[jax.Device], more: int) -> Row:
    """What the memory of each device will come to: {predicted, limit}, in bytes.

    Args:
      devices: of the run.
      more: bytes that it will take of each, beside what this process has taken already.

    Raises:
      SettingsError: they have less.
    """
    now = memory_of(tuple(devices))
    predicted = now.taken + more
    if predicted > now.limit:
        host = devices[0].platform == "cpu"
        times = sum(device.process_index == jax.process_index() for device in devices) if host else 1
        raise SettingsError(
            f"the run would take {times * predicted / 1e9:.1f} GB {'of memory' if host else 'on each device'}, "
            f"and there are {times * now.limit / 1e9:.1f} GB; take fewer replicas, a smaller network or batch_size=, "
            f"or {'a machine with more' if host else 'more devices'}"
        )
    return {"predicted": predicted, "limit": now.limit}
