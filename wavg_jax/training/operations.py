"""Counts the floating-point operations of a training step: those of its matrix products and convolutions.

XLA's own count depends on how operations are written and rewritten (patches, padding, fused element-wise work); this
count is the same on every backend.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from wavg_jax.base import Batch, Task


def training_flops(task: Task, batch: Batch) -> float:
    """Operations of one training step on a batch, forward and backward, without optimizer and element-wise work.

    A product of m x k and k x n numbers takes 2 m k n operations in the forward pass, and as many again in the backward
    pass for each operand with a gradient: three products in all for an inner layer, two for the first, whose input is
    data. A convolution counts as the product that it equals, what is inside a `scan` as often as it runs. A `while`
    with products inside may run for ever: infinity.

    >>> import jax.numpy as jnp
    >>> from wavg_jax import models
    >>> task = models.from_linen(models.MLP(hidden=(5,), classes=3), (4,))
    >>> training_flops(task, Batch(jnp.zeros((7, 4)), jnp.zeros(7, jnp.int32)))  # 2 * 7 * (2 * 4 * 5 + 3 * 5 * 3)
    1190
    """
    params, mutable = jax.eval_shape(task.init, jax.random.key(0))
    traced = jax.make_jaxpr(lambda p, m, b: task.loss(p, m, b, jax.random.key(0))[0])(params, mutable, batch)
    trained = [True] * len(jax.tree.leaves(params)) + [False] * len(jax.tree.leaves((mutable, batch)))
    return 2 * _products(traced.jaxpr, trained)[0]


def _products(jaxpr: Any, trained: Sequence[bool]) -> tuple[float, list[bool]]:
    """Multiplications of a program, forward and backward.

    Args:
      jaxpr: the program.
      trained: which of its inputs depend on parameters.

    Returns:
      The count, and which of its outputs depend on parameters.
    """
    known = dict(zip(jaxpr.invars, trained, strict=True))

    def depends(variable: Any) -> bool:
        return not hasattr(variable, "val") and known.get(variable, False)  # a literal has a val and is not hashable

    total: float = 0
    for equation in jaxpr.eqns:
        operands = [depends(variable) for variable in equation.invars]
        outs = [any(operands)] * len(equation.outvars)
        rule = _RULES.get(equation.primitive.name)
        if rule is not None:
            total += (1 + sum(operands[:2])) * rule(equation)
        elif inner := _inner(equation):
            counted = [_products(part, _aligned(operands, len(part.invars))) for part in inner]
            # A conditional takes one branch.
            once = max(count for count, _ in counted)
            total += once and once * _turns(equation)
            outs = [any(operands)] * len(outs)
        known.update(zip(equation.outvars, outs, strict=True))
    return total, [depends(variable) for variable in jaxpr.outvars]


def _turns(equation: Any) -> float:
    """How often an equation runs the program that it calls."""
    return math.inf if equation.primitive.name == "while" else equation.params.get("length", 1)


def _aligned(operands: Sequence[bool], wanted: int) -> list[bool]:
    """Flags for the inputs of an inner program; all equal if it does not take the operands one to one."""
    return list(operands) if len(operands) == wanted else [any(operands)] * wanted


def _inner(equation: Any) -> list[Any]:
    """The programs that an equation calls."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found


def _dot(equation: Any) -> int:
    contracted, _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted[0])


def _convolution(equation: Any) -> int:
    kernel = equation.invars[1].aval.shape
    per_output = math.prod(kernel) // kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return math.prod(equation.outvars[0].aval.shape) * per_output


_RULES: dict[str, Callable[[Any], int]] = {"dot_general": _dot, "conv_general_dilated": _convolution}
