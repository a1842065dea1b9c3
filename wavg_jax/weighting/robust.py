"""Robust weightings, computed from the replicas' parameters alone, and clipping of replica deltas.

They bound the damage a minority of broken or hostile replicas can do, without scoring anything; given held-out data, a
weighting by held-out scores does the same. Distances are Euclidean over all tensors together, in float32. When replicas
are spread over several devices, every device gathers all of them for the comparison: K times the memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.arguments import INT32, NONE, as_number, as_whole, check, either, number
from wavg_jax.base import Init, PyTree, SettingsError, Weighting
from wavg_jax.weighting import distances
from wavg_jax.weighting.make import make_weighting, stateless
from wavg_jax.weighting.scores import normalise

__all__ = [
    "bulyan",
    "clip_deltas",
    "coordinate_median",
    "geometric_median",
    "krum",
    "mean_around_median",
    "multi_krum",
    "trimmed_mean",
]


def __dir__() -> list[str]:
    return __all__


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


def _middle(left_out: Callable[[jax.Array], jax.Array], init: Init = stateless) -> Weighting:
    """Weighs the n living values of each element equally, leaving out the `left_out(n)` smallest and largest."""

    def weigh(stacked: PyTree, params: PyTree, alive: jax.Array, blend: Callable) -> PyTree:
        del params, blend
        n = alive.sum(dtype=jnp.int32)
        out = left_out(n)
        share = 1 / jnp.maximum(n - 2 * out, 1).astype(jnp.float32)

        def leaf(x: jax.Array) -> jax.Array:
            rank = distances.ranks(x, alive)
            kept = distances.over(alive, x) & (rank >= out) & (rank < n - out)
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


def _nearest_median(stacked: PyTree, alive: jax.Array, keep: jax.Array) -> PyTree:
    """Weighs the `keep` living values of each element that are nearest to their median equally; ties share places."""

    def leaf(x: jax.Array) -> jax.Array:
        x = x.astype(tree.accumulator_dtype(x.dtype))
        apart = jnp.abs(x - distances.median(x, alive)[None])
        return distances.places(apart, keep, alive) / keep.astype(jnp.float32)

    return jax.tree.map(leaf, stacked)


def mean_around_median(byzantine: int) -> Weighting:
    """Coordinate-wise mean of the values nearest to the median, without the `byzantine` farthest from it.

    Weights per element [K, *shape]: `1 / (n - byzantine)` on each of the n - byzantine living values nearest to their
    median (Xie, Koyejo and Gupta 2018, "Generalized Byzantine-tolerant SGD", arXiv:1802.10116). Values at equal
    distances share the last places, so that the order of the replicas does not matter. If fewer than 2 byzantine + 1
    replicas are left alive the rule still applies, to at least one value.

    Unlike `trimmed_mean` it may leave out more values on one side of the median than on the other, and leaves out half
    as many for the same number of broken replicas. Phocas (arXiv:1805.09682) measures from the trimmed mean instead.

    Args:
      byzantine: b, the number of broken replicas to tolerate, at most (K - 1) // 2. 0 is plain averaging.

    Raises:
      SettingsError: `byzantine` is negative or not a whole number. `init` raises it if `byzantine` is too large for K.

    >>> import jax.numpy as jnp
    >>> import wavg_jax as wavg
    >>> avg = wavg.averager(mean_around_median(2))
    >>> stacked = {"w": jnp.array([[1.0], [2.0], [3.0], [9.0], [99.0]])}
    >>> new, _, weights = avg.update(stacked, avg.init({"w": jnp.zeros(1)}, 5), {"w": jnp.zeros(1)})
    >>> new["w"].round(4).tolist()  # the median is 3: 1, 2 and 3 are nearest
    [2.0]
    """
    byzantine = as_whole("byzantine", byzantine, 0)
    init = _at_most("byzantine", byzantine, lambda replicas: (replicas - 1) // 2, 2 * byzantine + 1)

    def weigh(stacked: PyTree, params: PyTree, alive: jax.Array, blend: Callable) -> PyTree:
        del params, blend
        return _nearest_median(stacked, alive, jnp.maximum(alive.sum(dtype=jnp.int32) - byzantine, 1))

    return _from_stacked(weigh, init)


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
    iterations = as_whole("iterations", iterations, 1, INT32)
    smoothing = as_number("smoothing", smoothing, number(above=0))

    def weigh(stacked: PyTree, params: PyTree, alive: jax.Array, blend: Callable) -> jax.Array:
        def closeness(apart: jax.Array, least: jax.Array) -> jax.Array:
            return normalise(1 / jnp.maximum(least, apart), alive)

        moved = distances.from_centre(stacked, params)
        nu = jnp.asarray(smoothing, jnp.float32)
        start = closeness(moved, jnp.maximum(nu, distances.median(moved, alive)))
        return jax.lax.fori_loop(
            0, iterations, lambda _, w: closeness(distances.from_centre(stacked, blend(w)), nu), start
        )

    return _from_stacked(weigh)


def _krum_scores(squares: jax.Array, alive: jax.Array, byzantine: int) -> jax.Array:
    """Sums the squared distances to the n - byzantine - 2 nearest living replicas: [K]; infinite for the dead.

    `squares` are the squared distances between all pairs [K, K].
    """
    n = alive.sum(dtype=jnp.int32)
    neighbours = jnp.minimum(jnp.maximum(n - byzantine - 2, 1), n - 1)
    both = alive[:, None] & alive[None]
    nearest = jnp.sort(jnp.where(both, squares, jnp.inf), axis=1)
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
    that a run that loses replicas can continue. Sharing places departs from the paper, which takes the replica with the
    smallest number: the blend would depend on the order of the replicas.

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
        scores = _krum_scores(distances.pairwise_squares(stacked), alive, byzantine)
        return normalise(distances.places(scores, keep, alive), alive)

    return _from_stacked(weigh, init)


def krum(byzantine: int) -> Weighting:
    """Puts all weight on the replica with the smallest Krum score; `multi_krum` with `keep=1`.

    Replicas that tie share the weight, where the paper takes the one with the smallest number. With 1 neighbour
    (n = byzantine + 3 or fewer) the closest pair always ties.

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


