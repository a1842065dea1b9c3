"""The quadratic problem as a task of the library, so that `wavg.fit` trains it: what the closed form is checked against.

A sample of shard k is a point z around the shard's optimum, with the curvature for its target: its loss is
`0.5 sum_i A_ki (x_i - z_i)^2`, so the mean of the samples' losses has its optimum at their mean, and a gradient the
variance `A_k^2 var(z)`. All samples are drawn once and seen at most once.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wavg_jax as wavg
from experiments.setup.quadratic import Floats, Quadratic
from wavg_jax import data
from wavg_jax.base import PyTree, Weighting
from wavg_jax.weighting.make import make_weighting


def make_task(start: Floats) -> wavg.Task:
    """A point in d directions that begins at `start` [d]; its "logits" are its distance from a sample [B, d]."""

    def init(rng: jax.Array) -> tuple[PyTree, PyTree]:
        del rng
        return {"x": jnp.asarray(start, jnp.float32)}, {}

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


def train(
    problem: Quadratic,
    weighting: Weighting,
    rates: Floats,
    *,
    batch_size: int = 2,
    heldout: int = 1,
    seeds: Sequence[int] = (0,),
    start: Floats | None = None,
    pool: bool = False,
) -> Floats:
    """Trains with the library; the loss above that of the best parameters after every round [seeds, rounds].

    Args:
      problem: the shards.
      weighting: how replicas count, `fixed(...)` or any of the library's.
      rates: of the local steps [rounds, H].
      batch_size: samples of a mini-batch.
      heldout: samples scored in a round, other ones in each.
      seeds: of the samples and their order.
      start: first parameters [d]; the true optimum by default.
      pool: one network on all shards' samples mixed, at the same batch size.
    """
    count, steps = rates.shape
    sizes = {"batch_size": batch_size, "per_shard": batch_size * rates.size, "heldout": heldout * count}
    flat = jnp.asarray(rates.reshape(-1), jnp.float32)
    # The same objects for all seeds, which share compiled programs then.
    run = functools.partial(
        wavg.fit,
        make_task(np.zeros(len(problem.judge)) if start is None else start),
        averager=wavg.averager(weighting),
        inner=optax.sgd(lambda step: flat[jnp.minimum(step, len(flat) - 1)]),
        local_steps=steps,
        rounds=count,
        batch_size=batch_size,
        scoring=wavg.Scoring(samples=heldout),
        layout=wavg.Layout(devices=1, replica_map="vmap"),
        progress=False,
    )
    found = []
    for seed in seeds:
        sharded = make_data(problem, **sizes, seed=seed)
        result = run(data=data.pool(sharded) if pool else sharded, seed=seed)
        found.append([row["test_loss"] for row in result.rows if row["kind"] == "round"])
    return np.array(found)
