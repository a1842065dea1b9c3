"""Weightings that turn the scores of K replicas into weights that sum to 1.

Each function returns a `Weighting`. All give dead replicas weight 0, tolerate zero, negative, NaN and infinite scores,
and fall back to equal weights over the living if no score is usable.

Every rule works at the granularity of its signal: a signal [K] gives one weight per replica, a tree with one number per
tensor (`layer_grad_norm`) gives weights per tensor, and one with a number per element (`fisher`) weights per element.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wavg_jax import checks, tree
from wavg_jax.arguments import as_number, check, number
from wavg_jax.base import PyTree, SettingsError, Weighting
from wavg_jax.weighting.make import make_weighting
from wavg_jax.weighting.signals import direction, values_of

Scores = Callable[[jax.Array, jax.Array], jax.Array]
"""`(values [K, ...] float32, usable bool [K, ...]) -> scores [K, ...]`; larger scores get more weight."""

_TINY = float(jnp.finfo(jnp.float32).tiny)


def usable(values: jax.Array, alive: jax.Array) -> jax.Array:
    """Which values [K, ...] are finite and belong to a living replica: bool [K, ...]; `alive` is bool [K]."""
    return alive.reshape(alive.shape + (1,) * (values.ndim - 1)) & jnp.isfinite(values)


def _power_of_two(peak: jax.Array) -> jax.Array:
    """Returns a power of two that scales magnitudes up to `peak` to at most 1 (4 for the largest floats).

    This avoids overflow, and scaling by a power of two is exact. Any other product rounds, except where XLA fuses it
    into a sum; that depends on K, so a dead replica could change the last bit.
    """
    _, exponent = jnp.frexp(peak)
    return jnp.ldexp(jnp.float32(1), -jnp.clip(exponent, -126, 126))


def _scaled(values: jax.Array) -> jax.Array:
    """Scales values [K, ...] by a power of two to bring the largest over K near 1."""
    return values * _power_of_two(jnp.abs(values).max(axis=0))[None]


def normalise(scores: jax.Array, alive: jax.Array) -> jax.Array:
    """Turns scores into weights: `w_k = s_k / sum_j s_j` over the living, separately for each layer or element.

    Args:
      scores: [K, ...]; larger is better. Zero, negative, NaN and infinite scores get weight 0.
      alive: bool [K].

    Returns:
      Weights [K, ...] float32 that sum to 1 over K; equal over the living where no score is usable; all 0 if no
      replica is alive.

    Raises:
      SettingsError: `alive` is not a bool [K].

    >>> import jax.numpy as jnp
    >>> normalise(jnp.array([3.0, 1.0, jnp.nan, 9.0]), jnp.array([True, True, True, False])).round(4).tolist()
    [0.75, 0.25, 0.0, 0.0]
    >>> normalise(jnp.array([[0.0, 3.0], [-1.0, 1.0]]), jnp.array([True, True])).tolist()
    [[0.5, 0.75], [0.5, 0.25]]
    """
    scores = jnp.asarray(scores, jnp.float32)
    alive = checks.mask(alive, scores.shape[0] if scores.ndim else 0)
    kept = _scaled(jnp.where(usable(scores, alive) & (scores > 0), scores, 0))
    total = tree.ordered_sum(kept)[None]
    # The minimum, like others below, keeps XLA from fusing the product into later sums (see `_power_of_two`). A replica
    # that holds the whole total gets exactly 1, since x * (1 / x) may round.
    weights = jnp.where(kept < total, jnp.minimum(kept / jnp.where(total > 0, total, 1), 1), 1)
    equal = tree.equal_weights(alive)
    return jnp.where(total > 0, weights, equal.reshape(equal.shape + (1,) * (scores.ndim - 1)))


def per_replica(weights: PyTree) -> jax.Array:
    """Averages weights over layers and elements to one number per replica [K]."""
    # One replica at a time: XLA groups sums over several rows differently for each number of rows.
    means = [w if w.ndim == 1 else jax.lax.map(jnp.mean, w) for w in jax.tree.leaves(weights)]
    return functools.reduce(operator.add, means) / len(means)


def effective_replicas(weights: jax.Array) -> jax.Array:
    """Kish's effective number of replicas, `1 / sum_k w_k^2`: K for equal weights, 1 if one replica has all the weight.

    >>> import jax.numpy as jnp
    >>> round(float(effective_replicas(jnp.array([0.5, 0.5, 0.0, 0.0]))), 3)
    2.0
    """
    squares = jnp.sum(weights * weights)
    return jnp.where(squares > 0, 1 / jnp.where(squares > 0, squares, 1), 0)


def _from_signal(signal: str, scores: Scores, whole: Callable[[PyTree], PyTree] = lambda values: values) -> Weighting:
    """Builds a stateless weighting that scores and normalises each leaf of `whole(signal)`."""

    def update(
        stacked: PyTree, state: PyTree, params: PyTree, *, alive: jax.Array, **signals: Any
    ) -> tuple[PyTree, PyTree]:
        del stacked, params
        values = whole(values_of(signal, signals, alive))
        return jax.tree.map(lambda v: normalise(scores(v, usable(v, alive)), alive), values), state

    return make_weighting(update, needs=(signal,), reads_replicas=False)


def _check_direction(signal: str, higher_is_better: bool | None, needed: bool, instead: str) -> None:
    """Raises SettingsError if the signal's direction is unknown or wrong for the rule."""
    if (direction(signal, higher_is_better) > 0) != needed:
        said = repr(signal) if higher_is_better is None else f"{signal!r}, higher_is_better={higher_is_better}"
        raise SettingsError(f"this would trust the replica with the worst {signal} most; use {instead}({said})")


