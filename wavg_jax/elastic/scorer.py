"""Signals that the driver measures itself, where a worker's word is not enough."""

from typing import Any

import jax
import numpy as np

from wavg_jax.base import PyTree
from wavg_jax.elastic.worker import Form, Kit, form_of, from_host, recipe_of, scores_of, to_host


class Scorer:
    """Measures one replica at a time, by a program that is compiled when it is first needed."""

    def __init__(self, kit: Kit, shapes: PyTree):
        """`shapes` are those of a `Brought`, with leaves [K, ...]."""
        self._kit, self._shapes, self._program = kit, shapes, None
        whole = (shapes.replicas.params, shapes.replicas.mutable)
        self._network = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), whole)
        self.form: Form = form_of(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes.signals))
        """Of the signals of one replica; empty if the weighting needs none."""

    def scored(self, round: int) -> bool:
        """Whether replicas are scored in a round, from 1 on; else their signals are NaN."""
        return bool(self.form) and (round - 1) % self._kit.scoring.every == 0

    def network(self, leaves: list[np.ndarray], k: int) -> list[np.ndarray]:
        """Parameters and collections of the k-th replica of the leaves of a `Brought`."""
        brought = jax.tree.unflatten(jax.tree.structure(self._shapes), leaves)
        return [x[k] for x in jax.tree.leaves((brought.replicas.params, brought.replicas.mutable))]

    def measure(self, round: int, network: list[np.ndarray]) -> list[np.ndarray]:
        """The signals of a replica on the samples of a round."""
        if self._program is None:
            program: Any = jax.jit(scores_of(self._kit, recipe_of(self._kit, (0,))))
            self._program, self._held_out = program, jax.device_put(self._kit.held_out)
        assert self._program is not None
        return to_host(self._program(from_host(network, self._network), self._held_out, np.int32(round - 1)))
