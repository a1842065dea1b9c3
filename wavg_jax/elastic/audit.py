"""Scores are measured twice, by another worker, so that none can vouch for itself."""

from typing import Any

import jax
import numpy as np

from wavg_jax.base import PyTree, TrainState
from wavg_jax.elastic.arrivals import agree
from wavg_jax.elastic.crew import Crew, Member
from wavg_jax.elastic.worker import Form, Kit, Ticket, form_of, from_host, recipe_of, scores_of, to_host
from wavg_jax.storage.schema import Row


class Auditor:
    """Picks replicas, has another worker measure their scores, and judges where the two differ."""

    def __init__(self, crew: Crew, kit: Kit, replicas: int, seed: int):
        """`replicas` is how many to pick in a round."""
        self._crew, self._kit, self._count, self._seed = crew, kit, replicas, seed
        self._suspects: set[int] = set()
        self.found: list[Row] = []
        """What the last audit found: {replica, worker, auditor, wrong}; `wrong` is the worker that was, or None."""

    def audit(self, round: int, collected: Any, state: TrainState, shapes: PyTree) -> np.ndarray:
        """Which replicas to trust, bool [K].

        Args:
          round: from 1.
          collected: what has arrived; see `wavg_jax.elastic.engine.Collected`.
          state: before the round, whose collections have the shapes of a replica's.
          shapes: of the `Brought` that was collected.
        """
        self.found, confirmed = [], np.ones(len(collected.arrived), bool)
        if not self._count or not shapes.signals:
            return confirmed
        whole = jax.tree.unflatten(jax.tree.structure(shapes), collected.leaves)
        owner = {k: m for m in self._crew.members for k in m.replicas}
        left, asked = self._chosen(round, collected.arrived, owner), dict[Ticket, list[np.ndarray]]()
        form = form_of(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes.signals))
        self._ask(round, left, asked, owner, whole, form)
        for arrival in self._crew.arrivals(round, self._crew.patience(), audits=True):
            self._ask(round, left, asked, owner, whole, form)  # whoever answered is free
            ticket = arrival.order.ticket
            if arrival.reply is None or not arrival.order.audits or ticket not in asked:
                continue
            (k,) = ticket.replicas
            ours = [x[k] for x in to_host(whole.signals)]
            if agree(ours, arrival.reply.leaves):
                self.found.append(_finding(k, owner[k], arrival.member, None))
                continue
            wrong = self._judged(round, ours, asked[ticket], state, owner[k], arrival.member)
            self._suspects.add(wrong.number)
            self.found.append(_finding(k, owner[k], arrival.member, wrong.number))
            if wrong is owner[k]:
                confirmed[list(wrong.replicas)] = False
        return confirmed

    def _chosen(self, round: int, arrived: np.ndarray, owner: dict[int, Member]) -> list[int]:
        """The replicas to audit: some at random, and one of every suspect."""
        here = np.flatnonzero(arrived)
        rng = np.random.default_rng([self._seed, round])
        chosen = rng.choice(here, min(self._count, len(here)), replace=False).tolist()
        for suspect in self._suspects:
            own = [k for k in here.tolist() if owner[k].number == suspect]
            chosen += own[:1] if not set(own) & set(chosen) else []
        return chosen

    def _ask(
        self,
        round: int,
        left: list[int],
        asked: dict[Ticket, list[np.ndarray]],
        owner: dict[int, Member],
        whole: Any,
        form: Form,
    ) -> None:
        """Asks workers that are free about the replicas that are left, nobody about its own; notes what was asked."""
        for k in list(left):
            free = [m for m in self._crew.members if m.ready and m is not owner[k]]
            if not free:
                continue
            left.remove(k)
            ticket = Ticket(round, "audit", free[0].number, (k,))
            asked[ticket] = [x[k] for x in jax.tree.leaves((whole.replicas.params, whole.replicas.mutable))]
            self._crew.ask(free[0], ticket, asked[ticket], form)

    def _judged(
        self,
        round: int,
        ours: list[np.ndarray],
        leaves: list[np.ndarray],
        state: TrainState,
        owner: Member,
        auditor: Member,
    ) -> Member:
        """Who was wrong, by what the driver measures itself."""
        score = jax.jit(scores_of(self._kit, recipe_of(self._kit, (0,))))
        network = from_host(leaves, (state.params, state.mutable))
        held_out = jax.device_put(self._kit.held_out)
        measured = to_host(score(network, held_out, np.int32(round - 1)))
        return auditor if agree(ours, measured) else owner


def _finding(replica: int, owner: Member, auditor: Member, wrong: int | None) -> Row:
    return {"replica": replica, "worker": owner.number, "auditor": auditor.number, "wrong": wrong}