def uniform() -> Weighting:
    """Equal weights, `w_k = 1 / K` over K living replicas: plain averaging (McMahan et al. 2017; Stich 2019)."""

    def update(
        stacked: PyTree, state: PyTree, params: PyTree, *, alive: jax.Array, **signals: Any
    ) -> tuple[jax.Array, PyTree]:
        del stacked, params, signals
        return tree.equal_weights(alive), state

    return make_weighting(update, reads_replicas=False)


def proportional(
    signal: str = "accuracy", *, chance: float = 0.0, power: float = 1.0, higher_is_better: bool | None = None
) -> Weighting:
    """Weights proportional to a higher-is-better score, `w_k ~ max(s_k - chance, 0)^power`.

    With held-out accuracy this is the weighting that Ramroach and Joshi (2021) describe in words: sub-networks are not
    equal, so averaging does not treat them as equals. With `samples` it is FedAvg (McMahan et al. 2017).

    Args:
      signal: name of a non-negative signal.
      chance: the score of random guessing, such as 1 / classes for accuracy; scores up to it count as 0.
      power: above 1 sharpens differences, below 1 evens them out.
      higher_is_better: set to True for a signal that the library does not measure.

    Raises:
      SettingsError: lower values of this signal are better, the direction of an unknown signal is missing, `chance` is
        not a finite number, or `power` is not a positive finite number.
    """
    _check_direction(signal, higher_is_better, needed=True, instead="inverse")
    check("proportional: chance", chance, number())
    power = as_number("proportional: power", power, number(above=0))
    chance = float(chance)

    def scores(values: jax.Array, usable: jax.Array) -> jax.Array:
        excess = _scaled(jnp.where(usable, jnp.maximum(values - chance, 0), 0))
        # Relative to the best, so that no power overflows and the best score does not underflow.
        best = jnp.maximum(excess.max(axis=0), _TINY)[None]
        return jnp.power(excess / best, jnp.float32(power))

    return _from_signal(signal, scores)


def inverse(signal: str = "loss", *, higher_is_better: bool | None = None) -> Weighting:
    """Weights inversely proportional to a lower-is-better score, `w_k = (1/s_k) / sum_j (1/s_j)`.

    With `loss` this is the first rule of WASGD (Guo et al. 2020, arXiv:2004.03749); with `grad_norm` it is model-level
    and with `layer_grad_norm` layer-level GRAWA (see `wavg_jax.grawa`). Scores below 1e-12, in the signal's unit, count
    as 1e-12; negative scores get weight 0.

    Args:
      signal: name of a non-negative signal.
      higher_is_better: set to False for a signal that the library does not measure.

    Raises:
      SettingsError: higher values of this signal are better, or the direction of an unknown signal is missing.
    """
    _check_direction(signal, higher_is_better, needed=False, instead="proportional")

    def scores(values: jax.Array, usable: jax.Array) -> jax.Array:
        usable = usable & (values >= 0)
        s = jnp.maximum(values, 1e-12)
        best = jnp.where(usable, s, jnp.inf).min(axis=0)[None]  # relative to the best, to avoid overflow
        return jnp.where(usable, best / s, 0)

    return _from_signal(signal, scores)


