"""Transforms: what `averager(transform=...)` does to the replicas' parameters before they are weighed and blended.

A transform is a function `(stacked, params, alive) -> stacked`. These sparsify each replica's delta, its movement in
the round; `wavg_jax.robust.clip_deltas` clips it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.arguments import as_number, check, number, whole
from wavg_jax.base import PyTree

__all__ = ["Transform", "drop_deltas", "trim_deltas"]


def __dir__() -> list[str]:
    return __all__


Transform = Callable[[PyTree, PyTree, jax.Array], PyTree]
"""`(stacked, params, alive) -> stacked`; parameters [K, ...], those at the start of the round [...], bool [K]."""


def _delta(x: PyTree, params: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, *tree.as_accumulators((x, params)))


def _largest(sizes: PyTree, k: int) -> jax.Array:
    """The k-th largest of all the sizes in a tree, which are not negative.

    Bisects over the bits of float32, which are in the order of the numbers: 31 passes take a twentieth of XLA's sort on
    a CPU.
    """
    bits = [jax.lax.bitcast_convert_type(size.astype(jnp.float32), jnp.int32) for size in jax.tree.leaves(sizes)]

    def narrow(i: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | jnp.left_shift(jnp.int32(1), 30 - i)
        reached = sum((x >= tried).sum(dtype=jnp.int32) for x in bits)
        return jnp.where(reached >= k, tried, found)

    return jax.lax.bitcast_convert_type(
        jax.lax.fori_loop(jnp.int32(0), jnp.int32(31), narrow, jnp.int32(0)), jnp.float32
    )


def trim_deltas(density: float = 0.2) -> Transform:
    """Keeps each replica's largest changes and takes the others back: TIES's first step.

        x_k <- x_k where |x_k - params| is among the `density` largest of replica k, else params

    All tensors together. With `wavg_jax.disjoint_mean` after it this is TIES-Merging (Yadav et al. 2023,
    arXiv:2306.01708).

    Args:
      density: share of the elements to keep, rounded to a whole number, at least one; the paper keeps 0.2. Changes as
        large as the smallest that is kept all stay.

    Raises:
      SettingsError: `density` is not greater than 0 and at most 1.

    >>> import jax.numpy as jnp
    >>> trim = trim_deltas(0.5)
    >>> trim({"w": jnp.array([[1.0, -4.0, 0.5, 2.0]])}, {"w": jnp.zeros(4)}, jnp.ones(1, bool))["w"].tolist()
    [[0.0, -4.0, 0.0, 2.0]]
    """
    density = as_number("density", density, number(above=0, most=1))

    def transform(stacked: PyTree, params: PyTree, alive: jax.Array) -> PyTree:
        del alive
        kept = max(round(density * tree.count(params)), 1)

        def trim(x: PyTree) -> PyTree:
            sizes = jax.tree.map(jnp.abs, _delta(x, params))
            least = _largest(sizes, kept)
            return jax.tree.map(lambda v, p, d: jnp.where(d.astype(least.dtype) >= least, v, p), x, params, sizes)

        return jax.lax.map(trim, stacked)

    return transform


def _noise_key(x: PyTree, seed: int) -> jax.Array:
    """A key drawn from a seed and the bits of a replica's parameters."""
    key = jax.random.key(seed)
    for leaf in jax.tree.leaves(x):
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        # Wraps around, so that it is exact in any order.
        key = jax.random.fold_in(key, bits.sum(dtype=jnp.uint32))
    return key


def drop_deltas(rate: float, seed: int = 0) -> Transform:
    """Takes back each change with probability `rate` and scales the others up: DARE, drop and rescale.

        x_k <- params + b_k (x_k - params) / (1 - rate),    b_k ~ Bernoulli(1 - rate) per element

    The expected blend stays the same, and fewer changes of different replicas meet in one element (Yu et al. 2024,
    arXiv:2311.03099). The paper merges finetuned models once; over many rounds this is noise, as from dropout, that
    grows with rate / (1 - rate).

    A transform has no state and no random key. So each replica's mask is drawn from `seed` and the bits of its own
    parameters: it differs between replicas and rounds, is the same in a repeated or resumed run, and depends neither on
    the order of the replicas nor on who else is alive.

    Args:
      rate: probability of a change to be taken back, at least 0 and less than 1. The paper's 0.9 and more is for
        models whose changes are far smaller than a round's.
      seed: makes the masks; a whole number from 0 to 2**32 - 1.

    Raises:
      SettingsError: `rate` or `seed` is not such a number.

    >>> import jax.numpy as jnp
    >>> dropped = drop_deltas(0.5)({"w": jnp.ones((1, 1000))}, {"w": jnp.zeros(1000)}, jnp.ones(1, bool))["w"]
    >>> sorted(set(dropped[0].tolist())), bool(abs(dropped.mean() - 1) < 0.1)
    ([0.0, 2.0], True)
    """
    check("rate", rate, number(0, below=1))
    check("seed", seed, whole(0, 2**32 - 1))
    rate, seed = float(rate), int(seed)

    def transform(stacked: PyTree, params: PyTree, alive: jax.Array) -> PyTree:
        del alive
        if not rate:
            return stacked

        def drop(x: PyTree) -> PyTree:
            deltas = _delta(x, params)
            keys = optax.tree.split_key_like(_noise_key(x, seed), deltas)

            def one(p: jax.Array, d: jax.Array, key: jax.Array) -> jax.Array:
                kept = jax.random.bernoulli(key, 1 - rate, d.shape)
                return jnp.where(kept, (p.astype(d.dtype) + d / (1 - rate)).astype(p.dtype), p)

            return jax.tree.map(one, params, deltas, keys)

        return jax.lax.map(drop, stacked)

    return transform
