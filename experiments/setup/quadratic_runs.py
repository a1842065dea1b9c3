"""The quadratic problem as a task of the library, which `wavg.fit` trains: what the closed form is checked against.

A sample of shard k is a point z around the shard's optimum, with the curvature for its target: its loss is
`0.5 sum_i A_ki (x_i - z_i)^2`, so the mean of the samples' losses has its optimum at their mean, and a gradient the
variance `A_k^2 var(z)`. All samples are drawn once and seen at most once.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wavg_jax as wavg
from experiments.setup import quadratic, quadratic_shards
from experiments.setup.quadratic import Floats, Quadratic, State
from experiments.setup.quadratic_shards import BAD_LOSS, NOISE_LOSS, Arm, arms, skewed, with_bad
from wavg_jax import data
from wavg_jax.base import PyTree, Weighting
from wavg_jax.weighting.make import make_weighting


def make_task(directions: int) -> wavg.Task:
    """A point in d directions that begins at the origin; its "logits" are its distance from a sample [B, d]."""

    def init(rng: jax.Array) -> tuple[PyTree, PyTree]:
        del rng
        return {"x": jnp.zeros(directions)}, {}

    def predict(params: PyTree, mutable: PyTree, z: jax.Array) -> jax.Array:
        del mutable
        return params["x"][None] - z

    def measure(distance: jax.Array, batch: wavg.Batch) -> dict[str, jax.Array]:
        return {"loss": 0.5 * jnp.sum(batch.y * distance**2)}

    def loss(params: PyTree, mutable: PyTree, batch: wavg.Batch, rng: jax.Array) -> tuple[jax.Array, tuple]:
        del rng
        return measure(predict(params, mutable, batch.x), batch)["loss"] / len(batch.x), (mutable, {})

    return wavg.Task(init, loss, predict, measure)


def make_data(
    problem: Quadratic, *, batch_size: int, per_shard: int, heldout: int, seed: int, per_sample: float = 1.0
) -> data.ShardedData:
    """Draws the samples.

    Args:
      problem: the shards; `noise` is that of a mini-batch.
      batch_size: samples in it.
      per_shard: samples of each shard.
      heldout: samples around the true optimum, whose gradients have the covariance `per_sample` times the curvature.
      seed: of the samples.
      per_sample: 1 as for a cross-entropy.

    Returns:
      The data. Its test split is one sample at the optimum, so the test loss is the loss above that of the best.
    """
    rng = np.random.default_rng(seed)
    shape = (per_shard, *problem.optimum.shape)
    spread = np.sqrt(problem.noise * batch_size) / problem.curvature
    z = (problem.optimum + spread * rng.standard_normal(shape)).swapaxes(0, 1).reshape(-1, shape[-1])
    held = np.sqrt(per_sample / problem.judge) * rng.standard_normal((heldout, shape[-1]))
    judge = np.broadcast_to(problem.judge, held.shape)
    return data.ShardedData(
        name="quadratic",
        train=data.Split(_single(z), _single(np.repeat(problem.curvature, per_shard, axis=0))),
        heldout=data.Split(_single(held), _single(judge)),
        test=data.Split(np.zeros((1, shape[-1]), np.float32), _single(problem.judge[None])),
        shards=tuple(np.arange(per_shard * problem.replicas, dtype=np.int32).reshape(problem.replicas, -1)),
        classes=None,
        prepare=_as_stored,
    )


def _as_stored(z: jax.Array) -> jax.Array:
    return z


def _single(values: Floats) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)


def fixed(weights: Floats) -> Weighting:
    """Weights [K] that nothing changes."""

    def update(stacked: PyTree, state: PyTree, params: PyTree, *, alive: jax.Array, **_: object) -> tuple:
        del stacked, params
        return wavg.normalise(jnp.asarray(weights, jnp.float32), alive), state

    return make_weighting(update, reads_replicas=False)


class Case(NamedTuple):
    """Runs to compare with what is computed for them.

    Attributes:
      name: what they are, in words.
      arm: who trains on which shards, and with which weights.
      local_steps: H, of a replica.
      rounds: how many.
      decayed: whether the rate falls to 0.
      weighting: the library's weighting, where it is not the arm's own weights.
      shards: what the samples of an arm are drawn from that trains one network on shards pooled.
      heldout: held-out samples that `weighting` scores in a round.
    """

    name: str
    arm: Arm
    local_steps: int
    rounds: int
    decayed: bool = False
    weighting: Weighting | None = None
    shards: Quadratic | None = None
    heldout: int = 1

    @property
    def rates(self) -> Floats:
        return quadratic_shards.rates(self.rounds, self.local_steps * self.arm.faster, decayed=self.decayed)

    def judged(self, losses: Floats) -> Floats:
        """The mean over the second half of the rounds [..., rounds], the last round alone where the rate falls."""
        return losses[..., -1] if self.decayed else losses[..., self.rounds // 2 :].mean(axis=-1)


def computed(case: Case) -> float:
    """The loss of a case in closed form."""
    problem, start = case.arm.problem, State(*np.zeros((2, len(case.arm.problem.judge))))
    states = quadratic.rounds(problem, case.rates, case.arm.choose, start)
    return float(case.judged(np.array([quadratic.loss(problem, state) for state in states])))


def simulated(case: Case, seeds: Sequence[int], copies: int = 16) -> Floats:
    """The loss of a case when the library trains it, by seed [seeds].

    Args:
      case: what to train.
      seeds: of samples and their order.
      copies: how often the directions are repeated, for a mean over that many runs at the price of one; weights that
        are fitted see a single copy, since what they lose depends on the number of directions.
    """
    copies = copies if case.weighting is None else 1
    weighting = case.weighting or fixed(_constant(case.arm))
    problem = case.shards or case.arm.problem
    problem = Quadratic(*(np.tile(part, copies) for part in problem))
    pool = 0 if case.shards is None else case.shards.replicas // case.arm.faster
    losses = train(problem, weighting, case.rates, seeds=seeds, heldout=case.heldout, pool=pool)
    return case.judged(losses) / copies


def _constant(arm: Arm) -> Floats:
    nothing = State(*np.zeros((2, len(arm.problem.judge))))
    return arm.choose(nothing, quadratic.local(arm.problem, np.zeros(1)))


BATCH = 2
"""Samples of a mini-batch; the noise of a problem is that of a mini-batch, so nothing depends on it."""


def train(
    problem: Quadratic, weighting: Weighting, rates: Floats, *, seeds: Sequence[int], heldout: int = 1, pool: int = 0
) -> Floats:
    """Trains with the library, from the true optimum on.

    Args:
      problem: the shards.
      weighting: how replicas count, `fixed(...)` or any of the library's.
      rates: of the local steps [rounds, H].
      seeds: of samples and their order.
      heldout: samples scored in a round, other ones in each.
      pool: mini-batches in a step of one network on all shards' samples mixed; 0 trains K replicas.

    Returns:
      The loss above that of the best parameters after every round [seeds, rounds].
    """
    count, steps = rates.shape
    seen = BATCH * rates.size * (pool or problem.replicas)
    flat = jnp.asarray(rates.reshape(-1), jnp.float32)
    # The same objects for all seeds, which share compiled programs then.
    run = functools.partial(
        wavg.fit,
        make_task(len(problem.judge)),
        averager=wavg.averager(weighting),
        inner=optax.sgd(lambda step: flat[jnp.minimum(step, len(flat) - 1)]),
        local_steps=steps,
        rounds=count,
        batch_size=BATCH * (pool or 1),
        scoring=wavg.Scoring(samples=heldout),
        layout=wavg.Layout(devices=1, replica_map="vmap"),
        progress=False,
    )
    found = []
    for seed in seeds:
        sharded = make_data(
            problem,
            batch_size=BATCH,
            per_shard=-(-seen // problem.replicas),
            heldout=heldout * count,
            seed=seed,
        )
        result = run(data=data.pool(sharded) if pool else sharded, seed=seed)
        found.append([row["test_loss"] for row in result.rows if row["kind"] == "round"])
    return np.array(found)


def cases(samples: Sequence[int] = (32, 256, 2048)) -> list[Case]:
    """What is checked: K, H, bad shards, noise, other curvatures, a decaying rate, and weights fitted to `samples`."""
    found = []
    for replicas, local_steps in ((2, 10), (8, 1), (8, 10), (8, 100), (32, 10)):
        bad = replicas // 4
        every = _arms(replicas, bad)
        found += [
            Case(f"{name}, {bad} of {replicas} bad, H = {local_steps}", every[name], local_steps, 1000 // local_steps)
            for name in ("plain", "best weights")[: 1 + (bad > 0)]
        ]
    shards = with_bad(8, 2, bad_loss=BAD_LOSS, noise_loss=NOISE_LOSS)
    every = arms(shards, 2, BATCH)
    for name in ("sync", "sequential"):
        found.append(Case(f"{name}, 2 of 8 bad", every[name], 10, 100, shards=shards))
    for name in ("plain", "best weights"):
        found.append(Case(f"{name}, 2 of 8 bad, decaying rate", every[name], 50, 20, decayed=True))
        noisier = arms(with_bad(8, 2, bad_loss=0.0, noise_loss=NOISE_LOSS, bad_noise=10.0), 2, BATCH)[name]
        found.append(Case(f"{name}, 2 of 8 with ten times the noise", noisier, 10, 100))
    for local_steps in (1, 10, 100):
        apart = skewed(8, apart=1.0, spread=1.0, noise_loss=NOISE_LOSS, seed=0)
        arm = Arm(apart, quadratic.equal(apart))
        found.append(Case(f"plain, shards that differ, H = {local_steps}", arm, local_steps, 2000 // local_steps))
    for bad in (0, 2):
        best = _arms(8, bad)["best weights"]
        found += [
            Case(f"learned() on {n:,} samples, {bad} of 8 bad", best, 100, 20, weighting=wavg.learned(), heldout=n)
            for n in samples
        ]
    return found


def _arms(replicas: int, bad: int) -> dict[str, Arm]:
    return arms(with_bad(replicas, bad, bad_loss=BAD_LOSS, noise_loss=NOISE_LOSS), bad, BATCH)
