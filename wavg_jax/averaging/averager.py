"""The averager: a weighting, then one reduction, then an optional outer optimizer."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import checks, tree
from wavg_jax.arguments import (
    FUNCTION,
    NONE,
    OPTIMIZER,
    YES_OR_NO,
    as_whole,
    check_all,
    either,
    has,
    instance,
    number,
)
from wavg_jax.averaging.pull import OverRounds, Pull, toward_new
from wavg_jax.averaging.reduce import Reduction, weighted_mean
from wavg_jax.averaging.stepping import AveragerState, masters_of, step
from wavg_jax.averaging.transforms import Transform
from wavg_jax.base import Averager, Halves, PyTree, SettingsError, Weighting


class _Parts(NamedTuple):
    """The arguments of `averager`."""

    weighting: Weighting
    outer: optax.GradientTransformation | None
    reduce: Reduction
    transform: Transform | None
    deltas: bool


def _as_is(function: Callable) -> Callable:
    return function


def _given(alive: jax.Array | None, check_finite: bool, replicas: int) -> jax.Array:
    """The caller's mask, or all True; bool [K]."""
    if alive is not None:
        return checks.mask(alive, replicas)
    if not check_finite:
        raise SettingsError("check_finite=False trusts alive=, which is missing; give a bool for each replica, [K]")
    return jnp.ones(replicas, bool)


def _living(stacked: PyTree, alive: jax.Array, check_finite: bool) -> jax.Array:
    """Which replicas count: the `alive` ones and, unless the caller has tested it, only finite ones; bool [K]."""
    return alive & tree.all_finite(stacked) if check_finite else alive


