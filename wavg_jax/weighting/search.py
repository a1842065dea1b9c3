"""Weightings that search: they evaluate blended networks on held-out data and keep the best.

The score rules judge each replica on its own; these judge the blend, where the next round starts if replicas are
replaced and there is no outer optimizer. With an outer optimizer they still judge the blend, not the step.
They need the signal `evaluate`, a function `(params, weights [K]) -> {"loss", "accuracy"}`, and run whole inside jit,
one blend at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.arguments import NONE, OPTIMIZER, RATE, Rule, as_whole, check, either, takes
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.base import PyTree, SettingsError, Weighting
from wavg_jax.weighting.make import make_weighting
from wavg_jax.weighting.scores import normalise, per_replica, uniform
from wavg_jax.weighting.signals import HIGHER_IS_BETTER, values_of

Held = Callable[[PyTree], Mapping[str, jax.Array]]
"""`weights -> {"loss", "accuracy"}` of the network that they blend, float32 scalars."""


def _scalars(scores: Any) -> bool:
    """Whether these are named scalars, in floating point; a dict that lacks what is needed says so itself."""
    return isinstance(scores, Mapping) and all(
        jnp.ndim(score) == 0 and jnp.issubdtype(jnp.result_type(score), jnp.floating) for score in scores.values()
    )


_WANTED = '{"loss": ..., "accuracy": ...}, floating-point scalars'
_EVALUATE = takes(2, f"a function (params, weights [K]) that returns {_WANTED}")
_SCORES = Rule(_scalars, _WANTED)


class LearnedState(NamedTuple):
    """What `learned` remembers: the state of its start and, if it carries them, its logits [K] and their optimizer."""

    start: PyTree
    logits: PyTree
    optimizer: PyTree


def _held_out(evaluate: Callable, blend: Callable[[PyTree], PyTree], params: PyTree) -> Held:
    """How weights are tried out: the blend they give, in the dtypes of the parameters, on the held-out data."""
    check("evaluate", evaluate, _EVALUATE)

    def held_out(weights: PyTree) -> Mapping[str, jax.Array]:
        scores = evaluate(tree.cast_like(blend(weights), params), per_replica(weights))
        check("what evaluate returned", scores, _SCORES)
        return scores

    return held_out


def _check_signal(signal: str, name: str) -> None:
    if signal not in ("loss", "accuracy"):
        raise SettingsError(f'{name}(signal={signal!r}): blends are judged by "loss" or by "accuracy"')


def _goodness(score: jax.Array, signal: str) -> jax.Array:
    """Turns scores so that more is better; those that are not finite become -inf, which beats nothing."""
    return jnp.where(jnp.isfinite(score), score if HIGHER_IS_BETTER[signal] else -score, -jnp.inf)


def greedy_soup(signal: str = "accuracy") -> Weighting:
    """Equal weights over the replicas that help: the greedy soup of Wortsman et al. (2022, arXiv:2203.05482), recipe 1.

        soup = []
        for k in the living, the best own score first:
            if score(mean(soup + [k])) >= score(mean(soup)): soup += [k]
        w_k = 1 / |soup| for k in the soup, else 0

    Replicas whose own score is NaN or infinite are not ingredients, and a blend with such a score is never kept; if
    none is, all ingredients are. Replicas with equal own scores are tried in the order of their numbers: the only case
    in which that order matters.

    Costs K evaluations and K blends a round, beside the pass that measures the replicas' own scores; holds one blend.

    Args:
      signal: "accuracy" or "loss", by which both the replicas and the blends are judged.

    Raises:
      SettingsError: another signal.

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
        held_out = _held_out(signals["evaluate"], blend, params)
        own = jnp.where(alive, _goodness(values_of(signal, signals, alive), signal), -jnp.inf)
        usable = own > -jnp.inf

        def taste(soup: tuple, k: jax.Array) -> tuple[tuple, None]:
            members, best = soup
            tried = members | (jnp.arange(alive.shape[0]) == k)
            score = _goodness(held_out(normalise(tried.astype(jnp.float32), alive))[signal], signal)
            better = usable[k] & (score >= best) & (score > -jnp.inf)
            return tree.select(better, (tried, score), (members, best)), None

        empty = (jnp.zeros(alive.shape, bool), jnp.float32(-jnp.inf))
        (members, _), _ = jax.lax.scan(taste, empty, jnp.argsort(own, descending=True, stable=True))
        members = jnp.where(members.any(), members, usable)
        return normalise(members.astype(jnp.float32), alive), state

    return make_weighting(update, needs=(signal, "evaluate"))


