"""Named outer optimizers: optax transformations of the pseudo-gradient `params - blend`.

Any optax optimizer can be the outer one. `None`, no outer optimizer, takes the blend unchanged, as `optax.sgd(1.0)`
does. Below, g is the pseudo-gradient and p the global parameters, with float32 masters where they are stored in less;
every accumulator starts at 0 unless stated otherwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax.arguments import OPTIMIZER, RATE, as_number, check, number
from wavg_jax.base import PyTree

__all__ = ["bmuf", "delayed", "fedadagrad", "fedadam", "fedavgm", "fedyogi", "isotropic", "lookahead", "nesterov"]


def __dir__() -> list[str]:
    return __all__


_MEMORY = number(0, below=1)
"""A decay: 0 or more, less than 1."""


def nesterov(learning_rate: float = 0.7, momentum: float = 0.9) -> optax.GradientTransformation:
    """DiLoCo's outer optimizer: SGD with Nesterov momentum (Douillard et al. 2023, arXiv:2311.08105).

    `m <- momentum m + g`, `p <- p - learning_rate (g + momentum m)`.
    """
    learning_rate = as_number("learning_rate", learning_rate, RATE)
    momentum = as_number("momentum", momentum, _MEMORY)
    return optax.sgd(learning_rate, momentum=momentum, nesterov=True)


def bmuf(momentum: float, block_learning_rate: float = 1.0, *, nesterov: bool = True) -> optax.GradientTransformation:
    """Blockwise model-update filtering (Chen and Huo 2016, doi:10.1109/ICASSP.2016.7472805).

    With G = blend - (the replicas' start) = -g, the paper updates

        D <- momentum D + block_learning_rate G,    W <- W + D,

    and replicas start from W (classical) or from W + momentum D (Nesterov block momentum). Here replicas always start
    from the global parameters p; in terms of p the Nesterov form is
    `p <- p - block_learning_rate (g + momentum m)`, `m <- momentum m + g`: SGD with Nesterov momentum.

    Args:
      momentum: block momentum; the paper uses 1 - 1/K, so that a round's mean movement counts K times in the limit.
      block_learning_rate: 1 in the paper.
      nesterov: whether replicas start ahead of the model W.
    """
    block_learning_rate = as_number("block_learning_rate", block_learning_rate, RATE)
    momentum = as_number("momentum", momentum, _MEMORY)
    return optax.sgd(block_learning_rate, momentum=momentum, nesterov=nesterov)


def lookahead(alpha: float = 0.5) -> optax.GradientTransformation:
    """Slow weights that move a fraction of the way to the blend: `p <- p + alpha (blend - p)`.

    With K = 1 this is Lookahead itself (Zhang et al. 2019, arXiv:1907.08610); its k is the number of local steps.
    """
    alpha = as_number("alpha", alpha, RATE)
    return optax.sgd(alpha)


def isotropic() -> optax.GradientTransformation:
    """Iso-C: sets the singular values of each matrix in the pseudo-gradient to their mean, before an optimizer's step.

    `U diag(s) V^T` becomes `mean(s) U V^T`, so that no direction of the mean update dominates (Horoi et al. 2026, "Can
    model merging improve aggregation in DiLoCo?", arXiv:2607.03011, after Marczak et al. 2025, arXiv:2502.04959).
    Tensors of more than two axes, such as convolutions, are matrices into their last axis, output units in flax; those
    of fewer stay as they are. Directions whose singular value float32 cannot tell from 0 are rounding error and become
    0. The formula is that of public reimplementations.

    Costs one singular value decomposition of every matrix in a round, far more than any other outer step.

    >>> import jax.numpy as jnp
    >>> step = optax.chain(isotropic(), optax.sgd(1.0))
    >>> g = {"kernel": jnp.diag(jnp.array([3.0, 1.0])), "bias": jnp.ones(2)}
    >>> updates, _ = step.update(g, step.init(g))
    >>> abs(updates["kernel"]).round(4).tolist(), updates["bias"].tolist()
    ([[2.0, 0.0], [0.0, 2.0]], [-1.0, -1.0])
    """

    def leaf(g: jax.Array) -> jax.Array:
        if g.ndim < 2:
            return g
        u, s, v = jnp.linalg.svd(g.reshape(-1, g.shape[-1]), full_matrices=False)
        resolved = s > s.max(initial=0) * max(u.shape[0], v.shape[1]) * jnp.finfo(s.dtype).eps  # as in matrix_rank
        return jnp.matmul(s.mean() * u * resolved.astype(s.dtype)[None], v, precision="highest").reshape(g.shape)

    return optax.stateless(lambda updates, params: jax.tree.map(leaf, updates))


def fedavgm(learning_rate: float = 1.0, momentum: float = 0.9) -> optax.GradientTransformation:
    """FedAvg with server momentum (Hsu, Qi and Brown 2019, arXiv:1909.06335).

    `v <- momentum v + g`, `p <- p - learning_rate v`; the paper's learning rate is 1.
    """
    learning_rate = as_number("learning_rate", learning_rate, RATE)
    momentum = as_number("momentum", momentum, _MEMORY)
    return optax.sgd(learning_rate, momentum=momentum)


class AdaptiveState(NamedTuple):
    """State of `fedadagrad`, `fedyogi` and `fedadam`.

    Attributes:
      m: mean of the pseudo-gradients.
      v: how large their squares are.
    """

    m: PyTree
    v: PyTree


_Second = Callable[[jax.Array, jax.Array], jax.Array]
"""`(v, g^2) -> v`, of one leaf."""


def _adaptive(learning_rate: Any, b1: Any, tau: Any, second: _Second) -> optax.GradientTransformation:
    """Algorithm 2 of Reddi et al. with this rule for v."""
    learning_rate = as_number("learning_rate", learning_rate, RATE)
    b1 = as_number("b1", b1, _MEMORY)
    tau = as_number("tau", tau, number(above=0))

    def init(params: PyTree) -> AdaptiveState:
        return AdaptiveState(optax.tree.zeros_like(params), jax.tree.map(lambda x: jnp.full_like(x, tau * tau), params))

    def update(updates: PyTree, state: AdaptiveState, params: PyTree | None = None) -> tuple[PyTree, AdaptiveState]:
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, updates)
        v = jax.tree.map(lambda v, g: second(v, g * g), state.v, updates)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), m, v), AdaptiveState(m, v)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def fedadagrad(learning_rate: float = 0.1, b1: float = 0.0, tau: float = 1e-3) -> optax.GradientTransformation:
    """Adagrad on the pseudo-gradient, algorithm 2 of Reddi et al. (2021, "Adaptive federated optimization",
    arXiv:2003.00295).

        m <- b1 m + (1 - b1) g,    v <- v + g^2,    p <- p - learning_rate m / (sqrt(v) + tau)

    m starts at 0, v at tau^2, and nothing corrects their bias.

    Args:
      learning_rate: about how far a parameter moves in the first round; later rounds move it less. A number, or an
        optax schedule of the round.
      b1: decay of m; 0 in the paper, as in Adagrad.
      tau: the degree of adaptivity, in units of the pseudo-gradient: differences far smaller are not scaled up.

    Raises:
      SettingsError: an argument is out of range.

    >>> outer = fedadagrad(learning_rate=1.0, tau=0.5)
    >>> step, state = outer.update(jnp.array([1.2]), outer.init(jnp.zeros(1)))
    >>> round(step.item(), 4)  # -1.2 / (sqrt(0.25 + 1.44) + 0.5)
    -0.6667
    """
    return _adaptive(learning_rate, b1, tau, lambda v, square: v + square)


def fedyogi(
    learning_rate: float = 0.01, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> optax.GradientTransformation:
    """Yogi on the pseudo-gradient, algorithm 2 of Reddi et al. (2021, arXiv:2003.00295).

        m <- b1 m + (1 - b1) g,    v <- v - (1 - b2) g^2 sign(v - g^2),    p <- p - learning_rate m / (sqrt(v) + tau)

    v approaches g^2 by (1 - b2) g^2 in a round, so it falls more slowly than `fedadam`'s. m starts at 0, v at tau^2,
    and nothing corrects their bias; `optax.yogi` corrects it.

    Args:
      learning_rate, b1, b2, tau: as for `fedadam`.

    Raises:
      SettingsError: an argument is out of range.

    >>> outer = fedyogi(learning_rate=1.0, b1=0.5, b2=0.75, tau=0.5)
    >>> step, state = outer.update(jnp.array([0.8]), outer.init(jnp.zeros(1)))
    >>> round(step.item(), 4)  # -0.4 / (sqrt(0.25 + 0.25 * 0.64) + 0.5)
    -0.3508
    """
    b2 = as_number("b2", b2, _MEMORY)
    return _adaptive(learning_rate, b1, tau, lambda v, square: v - (1 - b2) * square * jnp.sign(v - square))


def fedadam(
    learning_rate: float = 0.01, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> optax.GradientTransformation:
    """Adam on the pseudo-gradient, algorithm 2 of Reddi et al. (2021, arXiv:2003.00295).

        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2,    p <- p - learning_rate m / (sqrt(v) + tau)

    m starts at 0, v at tau^2, and nothing corrects their bias; `optax.adam` starts v at 0 and corrects it.

    Args:
      learning_rate: about how far a parameter moves in a round: a number, or an optax schedule of the round.
      b1: decay of m.
      b2: decay of v.
      tau: the degree of adaptivity, in units of the pseudo-gradient: differences far smaller are not scaled up.

    Raises:
      SettingsError: an argument is out of range.

    >>> outer = fedadam(learning_rate=1.0, b1=0.5, b2=0.75, tau=0.5)
    >>> step, state = outer.update(jnp.array([1.0]), outer.init(jnp.zeros(1)))
    >>> round(step.item(), 4)  # -0.5 / (sqrt(0.75 * 0.25 + 0.25 * 1) + 0.5)
    -0.4305
    """
    b2 = as_number("b2", b2, _MEMORY)
    return _adaptive(learning_rate, b1, tau, lambda v, square: b2 * v + (1 - b2) * square)


class DelayedState(NamedTuple):
    """The pseudo-gradient held back until the next round, and the outer optimizer's state."""

    held: PyTree
    outer: PyTree


def delayed(outer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies every pseudo-gradient one round late: `p_{t+1} = p_t + outer.update(g_{t-1})`, with `g_{-1} = 0`.

    The blend of round t is needed only after round t + 1, which leaves the exchange a whole round to complete. This
    function does only the arithmetic; `fit` still finishes the exchange within its round, so it hides no communication
    yet. The first round leaves the parameters unchanged. This is the delay of CO2 (Sun et al. 2024, arXiv:2401.16265)
    without its staleness penalty and momentum clipping. Delayed pseudo-gradients need smaller steps: with
    `optax.sgd(1.0)` the parameters chase a blend reached from a different point.

    Args:
      outer: an optax optimizer, such as `nesterov()`.

    >>> late = delayed(optax.sgd(1.0))
    >>> state = late.init(jnp.zeros(1))
    >>> first, state = late.update(jnp.array([3.0]), state)
    >>> second, state = late.update(jnp.array([5.0]), state)
    >>> abs(first.item()), second.item()
    (0.0, -3.0)
    """

    check("outer", outer, OPTIMIZER)

    def init(params: PyTree) -> DelayedState:
        return DelayedState(optax.tree.zeros_like(params), outer.init(params))

    def update(updates: PyTree, state: DelayedState, params: PyTree | None = None) -> tuple[PyTree, DelayedState]:
        late, outer_state = outer.update(state.held, state.outer, params)
        return late, DelayedState(updates, outer_state)

    return optax.GradientTransformation(init, update)
