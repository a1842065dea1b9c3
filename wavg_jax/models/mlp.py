"""A multilayer perceptron."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from wavg_jax.arguments import check, each, number, whole


class MLP(nn.Module):
    """Flattens its input and applies dense layers with ReLU and dropout, then a linear layer for the logits.

    Attributes:
      hidden: width of each hidden layer.
      classes: number of logits.
      dropout: dropout rate of the hidden layers, in [0, 1).
      dtype: dtype of the computation and of the logits; parameters are float32 unless cast.

    Raises:
      SettingsError: when called, if an attribute is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = MLP(hidden=(16,), classes=3)
      >>> params = net.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)), train=False)
      >>> net.apply(params, jnp.ones((5, 8, 8, 1)), train=False).shape
      (5, 3)
    """

    hidden: Sequence[int] = (256, 256)
    classes: int = 10
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes logits [B, classes] of inputs [B, ...]; `train` turns on dropout."""
        check("hidden", self.hidden, each(whole(1), "the width of each hidden layer, such as (256, 256)"))
        check("classes", self.classes, whole(1))
        check("dropout", self.dropout, number(0, below=1))
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype)(x)
