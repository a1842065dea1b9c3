"""Networks, and what makes a `Task` of one: by hand, of a Linen module, of an NNX module."""

from wavg_jax.models.cnn import CNN
from wavg_jax.models.linen import from_linen
from wavg_jax.models.mlp import MLP
from wavg_jax.models.nnx import from_nnx
from wavg_jax.models.resnet import ResNet
from wavg_jax.models.task import classifier, language_model
from wavg_jax.models.transformer import Transformer

__all__ = ["CNN", "MLP", "ResNet", "Transformer", "classifier", "from_linen", "from_nnx", "language_model"]
