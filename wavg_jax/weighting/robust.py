"""Robust weightings, computed from the replicas' parameters alone, and clipping of replica deltas.

They bound the damage a minority of broken or hostile replicas can do, without scoring anything; given held-out data, a
weighting by held-out scores does the same. Distances are Euclidean over all tensors together, in float32. When replicas
are spread over several devices, every device gathers all of them for the comparison: K times the memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax import tree
from wavg_jax.arguments import NONE, as_whole, check, either, number
from wavg_jax.base import Init, PyTree, SettingsError, Weighting
from wavg_jax.weighting.make import make_weighting, stateless
from wavg_jax.weighting.scores import normalise


def _from_stacked(weigh: Callable[..., PyTree], init: Init = stateless) -> Weighting:
    """Builds the stateless weighting with weights `weigh(stacked, params, alive, blend)`."""

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

    return make_weighting(update, init=init)


def _at_most(name: str, value: int, most: Callable[[int], int], fewest: int) -> Init:
    """The `init` of a stateless rule whose argument may be at most `most(K)`; `fewest` is the K that `value` needs."""

    def init(params: PyTree, replicas: int) -> tuple:
        if value > most(replicas):
            allowed = f"{name}= must be {f'0 to {most(replicas)}' if most(replicas) else 0}"
            raise SettingsError(
                f"{name}={value} is too large for replicas={replicas}: {allowed}, or use at least {fewest} replicas"
            )
        return stateless(params, replicas)

    return init


def _squares(difference: PyTree) -> jax.Array:
    """Sum of squares of the differences [...], in float32."""
    return sum(
        (jnp.square(d.astype(jnp.float32)).sum() for d in jax.tree.leaves(difference)), start=jnp.zeros((), jnp.float32)
    )


def _difference(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, tree.as_accumulators(a), tree.as_accumulators(b))


def _distances(stacked: PyTree, centre: PyTree) -> jax.Array:
    """Distance of every replica from `centre`: [K]; one replica at a time, so that rounding does not depend on K."""
    return jax.lax.map(lambda x: jnp.sqrt(_squares(_difference(x, centre))), stacked)


def _median(values: jax.Array, alive: jax.Array) -> jax.Array:
    """Median of [K] numbers over the living replicas."""
    ordered = jnp.sort(jnp.where(alive, values, jnp.inf))
    n = alive.sum(dtype=jnp.int32)
    return (ordered[jnp.maximum(n - 1, 0) // 2] + ordered[n // 2]) / 2


def _middle(left_out: Callable[[jax.Array], jax.Array], init: Init = stateless) -> Weighting:
    """Weighs the n living values of each element equally, leaving out the `left_out(n)` smallest and largest."""

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

    return _from_stacked(weigh, init)


def coordinate_median() -> Weighting:
    """Coordinate-wise median over the living replicas, as weights per element [K, *shape].

    The middle value gets weight 1, or each of the two middle values 1/2 (Yin et al. 2018, arXiv:1803.01498).

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
    """Coordinate-wise mean over the living replicas, without the `trim` smallest and the `trim` largest values.

    Weights per element [K, *shape]: `1 / (n - 2 trim)` on each remaining value of the n living (Yin et al. 2018,
    arXiv:1803.01498, whose beta is trim / n). If fewer than 2 trim + 1 replicas are left alive, it is the median.

    Args:
      trim: number of values to drop at each end; at least the number of broken replicas, and at most (K - 1) // 2. 0 is
        plain averaging.

    Raises:
      SettingsError: `trim` is negative or not a whole number. `init` raises it if `trim` leaves nothing of K values.
    """
    trim = as_whole("trim", trim, 0)
    init = _at_most("trim", trim, lambda replicas: (replicas - 1) // 2, 2 * trim + 1)
    return _middle(lambda n: jnp.minimum(trim, jnp.maximum(n - 1, 0) // 2), init)


def geometric_median(iterations: int = 8, smoothing: float = 1e-6) -> Weighting:
    """Geometric median: the point with the smallest sum of distances to the living replicas.

    Computed by RFA's smoothed Weiszfeld algorithm

        z = blend(w),    w_k ~ 1 / max(smoothing, ||z - x_k||),    `iterations` times

    (Pillutla, Kakade and Harchaoui 2022, arXiv:1912.13445, with equal alpha_k). It is robust as long as more than half
    of the replicas are sound. Each iteration costs one blend and one pass over the replicas.

    A single replica can drag the mean anywhere, and each iteration would recover only a factor of K - 1. So the
    iterations start from the blend with `w_k ~ 1 / max(m, ||params - x_k||)` instead, where m is the median of these
    distances: no replica outweighs the median one.

    Args:
      iterations: number of Weiszfeld iterations; RFA stops after 3 to 5.
      smoothing: RFA's nu, a distance in units of the parameters.

    Raises:
      SettingsError: `iterations` is not a positive whole number, or `smoothing` is not a positive number.
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

    Goes one pair at a time, to hold one difference and round the same for every K. It takes differences directly:
    `|a|^2 + |b|^2 - 2ab` loses small distances between nearly equal replicas.
    """
    replicas = tree.count_replicas(stacked)
    i, j = (jnp.asarray(index, jnp.int32) for index in np.triu_indices(replicas, 1))
    squares = jax.lax.map(
        lambda pair: _squares(_difference(tree.replica(stacked, pair[0]), tree.replica(stacked, pair[1]))), (i, j)
    )
    return jnp.full((replicas, replicas), jnp.inf, jnp.float32).at[i, j].set(squares).at[j, i].set(squares)


def _krum_scores(stacked: PyTree, alive: jax.Array, byzantine: int) -> jax.Array:
    """Sums the squared distances to the n - byzantine - 2 nearest living replicas: [K]; infinite for the dead."""
    n = alive.sum(dtype=jnp.int32)
    neighbours = jnp.minimum(jnp.maximum(n - byzantine - 2, 1), n - 1)
    both = alive[:, None] & alive[None]
    nearest = jnp.sort(jnp.where(both, _pairwise_squares(stacked), jnp.inf), axis=1)
    score = jnp.zeros(alive.shape, jnp.float32)
    for k in range(alive.shape[0]):
        score = jnp.where(k < neighbours, score + nearest[:, k], score)
    return jnp.where(alive, score, jnp.inf)


def multi_krum(byzantine: int, keep: int) -> Weighting:
    """Averages the `keep` replicas with the smallest Krum scores (Blanchard et al. 2017, "Machine learning with
    adversaries: Byzantine tolerant gradient descent").

    The score `s_k` sums the squared distances from replica k to its n - byzantine - 2 nearest neighbours (at least 1)
    among the n living. The `keep` replicas with the smallest scores get `w_k = 1 / keep`; replicas that tie for the
    last places share them. Computes K (K - 1) / 2 differences of whole networks, one at a time.

    The paper's guarantee needs n >= 2 byzantine + 3. `init` requires only that every replica has a neighbour to be
    scored by, K >= byzantine + 3 (any K if byzantine is 0). With fewer replicas left alive the rule still applies, so
    that a run that loses replicas can continue.

    Args:
      byzantine: f, the number of broken replicas to tolerate, 0 to max(K - 3, 0); the guarantee needs
        f <= (K - 3) / 2.
      keep: number of replicas to average; 1 is Krum, and more than are alive is plain averaging.

    Raises:
      SettingsError: `byzantine` is negative or not a whole number, or `keep` is not a positive whole number. `init`
        raises it if `byzantine` is too large for K.
    """
    byzantine, keep = as_whole("byzantine", byzantine, 0), as_whole("keep", keep, 1)
    init = _at_most("byzantine", byzantine, lambda replicas: max(replicas - 3, 0), byzantine + 3)

    def weigh(stacked: PyTree, params: PyTree, alive: jax.Array, blend: Callable) -> jax.Array:
        del params, blend
        scores = _krum_scores(stacked, alive, byzantine)
        smaller = (alive[None] & (scores[None] < scores[:, None])).sum(axis=1, dtype=jnp.int32)
        equal = (alive[None] & (scores[None] == scores[:, None])).sum(axis=1, dtype=jnp.int32)
        places = jnp.clip(keep - smaller, 0, equal).astype(jnp.float32)
        return normalise(places / jnp.maximum(equal, 1).astype(jnp.float32), alive)

    return _from_stacked(weigh, init)


def krum(byzantine: int) -> Weighting:
    """Puts all weight on the replica with the smallest Krum score; `multi_krum` with `keep=1`.

    Replicas that tie share the weight. With 1 neighbour (n = byzantine + 3 or fewer) the closest pair always ties.

    Args:
      byzantine: f, the number of broken replicas to tolerate, 0 to max(K - 3, 0); the guarantee needs
        f <= (K - 3) / 2.

    Raises:
      SettingsError: `byzantine` is negative or not a whole number. `init` raises it if `byzantine` is too large for K.

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
    """Builds a transform for `averager(transform=...)` that clips each replica's movement in the round.

        x_k <- params + min(1, c / ||x_k - params||) (x_k - params)

    Args:
      max_norm: c, in units of the parameters; None takes the median norm over the living replicas.

    Returns:
      `(stacked, params, alive) -> stacked`. It keeps dtypes, and replicas within c bit for bit.

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
            # p + s (x - p) could overflow in the difference.
            return s.astype(wide) * x.astype(wide) + (1 - s).astype(wide) * p.astype(wide)

        def clip(replica: tuple[PyTree, jax.Array]) -> PyTree:
            x, s = replica
            clipped = tree.cast_like(jax.tree.map(lambda a, p: one(a, p, s), x, params), x)
            return tree.select(s < 1, clipped, x)

        # One at a time, like the distances: fused with the blend, rounding would depend on K.
        return jax.lax.map(clip, (stacked, scale))

    return transform
