"""A task's network as named tensors, which is how checkpoints hold one."""

from collections.abc import Mapping
from typing import Any

import jax

from wavg_jax import tree
from wavg_jax.base import DataError, PyTree, Task
from wavg_jax.storage.tensors import Spec

Named = Mapping[str, Any]
"""{name: array}: the tensors of one network, or of K with leaves [K, ...]."""


class Network:
    """The parameters and mutable collections of a task, by the names of `wavg_jax.tree.named`."""

    def __init__(self, task: Task):
        """Traces the task's `init`, and runs it if the network holds random keys, which no checkpoint has."""
        self._abstract = jax.eval_shape(task.init, jax.random.key(0))
        self._leaves = tree.named(*self._abstract)
        self.shapes = {name: x for name, x in self._leaves.items() if not tree.is_key(x)}
        """{name: shape and dtype} of what a checkpoint holds."""
        keys = len(self.shapes) < len(self._leaves)
        self._keys = tree.named(*jax.jit(task.init)(jax.random.key(0))) if keys else {}

    def check(self, specs: Mapping[str, Spec]) -> None:
        """Raises DataError unless checkpoints with these tensors hold the network."""
        for name, x in self.shapes.items():
            if name not in specs or specs[name].shape != x.shape:
                raise DataError(
                    f"the task's network has a tensor {name!r} of shape {[*x.shape]}; the checkpoints "
                    + (f"have {specs[name]} there" if name in specs else f"have none, but {_few(specs)}")
                    + ": make a task whose parameters have the names and shapes of the checkpoints' tensors"
                )

    def of(self, named: Named) -> tuple[PyTree, PyTree]:
        """The task's (params, mutable) of named tensors."""
        leaves = [self._keys[name] if tree.is_key(x) else named[name] for name, x in self._leaves.items()]
        params, mutable = jax.tree.unflatten(jax.tree.structure(self._abstract), leaves)
        return params, mutable


def _few(specs: Mapping[str, Spec]) -> str:
    names = list(specs)
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
