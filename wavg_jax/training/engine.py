"""What runs the rounds of a run: compiled programs of this process, or of whoever takes their place."""

from collections.abc import Callable
from typing import NamedTuple

from wavg_jax.base import PyTree
from wavg_jax.storage.schema import Row
from wavg_jax.training.overlap import compiled_pieces, overlaps
from wavg_jax.training.programs import Compiled, compiled, compiled_together, programs_of
from wavg_jax.training.recipe import Recipe
from wavg_jax.tree import count_replicas


def _nothing() -> Row:
    return {}


class Step(NamedTuple):
    """A round that can be run.

    Attributes:
      program: called as `Programs.run` is.
      waits: whether a call returns only once the round is done.
      entries: what the row of the last round says beside its log.
    """

    program: Compiled
    waits: bool
    entries: Callable[[], Row] = _nothing


Engine = Callable[[Recipe, tuple, tuple], tuple[Step, Compiled]]
"""`(recipe, arguments of Programs.run, request) -> (step, what compiling the request gave)`; the arguments may be
shapes, and the request is one of `compiled_together`."""


def in_process(recipe: Recipe, first: tuple[PyTree, ...], request: tuple) -> tuple[Step, Compiled]:
    """The engine of `fit`: the rounds are programs of this process, or of each of several."""
    if overlaps(recipe):
        return Step(compiled_pieces(recipe, *first), True), compiled(*request)
    program = programs_of(recipe, count_replicas(first[0].replicas.params)).run
    step, other = compiled_together((program, *first), request)
    return Step(step, False), other
