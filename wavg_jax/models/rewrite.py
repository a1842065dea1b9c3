"""Makes any network fast on XLA's CPU backend: its convolutions and pooling are replaced by forms that do the same.

A function is traced to a jaxpr, and the jaxpr evaluated with the forms of `wavg_jax.models.conv` and
`wavg_jax.models.pool` in place of the primitives, inside `jit`, `remat`, `scan`, `while`, `cond`, `custom_jvp` and
`custom_vjp` too. Given a gradient, its backward convolutions are replaced as well, whoever wrote the network and
however it is differentiated.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.extend.core import primitives

from wavg_jax.models import conv, pool


class Form(NamedTuple):
    """What replaces a primitive.

    Attributes:
      covers: `(*operand avals, output aval, **params) -> bool`: whether it may.
      call: `(*operands, **params) -> output`.
    """

    covers: Callable[..., bool]
    call: Callable[..., jax.Array]


_FORMS = {
    primitives.conv_general_dilated_p: Form(conv.covers, conv.convolve),
    primitives.reduce_window_max_p: Form(lambda x, out, **params: pool.covers(x, **params), pool.max_pool),
    primitives.select_and_scatter_add_p: Form(
        lambda slope, x, out, **params: pool.covers(x, **params), pool.max_pool_gradient
    ),
}

_INSIDE = {
    primitives.jit_p: ("jaxpr",),
    primitives.remat_p: ("jaxpr",),
    primitives.scan_p: ("jaxpr",),
    primitives.while_p: ("cond_jaxpr", "body_jaxpr"),
    primitives.cond_p: ("branches",),
    primitives.custom_jvp_call_p: ("call_jaxpr",),
    primitives.custom_vjp_call_p: ("call_jaxpr",),
}
"""The parameters in which a primitive holds programs; others' programs are left alone."""


def fast(function: Callable, on: bool = True) -> Callable:
    """Returns the same function, with convolutions and pooling in forms that XLA runs fast on a CPU.

    Results agree up to rounding. Give it the function that is run, `fast(jax.grad(f))` rather than
    `jax.grad(fast(f))`: whatever differentiates the result, forwards or backwards, differentiates `function` as it is.
    Nothing changes on other backends, and for functions without convolutions and pooling.

    Args:
      function: of pytrees of arrays, to pytrees of arrays.
      on: False returns the function itself.

    Returns:
      A function of the same positional arguments.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> pool = lambda x: nn.max_pool(x, (2, 2), (2, 2)).sum()
      >>> fast(jax.grad(pool))(jnp.arange(4.0).reshape(1, 2, 2, 1))[0, :, :, 0].tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """
    if not on:
        return function

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        # Not at import: asking for the backend starts it, and then jax.distributed can no longer be set up.
        if jax.default_backend() != "cpu":
            return function(*arguments)
        traced, outputs = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = _run(traced, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(outputs), results)

    return run


def _run(traced: core.ClosedJaxpr, arguments: Sequence[Any]) -> Sequence[Any]:
    """Runs a program with forms in place of primitives."""
    if not _gains(traced.jaxpr):
        return core.jaxpr_as_fun(traced)(*arguments)
    count = len(traced.consts)

    def evaluate(values: Sequence[Any], forms: bool) -> list[Any]:
        return _evaluate(traced.jaxpr, values[:count], values[count:], forms)

    values = (*traced.consts, *arguments)  # what was closed over is differentiated too
    if traced.effects:  # not every effect may be in a function with a derivative of its own
        return evaluate(values, True)
    # The forms have one derivative or none, and not in both modes; the program itself has what the user expects.
    run = jax.custom_jvp(lambda *values: evaluate(values, True))
    run.defjvp(lambda primals, tangents: jax.jvp(lambda *values: evaluate(values, False), primals, tangents))
    return run(*values)


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], forms: bool) -> list[Any]:
    """Runs a program equation by equation, with or without forms."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        # Scopes are the layers' names in profiles; the context holds what was set when the equation was traced.
        scope = str(equation.source_info.name_stack)
        with jax.named_scope(scope) if scope else contextlib.nullcontext(), equation.ctx.manager:
            outs = _apply(equation, [value(atom) for atom in equation.invars], forms)
        known.update(zip(equation.outvars, outs if equation.primitive.multiple_results else [outs], strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _apply(equation: core.JaxprEqn, operands: list[Any], forms: bool) -> Any:
    params = equation.params
    if forms and (form := _form(equation)) is not None:
        return form(*operands, **params)
    if forms:
        params = params | {name: _rewritten(params[name]) for name in _INSIDE.get(equation.primitive, ())}
    return equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))


def _form(equation: core.JaxprEqn) -> Callable[..., jax.Array] | None:
    """What replaces an equation, if anything."""
    form = _FORMS.get(equation.primitive)
    if form is None:
        return None
    shapes = [atom.aval for atom in (*equation.invars, *equation.outvars)]
    return form.call if form.covers(*shapes, **equation.params) else None


def _gains(jaxpr: core.Jaxpr) -> bool:
    """Whether a form replaces anything in a program, or in the programs inside."""
    return any(_form(equation) is not None or any(map(_gains, _inside(equation))) for equation in jaxpr.eqns)


def _inside(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """The programs that an equation holds, and that may be rewritten."""
    held = [equation.params[name] for name in _INSIDE.get(equation.primitive, ())]
    return [_open(program) for some in held for program in (some if isinstance(some, tuple) else (some,))]


def _open(program: Any) -> core.Jaxpr:
    return getattr(program, "jaxpr", program)  # closed or not; JAX 0.12 knows one kind only


def _rewritten(program: Any) -> Any:
    """A program that an equation holds, traced again with forms; itself if there is nothing to replace."""
    if isinstance(program, tuple):
        return tuple(map(_rewritten, program))
    jaxpr, consts = _open(program), getattr(program, "consts", ())
    if not _gains(jaxpr):
        return program
    avals: list[Any] = [variable.aval for variable in jaxpr.invars]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in avals]
    new = jax.make_jaxpr(lambda *values: _evaluate(jaxpr, consts, values, True))(*shapes)
    if isinstance(program, core.ClosedJaxpr):
        return new
    assert not new.consts  # the forms make their constants inside
    return new.jaxpr
