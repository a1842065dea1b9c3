"""What workers send is checked before it can touch the parameters."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax import tree
from wavg_jax.base import Replicas
from wavg_jax.elastic.worker import Form, Reply, Ticket

SLACK = 2**16
"""Bytes of a reply beside its arrays."""


def nbytes(form: Form) -> int:
    """The bytes of arrays of this form."""
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in form)


def complaint(reply: Any, ticket: Ticket, form: Form) -> str | None:
    """Says why a reply cannot be used; None if its form is right.

    Args:
      reply: what the worker sent, which may be anything.
      ticket: of the order.
      form: of the arrays that it must hold.

    >>> ticket = Ticket(3, "a", 0, (0,))
    >>> form = [((1, 2), np.dtype(np.float32))]
    >>> complaint(Reply(ticket, [np.zeros((1, 2), np.float32)], 0.1), ticket, form)
    >>> complaint(Reply(ticket, [np.zeros((1, 3), np.float32)], 0.1), ticket, form)
    'sent an array of shape (1, 3) for (1, 2)'
    >>> complaint(Reply(ticket._replace(round=2), [], 0.1), ticket, form)
    'answered another order'
    """
    if not isinstance(reply, tuple) or len(reply) != len(Reply._fields):
        return f"sent no reply but a {type(reply).__name__}"
    if repr(reply[0]) != repr(ticket):  # which compares whatever it may be
        return "answered another order"
    leaves, seconds = reply[1:]
    if not isinstance(seconds, float) or not 0 < seconds < float("inf"):
        return "sent no number of seconds"
    if not isinstance(leaves, list) or len(leaves) != len(form):
        return f"sent another tree, not {len(form)} arrays"
    for x, (shape, dtype) in zip(leaves, form, strict=True):
        if not isinstance(x, np.ndarray) or x.shape != shape:
            return f"sent an array of shape {getattr(x, 'shape', None)} for {shape}"
        if x.dtype != dtype:
            return f"sent an array of dtype {x.dtype} for {dtype}"
    return None


def vet(after: Replicas, train_loss: jax.Array, before: Replicas) -> tuple[jax.Array, jax.Array]:
    """Whether replicas are finite, bool [K], and how far they went, the L2 norm of their change [K].

    States of optimizers and collections may hold infinities that were there before.

    Args:
      after: [K, ...], as they arrived.
      train_loss: [K].
      before: as they started.
    """

    def sound(one: Replicas) -> jax.Array:
        return tree.is_finite((one.opt_state, one.mutable, one.rng, one.drift))

    states = [jax.vmap(sound)(x) for x in (after, before)]
    finite = tree.all_finite((after.params, train_loss)) & (states[0] | ~states[1])

    def distance(x: Any, start: Any) -> jax.Array:
        return optax.tree.norm(jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), x, start))

    return finite, jax.vmap(distance)(after.params, before.params)


KEPT = 10
"""Rounds whose norms are remembered."""

GIVES_IN = 3
"""Rounds in a row that refuse everybody, after which the past is forgotten."""


class NormBound:
    """Remembers how far replicas went, and tells who went too far."""

    def __init__(self, factor: float):
        self._factor = factor
        self._past: list[float] = []
        self._refused = 0

    def beyond(self, norms: np.ndarray, arrived: np.ndarray) -> np.ndarray:
        """Which of those who arrived, bool [K], went further than `factor` times the median of the last rounds, or, if
        that is more or there is none, of this one, where at least three arrived. Remembers the others."""
        here = np.sort(norms[arrived & np.isfinite(norms)])
        medians = [float(np.median(self._past))] if self._past else []
        if len(here) >= 3 or not medians:
            medians += here[(len(here) - 1) // 2 :][:1].tolist()
        bound = self._factor * max([*medians, float(np.finfo(np.float32).tiny)])
        beyond = arrived & ~(norms <= bound if medians else np.isfinite(norms))
        all_refused = bool(arrived.any()) and bool((arrived == beyond).all())
        self._refused = self._refused + 1 if all_refused else 0
        if self._refused == GIVES_IN:  # else a run whose rate has grown could never go on
            self._past = []
        if (arrived & ~beyond).any():
            self._past = [*self._past, float(np.median(norms[arrived & ~beyond]))][-KEPT:]
        return beyond


def agree(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> bool:
    """Whether two workers measured the same signals, up to what different hardware may round."""
    return all(
        np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True) for a, b in zip(ours, theirs, strict=True)
    )


TOLERANCE = 0.02
"""Relative and absolute difference of two measurements of a signal."""
