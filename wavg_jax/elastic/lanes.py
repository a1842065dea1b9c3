"""What every worker did in a round, for its row."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from wavg_jax.elastic.crew import Member, Order
from wavg_jax.storage.schema import Row

_CAME = {"computed", "late, counted", "late, dropped"}


class Lanes:
    """Collects, per worker, what became of its order; times are seconds since the round began."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new round begins."""
        self._begun, self._noted = time.perf_counter(), dict[int, Row]()

    def note(
        self, member: Member, was: str, order: Order, ended: float, why: str, computed: float | None = None
    ) -> None:
        """Notes the end of an order: what became of it, when it ended, and the seconds that it computed."""
        sent, replicas = order.sent, order.ticket.replicas
        entry: Row = {
            "worker": member.number,
            "replicas": list(replicas),
            "was": was,
            "sent": round(max(sent - self._begun, 0.0), 4),
            "ended": round(ended - self._begun, 4),
            "computed": None if computed is None else round(computed, 4),
        }
        before = self._noted.get(member.number)
        entry |= {} if before is None else {"after": before["was"]}
        self._noted[member.number] = entry | ({"why": why} if why else {})

    def row(self, members: Iterable[Member], missing: Mapping[int, str], audits: Iterable[Any]) -> Row:
        """Entries of the round's row: `missing`, {replica: why}; `workers`; and `audits`, if there were any. Marks
        who came."""
        workers = []
        for member in members:
            noted = self._noted.get(member.number)
            member.mark(noted is not None and not _CAME.isdisjoint((noted["was"], noted.get("after"))))
            away = {"worker": member.number, "replicas": list(member.replicas), "was": "away", "why": member.why}
            workers.append(away if noted is None else noted)
        found = list(audits)
        return {"missing": {str(k): why for k, why in sorted(missing.items())}, "workers": workers} | (
            {"audits": found} if found else {}
        )
