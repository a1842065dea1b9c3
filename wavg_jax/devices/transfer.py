"""Host arrays to devices, in one process or many: every process sends what its own devices hold."""

import jax
import numpy as np
from jax.sharding import Sharding

from wavg_jax.base import PyTree
from wavg_jax.tree import is_key


def put(values: PyTree, sharding: Sharding) -> PyTree:
    """Copies a tree of host arrays to devices, every process its own part of the whole arrays it has.

    Never aliases host memory, where a later write would reach the copy.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(values, sharding, may_alias=False)

    def leaf(x: jax.Array | np.ndarray) -> jax.Array:
        if isinstance(x, jax.Array) and is_key(x):
            return jax.random.wrap_key_data(leaf(jax.random.key_data(x)), impl=str(jax.random.key_impl(x)))
        whole = np.asarray(x)
        # device_put would send the data of one process to all others.
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: np.array(whole[index]))

    return jax.tree.map(leaf, values)


def own_part(sharding: Sharding, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of an array of this shape that this process's devices hold, one slice per axis.

    >>> own_part(jax.sharding.SingleDeviceSharding(jax.devices()[0]), (4, 3))
    (slice(0, 4, None), slice(0, 3, None))
    """
    indices = list(sharding.addressable_devices_indices_map(shape).values())
    spans = [[index[axis].indices(n)[:2] for index in indices if index is not None] for axis, n in enumerate(shape)]
    return tuple(slice(min(a for a, _ in span), max(b for _, b in span)) for span in spans)


def put_own(part: PyTree, sharding: Sharding, shape: tuple[int, ...]) -> PyTree:
    """Makes global arrays of the parts that the processes hold.

    Args:
      part: leaves with the part that `own_part(sharding, shape)` names of their first `len(shape)` axes.
      sharding: of the whole arrays.
      shape: the first axes of the whole arrays.
    """
    if sharding.is_fully_addressable:
        return put(part, sharding)

    def leaf(x: np.ndarray) -> jax.Array:
        whole = shape + x.shape[len(shape) :]
        return jax.make_array_from_process_local_data(sharding, np.array(x), whole)

    return jax.tree.map(leaf, part)
