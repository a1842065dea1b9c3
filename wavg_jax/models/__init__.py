"""Networks, and what makes a `Task` of one: by hand, of a Linen module, of an NNX module."""

from wavg_jax.models.cnn import CNN
from wavg_jax.models.linen import from_linen
from wavg_jax.models.mlp import MLP
from wavg_jax.models.nnx import from_nnx
from wavg_jax.models.task import classifier

__all__ = ["CNN", "MLP", "classifier", "from_linen", "from_nnx"]
