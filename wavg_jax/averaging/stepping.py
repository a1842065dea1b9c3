"""From a blend to the next global parameters: the outer step, its float32 masters, and whether it is taken."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.base import PyTree


class AveragerState(NamedTuple):
    """State of the weighting and of the outer optimizer.

    Attributes:
      weighting: the weighting's state.
      outer: the outer optimizer's state; None without one.
      masters: with an outer optimizer, float32 copies of the global parameters stored in less than float32, so that
        small steps add up; None in place of every other leaf.
    """

    weighting: PyTree
    outer: PyTree
    masters: PyTree


def masters_of(params: PyTree) -> PyTree:
    """Copies the leaves narrower than their accumulator dtype into that dtype; None in place of the others."""

    def leaf(x: jax.Array) -> jax.Array | None:
        wide = tree.accumulator_dtype(x.dtype)
        return None if x.dtype == wide else x.astype(wide)

    return jax.tree.map(leaf, params)


def _current(masters: PyTree, params: PyTree) -> PyTree:
    """The global parameters in their accumulator dtypes.

    These are the masters, or `params` where the caller has changed them, so that they no longer equal the masters cast.
    """

    def bits(x: jax.Array) -> jax.Array:
        # Compare bits: XLA may drop a cast to bfloat16 and back, so numbers would compare as if never rounded.
        return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

    def leaf(p: jax.Array, master: jax.Array | None) -> jax.Array:
        if master is None:
            return tree.as_accumulators(p)
        same = bits(master.astype(p.dtype)) == bits(p)
        return jnp.where(same, master, p.astype(master.dtype))

    return jax.tree.map(leaf, params, masters)


def _stepped(
    outer: optax.GradientTransformation | None, blend: PyTree, state: AveragerState, params: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """Steps to the next (parameters, outer optimizer state, masters), given the blend."""
    if outer is None:
        return tree.cast_like(blend, params), state.outer, state.masters
    # Measured from `params`, where the replicas started: the rounding of the masters is no movement of theirs.
    pseudo_gradient = optax.tree.sub(*tree.as_accumulators((params, blend)))
    current = _current(state.masters, params)
    updates, outer_state = outer.update(pseudo_gradient, state.outer, current)
    new = optax.apply_updates(current, updates)
    masters = jax.tree.map(lambda p, x: None if p.dtype == x.dtype else x, params, new)
    return tree.cast_like(new, params), outer_state, masters


def _sound(params: PyTree, outer: PyTree, before: PyTree) -> jax.Array:
    """Whether a step gave finite parameters and turned nothing finite in the outer optimizer's state infinite or NaN.

    State that was not finite before, such as a mask of -inf, may stay so. The masters are finite where `params` are,
    which are their casts.
    """
    # XLA fuses `isfinite` with the step itself, unlike the product in `tree.all_finite`.
    finite = [jnp.isfinite(x).all() for x in tree.floats(params)]
    kept = [(jnp.isfinite(x) | ~jnp.isfinite(y)).all() for x, y in zip(*map(tree.floats, (outer, before)), strict=True)]
    return tree.all_of(finite + kept)


def _apart(alive: jax.Array, blended: Callable[[], PyTree], params: PyTree) -> PyTree:
    """Computes the blend in a branch of its own where XLA would otherwise recompute it for every replica.

    XLA on CPU fuses the sum into the copies that restart the replicas, but compiles a branch separately. It
    materializes a branch's operands, so `blended` should compute what it can itself. On a GPU a condition would make
    the host wait, and outside jit it would recompile in every call; both take the blend directly.
    """
    if not (tree.on_cpu() and isinstance(alive, jax.core.Tracer)):
        return blended()
    masters = tree.as_accumulators(params)
    return jax.lax.cond(alive.any(), lambda: tree.cast_like(blended(), masters), lambda: masters)


def step(
    outer: optax.GradientTransformation | None,
    living: jax.Array,
    blended: Callable[[], PyTree],
    before: AveragerState,
    state: AveragerState,
    params: PyTree,
) -> tuple[PyTree, AveragerState, jax.Array]:
    """Blends and steps from `state`; parameters and `before` if no replica is left, or the step is not finite."""
    new_params, outer_state, masters = _stepped(outer, _apart(living, blended, params), state, params)
    taken = living.any() & _sound(new_params, outer_state, state.outer)
    stepped = state._replace(outer=outer_state, masters=masters)
    return *tree.select(taken, (new_params, stepped), (params, before)), taken
