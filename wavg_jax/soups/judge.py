"""How good checkpoints and their blends are as networks: scores on held-out data, and quality on the test split."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax import tree
from wavg_jax.base import Batch, DataError, PyTree, Task
from wavg_jax.data import ShardedData
from wavg_jax.rounds import score
from wavg_jax.rounds.forward import Forward, labels
from wavg_jax.rounds.score import Scoring
from wavg_jax.storage.tensors import Spec

Named = Mapping[str, Any]
"""{name: array}: the tensors of one network, or of K with leaves [K, ...]."""


class Judge:
    """Runs named tensors as the network of a task."""

    def __init__(self, task: Task, data: ShardedData, scoring: Scoring, specs: Mapping[str, Spec]):
        """Raises DataError if the checkpoints, whose tensors are `specs`, are not of the task's network."""
        self._forward = Forward(task, data.prepare, scoring.dtype, scoring.chunk)
        held_out, self._test = (Batch(*map(jnp.asarray, split)) for split in (data.heldout, data.test))
        self._window: Any = score.window(held_out, jnp.int32(0), scoring.samples)
        self._abstract = jax.eval_shape(task.init, jax.random.key(0))
        self._names = tree.named(*self._abstract)
        keys = [name for name, x in self._names.items() if tree.is_key(x)]
        self._keys = tree.named(*jax.jit(task.init)(jax.random.key(0))) if keys else {}
        for name, x in self._names.items():
            if name not in keys and (name not in specs or specs[name].shape != x.shape):
                raise DataError(
                    f"the task's network has a tensor {name!r} of shape {[*x.shape]}; the checkpoints "
                    + (f"have {specs[name]} there" if name in specs else f"have none, but {_few(specs)}")
                    + ": make a task whose parameters have the names and shapes of the checkpoints' tensors"
                )
        self._quality = jax.jit(lambda named, samples: score.scalar_metrics(self._forward, *self._of(named), samples))

    def _of(self, named: Named) -> tuple[PyTree, PyTree]:
        """The task's (params, mutable) of named tensors."""
        leaves = [self._keys[name] if tree.is_key(x) else named[name] for name, x in self._names.items()]
        return jax.tree.unflatten(jax.tree.structure(self._abstract), leaves)

    def names(self) -> set[str]:
        """The names of the network's tensors."""
        return set(self._names)

    def quality(self, named: Named) -> dict[str, float]:
        """The network's scalar metrics on the test split."""
        return {name: float(x) for name, x in self._quality(self._needed(named), self._test).items()}

    def _needed(self, named: Named) -> Named:
        return {name: x for name, x in named.items() if name in self._names}

    def measure(self, needs: Iterable[str]) -> Callable[[Named], dict[str, Any]]:
        """Builds `named -> {signal: number, or {name: array}}` for one checkpoint; what needs no data is left out."""
        measured = score.measure(self._forward, needs)
        run = jax.jit(lambda named, samples: measured(self._of(named), samples))

        def one(named: Named) -> dict[str, Any]:
            found = run(self._needed(named), self._window)
            return {name: x if isinstance(x, jax.Array) else tree.named(x) for name, x in found.items()}

        return one

    def samples(self) -> Batch:
        """The held-out samples to score."""
        return Batch(*self._window)

    def shared(self, needs: Sequence[str], signals: Mapping[str, Any], kept: Named, samples: Batch) -> dict[str, Any]:
        """The signals that all checkpoints share on held-out samples.

        Args:
          needs: names of signals.
          signals: those of the checkpoints.
          kept: the tensors that are not averaged.
          samples: of `samples()`, which a compiled program should take as an argument.

        Returns:
          `evaluate` and `labels`, as far as they are needed.
        """
        found: dict[str, Any] = {}
        if "labels" in needs:
            found["labels"] = labels(self._forward, samples, signals["logits"].shape[-1])
        if "evaluate" in needs:

            def evaluate(blend: Named, weights: jax.Array) -> Mapping[str, jax.Array]:
                del weights  # statistics are averaged like all other tensors, and part of the blend
                return score.scalar_metrics(self._forward, *self._of({**kept, **blend}), samples)

            found["evaluate"] = evaluate
        return found


def _few(specs: Mapping[str, Spec]) -> str:
    names = list(specs)
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def loaded(read: Callable[[str], np.ndarray], names: Iterable[str]) -> Named:
    """Reads some tensors of one checkpoint."""
    return {name: jnp.asarray(read(name)) for name in names}
