"""Weightings that try blends out: they evaluate blended networks on held-out data and keep what did best.

The rules in `weighting` look at each replica alone; these look at the blend, which is what the next round starts from.
They need the signal `evaluate`, a function `(params, weights [K]) -> {"loss", "accuracy"}`, and run whole inside jit, one
blend at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.base import PyTree, SettingsError, Weighting
from wavg_jax.reduce import weighted_mean
from wavg_jax.signals import HIGHER_IS_BETTER
from wavg_jax.weighting import normalise, per_replica, uniform

Held = Callable[[PyTree], Mapping[str, jax.Array]]
"""`weights -> {"loss", "accuracy"}` of the network that they blend, float32 scalars."""


class LearnedState(NamedTuple):
    """What `learned` remembers: the state of its start and, if it carries them, its logits [K] and their optimizer."""

    start: PyTree
    logits: PyTree
    optimizer: PyTree


def _held_out(evaluate: Callable, blend: Callable[[PyTree], PyTree], params: PyTree) -> Held:
    """How weights are tried out: the blend they give, in the dtypes of the parameters, on the held-out data."""
    return lambda weights: evaluate(tree.cast_like(blend(weights), params), per_replica(weights))


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

    Replicas whose own score is NaN or infinite are no ingredients, and a blend with such a score is never kept. Replicas
    with equal own scores are tried in the order of their numbers: the only case in which that order matters.

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
    ...     stacked, avg.init(params), params, loss=abs(stacked["w"] - 3), evaluate=evaluate
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
        own = jnp.where(alive, _goodness(jnp.asarray(signals[signal], jnp.float32), signal), -jnp.inf)
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

    return Weighting(lambda params, replicas=None: (), update, (signal, "evaluate"))


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
        # The softmax's own gradient, written out: derived, it would sum over K in an order that depends on K.
        slope = jax.tree.map(lambda w, g: w * (g - weighted_mean(g, w)[None]), weights, slope)
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


def learned(
    start: Weighting | None = None,
    *,
    steps: int = 8,
    learning_rate: float | None = None,
    carry: bool = False,
    optimizer: optax.GradientTransformation | None = None,
) -> Weighting:
    """TODO"""
    start = uniform() if start is None else start
    if steps < 1:
        raise SettingsError(f"learned(steps={steps}): at least 1 step is needed")
    if optimizer is not None and learning_rate is not None:
        raise SettingsError("learned: an optimizer brings its own learning rate; give either one")
    descent = optimizer or optax.rmsprop(0.4 if learning_rate is None else learning_rate, decay=0.5, momentum=0.5)

    def init(params: PyTree, replicas: int | None = None) -> LearnedState:
        if not carry:
            return LearnedState(start.init(params, replicas), (), ())
        if replicas is None:
            raise SettingsError("learned(carry=True) remembers a logit of every replica: call init(params, replicas=K)")
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
        if not carry:
            logits = jax.tree.map(jnp.zeros_like, begin)
            _, _, (_, weights) = _descend(held_out, begin, (logits, descent.init(logits)), descent, steps, alive)
            return weights, LearnedState(start_state, (), ())
        walk = (state.logits, state.optimizer)
        (logits, memory), sound, best = _descend(held_out, begin, walk, descent, steps, alive)
        equal = normalise(jnp.ones(alive.shape, jnp.float32), alive)
        _, weights = _keep(held_out(equal)["loss"], equal, best)
        logits = jnp.where(alive, logits - weighted_mean(logits, equal), 0)
        fresh = jnp.zeros_like(logits)
        logits, memory = tree.select(sound, (logits, memory), (fresh, descent.init(fresh)))
        return weights, LearnedState(start_state, logits, memory)

    return Weighting(init, update, tuple(dict.fromkeys((*start.needs, "evaluate"))))


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
        except ValueError:  # one of them is no prefix of this structure
            continue
    raise AssertionError("weights are a prefix tree of the parameters")


def best_of(*weightings: Weighting, signal: str = "loss") -> Weighting:
    """TODO"""
    _check_signal(signal, "best_of")
    if not weightings:
        raise SettingsError("best_of() needs at least one weighting to choose from, beside uniform")
    candidates = (uniform(), *weightings)

    def init(params: PyTree, replicas: int | None = None) -> tuple:
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

    return Weighting(init, update, tuple(dict.fromkeys((*(n for c in weightings for n in c.needs), "evaluate"))))
