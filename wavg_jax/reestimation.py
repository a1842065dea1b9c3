"""Statistics of a network whose parameters are a mean of others', on data: section 3.2 of SWA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from wavg_jax.base import PyTree, Task
from wavg_jax.local import Fetch, as_is

_PROBE = 2.0**64
"""So large that what a batch adds to it is rounded away, and a power of two, so that times a momentum it is exact."""

_AGREEMENT = 1e-6
"""By how much the momentum may differ at two probes of a leaf for which it is a constant, but for rounding."""

_LEAST, _MOST = 1e-3, 1 - 1e-5
"""Momenta of an average. One that is 1 belongs to a count or a constant, one that vanishes to what forgets the probe,
such as a vector that is normalised; between 1 - 1e-5 and 1 it is not told from 1 well enough in float32."""


def reestimate(task: Task, fetch: Fetch = as_is) -> Callable:
    """Builds what re-estimates one network's mutable collections on batches, its parameters fixed (Izmailov et al.
    2018, arXiv:1803.05407, section 3.2; torch's `update_bn`).

    A statistic as that of BatchNorm is an exponential average, s <- f_i(s) = m s + (1 - m) b_i, of batch statistics b_i
    that do not depend on s in training mode. What is wanted is their mean over the batches, without what s was before:

        mean_i b_i = mean_i f_i(0) / (1 - m)

    The momentum m, which only the network knows, is f(p) / p for a probe p beside which b vanishes. It is taken on the
    first batch, and again with -p on the last, so n batches cost n + 2 forward passes. A variance becomes the mean of
    the batches' variances.

    A number goes on from its old value, batch by batch, where f is something else: the two differ, or are 1 (counts,
    constants) or 0 (what keeps no memory, or is normalised), or it is not float32 or wider.

    Args:
      task: the network.
      fetch: as for `wavg_jax.local.local_steps`.

    Returns:
      `(params, mutable, items, count, shared, rng) -> mutable` for one network: the leaves of `items` have a leading
      axis n, of which the first `count` batches, an int32 scalar of at least 1, are read.
    """

    def run(params: PyTree, mutable: PyTree, items: PyTree, count: jax.Array, shared: PyTree, rng: jax.Array) -> PyTree:
        leaves, structure = jax.tree.flatten(mutable)
        probed = [_may_be_average(x) for x in leaves]

        def update(statistics: list, others: list, item: PyTree, rng: jax.Array) -> tuple[list, list]:
            each, rest = iter(statistics), iter(others)
            before = jax.tree.unflatten(structure, [next(each if p else rest) for p in probed])
            fetch_rng, loss_rng = jax.random.split(rng)
            _, (after, _) = task.loss(params, before, fetch(item, shared, fetch_rng), loss_rng)
            new = jax.tree.leaves(after)
            return _where(new, probed, True), _where(new, probed, False)

        statistics, others = _where(leaves, probed, True), _where(leaves, probed, False)
        batches = jax.random.split(rng, jax.tree.leaves(items)[0].shape[0])
        # The momentum is not a constant either if it differs between two batches, or with the counts of a step later.
        ends = [jax.tree.map(lambda x, i=i: x[i], (items, batches)) for i in (0, count - 1)]
        up, later = update([jnp.full_like(s, _PROBE) for s in statistics], others, *ends[0])
        down, _ = update([jnp.full_like(s, -_PROBE) for s in statistics], later, *ends[1])
        momenta = [_momentum(u, d) for u, d in zip(up, down, strict=True)]

        def step(carry: tuple, batch: tuple) -> tuple[tuple, None]:
            old, total = carry
            item, rng, i = batch
            start = [jnp.where(jnp.isnan(m), s, 0) for m, s in zip(momenta, old[0], strict=True)]
            new = update(start, old[1], item, rng)
            added = (new, [t + s for t, s in zip(total, new[0], strict=True)])
            return jax.tree.map(lambda a, b: jnp.where(i < count, a, b), added, carry), None

        carry = ((statistics, others), [jnp.zeros_like(s) for s in statistics])
        numbers = jnp.arange(batches.shape[0], dtype=jnp.int32)
        ((ran, others), total), _ = jax.lax.scan(step, carry, (items, batches, numbers))
        means = [t / count.astype(t.dtype) / (1 - m) for t, m in zip(total, momenta, strict=True)]
        found = iter([jnp.where(jnp.isnan(m), r, mean) for m, r, mean in zip(momenta, ran, means, strict=True)])
        rest = iter(others)
        return jax.tree.unflatten(structure, [next(found if p else rest) for p in probed])

    return run


def _may_be_average(x: jax.Array) -> bool:
    # With fewer digits than float32's, 1 - m says too little of a momentum near 1.
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4


def _where(leaves: list, mask: list[bool], value: bool) -> list:
    return [x for x, m in zip(leaves, mask, strict=True) if m == value]


def _momentum(up: jax.Array, down: jax.Array) -> jax.Array:
    """The momentum of each number, from what became of the probe and of its negative, NaN if it is not an average."""
    m = up / _PROBE
    average = (jnp.abs(m + down / _PROBE) <= _AGREEMENT) & (m >= _LEAST) & (m <= _MOST)
    return jnp.where(average, m, jnp.nan)
