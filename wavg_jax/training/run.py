"""One run: its numbers, its data on the devices, its compiled programs, and the row that describes it."""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from wavg_jax import tree
from wavg_jax.base import Batch, PyTree, TrainState
from wavg_jax.data import ShardedData
from wavg_jax.devices import machine, processes
from wavg_jax.devices.memory import memory_of, room
from wavg_jax.devices.network import WIRES
from wavg_jax.devices.transfer import own_part, put, put_own
from wavg_jax.devices.trial import try_collectives
from wavg_jax.rounds import sync
from wavg_jax.rounds.exchange import gathers
from wavg_jax.storage.schema import Row, run_row
from wavg_jax.training import progress
from wavg_jax.training.batches import ROUNDS_HELD, Work, as_targets, make_work, put_shared
from wavg_jax.training.engine import Engine, in_process
from wavg_jax.training.footprint import check_fits, held_bytes
from wavg_jax.training.programs import programs_of
from wavg_jax.training.recipe import Recipe
from wavg_jax.training.schedule import Schedule


class Plan(NamedTuple):
    """The numbers of a run; see `wavg_jax.fit` for each."""

    schedule: Schedule
    rounds: int
    batch_size: int
    seed: int
    checkpoint_every: int
    test_every: int


def evaluated(state: TrainState) -> tuple[PyTree, PyTree]:
    """The parameters and mutable collections that a run is judged by: the global ones, or their average over rounds."""
    return (state.params, state.mutable) if state.smoothed is None else state.smoothed[:2]


def blended_bytes(recipe: Recipe, state: TrainState) -> int:
    """What one replica sends at a blend: parameters, statistics, control variates, and optimizer state if averaged.
    Scores and logits, which are small beside them, are not counted.

    Args:
      recipe: of the rounds.
      state: their state, or its shapes.
    """
    nbytes = tree.nbytes(state.params) + tree.nbytes(tree.floats(state.mutable)) + tree.nbytes(state.drift)
    opt_state = state.replicas.opt_state
    if sync.averages(recipe.at_sync.opt_state, opt_state):
        nbytes += tree.nbytes(tree.floats(opt_state)) // tree.count_replicas(opt_state)
    return nbytes


