"""The averager: a weighting, then one reduction, then an optional outer optimizer."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import checks, tree
from wavg_jax.arguments import FUNCTION, NONE, OPTIMIZER, as_whole, check_all, either, has, number
from wavg_jax.averaging.pull import Pull, toward_new
from wavg_jax.averaging.reduce import Reduction, weighted_mean
from wavg_jax.base import Averager, Init, PyTree, SettingsError, Weighting

Transform = Callable[[PyTree, PyTree, jax.Array], PyTree]
"""`(stacked, params, alive) -> stacked`: what becomes of the replicas' parameters on their way to the blend."""


class AveragerState(NamedTuple):
    """State of the weighting and of the outer optimizer.

    Attributes:
      weighting: the weighting's.
      outer: the outer optimizer's; None without one.
      masters: with an outer optimizer, the global parameters that are stored in less than float32, in float32, so that
        small steps add up; None in place of every other leaf.
    """

    weighting: PyTree
    outer: PyTree
    masters: PyTree


def _masters(params: PyTree) -> PyTree:
    """Copies of the leaves that are narrower than what they are updated in; None in place of the others."""

    def leaf(x: jax.Array) -> jax.Array | None:
        wide = tree.accumulator_dtype(x.dtype)
        return None if x.dtype == wide else x.astype(wide)

    return jax.tree.map(leaf, params)


def _current(masters: PyTree, params: PyTree) -> PyTree:
    """The global parameters in their accumulator dtypes: the masters, or `params` where these are not the masters cast,
    which the caller has changed."""

    def bits(x: jax.Array) -> jax.Array:
        # As bits: XLA may leave out a cast to bfloat16 and back, with which numbers would be compared.
        return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

    def leaf(p: jax.Array, master: jax.Array | None) -> jax.Array:
        if master is None:
            return tree.as_accumulators(p)
        same = bits(master.astype(p.dtype)) == bits(p)
        return jnp.where(same, master, p.astype(master.dtype))

    return jax.tree.map(leaf, params, masters)


def _as_is(function: Callable) -> Callable:
    return function


def _living(stacked: PyTree, alive: jax.Array | None, check_finite: bool) -> jax.Array:
    """The replicas that count: those `alive` and, if that is tested here, with finite parameters; bool [K]."""
    if not check_finite:
        if alive is None:
            raise SettingsError("check_finite=False trusts alive=, which is missing; give a bool for each replica, [K]")
        return checks.mask(alive, tree.count_replicas(stacked))
    finite = tree.all_finite(stacked)
    return finite if alive is None else finite & checks.mask(alive, finite.shape[0])


def _check_restart(stacked: PyTree, old: PyTree, new: PyTree) -> int:
    checks.alike("old", old, "new", new, "give the global parameters before and after the update")
    return checks.stacked(stacked, new, of="new")


def _replace(
    stacked: PyTree, old: PyTree, new: PyTree, *, alive: jax.Array | None = None, check_finite: bool = True
) -> PyTree:
    """`Averager.restart` where every replica is replaced."""
    replicas = _check_restart(stacked, old, new)
    if alive is not None or not check_finite:
        _living(stacked, alive, check_finite=False)
    return tree.replicate(new, replicas)


