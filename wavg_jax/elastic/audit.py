"""Scores are measured twice, by another worker, so that none can vouch for itself."""

from typing import Any

import numpy as np

from wavg_jax.elastic.arrivals import agree
from wavg_jax.elastic.crew import Arrival, Crew, Member
from wavg_jax.elastic.scorer import Scorer
from wavg_jax.elastic.worker import Ticket
from wavg_jax.storage.schema import Row


class Auditor:
    """Picks replicas, has another worker measure their scores, and judges where the two differ."""

    def __init__(self, crew: Crew, scorer: Scorer, replicas: int, seed: int):
        """`replicas` is how many to pick in a round."""
        self._crew, self._scorer, self._count, self._seed = crew, scorer, replicas, seed
        self._suspects: set[int] = set()
        self.found: list[Row] = []
        """What the last audit found: {replica, worker, auditor, wrong}; `wrong` is the worker that was, or None."""
        self.others: list[Arrival] = []
        """What came during the last audit without being of it."""

    def audit(self, round: int, collected: Any) -> np.ndarray:
        """Which replicas to trust, bool [K].

        Args:
          round: from 1; one that is not scored has nothing to audit.
          collected: what has arrived; see `wavg_jax.elastic.engine.Collected`. Late results are left out, which the
            driver has scored itself.
        """
        self.found, self.others = [], []
        confirmed = np.ones(len(collected.arrived), bool)
        if not self._count or not self._scorer.scored(round):
            return confirmed
        rng = np.random.default_rng([self._seed, round])
        owner = {k: m for m in self._crew.members for k in m.replicas if collected.fresh[k]}
        left, asked = self._chosen(rng, owner), dict[Ticket, list[np.ndarray]]()
        self._ask(round, rng, left, asked, owner, collected.leaves)
        signals = collected.leaves[-len(self._scorer.form) :]  # they come last
        for arrival in self._crew.arrivals(round, self._crew.patience(1), audits=True):
            self._ask(round, rng, left, asked, owner, collected.leaves)  # whoever answered is free
            ticket = arrival.order.ticket
            if not arrival.order.audits:
                self.others.append(arrival)
            elif arrival.reply is not None and ticket in asked:
                (k,) = ticket.replicas
                wrong = self._judged(round, [x[k] for x in signals], arrival, asked[ticket], owner[k])
                self.found.append(_finding(k, owner[k], arrival.member, wrong))
                if wrong is owner[k]:
                    confirmed[list(wrong.replicas)] = False
        return confirmed

    def _chosen(self, rng: np.random.Generator, owner: dict[int, Member]) -> list[int]:
        """The replicas to audit: some at random, and one of every suspect."""
        here = sorted(owner)
        chosen = rng.choice(here, min(self._count, len(here)), replace=False).tolist()
        for suspect in self._suspects:
            own = [k for k in here if owner[k].number == suspect]
            chosen += own[:1] if not set(own) & set(chosen) else []
        return chosen

    def _ask(
        self,
        round: int,
        rng: np.random.Generator,
        left: list[int],
        asked: dict[Ticket, list[np.ndarray]],
        owner: dict[int, Member],
        leaves: list[np.ndarray],
    ) -> None:
        """Asks workers that are free about the replicas that are left, nobody about its own; notes what was asked."""
        for k in list(left):
            free = [m for m in self._crew.members if m.ready and m is not owner[k]]
            if not free:
                continue
            auditor = free[rng.integers(len(free))]
            ticket = Ticket(round, "audit", auditor.number, (k,))
            network = self._scorer.network(leaves, k)
            if self._crew.ask(auditor, ticket, network, self._scorer.form):
                left.remove(k)
                asked[ticket] = network

    def _judged(
        self, round: int, ours: list[np.ndarray], arrival: Arrival, network: list[np.ndarray], owner: Member
    ) -> Member | None:
        """Who was wrong, by what the driver measures itself; None if the two agree."""
        assert arrival.reply is not None
        if agree(ours, arrival.reply.leaves):
            return None
        wrong = arrival.member if agree(ours, self._scorer.measure(round, network)) else owner
        self._suspects.add(wrong.number)
        return wrong


def _finding(replica: int, owner: Member, auditor: Member, wrong: Member | None) -> Row:
    at_fault = None if wrong is None else wrong.number
    return {"replica": replica, "worker": owner.number, "auditor": auditor.number, "wrong": at_fault}
