"""The networks of the comparison, and the files that give every worker the same weights and batches."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from experiments.benchmarks.peer_workers.lines import Arrays, Job
from wavg_jax import data, models
from wavg_jax.base import Task
from wavg_jax.data import Dataset, ShardedData, Split

CLASSES = 10


class NetworkSpec(NamedTuple):
    """A network under comparison: its module, the shape of a sample, B of a replica, and the default H."""

    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    steps: int


# At these H a round takes a few seconds on two cores; H changes only ratios that dispatch dominates.
NETWORKS = {
    "mlp": NetworkSpec(lambda: models.MLP((512, 512), CLASSES), (28, 28), 64, 50),
    "digits_mlp": NetworkSpec(lambda: models.MLP((128,), CLASSES), (8, 8), 32, 50),
    "cnn": NetworkSpec(lambda: models.CNN(CLASSES), (28, 28), 64, 10),
    "resnet20": NetworkSpec(lambda: models.ResNet(CLASSES), (32, 32, 3), 64, 4),
}


def task(name: str) -> Task:
    """The library's task of a network."""
    network = NETWORKS[name]
    shape = network.shape if len(network.shape) == 3 else (*network.shape, 1)
    return models.from_linen(network.module(), shape)


def random_data(job: Job) -> ShardedData:
    """Random images as bytes, in K shards; a round trains on each sample once."""
    rng = np.random.default_rng(0)
    count, shape = job.replicas * job.steps * job.batch, NETWORKS[job.network].shape
    # Classes differ in brightness, so that there is something to learn: on pure noise, rounding alone would drive two
    # systems apart.
    labels = rng.integers(0, CLASSES, count, np.int32)
    noise = rng.integers(0, 156, (count, *shape), np.uint8)
    train = Split(noise + (11 * labels.astype(np.uint8)).reshape(-1, *[1] * len(shape)), labels)
    few = Split(train.x[:1], train.y[:1])
    dataset = Dataset(job.network, train, few, CLASSES)
    shards = data.iid(count, job.replicas, 0)
    return ShardedData(job.network, train, few, few, shards, CLASSES, data.make_prepare(dataset))


def write(job: Job) -> None:
    """Writes `data.npz` and `start.npz` for the workers."""
    folder, sharded = pathlib.Path(job.folder), random_data(job)
    indices = data.round_indices(sharded.shards, seed=0, first_step=0, local_steps=job.steps, batch_size=job.batch)
    x = np.asarray(jax.jit(sharded.prepare)(sharded.train.x))
    np.savez(folder / "data.npz", x=x, y=sharded.train.y, indices=indices)
    params, mutable = jax.jit(task(job.network).init)(jax.random.key(0))
    start: Any = flat({"params": params, **mutable})
    np.savez(folder / "start.npz", **start)


def flat(tree: Any) -> Arrays:
    """Names the leaves of nested dicts by their path."""
    return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def nested(arrays: Arrays) -> Any:
    """Undoes `flat`."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def difference(one: Arrays, other: Arrays, start: Arrays) -> float:
    """How far two rounds from the same start differ: `|one - other| / |other - start|` over all parameters."""
    names = [name for name in start if name.startswith("params/")]
    apart = sum(float(np.square(np.float64(one[name]) - other[name]).sum()) for name in names)
    moved = sum(float(np.square(np.float64(start[name]) - other[name]).sum()) for name in names)
    return float((apart / moved) ** 0.5)