def _pulled(pull: Pull, x: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Pulls one leaf of all replicas [K, ...], computing in the accumulator dtype."""
    wide = tree.accumulator_dtype(x.dtype)
    moved = jax.vmap(pull, in_axes=(0, None, None))(x.astype(wide), old.astype(wide), new.astype(wide))
    checks.broadcasts("pull(...)", moved, x.shape, "a pull returns the replica it is given, moved")
    return jnp.broadcast_to(moved.astype(x.dtype), x.shape)


def _restart(
    pull: Pull | OverRounds | None,
    stacked: PyTree,
    old: PyTree,
    new: PyTree,
    *,
    alive: jax.Array | None = None,
    check_finite: bool = True,
    round: jax.Array | int | None = None,
) -> PyTree:
    """`Averager.restart`; a `pull` of None replaces every replica."""
    checks.alike("old", old, "new", new, "give the global parameters before and after the update")
    replicas = checks.stacked(stacked, new, of="new")
    alive = _given(alive, check_finite, replicas)
    replaced = tree.replicate(new, replicas)
    if pull is None:
        return replaced
    if isinstance(pull, OverRounds):
        if round is None:
            raise SettingsError("pull= changes over rounds: give restart(..., round=), the number of rounds before")
        pull = pull.at(jnp.asarray(round, jnp.int32))
    pulled = jax.tree.map(functools.partial(_pulled, pull), stacked, old, new)
    return tree.select_replicas(_living(stacked, alive, check_finite), pulled, replaced)


def _check_state(parts: _Parts, state: PyTree, params: PyTree, replicas: int) -> None:
    made = jax.eval_shape(lambda params: _init(parts, params, replicas), params)
    fix = f"make it with this averager's init(params, replicas={replicas})"
    checks.alike("state", state, "this averager's state", made, fix)


def _masked(stacked: PyTree, params: PyTree, living: jax.Array) -> PyTree:
    """Replaces dead replicas by `params`."""
    # Searches differentiate through the blend, where 0 * NaN would be NaN.
    return tree.select_replicas(living, stacked, tree.replicate(params, living.shape[0]))


def _transformed(transform: Transform | None, stacked: PyTree, params: PyTree, living: jax.Array) -> PyTree:
    if transform is None:
        return stacked
    sent = transform(stacked, params, living)
    checks.alike(
        "transform(...)", sent, "stacked", stacked, "a transform must keep the structure and shapes of stacked"
    )
    return sent


def _reducer(
    parts: _Parts, params: PyTree, place: Callable[[Callable], Callable]
) -> Callable[[PyTree, PyTree], PyTree]:
    """The reduction `(stacked, weights) -> blend`; raises SettingsError unless it returns a tree like `params`."""
    reduce = place(parts.reduce)

    def checked(stacked: PyTree, weights: PyTree) -> PyTree:
        blend = reduce(stacked, weights)
        checks.alike("reduce(...)", blend, "params", params, "a reduction sums the replica axis away")
        return blend

    def of_deltas(stacked: PyTree, weights: PyTree) -> PyTree:
        wide, start = tree.as_accumulators((stacked, params))
        deltas = jax.tree.map(lambda x, p: x - p[None], wide, start)
        return optax.tree.add(start, tree.as_accumulators(checked(deltas, weights)))

    return of_deltas if parts.deltas else checked


def _weigh(weighting: Weighting, sent: PyTree, state: PyTree, params: PyTree, **given: Any) -> tuple[PyTree, PyTree]:
    """Calls the weighting and checks what it returns."""
    weights, new = checks.pair("weighting.update", weighting.update(sent, state, params, **given), "(weights, state)")
    checks.weights(weights, sent)
    checks.alike("the weighting's new state", new, "its state", state, "update must keep the shapes that init made")
    return weights, new


def _init(parts: _Parts, params: PyTree, replicas: int) -> AveragerState:
    """`Averager.init`."""
    checks.parameters("params", params)
    state = parts.weighting.init(params, as_whole("replicas", replicas, 1))
    if parts.outer is None:
        return AveragerState(state, None, None)
    return AveragerState(state, parts.outer.init(tree.as_accumulators(params)), masters_of(params))


def _update(
    parts: _Parts,
    stacked: PyTree,
    state: AveragerState,
    params: PyTree,
    *,
    alive: jax.Array | None = None,
    check_finite: bool = True,
    place: Callable[[Callable], Callable] = _as_is,
    **signals: Any,
) -> tuple[PyTree, AveragerState, PyTree]:
    """`Averager.update`."""
    checks.signals(parts.weighting.needs, signals)
    replicas = checks.stacked(stacked, params)
    _check_state(parts, state, params, replicas)
    living = _living(stacked, _given(alive, check_finite, replicas), check_finite)
    sent = _transformed(parts.transform, _masked(stacked, params, living), params, living)
    reduce = _reducer(parts, params, place)
    weights, weighting_state = _weigh(
        parts.weighting, sent, state.weighting, params, alive=living, blend=functools.partial(reduce, sent), **signals
    )

    def blended() -> PyTree:
        return reduce(sent if parts.transform else _masked(stacked, params, living), weights)

    stepped = state._replace(weighting=weighting_state)
    new_params, new_state, taken = step(parts.outer, living, blended, state, stepped, params)
    return new_params, new_state, tree.select(taken, weights, optax.tree.zeros_like(weights))


def _weigh_alone(
    parts: _Parts,
    stacked: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    alive: jax.Array,
    place: Callable[[Callable], Callable] = _as_is,
    **signals: Any,
) -> tuple[PyTree, PyTree]:
    """`Halves.weigh`."""
    checks.signals(parts.weighting.needs, signals)
    checks.stacked(stacked, params)
    sent = _transformed(parts.transform, _masked(stacked, params, alive), params, alive)
    blend = functools.partial(_reducer(parts, params, place), sent)
    return _weigh(parts.weighting, sent, state, params, alive=alive, blend=blend, **signals)


def _step_alone(
    parts: _Parts,
    stacked: PyTree,
    weights: PyTree,
    state: AveragerState,
    params: PyTree,
    *,
    alive: jax.Array,
    place: Callable[[Callable], Callable] = _as_is,
) -> tuple[PyTree, AveragerState, jax.Array]:
    """`Halves.step`."""

    def blended() -> PyTree:
        sent = _transformed(parts.transform, _masked(stacked, params, alive), params, alive)
        return _reducer(parts, params, place)(sent, weights)

    return step(parts.outer, alive, blended, state, state, params)


_ARGUMENTS = {
    "weighting": has("a Weighting, such as wavg_jax.learned()", "init", "update", "needs", lacks="restart"),
    "outer": either(NONE, OPTIMIZER),
    "reduce": FUNCTION,
    "pull": either(number(0, 1), FUNCTION, instance(OverRounds, "made by wavg_jax.pull.scheduled")),
    "transform": either(NONE, FUNCTION),
    "deltas": YES_OR_NO,
}


def averager(
    weighting: Weighting,
    *,
    outer: optax.GradientTransformation | None = None,
    reduce: Reduction = weighted_mean,
    pull: float | Pull | OverRounds = 1.0,
    transform: Transform | None = None,
    deltas: bool = False,
) -> Averager:
    """Builds the averager, which turns K replicas into the next global parameters.

        blend  = sum_k w_k * stacked_k                           (or another reduction)
        params = blend                                           (outer=None)
        params = params + outer.update(params - blend)           (with an outer optimizer)

    The pseudo-gradient `params - blend` points uphill as a gradient does (Reddi et al. 2021, "Adaptive federated
    optimization"), so any optax optimizer can be the outer one. `optax.sgd(1.0)` is plain averaging.

    Every scheme gives weight 0 to a replica that is not `alive` or has non-finite parameters. If no replica is left, or
    the outer step makes the parameters or its own state infinite or NaN, parameters and state stay unchanged and all
    weights are 0. The update is pure and can be jitted.

    With an outer optimizer, bfloat16 and float16 parameters are updated in float32: the state holds float32 masters,
    and `params` are the masters cast. The pseudo-gradient is taken at `params`, where the replicas started. If the
    caller passes `params` that are not the masters cast, say ones loaded from elsewhere, the step starts from `params`.

    Args:
      weighting: how much each replica counts, such as `wavg_jax.softmax("loss", temperature=0.2)`.
      outer: an optax optimizer, such as `wavg_jax.outer.nesterov(0.7, 0.9)` for DiLoCo.
      reduce: the reduction over the replica axis; see `wavg_jax.averaging.reduce.Reduction`.
      pull: how far `restart` pulls living replicas toward the new global parameters, or a function; see
        `wavg_jax.pull`. 1 replaces them. Dead replicas are always replaced. `restart` needs `round=` if it changes over
        rounds.
      transform: `(stacked, params, alive) -> stacked`, applied before weighting and blend, such as
        `wavg_jax.robust.clip_deltas()` or `wavg_jax.transforms.trim_deltas()`.
      deltas: reduce how far the replicas moved, `blend = params + reduce(stacked - params, weights)`, for reductions
        such as `wavg_jax.radial_directional`. It changes nothing but rounding for the weighted mean.

    Returns:
      An `Averager`. Besides the signals, its `update` takes `alive` (bool [K]) and `place`, a function that spreads the
      reduction over several devices, such as `devices.placement.Placement.reduce`. It raises SettingsError if a signal
      that the weighting needs is missing, or if `stacked`, `state`, `params`, `alive` and the weights do not fit
      together. Shapes are checked while tracing, so the compiled update pays nothing for it.

    Raises:
      SettingsError: an argument is not of the kind above, or `pull` is not between 0 and 1. `init` raises it if a leaf
        of `params` is not floating-point.

    >>> import jax.numpy as jnp
    >>> import wavg_jax as wavg
    >>> params = {"w": jnp.zeros(2)}
    >>> avg = averager(wavg.proportional("accuracy"))
    >>> stacked = {"w": jnp.array([[1.0, 1.0], [5.0, 5.0]])}
    >>> blend, state, weights = avg.update(stacked, avg.init(params, 2), params, accuracy=jnp.array([0.9, 0.3]))
    >>> [round(float(w), 4) for w in weights], blend["w"].round(4).tolist()
    ([0.75, 0.25], [2.0, 2.0])
    """
    check_all(_ARGUMENTS, locals())
    parts = _Parts(weighting, outer, reduce, transform, deltas)
    # Only the plain weighted mean is one sum over the replicas.
    reads_replicas = weighting.reads_replicas or transform is not None or reduce is not weighted_mean
    how = None if pull == 1.0 else pull if callable(pull) or isinstance(pull, OverRounds) else toward_new(pull)
    return Averager(
        functools.partial(_init, parts),
        functools.partial(_update, parts),
        weighting.needs,
        functools.partial(_restart, how),
        reads_replicas,
        Halves(weighting, functools.partial(_weigh_alone, parts), functools.partial(_step_alone, parts)),
    )