def _restart(pull: Pull) -> Callable:
    """`Averager.restart` where the living are pulled."""

    def one(x: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        wide = tree.accumulator_dtype(x.dtype)
        return pull(x.astype(wide), old.astype(wide)[None], new.astype(wide)[None]).astype(x.dtype)

    def restart(
        stacked: PyTree, old: PyTree, new: PyTree, *, alive: jax.Array | None = None, check_finite: bool = True
    ) -> PyTree:
        replaced = tree.replicate(new, _check_restart(stacked, old, new))
        living = _living(stacked, alive, check_finite)
        pulled = jax.tree.map(lambda x, o, n: jnp.broadcast_to(one(x, o, n), x.shape), stacked, old, new)
        return tree.select_replicas(living, pulled, replaced)

    return restart


def _check_update(
    weighting: Weighting, init: Init, stacked: PyTree, state: PyTree, params: PyTree, signals: dict[str, Any]
) -> int:
    """Refuses what does not fit together, and returns K."""
    checks.signals(weighting.needs, signals)
    replicas = checks.stacked(stacked, params)
    made = jax.eval_shape(functools.partial(init, replicas=replicas), params)
    fix = f"make it with this averager's init(params, replicas={replicas})"
    checks.alike("state", state, "this averager's state", made, fix)
    return replicas


def _step(
    outer: optax.GradientTransformation | None, blend: PyTree, state: AveragerState, params: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """The parameters, the outer optimizer's state and the masters after the blend."""
    if outer is None:
        return tree.cast_like(blend, params), state.outer, state.masters
    # From what the replicas started from: what rounding took off the masters is not a movement of the replicas.
    pseudo_gradient = optax.tree.sub(*tree.as_accumulators((params, blend)))
    current = _current(state.masters, params)
    updates, outer_state = outer.update(pseudo_gradient, state.outer, current)
    new = optax.apply_updates(current, updates)
    masters = jax.tree.map(lambda p, x: None if p.dtype == x.dtype else x, params, new)
    return tree.cast_like(new, params), outer_state, masters


def _sound(params: PyTree, outer: PyTree, before: PyTree) -> jax.Array:
    """Whether a step gave parameters that are all finite, and made nothing of the outer optimizer's state infinite or
    NaN that was not so before, as a mask of -inf is. The masters are finite where the parameters, their casts, are."""
    # `isfinite`, unlike the product of `tree.all_finite`, is fused with what computes the step.
    finite = [jnp.isfinite(x).all() for x in tree.floats(params)]
    kept = [(jnp.isfinite(x) | ~jnp.isfinite(y)).all() for x, y in zip(*map(tree.floats, (outer, before)), strict=True)]
    return functools.reduce(operator.and_, finite + kept)


def _apart(alive: jax.Array, blended: Callable[[], PyTree], params: PyTree) -> PyTree:
    """The blend, computed apart from what is made of it where XLA would otherwise compute it again for every replica.

    On CPU it fuses the sum with the copies that restart the replicas; a branch is compiled by itself. What a branch is
    given is put into memory first, so `blended` should make what it can itself. Not on a GPU, where a condition makes
    the host wait, nor outside jit, where it would be compiled anew in every call.
    """
    if not (tree.on_cpu() and isinstance(alive, jax.core.Tracer)):
        return blended()
    masters = tree.as_accumulators(params)
    return jax.lax.cond(alive.any(), lambda: tree.cast_like(blended(), masters), lambda: masters)


_ARGUMENTS = {
    "weighting": has("a Weighting, such as wavg_jax.learned()", "init", "update", "needs", lacks="restart"),
    "outer": either(NONE, OPTIMIZER),
    "reduce": FUNCTION,
    "pull": either(number(0, 1), FUNCTION),
    "transform": either(NONE, FUNCTION),
}


def averager(
    weighting: Weighting,
    *,
    outer: optax.GradientTransformation | None = None,
    reduce: Reduction = weighted_mean,
    pull: float | Pull = 1.0,
    transform: Transform | None = None,
) -> Averager:
    """Builds the averager that turns K replicas into the next global parameters.

        blend  = sum_k w_k * stacked_k
        params = blend                                           (outer=None)
        params = params + outer.update(params - blend)           (with an outer optimizer)

    The pseudo-gradient `params - blend` points uphill as a gradient does (Reddi et al. 2021, "Adaptive federated
    optimization"), so any optax optimizer can be the outer one, and `optax.sgd(1.0)` is plain averaging.

    A replica that is not `alive`, or whose parameters are not all finite, has weight 0 in every scheme. If no replica
    is left, or an outer step makes the parameters or its optimizer's state infinite or NaN, parameters and state stay
    as they were and all weights are 0. The update is pure and can be jitted.

    With an outer optimizer, parameters in bfloat16 or float16 are updated in float32: the state holds masters of them,
    and `params` are the masters cast. The pseudo-gradient is taken from `params`, from which the replicas started.
    Where the `params` handed in are not the masters cast, having been loaded from elsewhere, say, the step starts from
    `params`.

    Args:
      weighting: how much each replica counts, such as `wavg_jax.softmax("loss", temperature=0.2)`.
      outer: an optax optimizer, such as `wavg_jax.outer.nesterov(0.7, 0.9)` for DiLoCo.
      reduce: the reduction over the replica axis; see `wavg_jax.averaging.reduce.Reduction`.
      pull: how far `restart` pulls the living replicas toward the new global parameters, 1 meaning that they are
        replaced, or a function; see `wavg_jax.pull`. Dead ones are always replaced.
      transform: `(stacked, params, alive) -> stacked`, applied before weighting and blend, such as
        `wavg_jax.robust.clip_deltas()`.

    Returns:
      An `Averager`. Its `update` takes, beside the signals, `alive` (bool [K]) and `place`, a function that lays the
      reduction out over several devices, as `devices.placement.Placement.reduce` does. It raises SettingsError if a
      signal that the weighting needs is not given, or if `stacked`, `state`, `params`, `alive` and the weights do not
      fit together; shapes are looked at while tracing, so that the compiled update does not pay for it.

    Raises:
      SettingsError: an argument is not what is said above, or `pull` not between 0 and 1. `init` raises it if a leaf of
        `params` is not floating-point.

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

    def init(params: PyTree, replicas: int) -> AveragerState:
        checks.parameters("params", params)
        state = weighting.init(params, as_whole("replicas", replicas, 1))
        if outer is None:
            return AveragerState(state, None, None)
        return AveragerState(state, outer.init(tree.as_accumulators(params)), _masters(params))

    def update(
        stacked: PyTree,
        state: AveragerState,
        params: PyTree,
        *,
        alive: jax.Array | None = None,
        check_finite: bool = True,
        place: Callable[[Callable], Callable] = _as_is,
        **signals: Any,
    ) -> tuple[PyTree, AveragerState, PyTree]:
        replicas = _check_update(weighting, init, stacked, state, params, signals)
        living = _living(stacked, alive, check_finite)

        def send() -> PyTree:
            # A search differentiates through the blend, where a weight of 0 times NaN would be NaN.
            sent = tree.select_replicas(living, stacked, tree.replicate(params, replicas))
            return sent if transform is None else transform(sent, params, living)

        reduction, sent = place(reduce), send()
        checks.alike("transform(...)", sent, "stacked", stacked, "a transform returns what it was given, changed")
        weights, weighting_state = weighting.update(
            sent, state.weighting, params, alive=living, blend=lambda w: reduction(sent, w), **signals
        )
        checks.weights(weights, sent)
        blend = _apart(living, lambda: reduction(sent if transform else send(), weights), params)
        new_params, outer_state, masters = _step(outer, blend, state, params)
        new = (new_params, AveragerState(weighting_state, outer_state, masters))
        taken = living.any() & _sound(new_params, outer_state, state.outer)
        new_params, new_state = tree.select(taken, new, (params, state))
        return new_params, new_state, tree.select(taken, weights, optax.tree.zeros_like(weights))

    restart = _replace if pull == 1.0 else _restart(pull if callable(pull) else toward_new(pull))
    return Averager(init, update, weighting.needs, restart)
