"""Weightings that search: they evaluate blended networks on held-out data and keep the best.

Score rules judge each replica on its own; these judge the blend. The next round starts from that blend if it replaces
the replicas and there is no outer optimizer. With an outer optimizer they still judge the blend, not the outer step.
They need the signal `evaluate`, `(params, weights [K]) -> {"loss", "accuracy"}`, and run inside jit, blend by blend.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.arguments import INT32, NONE, OPTIMIZER, RATE, as_number, as_whole, check, either
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.base import PyTree, SettingsError, Weighting
from wavg_jax.weighting.blends import Held, blended
from wavg_jax.weighting.make import make_weighting
from wavg_jax.weighting.scores import normalise, uniform
from wavg_jax.weighting.signals import HIGHER_IS_BETTER, values_of


class LearnedState(NamedTuple):
    """State of `learned`: the state of `start` and, with `carry=True`, the logits [K] and their optimizer state."""

    start: PyTree
    logits: PyTree
    optimizer: PyTree


def _check_signal(signal: str, name: str) -> None:
    if signal not in ("loss", "accuracy"):
        raise SettingsError(f'{name}(signal={signal!r}): judge blends by "loss" or "accuracy"')


def _goodness(score: jax.Array, signal: str) -> jax.Array:
    """Signs a score so that higher is better; non-finite scores become -inf and never win."""
    return jnp.where(jnp.isfinite(score), score if HIGHER_IS_BETTER[signal] else -score, -jnp.inf)


def greedy_soup(signal: str = "accuracy") -> Weighting:
    """Equal weights over the replicas that help: the greedy soup of Wortsman et al. (2022, arXiv:2203.05482), recipe 1.

        soup = []
        for k in living replicas, best own score first:
            if score(mean(soup + [k])) >= score(mean(soup)): soup += [k]
        w_k = 1 / |soup| for k in the soup, else 0

    Replicas with a NaN or infinite score of their own are not ingredients, and a blend with such a score is never
    kept. If no blend is kept, the soup is all ingredients. Replicas with equal scores are tried by index; otherwise
    the order of the replicas does not matter.

    Costs K evaluations and K blends a round, on top of the pass that measures each replica's own score. Holds one
    blend in memory.

    Args:
      signal: "accuracy" or "loss"; judges both the replicas and the blends.

    Raises:
      SettingsError: `signal` is neither.

    >>> import jax.numpy as jnp
    >>> import wavg_jax as wavg
    >>> avg = wavg.averager(greedy_soup("loss"))  # the loss is the distance to 3
    >>> stacked, params = {"w": jnp.array([2.0, 5.0, 9.0])}, {"w": jnp.float32(0)}
    >>> def evaluate(params, weights):
    ...     return {"loss": abs(params["w"] - 3), "accuracy": jnp.float32(0)}
    >>> blend, _, weights = avg.update(
    ...     stacked, avg.init(params, 3), params, loss=abs(stacked["w"] - 3), evaluate=evaluate
    ... )  # 2 alone: 1 off; with 5: 0.5 off; with 9 too: 2.33 off
    >>> weights.tolist(), float(blend["w"])
    ([0.5, 0.5, 0.0], 3.5)
    """
    _check_signal(signal, "greedy_soup")

    def update(
        stacked: PyTree,
        state: PyTree,
        params: PyTree,
        *,
        alive: jax.Array,
        blend: Callable[[PyTree], PyTree],
        **signals: Any,
    ) -> tuple[jax.Array, PyTree]:
        del stacked
        held_out = blended(signals["evaluate"], blend, params)
        own = jnp.where(alive, _goodness(values_of(signal, signals, alive), signal), -jnp.inf)
        usable = own > -jnp.inf

        def taste(soup: tuple, k: jax.Array) -> tuple[tuple, None]:
            members, best = soup
            tried = members | (jnp.arange(alive.shape[0]) == k)
            score = _goodness(held_out.scores(normalise(tried.astype(jnp.float32), alive))[signal], signal)
            better = usable[k] & (score >= best) & (score > -jnp.inf)
            return tree.select(better, (tried, score), (members, best)), None

        empty = (jnp.zeros(alive.shape, bool), jnp.float32(-jnp.inf))
        (members, _), _ = jax.lax.scan(taste, empty, jnp.argsort(own, descending=True, stable=True))
        members = jnp.where(members.any(), members, usable)
        return normalise(members.astype(jnp.float32), alive), state

    return make_weighting(update, needs=(signal, "evaluate"))


def _lean(weights: PyTree, logits: PyTree, alive: jax.Array) -> PyTree:
    """Tilts weights by logits: `w_k e^{z_k} / sum_j w_j e^{z_j}`, leaf by leaf; zero weights stay 0."""

    def leaf(w: jax.Array, z: jax.Array) -> jax.Array:
        z = jnp.where(w > 0, z, -jnp.inf)
        top = z.max(axis=0, keepdims=True)
        return normalise(w * jnp.exp(z - jnp.where(jnp.isfinite(top), top, 0)), alive)

    return jax.tree.map(leaf, weights, logits)


def _keep(loss: jax.Array, weights: PyTree, best: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
    """The better of two (loss, weights) pairs; ties and non-finite losses keep `best`."""
    return tree.select(jnp.isfinite(loss) & (loss < best[0]), (loss, weights), best)


def _descend(
    held_out: Held,
    start: PyTree,
    walk: tuple[PyTree, PyTree],
    optimizer: optax.GradientTransformation,
    steps: int,
    alive: jax.Array,
) -> tuple[PyTree, PyTree, tuple[jax.Array, PyTree]]:
    """Descends the held-out loss from `walk`, a pair (logits, optimizer state).

    Returns:
      The final (logits, optimizer state); whether every loss, gradient and logit was finite; the best (loss, weights).
    """

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        (logits, memory), sound, best = carry
        weights = _lean(start, logits, alive)
        loss, slope = held_out.loss_and_slope(weights)
        slope = jax.tree.map(lambda w, g: jnp.where(w > 0, g - weighted_mean(g, w)[None], 0), weights, slope)
        updates, next_memory = optimizer.update(slope, memory, logits)
        next_logits = optax.apply_updates(logits, updates)
        fine = jnp.isfinite(loss) & tree.all_finite((slope, next_logits)).all()
        walk = tree.select(fine, (next_logits, next_memory), (logits, memory))
        return (walk, sound & fine, _keep(loss, weights, best)), None

    unseen = (jnp.float32(jnp.inf), start)
    (walk, sound, best), _ = jax.lax.scan(step, (walk, jnp.bool_(True), unseen), length=steps)
    last = _lean(start, walk[0], alive)
    loss = held_out.scores(last)["loss"]
    return walk, sound & jnp.isfinite(loss), _keep(loss, last, best)


_DEEPEST = 8.0
"""Carried logits stay within this of the largest: e^-8 is practically no weight, but its gradient can still recover."""


def _carried(logits: jax.Array, uniform_won: jax.Array, equal: jax.Array, alive: jax.Array) -> jax.Array:
    """Prepares a round's logits [K] for the next: clips and centres them, so that the dead replicas' 0 is neutral."""
    logits = jnp.where(uniform_won, 0.5 * logits, logits)
    logits = jnp.maximum(logits, jnp.where(alive, logits, -jnp.inf).max() - _DEEPEST)
    return jnp.where(alive, logits - weighted_mean(logits, equal), 0)


def _default_descent(carry: bool, learning_rate: float | None) -> optax.GradientTransformation:
    """Default optimizer of `learned`: normalised for a fixed loss, plain for a loss that changes every round."""
    if carry:
        # Normalised steps stay long even when the gradient is noise; on IID shards the weights would drift.
        return optax.sgd(1.0 if learning_rate is None else learning_rate)
    # A short memory converges fastest in few steps. optax.rprop lags its gradient by a step and wastes the first one;
    # optax.adam fails under strict dtype promotion.
    return optax.rmsprop(0.3 if learning_rate is None else learning_rate, decay=0.5, momentum=0.5, eps=1e-10)


def learned(
    start: Weighting | None = None,
    *,
    steps: int = 8,
    learning_rate: float | None = None,
    carry: bool = False,
    optimizer: optax.GradientTransformation | None = None,
) -> Weighting:
    """Weights learned on held-out data: takes a few optimizer steps on the blend's loss and keeps the best weights.

        w(z)_k = s_k e^{z_k} / sum_j s_j e^{z_j}            s: the weights of `start`; z = 0 at first
        z <- z - optimizer(g - sum_j w_j g_j)               g_k = d loss(blend(w)) / d w_k, steps times
        w = the visited w(z) with the lowest loss, first and last included

    `g - sum_j w_j g_j` is the natural gradient of the softmax: with `optax.sgd(eta)` the steps are exponentiated
    gradient descent, `w_k ~ w_k e^{-eta g_k}` (Kivinen and Warmuth 1997), and a replica's step does not shrink with
    its weight. A replica with weight 0 in `start` keeps 0. Logits have the granularity of the start's weights: one per
    replica, layer or element.

    With `carry=True` each round continues from the last round's logits. Use it with `steps=1` or 2 and a held-out
    subset that changes every round, so that the subsets' noise averages out. If the result's loss on the round's subset
    is worse than that of equal weights, the round returns equal weights and halves the logits. A dead replica returns
    with the mean logit of the living. `start` must then give one weight per replica.

    The result is never worse than `start` (with `carry=True`: than equal weights) on the data it was learned on. At the
    first non-finite loss or gradient the descent stops and returns the best weights so far, or the start if there are
    none. (Carried logits then reset for the next round.)

    Costs, on top of `start`: `steps` gradients of a held-out pass, each about the work of three evaluations (its
    forward pass serves as that step's evaluation), plus 1 final evaluation; `steps + 1` blends, plus one pass over
    `stacked` per step for the gradient. `carry=True` adds 1 evaluation and 1 blend, of equal weights. Holds one blend
    and its gradient, on top of `stacked` and the averager's copy of it.

    Args:
      start: weighting to start from; equal weights by default.
      steps: optimizer steps per round.
      learning_rate: learning rate of the default optimizer; by default 0.3, roughly the step of a logit, or with
        `carry=True` 1.0 per unit of loss.
      carry: keep the logits between rounds; call `init(params, replicas=K)`.
      optimizer: replaces the default, `optax.rmsprop(0.3, decay=0.5, momentum=0.5)` or with `carry=True`
        `optax.sgd(1.0)`. It should work elementwise: a norm over replicas would round differently with dead replicas
        in the sum.

    Raises:
      SettingsError: `steps` is not a whole number, 1 or more, or both `learning_rate` and `optimizer` are given; from
        `update` with `carry=True`, `start` does not give weights [K].

    >>> import jax.numpy as jnp
    >>> import wavg_jax as wavg
    >>> avg = wavg.averager(learned())
    >>> stacked, params = {"w": jnp.array([0.0, 4.0])}, {"w": jnp.float32(0)}
    >>> def evaluate(params, weights):
    ...     return {"loss": (params["w"] - 3) ** 2, "accuracy": jnp.float32(0)}
    >>> blend, _, weights = avg.update(stacked, avg.init(params, 2), params, evaluate=evaluate)
    >>> [round(float(w), 1) for w in weights]
    [0.2, 0.8]
    """
    start = uniform() if start is None else start
    steps = as_whole("learned: steps", steps, 1, INT32)
    if learning_rate is not None:
        learning_rate = as_number("learned: learning_rate", learning_rate, RATE)
    check("learned: optimizer", optimizer, either(NONE, OPTIMIZER))
    if optimizer is not None and learning_rate is not None:
        raise SettingsError("learned: an optimizer has its own learning rate; give only one of the two")
    descent = optimizer or _default_descent(carry, learning_rate)

    def init(params: PyTree, replicas: int) -> LearnedState:
        if not carry:
            return LearnedState(start.init(params, replicas), (), ())
        logits = jnp.zeros(replicas, jnp.float32)
        return LearnedState(start.init(params, replicas), logits, descent.init(logits))

    def update(
        stacked: PyTree,
        state: LearnedState,
        params: PyTree,
        *,
        alive: jax.Array,
        blend: Callable[[PyTree], PyTree],
        **signals: Any,
    ) -> tuple[PyTree, LearnedState]:
        begin, start_state = start.update(stacked, state.start, params, alive=alive, blend=blend, **signals)
        held_out = blended(signals["evaluate"], blend, params)
        neutral = jax.tree.map(jnp.zeros_like, begin)
        fresh = (neutral, descent.init(neutral))
        if not carry:
            _, _, (_, weights) = _descend(held_out, begin, fresh, descent, steps, alive)
            return weights, LearnedState(start_state, (), ())
        if jax.tree.map(jnp.shape, begin) != alive.shape:
            raise SettingsError("learned(carry=True) keeps one logit per replica: its start must give weights [K]")
        walk, sound, best = _descend(held_out, begin, (state.logits, state.optimizer), descent, steps, alive)
        equal = normalise(jnp.ones(alive.shape, jnp.float32), alive)
        loss, weights = _keep(held_out.scores(equal)["loss"], equal, best)
        logits = _carried(walk[0], loss < best[0], equal, alive)
        return weights, LearnedState(start_state, *tree.select(sound, (logits, walk[1]), fresh))

    return make_weighting(update, needs=tuple(dict.fromkeys((*start.needs, "evaluate"))), init=init)


def _aligned(weights: PyTree, like: PyTree) -> PyTree:
    """Broadcasts weights to a finer prefix tree with higher-rank leaves."""

    def leaf(w: jax.Array, to: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.broadcast_to(w.reshape(w.shape + (1,) * (len(to.shape) - w.ndim)), to.shape)

    return jax.tree.map(leaf, jax.tree.broadcast(weights, like), like)


def _finest(shapes: Sequence[PyTree], params: PyTree) -> PyTree:
    """Finds the coarsest of the given structures that all weights broadcast to; `params` is the fallback."""

    def widest(*leaves: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return max(leaves, key=lambda leaf: len(leaf.shape))

    for like in (*shapes, params):
        try:
            return jax.tree.map(widest, *[jax.tree.broadcast(shape, like) for shape in shapes])
        except ValueError:  # one of them is not a prefix of this structure
            continue
    raise AssertionError("weights are a prefix tree of the parameters")


def best_of(*weightings: Weighting, signal: str = "loss") -> Weighting:
    """Picks the candidate whose blend scores best on held-out data; equal weights are always a candidate.

        w = the w_c with the best score(blend(w_c)) over c = uniform, weightings...

    No fixed rule is safe; this one is never worse than plain averaging on the data it selects with. Equal weights win
    ties, then earlier candidates do. A non-finite score never wins; if no score is finite, the weights are equal. Every
    round updates the states of all candidates, whichever wins.

    Costs one evaluation and one blend per candidate, equal weights included, on top of the candidates' own costs. It
    tries them one after another, so it holds one blend and the best weights so far, which are small unless a candidate
    gives weights per element (then twice the size of the replicas).

    Args:
      *weightings: the candidates.
      signal: judges the blends: "loss" (lower is better) or "accuracy" (higher is better).

    Returns:
      A weighting that gives the winner's weights at the finest granularity among the candidates. It `needs` `evaluate`
      and all signals of the candidates.

    Raises:
      SettingsError: `signal` is neither, or there is no candidate.

    >>> import jax.numpy as jnp
    >>> import wavg_jax as wavg
    >>> avg = wavg.averager(best_of(wavg.proportional("accuracy"), wavg.inverse("loss")))
    >>> stacked, params = {"w": jnp.array([0.0, 4.0])}, {"w": jnp.float32(0)}
    >>> def evaluate(params, weights):
    ...     return {"loss": (params["w"] - 3) ** 2, "accuracy": jnp.float32(0)}
    >>> own = {"accuracy": jnp.array([0.5, 0.5]), "loss": jnp.array([9.0, 1.0])}
    >>> _, _, weights = avg.update(stacked, avg.init(params, 2), params, evaluate=evaluate, **own)
    >>> [round(float(w), 4) for w in weights]
    [0.1, 0.9]
    """
    _check_signal(signal, "best_of")
    if not weightings:
        raise SettingsError("best_of() needs at least one weighting besides uniform")
    candidates = (uniform(), *weightings)

    def init(params: PyTree, replicas: int) -> tuple:
        return tuple(candidate.init(params, replicas) for candidate in candidates)

    def update(
        stacked: PyTree,
        state: tuple,
        params: PyTree,
        *,
        alive: jax.Array,
        blend: Callable[[PyTree], PyTree],
        **signals: Any,
    ) -> tuple[PyTree, tuple]:
        held_out = blended(signals["evaluate"], blend, params)

        def weigh(i: int, states: tuple) -> tuple[PyTree, PyTree]:
            return candidates[i].update(stacked, states[i], params, alive=alive, blend=blend, **signals)

        like = _finest([jax.eval_shape(partial(weigh, i), state)[0] for i in range(len(candidates))], params)

        def branch(i: int, states: tuple) -> tuple[PyTree, tuple]:
            weights, new = weigh(i, states)
            return _aligned(weights, like), (*states[:i], new, *states[i + 1 :])

        def attempt(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
            best, states = carry
            weights, states = jax.lax.switch(i, [partial(branch, n) for n in range(len(candidates))], states)
            score = _goodness(held_out.scores(weights)[signal], signal)
            return (tree.select(score > best[0], (score, weights), best), states), None

        nothing = (jnp.float32(-jnp.inf), _aligned(weigh(0, state)[0], like))
        ((_, weights), state), _ = jax.lax.scan(attempt, (nothing, state), jnp.arange(len(candidates)))
        return weights, state

    needs = tuple(dict.fromkeys((*(name for one in weightings for name in one.needs), "evaluate")))
    return make_weighting(update, needs=needs, init=init)
