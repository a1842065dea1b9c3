"""Robust weightings, which look at the replicas' parameters alone, and the clipping of what replicas send.

They bound what a minority of broken or hostile replicas can do without scoring anything; a weighting by held-out scores
does so too where held-out data can be had. Distances are Euclidean over all tensors together, in float32. With the
replicas spread over several devices every device gathers all of them to compare them: K times the memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax import tree
from wavg_jax.arguments import NONE, as_whole, check, either, number
from wavg_jax.base import PyTree, Weighting
from wavg_jax.weighting.make import make_weighting
from wavg_jax.weighting.scores import normalise


def _from_stacked(weigh: Callable[..., PyTree]) -> Weighting:
    """The weighting without state whose weights are `weigh(stacked, params, alive, blend)`."""

    def update(
        stacked: PyTree,
        state: PyTree,
        params: PyTree,
        *,
        alive: jax.Array,
        blend: Callable[[PyTree], PyTree],
        **signals: Any,
    ) -> tuple[PyTree, PyTree]:
        del signals
        return weigh(stacked, params, alive, blend), state

    return make_weighting(update)


def _squares(difference: PyTree) -> jax.Array:
    """Sum of squares of the differences [...], in float32."""
    return sum(
        (jnp.square(d.astype(jnp.float32)).sum() for d in jax.tree.leaves(difference)), start=jnp.zeros((), jnp.float32)
    )


def _difference(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, tree.as_accumulators(a), tree.as_accumulators(b))


def _distances(stacked: PyTree, centre: PyTree) -> jax.Array:
    """Distance of every replica from `centre`: [K]; one replica at a time, which rounds alike for every K."""
    return jax.lax.map(lambda x: jnp.sqrt(_squares(_difference(x, centre))), stacked)


def _median(values: jax.Array, alive: jax.Array) -> jax.Array:
    """Median over the living of [K] numbers."""
    ordered = jnp.sort(jnp.where(alive, values, jnp.inf))
    n = alive.sum(dtype=jnp.int32)
    return (ordered[jnp.maximum(n - 1, 0) // 2] + ordered[n // 2]) / 2


def _middle(left_out: Callable[[jax.Array], jax.Array]) -> Weighting:
    """Per element, equal weights on the living values but for the `left_out(n)` smallest and largest of n."""

    def weigh(stacked: PyTree, params: PyTree, alive: jax.Array, blend: Callable) -> PyTree:
        del params, blend
        n = alive.sum(dtype=jnp.int32)
        out = left_out(n)
        share = 1 / jnp.maximum(n - 2 * out, 1).astype(jnp.float32)

        def leaf(x: jax.Array) -> jax.Array:
            column = (-1,) + (1,) * (x.ndim - 1)
            index = jnp.arange(x.shape[0]).reshape(column)
            rank = jnp.zeros(x.shape, jnp.int32)
            for j in range(x.shape[0]):
                before = (x[j][None] < x) | ((x[j][None] == x) & (j < index))
                rank = rank + (before & alive[j]).astype(jnp.int32)
            kept = alive.reshape(column) & (rank >= out) & (rank < n - out)
            return jnp.where(kept, share, 0)

        return jax.tree.map(leaf, stacked)

    return _from_stacked(weigh)


def coordinate_median() -> Weighting:
    """The median of every element over the living replicas, as weights per element [K, *shape].

    1 on the middle value, or 1/2 on each of the two middle ones (Yin et al. 2018, arXiv:1803.01498).

    >>> import jax.numpy as jnp
    >>> import wavg_jax as wavg
    >>> avg = wavg.averager(coordinate_median())
    >>> stacked = {"w": jnp.array([[1.0, 9.0], [2.0, 1.0], [99.0, 3.0]])}
    >>> new, _, _ = avg.update(stacked, avg.init({"w": jnp.zeros(2)}, 3), {"w": jnp.zeros(2)})
    >>> new["w"].tolist()
    [2.0, 3.0]
    """
    return _middle(lambda n: jnp.maximum(n - 1, 0) // 2)


def trimmed_mean(trim: int) -> Weighting:
    """The mean of every element over the living replicas without the `trim` smallest and the `trim` largest values.

    Weights per element [K, *shape]: `1 / (n - 2 trim)` on what is left of n (Yin et al. 2018, arXiv:1803.01498, whose
    beta is trim / n). With fewer than 2 trim + 1 living replicas it is the median. 0 is plain averaging.

    Args:
      trim: how many values to leave out at each end; it must be at least the number of broken replicas.

    Raises:
      SettingsError: `trim` is not a whole number, or negative.
    """
    trim = as_whole("trim", trim, 0)
    return _middle(lambda n: jnp.minimum(trim, jnp.maximum(n - 1, 0) // 2))


def geometric_median(iterations: int = 8, smoothing: float = 1e-6) -> Weighting:
    """The point with the smallest sum of distances to the living replicas, by the smoothed Weiszfeld algorithm of RFA.

        z = blend(w),    w_k ~ 1 / max(smoothing, ||z - x_k||),    `iterations` times

    (Pillutla, Kakade and Harchaoui 2022, arXiv:1912.13445, with equal alpha_k). It holds as long as more than half of
    the replicas are sound. Each iteration costs one blend and one pass over the replicas.

    It starts not from the mean, which one replica can drag anywhere and from which every iteration would come back by a
    factor K - 1 only, but from the blend with `w_k ~ 1 / max(m, ||params - x_k||)`, where m is the median of these
    distances: no replica counts for more than the median one does.

    Args:
      iterations: how often the weights are improved; RFA stops after 3 to 5.
      smoothing: RFA's nu, a distance in units of the parameters.

    Raises:
      SettingsError: `iterations` is not a positive whole number, or `smoothing` not a positive number.
    """
    iterations = as_whole("iterations", iterations, 1)
    check("smoothing", smoothing, number(above=0))

    def weigh(stacked: PyTree, params: PyTree, alive: jax.Array, blend: Callable) -> jax.Array:
        def closeness(distances: jax.Array, least: jax.Array) -> jax.Array:
            return normalise(1 / jnp.maximum(least, distances), alive)

        moved = _distances(stacked, params)
        nu = jnp.asarray(smoothing, jnp.float32)
        start = closeness(moved, jnp.maximum(nu, _median(moved, alive)))
        return jax.lax.fori_loop(0, iterations, lambda _, w: closeness(_distances(stacked, blend(w)), nu), start)

    return _from_stacked(weigh)


def _pairwise_squares(stacked: PyTree) -> jax.Array:
    """Squared distances between the replicas, [K, K], with infinity on the diagonal.

    One pair at a time: memory for one difference, and the same rounding for every K. By direct differences, since
    `|a|^2 + |b|^2 - 2ab` loses the small distances between replicas that share most of their parameters.
    """
    replicas = tree.count_replicas(stacked)
    i, j = (jnp.asarray(index, jnp.int32) for index in np.triu_indices(replicas, 1))
    squares = jax.lax.map(
        lambda pair: _squares(_difference(tree.replica(stacked, pair[0]), tree.replica(stacked, pair[1]))), (i, j)
    )
    return jnp.full((replicas, replicas), jnp.inf, jnp.float32).at[i, j].set(squares).at[j, i].set(squares)


def _krum_scores(stacked: PyTree, alive: jax.Array, byzantine: int) -> jax.Array:
    """Sum of the squared distances to the n - byzantine - 2 nearest living replicas: [K]; infinite for the dead."""
    n = alive.sum(dtype=jnp.int32)
    neighbours = jnp.minimum(jnp.maximum(n - byzantine - 2, 1), n - 1)
    both = alive[:, None] & alive[None]
    nearest = jnp.sort(jnp.where(both, _pairwise_squares(stacked), jnp.inf), axis=1)
    score = jnp.zeros(alive.shape, jnp.float32)
    for k in range(alive.shape[0]):
        score = jnp.where(k < neighbours, score + nearest[:, k], score)
    return jnp.where(alive, score, jnp.inf)


def multi_krum(byzantine: int, keep: int) -> Weighting:
    """The mean of the `keep` replicas with the smallest Krum scores (Blanchard et al. 2017, "Machine learning with
    adversaries: Byzantine tolerant gradient descent").

    `s_k` is the sum of the squared distances of replica k to its n - byzantine - 2 nearest among the n living (at
    least 1), and `w_k = 1 / keep` for those with the smallest. Replicas that tie for the last places share them.
    K (K - 1) / 2 differences of whole networks are taken, one at a time.

    The guarantee holds for 2 byzantine + 2 < n. With fewer living the rule is applied all the same, since a run that
    lost replicas has to go on.

    Args:
      byzantine: f, how many replicas may be broken.
      keep: how many are averaged; 1 is Krum, and more than are living is plain averaging.

    Raises:
      SettingsError: `byzantine` is not a whole number or negative, `keep` not a positive whole number.
    """
    byzantine, keep = as_whole("byzantine", byzantine, 0), as_whole("keep", keep, 1)

    def weigh(stacked: PyTree, params: PyTree, alive: jax.Array, blend: Callable) -> jax.Array:
        del params, blend
        scores = _krum_scores(stacked, alive, byzantine)
        smaller = (alive[None] & (scores[None] < scores[:, None])).sum(axis=1, dtype=jnp.int32)
        equal = (alive[None] & (scores[None] == scores[:, None])).sum(axis=1, dtype=jnp.int32)
        places = jnp.clip(keep - smaller, 0, equal).astype(jnp.float32)
        return normalise(places / jnp.maximum(equal, 1).astype(jnp.float32), alive)

    return _from_stacked(weigh)


def krum(byzantine: int) -> Weighting:
    """All weight on the replica with the smallest Krum score; see `multi_krum`, whose `keep` is 1.

    Replicas that tie share the weight. With 1 neighbour (n = byzantine + 3 or fewer) the closest pair always ties.

    Args:
      byzantine: f, how many replicas may be broken.

    Raises:
      SettingsError: `byzantine` is not a whole number, or negative.

    >>> import jax.numpy as jnp
    >>> import wavg_jax as wavg
    >>> avg = wavg.averager(krum(1))
    >>> stacked = {"w": jnp.array([[0.0], [1.0], [3.0], [4.5], [99.0]])}
    >>> new, _, weights = avg.update(stacked, avg.init({"w": jnp.zeros(1)}, 5), {"w": jnp.zeros(1)})
    >>> weights.tolist()  # scores, with 2 neighbours: 1 + 9, 1 + 4, 2.25 + 4, 2.25 + 12.25, ...
    [0.0, 1.0, 0.0, 0.0, 0.0]
    """
    return multi_krum(byzantine, keep=1)


def clip_deltas(max_norm: float | None = None) -> Callable[[PyTree, PyTree, jax.Array], PyTree]:
    """A transform for `averager(transform=...)` that bounds how far a replica can have moved in the round.

        x_k <- params + min(1, c / ||x_k - params||) (x_k - params)

    Args:
      max_norm: c, in units of the parameters; None means the median norm over the living.

    Returns:
      `(stacked, params, alive) -> stacked`. Replicas within c are kept bit for bit, dtypes always.

    Raises:
      SettingsError: `max_norm` is not greater than 0.

    >>> import jax.numpy as jnp
    >>> stacked = {"w": jnp.array([[6.0, 8.0], [3.0, 4.0]])}
    >>> clip_deltas(5.0)(stacked, {"w": jnp.zeros(2)}, jnp.array([True, True]))["w"].tolist()
    [[3.0, 4.0], [3.0, 4.0]]
    """
    check("max_norm", max_norm, either(NONE, number(above=0)))

    def transform(stacked: PyTree, params: PyTree, alive: jax.Array) -> PyTree:
        norms = _distances(stacked, params)
        c = _median(norms, alive) if max_norm is None else jnp.asarray(max_norm, jnp.float32)
        scale = jnp.where(norms > c, c / norms, 1)

        def one(x: jax.Array, p: jax.Array, s: jax.Array) -> jax.Array:
            wide = tree.accumulator_dtype(x.dtype)
            # Not p + s (x - p): that difference can overflow.
            return s.astype(wide) * x.astype(wide) + (1 - s).astype(wide) * p.astype(wide)

        def clip(replica: tuple[PyTree, jax.Array]) -> PyTree:
            x, s = replica
            clipped = tree.cast_like(jax.tree.map(lambda a, p: one(a, p, s), x, params), x)
            return tree.select(s < 1, clipped, x)

        # One at a time, as the distances: fused with the blend, the rounding would depend on K.
        return jax.lax.map(clip, (stacked, scale))

    return transform