def _lean(weights: PyTree, logits: PyTree, alive: jax.Array) -> PyTree:
    """Leans weights by logits: `w_k e^{z_k} / sum_j w_j e^{z_j}`, leaf by leaf; what was 0 stays 0."""

    def leaf(w: jax.Array, z: jax.Array) -> jax.Array:
        z = jnp.where(w > 0, z, -jnp.inf)
        top = z.max(axis=0, keepdims=True)
        return normalise(w * jnp.exp(z - jnp.where(jnp.isfinite(top), top, 0)), alive)

    return jax.tree.map(leaf, weights, logits)


def _keep(loss: jax.Array, weights: PyTree, best: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
    """The better of two (loss, weights); a tie, or a loss that is not finite, keeps `best`."""
    return tree.select(jnp.isfinite(loss) & (loss < best[0]), (loss, weights), best)


def _descend(
    held_out: Held,
    start: PyTree,
    walk: tuple[PyTree, PyTree],
    optimizer: optax.GradientTransformation,
    steps: int,
    alive: jax.Array,
) -> tuple[PyTree, PyTree, tuple[jax.Array, PyTree]]:
    """Walks (logits, optimizer state) down the held-out loss.

    Returns:
      Where the walk ended; whether all on it was finite; and the best (loss, weights) seen.
    """

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        (logits, memory), sound, best = carry
        weights = _lean(start, logits, alive)
        loss, slope = jax.value_and_grad(lambda w: held_out(w)["loss"])(weights)
        slope = jax.tree.map(lambda w, g: jnp.where(w > 0, g - weighted_mean(g, w)[None], 0), weights, slope)
        updates, next_memory = optimizer.update(slope, memory, logits)
        next_logits = optax.apply_updates(logits, updates)
        fine = jnp.isfinite(loss) & tree.all_finite((slope, next_logits)).all()
        walk = tree.select(fine, (next_logits, next_memory), (logits, memory))
        return (walk, sound & fine, _keep(loss, weights, best)), None

    unseen = (jnp.float32(jnp.inf), start)
    (walk, sound, best), _ = jax.lax.scan(step, (walk, jnp.bool_(True), unseen), length=steps)
    last = _lean(start, walk[0], alive)
    loss = held_out(last)["loss"]
    return walk, sound & jnp.isfinite(loss), _keep(loss, last, best)


_DEEPEST = 8.0
"""How far below the best a carried logit may sink: e^-8 is as good as no weight, but leaves a slope to return by."""


def _carried(logits: jax.Array, uniform_won: jax.Array, equal: jax.Array, alive: jax.Array) -> jax.Array:
    """What a round's logits [K] become for the next one: centred, so that 0, the logit of the dead, is neutral."""
    logits = jnp.where(uniform_won, 0.5 * logits, logits)
    logits = jnp.maximum(logits, jnp.where(alive, logits, -jnp.inf).max() - _DEEPEST)
    return jnp.where(alive, logits - weighted_mean(logits, equal), 0)


def _default_descent(carry: bool, learning_rate: float | None) -> optax.GradientTransformation:
    """The optimizer of `learned`: normalised for a fixed loss, plain for one that changes every round."""
    if carry:
        # A normalised step stays long when the gradient is noise: on IID shards the weights would drift.
        return optax.sgd(1.0 if learning_rate is None else learning_rate)
    # Short memories converge fastest in few steps. optax.rprop lags a step behind its gradient and wastes the first;
    # optax.adam does not run under strict dtype promotion.
    return optax.rmsprop(0.3 if learning_rate is None else learning_rate, decay=0.5, momentum=0.5, eps=1e-10)


def learned(
    start: Weighting | None = None,
    *,
    steps: int = 8,
    learning_rate: float | None = None,
    carry: bool = False,
    optimizer: optax.GradientTransformation | None = None,
) -> Weighting:
    """Weights learned on held-out data: a few optimizer steps on the loss of the blend, keeping the best weights seen.

        w(z)_k = s_k e^{z_k} / sum_j s_j e^{z_j}            s: the weights of `start`; z = 0 at first
        z <- z - optimizer(g - sum_j w_j g_j)               g_k = d loss(blend(w)) / d w_k, steps times
        w = the w(z) of least loss on the way, its start and its end included

    The slope is the natural gradient of the softmax: with `optax.sgd(eta)` the steps are exponentiated gradient
    descent, `w_k ~ w_k e^{-eta g_k}` (Kivinen and Warmuth 1997), in which a replica's step does not shrink with its
    weight. A replica with weight 0 in `start` keeps 0. Logits have the granularity of the start's weights: one per
    replica, layer or element.

    With `carry=True` the logits are kept over the rounds: each round takes up those of the last one, which is meant for
    `steps=1` or 2 on a held-out subset that changes every round, so that a subset's noise averages out. The result is
    used only if its loss on the round's subset is no worse than that of equal weights; else those are returned, and
    the logits halved. A dead replica comes back with the mean logit of those that lived. `start` then needs to give one
    weight per replica.

    The result is never worse than its start on the data it was learned on; `carry=True`: than equal weights. A loss or
    gradient that is not finite ends the walk, and the best seen until then is returned: the start, if there is none.
    (Carried logits start anew in the next round.)

    Costs, beside the start's own: `steps` gradients of a held-out pass, each about three evaluations' work (no further
    evaluation: its forward half is one), and 1 evaluation, of the end; `steps + 1` blends, and for each step one more
    pass over `stacked` for the slope. With `carry=True` 1 evaluation and 1 blend more, of equal weights. Holds, beside
    `stacked` and the averager's copy of it, one blend and its gradient.

    Args:
      start: where the descent starts; equal weights if left out.
      steps: optimizer steps a round.
      learning_rate: of the default optimizer: 0.3, about a logit's step, or with `carry=True` 1.0 per unit of
        loss.
      carry: keep the logits over rounds; call `init(params, replicas=K)`.
      optimizer: instead of the default, `optax.rmsprop(0.3, decay=0.5, momentum=0.5)`, or with `carry=True`
        `optax.sgd(1.0)`. It should work element by element: a norm over replicas would round differently
        with dead replicas in the sum.

    Raises:
      SettingsError: `steps` is not a whole number, 1 or more; both a learning rate and an optimizer are given.

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
    steps = as_whole("learned: steps", steps, 1)
    check("learned: learning_rate", learning_rate, either(NONE, RATE))
    check("learned: optimizer", optimizer, either(NONE, OPTIMIZER))
    if optimizer is not None and learning_rate is not None:
        raise SettingsError("learned: an optimizer brings its own learning rate; give one of the two")
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
        held_out = _held_out(signals["evaluate"], blend, params)
        neutral = jax.tree.map(jnp.zeros_like, begin)
        fresh = (neutral, descent.init(neutral))
        if not carry:
            _, _, (_, weights) = _descend(held_out, begin, fresh, descent, steps, alive)
            return weights, LearnedState(start_state, (), ())
        if jax.tree.map(jnp.shape, begin) != alive.shape:
            raise SettingsError("learned(carry=True) keeps one logit per replica: its start must give weights [K]")
        walk, sound, best = _descend(held_out, begin, (state.logits, state.optimizer), descent, steps, alive)
        equal = normalise(jnp.ones(alive.shape, jnp.float32), alive)
        loss, weights = _keep(held_out(equal)["loss"], equal, best)
        logits = _carried(walk[0], loss < best[0], equal, alive)
        return weights, LearnedState(start_state, *tree.select(sound, (logits, walk[1]), fresh))

    return make_weighting(update, needs=tuple(dict.fromkeys((*start.needs, "evaluate"))), init=init)


def _aligned(weights: PyTree, like: PyTree) -> PyTree:
    """Broadcasts weights to a finer prefix structure and to leaves of more dimensions."""

    def leaf(w: jax.Array, to: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.broadcast_to(w.reshape(w.shape + (1,) * (len(to.shape) - w.ndim)), to.shape)

    return jax.tree.map(leaf, jax.tree.broadcast(weights, like), like)


def _finest(shapes: Sequence[PyTree], params: PyTree) -> PyTree:
    """The coarsest of the structures at hand, or else that of `params`, that all these weights broadcast to."""

    def widest(*leaves: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return max(leaves, key=lambda leaf: len(leaf.shape))

    for like in (*shapes, params):
        try:
            return jax.tree.map(widest, *[jax.tree.broadcast(shape, like) for shape in shapes])
        except ValueError:  # one of them is not a prefix of this structure
            continue
    raise AssertionError("weights are a prefix tree of the parameters")


def best_of(*weightings: Weighting, signal: str = "loss") -> Weighting:
    """The candidate whose blend does best on held-out data; equal weights are always a candidate.

        w = the w_c of best score(blend(w_c)) over c = uniform, weightings...

    No fixed rule is safe: this one is never worse than plain averaging on the data it chooses by. Equal weights are
    tried first and win ties, then earlier candidates win over later ones. A score that is not finite never wins; if
    none is finite the weights are equal. The states of all candidates move on each round, whichever is chosen.

    Costs one evaluation and one blend for each candidate and for equal weights, beside what the candidates cost
    themselves. They are tried one after another: it holds one blend and the best weights so far, which are small unless
    a candidate weighs every element apart (then twice the size of the replicas).

    Args:
      *weightings: the candidates.
      signal: "loss" (lower is better) or "accuracy" (higher is better) of the blends.

    Returns:
      The chosen weights, in the finest granularity among the candidates'. The weighting `needs` all that they need, and
      `evaluate`.

    Raises:
      SettingsError: another signal; no candidate.

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
        raise SettingsError("best_of() needs at least one weighting to choose from, beside uniform")
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
        held_out = _held_out(signals["evaluate"], blend, params)

        def weigh(i: int, states: tuple) -> tuple[PyTree, PyTree]:
            return candidates[i].update(stacked, states[i], params, alive=alive, blend=blend, **signals)

        like = _finest([jax.eval_shape(partial(weigh, i), state)[0] for i in range(len(candidates))], params)

        def branch(i: int, states: tuple) -> tuple[PyTree, tuple]:
            weights, new = weigh(i, states)
            return _aligned(weights, like), (*states[:i], new, *states[i + 1 :])

        def attempt(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
            best, states = carry
            weights, states = jax.lax.switch(i, [partial(branch, n) for n in range(len(candidates))], states)
            score = _goodness(held_out(weights)[signal], signal)
            return (tree.select(score > best[0], (score, weights), best), states), None

        nothing = (jnp.float32(-jnp.inf), _aligned(weigh(0, state)[0], like))
        ((_, weights), state), _ = jax.lax.scan(attempt, (nothing, state), jnp.arange(len(candidates)))
        return weights, state

    needs = tuple(dict.fromkeys((*(name for one in weightings for name in one.needs), "evaluate")))
    return make_weighting(update, needs=needs, init=init)
