"""Rounds whose replicas train in workers: the driver sends orders, blends what comes back in time, and keeps the state.

The driver alone holds the global parameters, the optimizer states of all replicas, the averager, rows and checkpoints.
"""

import dataclasses
import re
import statistics
import time
import uuid
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from wavg_jax.base import PyTree, TooFew, TrainState, WavgWarning
from wavg_jax.elastic.arrivals import NormBound, vet
from wavg_jax.elastic.audit import Auditor
from wavg_jax.elastic.crew import POLL, Arrival, Crew, Member
from wavg_jax.elastic.lanes import Lanes
from wavg_jax.elastic.scorer import Scorer
from wavg_jax.elastic.settings import Workers
from wavg_jax.elastic.worker import Form, Kit, Ticket, form_of, from_host, locally, recipe_of, to_host
from wavg_jax.rounds.common import Brought, RoundLog
from wavg_jax.storage.schema import Row
from wavg_jax.training.batches import Shared, Work
from wavg_jax.training.programs import compiled_together
from wavg_jax.training.recipe import Recipe, rounds_of


def shapes_of(state: TrainState, replicas: int) -> PyTree:
    """Shapes of `(Replicas, drift)` as an order of so many replicas brings them."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((replicas, *x.shape[1:]), x.dtype)

    drift = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.drift)
    return jax.tree.map(leaf, state.replicas._replace(residual=())), drift


def rows(replicas: tuple[int, ...]) -> Any:
    """An index of these rows, without a copy where they are neighbours."""
    first, last = replicas[0], replicas[-1]
    return slice(first, last + 1) if last - first + 1 == len(replicas) else list(replicas)


@dataclasses.dataclass
class Collected:
    """What has come of a round: host arrays [K, ...] of a `Brought`, which replicas they hold and which of those are of
    this round, bool [K] each, and for each replica that is missing, why."""

    leaves: list[np.ndarray]
    arrived: np.ndarray
    fresh: np.ndarray
    missing: dict[int, str]

    def put(self, replicas: tuple[int, ...], leaves: list[np.ndarray], *, fresh: bool) -> None:
        for all_of_them, own in zip(self.leaves, leaves, strict=True):
            all_of_them[rows(replicas)] = own
        self.arrived[list(replicas)], self.fresh[list(replicas)] = True, fresh
        for k in replicas:
            self.missing.pop(k, None)

    def lack(self, replicas: Iterable[int], why: str) -> None:
        """Says why replicas are missing, unless something of them has come."""
        self.missing.update({k: why for k in replicas if not self.arrived[k]})

    def fill(self, before: list[np.ndarray]) -> None:
        """Puts the replicas that are missing where they were `before`, with nothing measured of them."""
        for place, x in enumerate(self.leaves):
            x[~self.arrived] = before[place][~self.arrived] if place < len(before) else 0


class Elastic:
    """Runs the rounds of a run; `step` is called as `Programs.run` is."""

    def __init__(self, crew: Crew, workers: Workers, kit: Kit, recipe: Recipe, first: tuple, seed: int):
        """
        Args:
          crew: the workers.
          workers: the settings.
          kit: what the workers are made with.
          recipe: of all rounds, on the driver.
          first: arguments of `Programs.run`, or their shapes.
          seed: decides which replicas are audited.
        """
        self._crew, self._workers, self._kit = crew, workers, kit
        state, work, shared, _ = first
        self._k, self._nonce = kit.replicas, uuid.uuid4().hex
        self._forms: dict[int, Form] = {}
        self._parts = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, work.items, shared))
        self._shapes = self._brought(self._k)
        self._stack = [_aligned(shape, dtype) for shape, dtype in self._form(self._k)]
        from_host(self._stack, self._shapes, copy=False)  # compiles what handles random keys
        self._bound, self._lanes = NormBound(workers.norm_bound), Lanes()
        self._told: set[tuple[int, str]] = set()
        self._scorer = Scorer(kit, self._shapes)
        self._auditor = Auditor(crew, self._scorer, workers.audit, seed)
        self._programs = self._compile(recipe, state, work, shared)
        self.seconds = sum(program.seconds for program in self._programs)

    def _brought(self, replicas: int) -> PyTree:
        """Shapes of what so many replicas bring."""
        state, items, shared = self._parts
        own = recipe_of(self._kit, tuple(range(replicas)))
        given = (*shapes_of(state, replicas), jax.ShapeDtypeStruct((replicas, *items.shape[1:]), items.dtype))
        number = jax.ShapeDtypeStruct((), np.int32)
        return jax.eval_shape(locally(self._kit, own), *given, shared.train, shared.held_out, number, number)

    def _form(self, replicas: int) -> Form:
        if replicas not in self._forms:
            self._forms[replicas] = form_of(self._brought(replicas))
        return self._forms[replicas]

    def _compile(self, recipe: Recipe, state: TrainState, work: Work, shared: Shared) -> list[Any]:
        apart = rounds_of(recipe).apart
        assert apart is not None

        def together(
            state: TrainState, brought: Brought, alive: jax.Array, items: PyTree, shared: Shared
        ) -> tuple[TrainState, RoundLog]:
            whole = brought._replace(
                replicas=brought.replicas._replace(residual=state.replicas.residual), alive=brought.alive & alive
            )
            return apart.together(state, whole, items, shared.held_out, shared=shared.train, sizes=shared.sizes)

        where = recipe.placement.shared
        laid = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), self._shapes)
        alive = jax.ShapeDtypeStruct((self._k,), bool, sharding=where)
        before = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state.replicas._replace(residual=())
        )
        blend = (jax.jit(together, donate_argnums=0), state, laid, alive, work.items, shared)
        return compiled_together(blend, (jax.jit(vet), laid.replicas, laid.train_loss, before), keep=False)

    def step(
        self, state: TrainState, work: Work, shared: Shared, stop: None = None
    ) -> tuple[TrainState, RoundLog, None]:
        """Runs a round.

        Raises:
          TooFew: there were not enough replicas for too long; the state is as it was.
        """
        number = int(state.round) + 1
        self._lanes.begin()
        self._crew.muster(number)
        collected = self._collect(number, state, work)
        confirmed = self._auditor.audit(number, collected)
        blend, check = self._programs
        brought = from_host(collected.leaves, self._shapes, copy=False)
        finite, norms = jax.device_get(
            check.call(brought.replicas, brought.train_loss, state.replicas._replace(residual=()))
        )
        finite = finite & collected.leaves[self._place("alive")]  # what the worker itself found
        beyond = self._bound.beyond(np.asarray(norms), collected.arrived & confirmed & finite)
        refused = {
            "another worker measured other scores": ~confirmed,
            "its numbers are not finite": confirmed & ~finite,
            "its change is out of bounds": beyond,
        }
        for why, which in refused.items():
            collected.missing.update(dict.fromkeys(np.flatnonzero(collected.arrived & which).tolist(), why))
        for member in self._crew.members:
            own = [k for k in member.replicas if collected.fresh[k]]
            if own:
                self._crew.judge(member, any(k not in collected.missing for k in own))
        alive = jax.device_put(collected.arrived & confirmed & finite & ~beyond)
        state, log = jax.block_until_ready(blend.call(state, brought, alive, work.items, shared))
        self._warn(number, collected.missing)
        self._entries = self._lanes.row(self._crew.members, collected.missing, self._auditor.found)
        return state, log, None

    def _warn(self, number: int, missing: dict[int, str]) -> None:
        """Says who is missing for the first time, once for every worker and reason; rows say it in every round."""
        for member in self._crew.members:
            own = [k for k in member.replicas if k in missing and not member.missed]
            told = (member.number, re.sub(r"[\d.,+e-]+", "", missing[own[0]])) if own else None
            if told is not None and told not in self._told:
                self._told.add(told)
                which = f"replica{'s' * (len(own) > 1)} {', '.join(map(str, own))}"
                warnings.warn(
                    f"round {number} is without {which} of worker {member.number}: {missing[own[0]]}; "
                    f"{'they restart' if len(own) > 1 else 'it restarts'} from the blend",
                    WavgWarning,
                    stacklevel=2,
                )

    def entries(self) -> Row:
        """What the row of the last round says of its workers."""
        return self._entries

    def _collect(self, number: int, state: TrainState, work: Work) -> Collected:
        """Sends the orders of a round and gathers what comes, until it has enough."""
        given = to_host((state.replicas._replace(residual=()), state.drift))
        own = len(jax.tree.leaves(state.replicas._replace(residual=())))
        items, longest = np.asarray(work.items), self._steps(work)
        collected = self._nothing_yet()
        asked: set[int] = set()
        begun = time.perf_counter()
        while True:
            for arrival in [*self._auditor.others, *self._crew.look(0)]:  # of earlier rounds
                self._take(number, arrival, given, own, collected)
            self._auditor.others = []
            for member in self._crew.members:
                if member.ready and not asked.intersection(member.replicas):
                    self._send(number, member, given, own, items, longest, collected)
                    asked.update(member.replicas)
            left = self._workers.patience - (time.perf_counter() - begun)
            for arrival in self._crew.arrivals(number, min(self._crew.patience(longest), left)):
                self._take(number, arrival, given, own, collected)
            if collected.arrived.sum() >= self._workers.min_replicas:
                break
            if left <= 0:
                raise TooFew(self._explain(number, collected))
            for arrival in self._crew.look(min(POLL, left)):
                self._take(number, arrival, given, own, collected)
            asked = {k for m in self._crew.members if m.order is not None for k in m.replicas}
            asked.update(np.flatnonzero(collected.arrived).tolist())
        collected.fill(given[:own])
        for member in self._crew.members:
            if member.order is not None and member.order.ticket.round == number:
                collected.lack(member.replicas, "its worker was late")
                self._lanes.note(member, "late", member.order, time.perf_counter(), "late")
        return collected

    def _nothing_yet(self) -> Collected:
        """A round of which nothing has come."""
        why = {k: member.why for member in self._crew.members for k in member.replicas}
        missing = {k: why.get(k, "no worker has it") for k in range(self._k)}
        return Collected(self._stack, np.zeros(self._k, bool), np.zeros(self._k, bool), missing)

    def _send(
        self,
        number: int,
        member: Member,
        given: list[np.ndarray],
        own: int,
        items: np.ndarray,
        longest: int,
        collected: Collected,
    ) -> None:
        chosen = rows(member.replicas)
        leaves = [x[chosen] if place < own else x for place, x in enumerate(given)]
        ticket = Ticket(number, self._nonce, member.number, member.replicas)
        try:
            order = self._crew.send(member, ticket, leaves, items[chosen], self._share(member, longest))
        except self._crew.full as error:
            collected.lack(member.replicas, f"no room to send its order: {type(error).__name__}")
            return
        order.form = self._form(len(member.replicas))
        if self._workers.late is not None:  # a copy, for a state that somebody looks at cannot be overwritten in place
            order.start = [x.copy() for x in leaves[: self._params]]

    @property
    def _params(self) -> int:
        """How many leaves parameters have; they come first."""
        return len(jax.tree.leaves(self._shapes.replicas.params))

    def _steps(self, work: Work) -> int:
        return self._kit.longest if work.pace.steps is None else int(work.pace.steps)

    def _share(self, member: Member, longest: int) -> int:
        """How many local steps a worker is to take: with `fill`, those that the median worker's time has room for."""
        paces = [m.pace for m in self._crew.members if m.pace is not None]
        if not self._workers.fill or member.pace is None or not paces:
            return longest
        return int(np.clip(longest * statistics.median(paces) / member.pace, 1, longest))

    def _take(self, number: int, arrival: Arrival, given: list[np.ndarray], own: int, collected: Collected) -> None:
        """Puts an arrival where it belongs; a late one only if that counts and nothing newer is there."""
        member, order = arrival.member, arrival.order
        staleness, replicas = number - order.ticket.round, order.ticket.replicas
        if arrival.reply is None:
            if not staleness:
                collected.lack(replicas, str(arrival.why))
            self._lanes.note(member, "failed", order, arrival.at, str(arrival.why))
            return
        if order.audits:
            return
        leaves, reply, place = arrival.reply.leaves, arrival.reply, self._place("steps")
        leaves[place] = np.clip(leaves[place], 0, order.steps)  # nobody has taken more than it was told to
        if replicas == member.replicas:
            member.pace = reply.seconds / max(int(leaves[place].max()), 1)
        was, why = "computed", ""
        if staleness == 0:
            collected.put(replicas, leaves, fresh=True)
        elif self._workers.late is not None and not collected.arrived[list(replicas)].any():
            was, why = "late, counted", f"{staleness} rounds late"
            moved = self._discounted(order, leaves, given, self._workers.late(staleness))
            collected.put(replicas, self._scored_anew(number, moved), fresh=False)
        else:
            was, why = "late, dropped", f"{staleness} rounds late"
        self._lanes.note(member, was, order, arrival.at, why, reply.seconds)

    def _scored_anew(self, number: int, leaves: list[np.ndarray]) -> list[np.ndarray]:
        """The same with the signals of today: a late result was scored on other samples, and as another network."""
        count = len(self._scorer.form)
        if not count:
            return leaves
        each = range(len(leaves[0]))
        if not self._scorer.scored(number):
            return [*leaves[:-count], *(np.full_like(x, np.nan) for x in leaves[-count:])]
        measured = [self._scorer.measure(number, self._scorer.network(leaves, k)) for k in each]
        return [*leaves[:-count], *(np.stack(found) for found in zip(*measured, strict=True))]

    def _discounted(
        self, order: Any, leaves: list[np.ndarray], given: list[np.ndarray], factor: float
    ) -> list[np.ndarray]:
        """A late result as a change of the parameters of today: `now + factor * (sent - start)`."""
        chosen = rows(order.ticket.replicas)
        moved = [
            now[chosen] + np.asarray(factor, x.dtype) * (x - start)
            for x, start, now in zip(leaves, order.start, given, strict=False)
        ]
        return [*moved, *leaves[len(moved) :]]

    def _place(self, name: str) -> int:
        """The first leaf of an entry of `Brought`."""
        entries = self._shapes._asdict()
        before = list(entries)[: list(entries).index(name)]
        return sum(len(jax.tree.leaves(entries[other])) for other in before)

    def _explain(self, number: int, collected: Collected) -> str:
        some = sorted({f"{why} (replica {k})" for k, why in collected.missing.items()})[:4]
        return (
            f"round {number} waited {self._workers.patience:g} s for {self._workers.min_replicas} replicas and had "
            f"{int(collected.arrived.sum())}: {'; '.join(some)}. Give Workers a longer patience= or deadline=, or less "
            "min_replicas=; with a workdir= the rounds before are saved, and resume=True goes on"
        )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that a CPU device can use as they are: XLA takes over host memory at multiples of 64 bytes."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)
