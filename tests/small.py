"""A small problem that trains in a second: three blobs, told apart by a softmax regression over a plain dict."""

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax import data, models
from wavg_jax.rounds import keys


def blobs(train: int = 260, test: int = 60, seed: int = 0) -> data.Dataset:
    """Three overlapping clouds in 4 dimensions."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, 4)) * 1.5
    y = rng.integers(0, 3, size=train + test)
    x = (centres[y] + rng.normal(size=(train + test, 4))).astype(np.float32)
    return data.from_arrays(x[:train], y[:train], x[train:], y[train:], name="blobs")


def sharded(replicas: int = 4, seed: int = 0, noisy: tuple[int, ...] = (), heldout: int = 20) -> data.ShardedData:
    return data.shard(
        blobs(), lambda split, seed: data.iid(len(split.y), replicas, seed), heldout=heldout, seed=seed, noisy=noisy
    )


def regression():
    """Softmax regression; `mutable` counts the steps, as BatchNorm statistics would change."""

    def init(rng):
        return {"w": 0.1 * jax.random.normal(rng, (4, 3)), "b": jnp.zeros(3)}, {"seen": jnp.zeros(())}

    def apply(params, mutable, x, *, train, rng):
        del rng
        seen = mutable["seen"] + jnp.asarray(train, mutable["seen"].dtype)
        return x @ params["w"] + params["b"][None], {"seen": seen}

    return models.classifier(init, apply)


def initial(task, seed=0):
    """Parameters and collections with which `fit` starts."""
    return task.init(keys.roots(jax.random.key(seed)).init)


def filled(task):
    """Parameters and collections as `task.init` might make them, without the seconds of compiling it."""
    rng = np.random.default_rng(0)
    fill = {
        "kernel": lambda shape: rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])),
        "embedding": lambda shape: 0.02 * rng.normal(size=shape),
        "positions": lambda shape: 0.02 * rng.normal(size=shape),
        "scale": np.ones,
        "var": np.ones,
    }

    def leaf(path, aval):
        return jnp.asarray(fill.get(path[-1].key, np.zeros)(aval.shape), aval.dtype)

    return jax.tree.map_with_path(leaf, jax.eval_shape(task.init, jax.random.key(0)))
