"""One run: its numbers, its data on the devices, its compiled programs, and the row that describes it."""

import functools
import zlib
from typing import NamedTuple

import jax
import numpy as np

from wavg_jax import tree
from wavg_jax.base import PyTree, TrainState
from wavg_jax.data import ShardedData
from wavg_jax.devices import machine
from wavg_jax.devices.placement import put
from wavg_jax.rounds import score as scoring
from wavg_jax.rounds import sync
from wavg_jax.rounds.recipe import Recipe, Work, make_work, put_shared
from wavg_jax.storage.rows import Row
from wavg_jax.training import metrics, progress
from wavg_jax.training.programs import compiled_together, programs
from wavg_jax.training.schedule import Schedule


class Plan(NamedTuple):
    """The numbers of a run; see `wavg_jax.fit` for each."""

    schedule: Schedule
    rounds: int
    batch_size: int
    seed: int
    checkpoint_every: int
    evaluate_every: int
    chunk: int


def evaluated(state: TrainState) -> tuple[PyTree, PyTree]:
    """The parameters and mutable collections that a run is judged by: the global ones, or their average over rounds."""
    return (state.params, state.mutable) if state.smoothed is None else state.smoothed[:2]


class Run:
    """One run's data on the devices, and its compiled programs."""

    def __init__(self, recipe: Recipe, data: ShardedData, plan: Plan, name: str):
        self.recipe, self.data, self.plan, self.name = recipe, data, plan, name
        self.replicas = len(data.shards)
        progress.doing(f"{name}: compiling")
        self.shared = put_shared(recipe, data, plan.chunk)
        self.test = put(scoring.chunked(data.test.x, data.test.y, plan.chunk), recipe.placement.shared)
        program = programs(recipe, self.replicas)
        rng = put(jax.random.key(plan.seed), recipe.placement.shared)
        self.initial: TrainState = program.init(rng)
        self.step, self.predict = compiled_together(
            (program.run, self.initial, self.work(0, 1), self.shared),
            (program.predict, *evaluated(self.initial), self.test),
        )

    def work(self, first_step: int, steps: int) -> Work:
        """What the replicas are given to do in a round of so many steps, on the devices."""
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

    def evaluates(self, number: int) -> bool:
        """Whether the round of this number is evaluated on the test split."""
        return number == self.plan.rounds or number % self.plan.evaluate_every == 0

    def evaluate(self, state: TrainState) -> metrics.Quality:
        """Quality on the test split of what the run is judged by. Off the clock."""
        labels = self.data.test.y
        logits = np.asarray(self.predict.call(*evaluated(state), self.test))
        return metrics.evaluate(logits.reshape(-1, logits.shape[-1])[: len(labels)], labels)

    def describe(self) -> Row:
        """The run's first row, but for what the caller adds."""
        data, plan, initial = self.data, self.plan, self.initial
        per_replica = tree.nbytes(initial.params) + tree.nbytes(tree.floats(initial.mutable))
        opt_state = initial.replicas.opt_state
        if sync.averages(self.recipe.opt_state_at_sync, opt_state):
            per_replica += tree.nbytes(tree.floats(opt_state)) // self.replicas
        return {
            "kind": "run",
            "run": self.name,
            "arm": self.name,
            "seed": plan.seed,
            "started": machine.now(),
            "dataset": data.name,
            "classes": data.classes,
            "class_names": data.class_names,
            "train_samples": len(data.train.y),
            "heldout_samples": len(data.heldout.y),
            "test_samples": len(data.test.y),
            "shard_sizes": [len(shard) for shard in data.shards],
            "noisy_shards": data.noisy,
            "data_crc": _fingerprint(data),
            "replicas": self.replicas,
            "devices": len(self.recipe.placement.devices),
            "replica_map": self.recipe.placement.replica_map,
            "resident": self.recipe.resident,
            "local_steps": plan.schedule.longest,
            "batch_size": plan.batch_size,
            "rounds": plan.rounds,
            "checkpoint_every": plan.checkpoint_every,
            "samples_per_round": self.replicas * plan.schedule.longest * plan.batch_size,
            "parameters": tree.count(initial.params),
            "bytes_per_round": 2 * self.replicas * per_replica if self.replicas > 1 else 0,
            "compile_seconds": self.step.seconds + self.predict.seconds,
            "score_samples": self.recipe.score_samples,
            "faults": None if self.recipe.faults is None else self.recipe.faults._asdict(),
            "critical_path": None,
            "target_accuracy": None,
            "hardware": machine.hardware(),
            "versions": machine.versions(),
        }


def _bytes(array: np.ndarray) -> memoryview:
    """The memory of an array, of any dtype."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _fingerprint(data: ShardedData) -> int:
    """Tells apart data that differ in inputs, labels, splits or shards: 0.3 s a gigabyte, one part after another."""
    splits = (data.train, data.heldout, data.test)
    parts = (*(split.y for split in splits), *data.shards, *(split.x for split in splits))
    return functools.reduce(lambda crc, part: zlib.crc32(_bytes(part), crc), parts, 0)