def token_weighted(tokens: str = "tokens") -> Weighting:
    """Weights by tokens and by tokens per step, `w_k ~ c_k (c_k / s_k)`, with c tokens processed in s local steps.

    For replicas that run at speeds and batch sizes of their own; with equal batches it is `proportional("steps")`. The
    weights of Decoupled DiLoCo (Douillard et al. 2026, arXiv:2604.21428), which go with `wavg_jax.radial_directional`,
    as public reimplementations write them.

    Args:
      tokens: name of the signal c, the tokens or samples that a replica processed in the round. `fit` does not measure
        it: pass `tokens=` to `update` in a loop of your own. s is the signal `steps`.

    >>> weights, _ = token_weighted().update(
    ...     None, (), None, alive=jnp.ones(2, bool), tokens=jnp.array([400.0, 400.0]), steps=jnp.array([10.0, 30.0])
    ... )
    >>> weights.round(4).tolist()  # 400 * 40 and 400 * 13.3
    [0.75, 0.25]
    """

    def update(
        stacked: PyTree, state: PyTree, params: PyTree, *, alive: jax.Array, **signals: Any
    ) -> tuple[jax.Array, PyTree]:
        del stacked, params
        c, s = values_of(tokens, signals, alive), values_of("steps", signals, alive)
        fine = usable(c, alive) & usable(s, alive) & (c > 0) & (s > 0)
        c, s = (_scaled(jnp.where(fine, x, 0)) for x in (c, s))  # c^2 must not overflow
        return normalise(jnp.where(fine, c * (c / jnp.where(fine, s, 1)), 0), alive), state

    return make_weighting(update, needs=(tokens, "steps"), reads_replicas=False)


def _standard_deviation(values: jax.Array, usable: jax.Array) -> jax.Array:
    """Computes the standard deviation of the usable values over replicas, [...]; tiny where they are equal."""
    n = jnp.maximum(usable.sum(axis=0, dtype=jnp.float32), 1)

    def centred(x: jax.Array) -> jax.Array:
        mean = jnp.clip(tree.ordered_sum(x) / n, -4, 4)
        return jnp.where(usable, x - mean[None], 0)

    # Centre twice: the mean of nearly equal values can have a rounding error as large as their differences.
    x = centred(centred(jnp.where(usable, values, 0)))
    squares = jnp.where(usable, jnp.maximum(jnp.square(x), _TINY), 0)
    return jnp.sqrt(jnp.maximum(tree.ordered_sum(squares) / n, _TINY))


def softmax(
    signal: str = "loss", temperature: float = 1.0, *, higher_is_better: bool | None = None, standardise: bool = False
) -> Weighting:
    """Softmax weights, `w_k ~ exp(s_k / T)` if higher is better, `exp(-s_k / T)` if lower is.

    Args:
      signal: name of a signal.
      temperature: T, in units of the signal; a small T favours the best replica alone, a large T approaches equal
        weights.
      higher_is_better: the signal's direction; optional for signals that the library measures.
      standardise: first z-score the signal over the living, `(s_k - mean) / std`, as in WASGD+ (Guo et al. 2020,
        arXiv:2004.03749); T is then in standard deviations and means the same early and late in a run. If all scores
        are the same, the weights are equal.

    Raises:
      SettingsError: `temperature` is not positive, or the direction of an unknown signal is missing.
    """
    check("temperature", temperature, number(above=0))
    temperature = float(temperature)
    sign = direction(signal, higher_is_better)

    def scores(values: jax.Array, usable: jax.Array) -> jax.Array:
        s = sign * values
        if standardise:
            s = _scaled(jnp.where(usable, s, 0))
        best = jnp.where(usable, s, -jnp.inf).max(axis=0)[None]
        gaps = jnp.where(usable, s - best, -jnp.inf)
        if standardise:
            gaps = gaps / _standard_deviation(s, usable)[None]
        exponents = jnp.maximum(gaps / temperature, -200)  # exp(-200) is 0
        # One replica at a time: the rounding of XLA's vectorised exp depends on the number of replicas.
        return jnp.stack([jnp.exp(exponents[k]) for k in range(exponents.shape[0])])

    return _from_signal(signal, scores)


