"""How good checkpoints and their blends are as networks: scores on held-out data, and quality on the test split."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax import tree
from wavg_jax.base import Batch, Task
from wavg_jax.data import ShardedData
from wavg_jax.rounds import score
from wavg_jax.rounds.forward import Forward, labels
from wavg_jax.rounds.score import Scoring
from wavg_jax.soups.network import Named, Network
from wavg_jax.storage.tensors import Spec


class Judge:
    """Runs named tensors as the network of a task."""

    def __init__(self, task: Task, data: ShardedData, scoring: Scoring, specs: Mapping[str, Spec]):
        """Raises DataError if the checkpoints, whose tensors are `specs`, are not of the task's network."""
        self._forward = Forward(task, data.prepare, scoring.dtype, scoring.chunk)
        held_out, self._test = (Batch(*map(jnp.asarray, split)) for split in (data.heldout, data.test))
        self._window: Any = score.window(held_out, jnp.int32(0), scoring.samples)
        self._network = Network(task)
        self._network.check(specs)
        self._quality = jax.jit(
            lambda named, samples: score.scalar_metrics(self._forward, *self._network.of(named), samples)
        )

    def names(self) -> set[str]:
        """The names of the network's tensors."""
        return set(self._network.shapes)

    def quality(self, named: Named) -> dict[str, float]:
        """The network's scalar metrics on the test split."""
        return {name: float(x) for name, x in self._quality(self._needed(named), self._test).items()}

    def _needed(self, named: Named) -> Named:
        return {name: x for name, x in named.items() if name in self._network.shapes}

    def measure(self, needs: Iterable[str]) -> Callable[[Named], dict[str, Any]]:
        """Builds `named -> {signal: number, or {name: array}}` for one checkpoint; what needs no data is left out."""
        measured = score.measure(self._forward, needs)
        run = jax.jit(lambda named, samples: measured(self._network.of(named), samples))

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
                return score.scalar_metrics(self._forward, *self._network.of({**kept, **blend}), samples)

            found["evaluate"] = evaluate
        return found


def loaded(read: Callable[[str], np.ndarray], names: Iterable[str]) -> Named:
    """Reads some tensors of one checkpoint."""
    return {name: jnp.asarray(read(name)) for name in names}
