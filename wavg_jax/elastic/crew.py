"""The driver's view of its workers: who holds which replicas, who is at work, and who is away."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from wavg_jax.base import SettingsError
from wavg_jax.elastic.arrivals import SLACK, complaint, nbytes
from wavg_jax.elastic.dealing import deal
from wavg_jax.elastic.settings import Workers, size_in
from wavg_jax.elastic.worker import Form, Kit, Reply, Ticket, Unprepared, actor

REMEMBERED = 100
"""Replies whose seconds decide the next deadline."""

STRIKES = 3
"""Useless replies in a row after which a worker is started anew."""

POLL = 0.2
"""Seconds between two looks at workers that start."""


@dataclasses.dataclass
class Order:
    """An order under way, for so many local steps; `start` are the parameters that its replicas started from, where a
    late result counts."""

    ticket: Ticket
    ref: Any
    form: Form
    sent: float
    steps: int = 0
    start: list[np.ndarray] | None = None
    audits: bool = False


@dataclasses.dataclass
class Member:
    """A worker, as the driver knows it.

    Attributes:
      number: its own, never given twice.
      actor: Ray's handle.
      replicas: those dealt to it.
      holding: the call that is to make it ready; None if it is.
      order: what it works on; None if nothing.
      why: the reason why it is not ready.
      pace: seconds that a local step of all its replicas takes; None before the first reply.
      strikes: useless replies in a row.
      missed, since: rounds missed in a row, and when the first of them ended; 0 and None if it came.
    """

    number: int
    actor: Any
    replicas: tuple[int, ...] = ()
    holding: Any = None
    order: Order | None = None
    why: str = ""
    pace: float | None = None
    strikes: int = 0
    missed: int = 0
    since: float | None = None

    @property
    def ready(self) -> bool:
        return self.holding is None and self.order is None and bool(self.replicas)

    def mark(self, came: bool) -> None:
        """Notes at the end of a round whether it came; one that was dealt nothing need only be there."""
        if came or (not self.replicas and self.holding is None and self.order is None):
            self.missed, self.since = 0, None
        else:
            self.missed, self.since = self.missed + 1, self.since or time.perf_counter()

    def away(self) -> float:
        """Seconds that it has been away."""
        return 0.0 if self.since is None else time.perf_counter() - self.since


@dataclasses.dataclass
class Arrival:
    """The end of an order: a reply of the right form, or the reason why there is none."""

    member: Member
    order: Order
    at: float
    reply: Reply | None
    why: str | None


class Crew:
    """The workers of a run."""

    def __init__(self, ray: Any, workers: Workers, kit: Kit, shapes_of: Callable[[int], Any], shards: list[Any]):
        """
        Args:
          ray: the module, connected.
          workers: the settings.
          kit: what every worker is made with.
          shapes_of: n -> shapes of what an order of n replicas brings.
          shards: Ray's references to every replica's shard.
        """
        self._ray, self._workers, self._shapes_of, self._shards = ray, workers, shapes_of, shards
        self._kit = ray.put(kit)  # once; the driver owns it, so that a worker that starts anew finds it
        self._next = 0
        self.members: list[Member] = []
        self.full = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)
        """Errors of `send` where there is no room."""
        self.seconds: collections.deque[float] = collections.deque(maxlen=REMEMBERED)
        """What the last replies took, for a local step of all replicas of a worker."""

    def patience(self, steps: int) -> float:
        """Seconds that a round of so many local steps waits, if enough have come by then."""
        wait = self._workers.deadline([steps * seconds for seconds in self.seconds])
        return self._workers.patience if wait is None else min(wait, self._workers.patience)

    def muster(self, round: int) -> None:
        """Adds and removes workers as the settings say, deals the shards among those who are there, and waits until
        they have taken over what is new to them.

        Raises:
          SettingsError: a worker cannot be made, or its program cannot be compiled.
        """
        replicas = len(self._shards)
        count = size_in(self._workers, round, replicas)
        while len(self.members) > count:  # whoever is away longest goes first, then the youngest
            leaving = max(self.members, key=lambda m: (m.away(), m.number))
            self.members.remove(leaving)
            self._ray.kill(leaving.actor)
        while len(self.members) < count:
            self.members.append(Member(self._next, self._start(self._next)))
            self._next += 1
        here = [m for m in self.members if m.away() < self._workers.away] or self.members
        dealt = deal(replicas, {m.number: m.replicas for m in here})
        changed = []
        for member in self.members:
            own = dealt.get(member.number, ())
            if own != member.replicas:
                member.replicas, member.pace = own, None
                if own:
                    self._enlist(member, "its worker takes over shards")
                    changed.append(member)
        first = not self.seconds
        if changed:  # they have another amount of work from now on
            self.seconds.clear()
        end = time.perf_counter() + self._workers.start_timeout
        while any(m.holding is not None for m in changed) and time.perf_counter() < end:
            self.settle(POLL, first=first)

    def _start(self, number: int) -> Any:
        """Makes the actor of a worker. Those of this machine are not counted: Ray knows of one core alone."""
        workers, options = self._workers, {"num_cpus": 0.0}
        if workers.address is not None:
            options = {"num_cpus": workers.cpus, "num_gpus": workers.gpus}
        return actor().options(**options).remote(number)

    def _enlist(self, member: Member, why: str) -> None:
        """Lets a worker take over its replicas; Ray repeats the call on the process that follows one that dies."""
        if not member.replicas:  # those of one that was away have been dealt to others
            member.why, member.holding = why, None
            return
        shards = [self._shards[k] for k in member.replicas]
        shapes = self._shapes_of(len(member.replicas))
        hold = member.actor.hold.options(max_task_retries=-1)
        member.why, member.holding = why, hold.remote(self._kit, member.replicas, shapes, *shards)

    def settle(self, timeout: float, *, first: bool = False) -> None:
        """Looks, for as long as `timeout`, who has become ready. `first` raises what went wrong as SettingsError."""
        holding = {m.holding: m for m in self.members if m.holding is not None}
        if not holding:
            return
        done, _ = self._ray.wait(list(holding), num_returns=1, timeout=timeout)
        for ref in done:
            member = holding[ref]
            try:
                self._ray.get(ref)
                member.holding = None
            except self._ray.exceptions.RayError as error:
                if first:
                    raise SettingsError(f"worker {member.number} cannot start: {_cause(error)}") from error
                self._restart(member, f"its worker cannot start: {_cause(error)}")

    def _restart(self, member: Member, why: str) -> None:
        """Starts a worker anew, in a process of its own."""
        self._ray.kill(member.actor)
        member.actor, member.order, member.strikes = self._start(member.number), None, 0
        self._enlist(member, why)

    def send(self, member: Member, ticket: Ticket, leaves: list[np.ndarray], items: np.ndarray, steps: int) -> Order:
        """Sends an order for a round to a worker that is ready.

        Raises:
          ray.exceptions.ObjectStoreFullError, OutOfDiskError: there is no room to send it.
        """
        brought = self._ray.put(leaves)
        ref = member.actor.train.remote(ticket, brought, items, steps)
        order = Order(ticket, ref, [], time.perf_counter(), steps)
        member.order, member.why = order, "its worker is still at an older round"
        return order

    def ask(self, member: Member, ticket: Ticket, leaves: list[np.ndarray], form: Form) -> bool:
        """Asks a worker for the scores of another one's replica; False if there is no room to send it."""
        try:
            ref = member.actor.score.remote(ticket, self._ray.put(leaves))
        except self.full:
            return False
        member.order = Order(ticket, ref, form, time.perf_counter(), audits=True)
        return True

    def arrivals(self, round: int, seconds: float, *, audits: bool = False) -> Iterator[Arrival]:
        """Yields what comes, also of earlier rounds, until the orders of this round have all ended or the time is up.

        Args:
          round: the round whose orders to wait for.
          seconds: how long.
          audits: whether to wait for audits, else for training.
        """
        end = time.perf_counter() + seconds
        while any(o.ticket.round == round and o.audits == audits for o in self._orders().values()):
            left = end - time.perf_counter()
            came = self.look(max(left, 0))
            yield from came
            if not came and left <= 0:
                return

    def look(self, seconds: float) -> list[Arrival]:
        """Waits until an order of any round ends, or a worker becomes ready, and returns the orders that have ended."""
        orders = self._orders()
        holding = [m.holding for m in self.members if m.holding is not None]
        if not orders and not holding:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait([*orders, *holding], num_returns=1, timeout=seconds)
        self.settle(0)
        return [self._taken(m) for m in self.members if m.order is not None and m.order.ref in done]

    def _orders(self) -> dict[Any, Order]:
        return {m.order.ref: m.order for m in self.members if m.order is not None}

    def _taken(self, member: Member) -> Arrival:
        """What an order has come to."""
        order, at = member.order, time.perf_counter()
        assert order is not None
        member.order, errors = None, self._ray.exceptions
        try:
            reply, why = self._read(order)
        except errors.RayActorError:  # Ray starts it anew
            reply, why = None, "its worker died"
            self._enlist(member, why)
        except errors.RayError as error:
            if isinstance(getattr(error, "cause", None), Unprepared):  # it died between two orders
                reply, why = None, "its worker died"
                self._enlist(member, why)
            else:
                reply, why = None, f"its worker failed: {_cause(error)}"
        if reply is None:
            self.judge(member, False)
        elif not order.audits:
            self.seconds.append((at - order.sent) / max(order.steps, 1))
        return Arrival(member, order, at, reply, why)

    def judge(self, member: Member, useful: bool) -> None:
        """Notes whether what a worker sent was of use; after some useless replies in a row it is started anew."""
        member.strikes = 0 if useful else member.strikes + 1
        if member.strikes >= STRIKES and member.holding is None:
            self._restart(member, "its worker starts anew after useless replies")

    def _read(self, order: Order) -> tuple[Reply | None, str | None]:
        """A reply, if it has the right size and form; one that is too large is not unpickled."""
        from ray.experimental import get_object_locations

        size = get_object_locations([order.ref]).get(order.ref, {}).get("object_size") or 0
        most = 2 * nbytes(order.form) + SLACK
        if size > most:
            return None, f"its worker sent {size:,} bytes for {most:,} at most"
        reply = self._ray.get(order.ref)
        wrong = complaint(reply, order.ticket, order.form)
        return (None, f"its worker {wrong}") if wrong else (Reply(*reply), None)

    def close(self) -> None:
        """Ends all workers."""
        for member in self.members:
            self._ray.kill(member.actor)
        self.members = []


def _cause(error: BaseException) -> str:
    """What went wrong in a worker, in one line: the last one of its traceback."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    text = lines[-1].strip() if lines else ""
    name = type(cause).__name__
    return f"{text:.200}" if text.startswith(name) or cause is error else f"{name}: {text:.200}"
