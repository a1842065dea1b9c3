"""Training that starts from a checkpoint, yours or another's."""

from os import PathLike

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax.base import DataError, PyTree, Task
from wavg_jax.soups.network import Network
from wavg_jax.storage.tensors import open_tensors


def start_from(task: Task, checkpoint: str | PathLike[str]) -> Task:
    """The task, whose training starts from a checkpoint's parameters and statistics, and not from random ones.

    All replicas start from them, whatever K is. So a run goes on from the blend of another with more replicas or fewer,
    in a folder of its own; optimizers, averager and schedules begin anew.

    Args:
      task: of the network; its tensors have the names and shapes of the checkpoint's.
      checkpoint: a safetensors file, a folder of them, or the folder of one Orbax checkpoint, such as
        `WORKDIR/checkpoints/run/40` of a run of `fit`. Tensors that the network has not are left out.

    Raises:
      DataError: it is none of these, is damaged, is of another network, or holds a number that is not finite.
      MissingExtra: safetensors (extra `soup`) or Orbax (extra `run`) is not installed.
    """
    network = Network(task)
    with open_tensors(checkpoint) as opened:
        network.check(opened.specs)
        held = {name: opened.read(name).astype(x.dtype) for name, x in network.shapes.items()}
    if bad := [name for name, x in held.items() if not np.isfinite(x.astype(np.float32)).all()]:
        raise DataError(f"{bad[0]!r} in {checkpoint} has numbers that are not finite: give an earlier checkpoint")

    def init(rng: jax.Array) -> tuple[PyTree, PyTree]:
        del rng
        return network.of(jax.tree.map(jnp.asarray, held))

    return task._replace(init=init)
