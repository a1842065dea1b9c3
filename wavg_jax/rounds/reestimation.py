"""Re-estimates the statistics of a blended network on data: section 3.2 of SWA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from wavg_jax.base import PyTree, Task
from wavg_jax.models.rewrite import fast
from wavg_jax.rounds.local import Fetch, as_is

_PROBE = 2.0**64
"""So large that rounding removes what a batch adds; a power of two, so that its product with a momentum is exact."""

_PROBES_AGAIN = _PROBE / 4, -_PROBE
"""Probes of another size and sign, to confirm the momentum. A negative one gives NaN behind a layer that divides by
the root of its running variance in training."""

_AGREEMENT = 1e-6
"""How far the momenta found by two probes may differ through rounding alone."""

_LEAST, _MOST = 1e-3, 1 - 1e-5
"""Momenta of an average. A momentum of 1 means a count or a constant, one near 0 something that forgets the probe,
such as a normalised vector; float32 cannot tell momenta between 1 - 1e-5 and 1 from 1."""


def reestimate(task: Task, fetch: Fetch = as_is) -> Callable:
    """Builds the re-estimation of one network's mutable collections on batches, with fixed parameters (Izmailov et al.
    2018, arXiv:1803.05407, section 3.2; torch's `update_bn`).

    A BatchNorm statistic is an exponential average, s <- f_i(s) = m s + (1 - m) b_i, of batch statistics b_i that do
    not depend on s in training mode. Wanted is their mean over the batches, independent of the old s:

        mean_i b_i,    b_i = (f_i(s) - m s) / (1 - m) whatever s

    Each batch starts from the b of the one before, the first from its own, found from the old s. So s stays near b, and
    dividing by 1 - m magnifies no larger rounding; and a layer that divides by s in training never sees zeros.

    The momentum m, which only the network knows, is f(p) / p for a probe p so large that b vanishes beside it. It is
    measured on the first batch, and again on the last with p / 4 and -p, so n batches cost n + 4 forward passes. A
    variance becomes the mean of the batches' variances.

    A number that is no such average continues from its old value, batch by batch: one whose momenta differ (except that
    -p may give NaN behind a frozen layer, which takes the root of a negative variance), are 1 (counts, constants) or 0
    (no memory, or normalised), or whose dtype is narrower than float32.

    Args:
      task: the network.
      fetch: as for `wavg_jax.rounds.local.local_steps`.

    Returns:
      `(params, mutable, items, count, shared, rng) -> mutable` for one network: the leaves of `items` have a leading
      axis n; the first `count` batches are read, an int32 scalar of at least 1.
    """
    loss = fast(task.loss, task.cpu_forms)

    def run(params: PyTree, mutable: PyTree, items: PyTree, count: jax.Array, shared: PyTree, rng: jax.Array) -> PyTree:
        leaves, structure = jax.tree.flatten(mutable)
        probed = [_may_be_average(x) for x in leaves]

        def update(statistics: list, others: list, item: PyTree, rng: jax.Array) -> tuple[list, list]:
            each, rest = iter(statistics), iter(others)
            before = jax.tree.unflatten(structure, [next(each if p else rest) for p in probed])
            fetch_rng, loss_rng = jax.random.split(rng)
            _, (after, _) = loss(params, before, fetch(item, shared, fetch_rng), loss_rng)
            new = jax.tree.leaves(after)
            return _where(new, probed, True), _where(new, probed, False)

        statistics, others = _where(leaves, probed, True), _where(leaves, probed, False)
        batches = jax.random.split(rng, jax.tree.leaves(items)[0].shape[0])
        # On two batches, one with the counts of a step later: a momentum that differs is no constant.
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
    """The momentum of each number, from the updated probes; NaN if it is no average."""
    m = up / _PROBE
    again, negative = (x / p for x, p in zip((low, down), _PROBES_AGAIN, strict=True))
    same = (jnp.abs(m - again) <= _AGREEMENT) & (jnp.isnan(negative) | (jnp.abs(m - negative) <= _AGREEMENT))
    return jnp.where(same & (m >= _LEAST) & (m <= _MOST), m, jnp.nan)