def _selected(squares: jax.Array, alive: jax.Array, byzantine: int) -> jax.Array:
    """Krum's choice, again and again among the living replicas left, until n - 2 byzantine or more are chosen: [K]."""
    wanted = jnp.maximum(alive.sum(dtype=jnp.int32) - 2 * byzantine, 1)

    def choose(_: int, chosen: jax.Array) -> jax.Array:
        left = alive & ~chosen
        scores = _krum_scores(squares, left, byzantine)
        more = left & (scores == scores.min()) & (chosen.sum(dtype=jnp.int32) < wanted)
        return chosen | more

    return jax.lax.fori_loop(0, alive.shape[0], choose, jnp.zeros_like(alive))


def bulyan(byzantine: int) -> Weighting:
    """Coordinate-wise mean around the median of the replicas that Krum selects (El Mhamdi, Guerraoui and Rouault 2018,
    "The hidden vulnerability of distributed learning in Byzantium", arXiv:1802.07927).

        S   = {}
        while |S| < n - 2 f:    S += Krum's choice among the living replicas that are not in S
        w_k = 1 / (|S| - 2 f) on each of the |S| - 2 f values of S nearest to their median, per element

    Distances hide a large change of a single element; the second step bounds it in every element. Replicas that tie for
    Krum's choice all join S, and values at equal distances share the last places; the paper picks one of them, which
    would make the blend depend on the order of the replicas.

    The paper's guarantee needs n >= 4 byzantine + 3. `init` requires only K >= byzantine + 3 (any K if byzantine is 0),
    as for `krum`, and with fewer replicas left alive the rule still applies, to at least one value. Costs what `krum`
    costs.

    Args:
      byzantine: f, the number of broken replicas to tolerate, 0 to max(K - 3, 0); the guarantee needs
        f <= (K - 3) / 4. 0 is plain averaging.

    Raises:
      SettingsError: `byzantine` is negative or not a whole number. `init` raises it if `byzantine` is too large for K.

    >>> import jax.numpy as jnp
    >>> import wavg_jax as wavg
    >>> avg = wavg.averager(bulyan(1))
    >>> stacked = {"w": jnp.array([[0.0], [1.0], [2.0], [4.0], [7.0], [11.0], [99.0]])}
    >>> new, _, _ = avg.update(stacked, avg.init({"w": jnp.zeros(1)}, 7), {"w": jnp.zeros(1)})
    >>> round(float(new["w"][0]), 4)  # S: 2, 4, 1, then 7 and 11, which tie; nearest to 4 are 4, 2, and 1 or 7
    3.3333
    """
    byzantine = as_whole("byzantine", byzantine, 0)
    init = _at_most("byzantine", byzantine, lambda replicas: max(replicas - 3, 0), byzantine + 3)

    def weigh(stacked: PyTree, params: PyTree, alive: jax.Array, blend: Callable) -> PyTree:
        del params, blend
        chosen = _selected(distances.pairwise_squares(stacked), alive, byzantine)
        keep = jnp.maximum(chosen.sum(dtype=jnp.int32) - 2 * byzantine, 1)
        return _nearest_median(stacked, chosen, keep)

    return _from_stacked(weigh, init)


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
        norms = distances.from_centre(stacked, params)
        c = distances.median(norms, alive) if max_norm is None else jnp.asarray(max_norm, jnp.float32)
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