def rank(signal: str = "loss", *, higher_is_better: bool | None = None) -> Weighting:
    """Weights proportional to rank: of n usable scores the best counts n, the next n - 1, the worst 1.

    Ties share the mean of their ranks. Only the order of the scores matters, so an outlier cannot take all the weight:
    the best of n gets 2 / (n + 1).

    Args:
      signal: name of a signal.
      higher_is_better: the signal's direction; optional for signals that the library measures.

    Raises:
      SettingsError: the direction of an unknown signal is missing.
    """
    sign = direction(signal, higher_is_better)

    def scores(values: jax.Array, usable: jax.Array) -> jax.Array:
        s = sign * values
        ranks = jnp.full(s.shape, 0.5, jnp.float32)
        for j in range(s.shape[0]):
            one = s[j : j + 1]
            behind = (one < s).astype(jnp.float32) + 0.5 * (one == s).astype(jnp.float32)
            ranks = ranks + jnp.where(usable[j : j + 1], behind, 0)
        return jnp.where(usable, ranks, 0)

    return _from_signal(signal, scores)


def best(signal: str = "loss", *, higher_is_better: bool | None = None) -> Weighting:
    """Puts all weight on the replica with the best score; exact ties share it equally.

    With `train_loss` the blend is the leader in LSGD (Teng et al. 2019, arXiv:1905.10395); `averager(pull=...)` can
    pull the other replicas toward it. The paper has one leader; sharing the weight among ties departs from it, so that
    the order of the replicas does not matter.

    Args:
      signal: name of a signal.
      higher_is_better: the signal's direction; optional for signals that the library measures.

    Raises:
      SettingsError: the direction of an unknown signal is missing.
    """
    sign = direction(signal, higher_is_better)

    def scores(values: jax.Array, usable: jax.Array) -> jax.Array:
        s = jnp.where(usable, sign * values, -jnp.inf)
        return (usable & (s == s.max(axis=0)[None])).astype(jnp.float32)

    return _from_signal(signal, scores)


def fisher_merging(floor: float = 1e-6, *, normalise: bool = False) -> Weighting:
    """Weights each element by its diagonal Fisher information, `w_k = max(F_k, floor) / sum_j max(F_j, floor)`.

    An element's weight grows with its effect on the replica's predictions (Matena and Raffel 2022, "Merging models with
    Fisher-weighted averaging", arXiv:2111.09832; `floor` follows their code, github.com/mmatena/model_merging).

    Args:
      floor: minimum importance of an element, in squared nats per unit of the parameter.
      normalise: first divide each replica's floored Fisher by its L2 norm over the whole tree, so that no replica
        dominates everywhere. Their code does the same, but takes the norm before the floor.

    Raises:
      SettingsError: `floor` is negative.
    """
    check("fisher_merging: floor", floor, number(0))
    floor = float(floor)

    def floored(values: jax.Array) -> jax.Array:
        return jnp.where(values >= 0, jnp.maximum(values, floor), values)

    def unit(fisher: PyTree) -> PyTree:
        factor = _power_of_two(functools.reduce(jnp.maximum, [jnp.max(x) for x in jax.tree.leaves(fisher)]))
        scaled = optax.tree.scale(factor, fisher)
        return jax.tree.map(lambda x: x / jnp.maximum(optax.tree.norm(scaled), _TINY), scaled)

    def whole(fisher: PyTree) -> PyTree:
        fisher = jax.tree.map(floored, fisher)
        return jax.lax.map(unit, fisher) if normalise else fisher

    return _from_signal("fisher", lambda values, usable: values, whole)
