"""Networks, and adapters that make a `Task` of a Linen module, an NNX module or plain functions.

Flax is imported at first use.
"""

from typing import TYPE_CHECKING

from wavg_jax import lazy

if TYPE_CHECKING:
    from wavg_jax.models.airbench import Airbench, whitening
    from wavg_jax.models.cnn import CNN
    from wavg_jax.models.decoding import generate
    from wavg_jax.models.linen import from_linen
    from wavg_jax.models.metrics import with_metrics
    from wavg_jax.models.mirror import mirrored
    from wavg_jax.models.mlp import MLP
    from wavg_jax.models.nnx import from_nnx
    from wavg_jax.models.resnet import ResNet
    from wavg_jax.models.rewrite import fast
    from wavg_jax.models.task import classifier, language_model, regressor
    from wavg_jax.models.train_state import from_train_state, to_train_state
    from wavg_jax.models.transformer import Transformer
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {
            "Airbench": "airbench",
            "CNN": "cnn",
            "MLP": "mlp",
            "ResNet": "resnet",
            "Transformer": "transformer",
            "classifier": "task",
            "fast": "rewrite",
            "from_linen": "linen",
            "from_nnx": "nnx",
            "from_train_state": "train_state",
            "generate": "decoding",
            "language_model": "task",
            "mirrored": "mirror",
            "regressor": "task",
            "to_train_state": "train_state",
            "whitening": "airbench",
            "with_metrics": "metrics",
        },
    )

__all__ = [
    "CNN",
    "MLP",
    "Airbench",
    "ResNet",
    "Transformer",
    "classifier",
    "fast",
    "from_linen",
    "from_nnx",
    "from_train_state",
    "generate",
    "language_model",
    "mirrored",
    "regressor",
    "to_train_state",
    "whitening",
    "with_metrics",
]
