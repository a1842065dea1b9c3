"""The arms of the evidence: what trains on which samples."""

from typing import NamedTuple

import numpy as np
from absl import flags

import wavg_jax as wavg
from experiments.setup.methods import METHODS
from experiments.setup.scenario import Scenario
from experiments.setup.trial import Budget, shape_of
from experiments.setup.weightings import WEIGHTINGS
from wavg_jax import data
from wavg_jax.base import Averager
from wavg_jax.data.arrays import Split
from wavg_jax.training import schedule

F = flags.FLAGS

POOLED = ("sequential", "sync")
CONTROLS = ("oracle", *(f"oracle_{name}" for name in POOLED), *(f"{name}+heldout" for name in POOLED))
EVIDENCE = (*POOLED, *CONTROLS, *WEIGHTINGS, *METHODS)
"""Names of arms: one network on all shards, controls, every weighting of replicas, methods with an H of their own.

oracle is plain averaging without what is wrong, oracle_sequential and oracle_sync likewise; +heldout also trains on the
held-out samples.
"""
PUBLISHED = (
    *("accuracy", "softmax_loss", "grawa", "edit", "greedy_soup"),
    *("geometric_median", "trimmed_mean", "multi_krum", "coordinate_median", "krum", "fisher", "best_replica"),
    *METHODS,
)
"""Weightings and methods that others published, among which the best is looked for."""


class Arm(NamedTuple):
    """One arm.

    Attributes:
      name: of `EVIDENCE`.
      averager: of its replicas.
      pooled: "sequential" or "sync" for one network on all samples; "" for K replicas.
      good: whether what is wrong is removed.
      heldout: whether it trains on the held-out samples too.
    """

    name: str
    averager: Averager
    pooled: str = ""
    good: bool = False
    heldout: bool = False

    def budget(self) -> Budget:
        """K·H·B samples a round, and a schedule that all arms go through over equally many of them."""
        stretch = F.replicas if self.pooled == "sequential" else 1
        batch = F.batch_size * (F.replicas if self.pooled == "sync" else 1)
        steps, warmup = F.rounds * F.local_steps * stretch, F.warmup * stretch
        when = schedule.fixed(F.local_steps * stretch)
        if self.name in METHODS:
            when = METHODS[self.name].schedule(steps, shape_of(steps, warmup, F.decay))
        return Budget(steps, batch, when, warmup, F.decay)

    def samples(self, sharded: data.ShardedData, scenario: Scenario, seed: int) -> data.ShardedData:
        """What it trains on in a scenario."""
        if self.good and scenario.bad:
            good = np.concatenate([shard for k, shard in enumerate(sharded.shards) if k not in scenario.bad])
            dealt = data.iid(len(good), len(sharded.shards), seed)
            sharded = sharded._replace(shards=tuple(np.sort(good[part]) for part in dealt))
        if self.pooled:
            sharded = data.pool(sharded)
        if self.heldout:
            (all_of_them,), n = sharded.shards, len(sharded.train.y)
            train = Split(*map(np.concatenate, zip(sharded.train, sharded.heldout, strict=True)))
            more = np.arange(n, len(train.y), dtype=all_of_them.dtype)
            sharded = sharded._replace(train=train, shards=(np.concatenate([all_of_them, more]),))
        return sharded


def make(names: tuple[str, ...]) -> list[Arm]:
    """The arms of these names; weightings are of the flags, and one object each, so that runs share programs."""
    plain = wavg.averager(wavg.uniform())

    def one(name: str) -> Arm:
        bare = name.removeprefix("oracle_").removesuffix("+heldout")
        if bare in POOLED:
            return Arm(name, plain, bare, good=bare != name and "+" not in name, heldout="+" in name)
        if name in ("oracle", "plain"):
            return Arm(name, plain, good=name == "oracle")
        return Arm(name, METHODS[name].averager() if name in METHODS else wavg.averager(**WEIGHTINGS[name](F)))

    return [one(name) for name in names]