def exchanged(recipe: Recipe, state: TrainState) -> tuple[int, int]:
    """How large the exchange of parameters is.

    Args:
      recipe: of the rounds.
      state: their state, or its shapes.

    Returns:
      Numbers of float32 (or as many bytes) that a device gathers on the others, and numbers in a sum over all; the one
      that is not needed is small.
    """
    numbers = -(-tree.count(state.params) // recipe.at_sync.fragments)
    if recipe.placement.parts == 1 or not gathers(recipe.averager, recipe.at_sync.wire):
        return 1, numbers
    each = tree.count_replicas(state.replicas.params) // recipe.placement.parts
    return math.ceil(each * numbers * WIRES[recipe.at_sync.wire] / WIRES["float32"]), 1


class Run:
    """One run's data on the devices, and its compiled programs."""

    def __init__(
        self,
        recipe: Recipe,
        data: ShardedData,
        plan: Plan,
        name: str,
        metrics: tuple[str, ...],
        at_end: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None,
        engine: Engine = in_process,
        *,
        stored: bool = False,
    ):
        self.recipe, self.data, self.plan, self.name, self.metrics = recipe, data, plan, name, metrics
        self._at_end = at_end
        self.replicas = len(data.shards)
        self._crc = _fingerprint(data)
        progress.doing(f"{name}: compiling")
        self.shared = put_shared(recipe, data)
        self._test = put(Batch(data.test.x, as_targets(data.test.y)), recipe.placement.shared)
        program = programs_of(recipe, self.replicas)
        shapes, state = program.begin(jax.random.key(plan.seed))
        where, held = recipe.placement.devices, held_bytes(shapes)
        check_fits(where, held)  # compiling a program that cannot run may take minutes
        self.copies = held <= room(where)
        """Whether the devices have room for another copy of the state, to be saved while the next round runs."""
        first = (shapes, self.work(0, 1), self.shared, self.ask(False))
        evaluate = (program.evaluate, *evaluated(shapes), self._test)
        self.step, self._evaluate = engine(recipe, first, evaluate)
        waiting = (ROUNDS_HELD - 1) * held_bytes(first[1])
        self.memory = self._foresee(held + waiting + (held if stored and self.copies else 0))
        self._initial: TrainState | None = state()
        self._sizes = {
            "parameters": tree.count(shapes.params),
            "blended_bytes": blended_bytes(recipe, shapes),
        }
        # Before the first of them runs: different programs wait for one another for ever, or mix up their numbers.
        processes.agree({"round": self.step.program.digest, "evaluation": self._evaluate.digest}, _OTHER_PROGRAM)
        if processes.count() > 1:
            try_collectives(recipe.placement.devices, *exchanged(recipe, shapes))

    def _foresee(self, held: int) -> Row | None:
        """What the memory of each device will come to; None where that is not known."""
        sizes = [program.temporary for program in (self.step.program, self._evaluate)]  # one after the other
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            return None
        return check_fits(self.recipe.placement.devices, held + max(known))

    def work(self, first_step: int, steps: int) -> Work:
        """The batches of a `steps`-step round starting at global local step `first_step`, on the devices."""
        plan = self.plan
        return make_work(
            self.recipe,
            self.data,
            seed=plan.seed,
            first_step=first_step,
            longest=plan.schedule.longest,
            batch_size=plan.batch_size,
            steps=steps if plan.schedule.varies else None,
        )

    def ask(self, stop: bool) -> jax.Array | None:
        """This process's wish to stop, as the round's program takes it to all others; None if there are none."""
        where = self.recipe.placement
        shape = (len(where.devices),)
        wishes = np.full(len(range(*own_part(where.each, shape)[0].indices(shape[0]))), stop)
        return put_own(wishes, where.each, shape) if processes.count() > 1 else None

    def evaluates(self, number: int) -> bool:
        """Whether to evaluate the round of this number on the test split."""
        return number == self.plan.rounds or number % self.plan.test_every == 0

    def saves(self, number: int) -> bool:
        """Whether a checkpoint of the round of this number is due."""
        return number == self.plan.rounds or number % self.plan.checkpoint_every == 0

    def evaluate(self, state: TrainState) -> dict[str, jax.Array]:
        """Launches the metrics on the test split of what the run is judged by. The state may be donated at once."""
        return self._evaluate.call(*evaluated(state), self._test)

    def final(self, state: TrainState) -> Row:
        """What the last row says beside its round: what the caller adds, and the memory. Off the clock."""
        own = {} if self._at_end is None else dict(self._at_end(*jax.device_get(evaluated(state))))
        memory = memory_of(self.recipe.placement.devices)
        return own | {"peak_memory": None if memory is None else memory.peak or None}

    def first(self) -> TrainState:
        """The first state, once. The run keeps none, which would take as much memory as another state."""
        state, self._initial = self._initial, None
        assert state is not None
        return state

    def describe(self) -> Row:
        """The run's first row, without what the caller adds."""
        data, plan = self.data, self.plan
        return run_row(
            run=self.name,
            seed=plan.seed,
            started=machine.now(),
            dataset=data.name,
            classes=data.classes,
            class_names=data.class_names,
            train_samples=len(data.train.y),
            heldout_samples=len(data.heldout.y),
            test_samples=len(data.test.y),
            shard_sizes=[len(shard) for shard in data.shards],
            noisy_shards=data.noisy,
            noise=data.noise,
            data_crc=self._crc,
            devices=len(self.recipe.placement.devices),
            replica_map=self.recipe.placement.replica_map,
            resident=self.recipe.resident,
            local_steps=plan.schedule.longest,
            batch_size=plan.batch_size,
            rounds=plan.rounds,
            checkpoint_every=plan.checkpoint_every,
            **self._sizes,
            compile_seconds=self.step.program.seconds + self._evaluate.seconds,
            memory=self.memory,
            score_samples=self.recipe.scoring.samples,
            score_every=self.recipe.scoring.every,
            faults=None if self.recipe.faults is None else self.recipe.faults._asdict(),
            hardware=machine.hardware(),
            versions=machine.versions(),
        )


def _bytes(array: np.ndarray) -> memoryview:
    """The memory of an array, of any dtype."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _fingerprint(data: ShardedData) -> int:
    """Tells apart data that differ in inputs, labels, splits or shards: 0.3 s a gigabyte.

    Every process reads the inputs of its share of the shards alone.

    Raises:
      SettingsError: a process has other data than process 0, as far as both know of them.
    """
    common = {"held-out samples": _crc(*data.heldout), "test samples": _crc(*data.test)}
    known = {"shards": _crc(*data.shards), "labels": _crc(data.train.y), **common}
    processes.agree(known, _OTHER_DATA)
    share, rest = divmod(len(data.shards), processes.count())
    mine = data.shards if rest else data.shards[share * processes.index() :][:share]
    shards = [_crc(shard, data.train.y[shard], *_pieces(data.train.x, shard)) for shard in mine]
    if rest:  # each reads all
        processes.agree({"training samples": _crc(np.asarray(shards, np.uint32))}, _OTHER_DATA)
    each = processes.gather(np.asarray(shards, np.uint32))
    return _crc(each[0] if rest else each, *data.heldout, *data.test)


_OTHER_DATA = "has other {name} than process 0; give all processes the same data, split and dealt with the same seed"
_OTHER_PROGRAM = (
    "would run another {name} than process 0; give all processes the same task, averager, inner optimizer, scoring, "
    "at_sync, faults and numbers in them, and the same versions"
)
_AT_ONCE = 2**14
"""Samples copied at a time."""


def _pieces(x: np.ndarray, shard: np.ndarray) -> Iterator[np.ndarray]:
    return (x[shard[start : start + _AT_ONCE]] for start in range(0, len(shard), _AT_ONCE))


def _crc(*parts: np.ndarray) -> int:
    return functools.reduce(lambda crc, part: zlib.crc32(_bytes(part), crc), parts, 0)
