"""Statistics of a network whose parameters are a mean of others', on data: section 3.2 of SWA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from wavg_jax.base import PyTree, Task
from wavg_jax.rounds.local import Fetch, as_is

_PROBE = 2.0**64
"""So large that what a batch adds to it is rounded away, and a power of two, so that times a momentum it is exact."""

_PROBES_AGAIN = _PROBE / 4, -_PROBE
"""What the momentum is measured with again, at another size and sign. Where a layer divides by the root of its running
variance in training, a negative one makes NaN of what comes after it."""

_AGREEMENT = 1e-6
"""By how much the momentum may differ at the probes of a leaf for which it is a constant, but for rounding."""

_LEAST, _MOST = 1e-3, 1 - 1e-5
"""Momenta of an average. One that is 1 belongs to a count or a constant, one that vanishes to what forgets the probe,
such as a vector that is normalised; between 1 - 1e-5 and 1 it is not told from 1 well enough in float32."""


def reestimate(task: Task, fetch: Fetch = as_is) -> Callable:
    """Builds what re-estimates one network's mutable collections on batches, its parameters fixed (Izmailov et al.
    2018, arXiv:1803.05407, section 3.2; torch's `update_bn`).

    A statistic as that of BatchNorm is an exponential average, s <- f_i(s) = m s + (1 - m) b_i, of batch statistics b_i
    that do not depend on s in training mode. What is wanted is their mean over the batches, without what s was before:

        mean_i b_i,    b_i = (f_i(s) - m s) / (1 - m) whatever s

    Each batch starts from the b of the one before, the first from its own, found from the old s. Then 1 / (1 - m)
    roundings of s are no larger beside b than that of 1 - m, and a layer that divides by s in training, too, is not
    given zeros.

    The momentum m, which only the network knows, is f(p) / p for a probe p beside which b vanishes. It is taken on the
    first batch, and again on the last with p / 4 and with -p, so n batches cost n + 4 forward passes. A variance
    becomes the mean of the batches' variances.

    A number goes on from its old value, batch by batch, where f is something else: the momenta differ (but for that at
    -p where it is NaN, a frozen layer before having taken the root of a negative variance), or are 1 (counts,
    constants) or 0 (what keeps no memory, or is normalised), or it is not float32 or wider.

    Args:
      task: the network.
      fetch: as for `wavg_jax.rounds.local.local_steps`.

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
        low, down = (update([jnp.full_like(s, p) for s in statistics], later, *ends[1])[0] for p in _PROBES_AGAIN)
        momenta = [_momentum(*probed) for probed in zip(up, low, down, strict=True)]

        def of_batch(statistics: list, others: list, item: PyTree, rng: jax.Array) -> tuple[list, list]:
            """b where the statistic is an average, else f(s)."""
            after, others = update(statistics, others, item, rng)
            new = [
                jnp.where(jnp.isnan(m), f, (f - m * s) / (1 - m))
                for f, m, s in zip(after, momenta, statistics, strict=True)
            ]
            return new, others

        def step(carry: tuple, batch: tuple) -> tuple[tuple, None]:
            (before, others), total = carry
            item, rng, i = batch
            new, others = of_batch(before, others, item, rng)
            added = ((new, others), [t + b for t, b in zip(total, new, strict=True)])
            return jax.tree.map(lambda a, b: jnp.where(i < count, a, b), added, carry), None

        first, _ = of_batch(statistics, others, *ends[0])
        start = [jnp.where(jnp.isnan(m), s, b) for m, s, b in zip(momenta, statistics, first, strict=True)]
        carry = ((start, others), [jnp.zeros_like(s) for s in statistics])
        numbers = jnp.arange(batches.shape[0], dtype=jnp.int32)
        ((last, others), total), _ = jax.lax.scan(step, carry, (items, batches, numbers))
        mean = [t / count.astype(t.dtype) for t in total]
        found = iter([jnp.where(jnp.isnan(m), b, mean) for m, b, mean in zip(momenta, last, mean, strict=True)])
        rest = iter(others)
        return jax.tree.unflatten(structure, [next(found if p else rest) for p in probed])

    return run


def _may_be_average(x: jax.Array) -> bool:
    # With fewer digits than float32's, 1 - m says too little of a momentum near 1.
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4


def _where(leaves: list, mask: list[bool], value: bool) -> list:
    return [x for x, m in zip(leaves, mask, strict=True) if m == value]


def _momentum(up: jax.Array, low: jax.Array, down: jax.Array) -> jax.Array:
    """The momentum of each number, from what became of the probes; NaN if it is not an average."""
    m = up / _PROBE
    again, negative = (x / p for x, p in zip((low, down), _PROBES_AGAIN, strict=True))
    same = (jnp.abs(m - again) <= _AGREEMENT) & (jnp.isnan(negative) | (jnp.abs(m - negative) <= _AGREEMENT))
    return jnp.where(same & (m >= _LEAST) & (m <= _MOST), m, jnp.nan)
