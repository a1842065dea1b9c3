"""Named outer optimizers: optax transformations of the pseudo-gradient `params - blend`.

Any optax optimizer can be the outer one. `None`, no outer optimizer, takes the blend as it is, as `optax.sgd(1.0)`
does.
"""

import optax


def nesterov(learning_rate: float = 0.7, momentum: float = 0.9) -> optax.GradientTransformation:
    """DiLoCo's outer optimizer: SGD with Nesterov momentum (Douillard et al. 2023, arXiv:2311.08105)."""
    return optax.sgd(learning_rate, momentum=momentum, nesterov=True)
