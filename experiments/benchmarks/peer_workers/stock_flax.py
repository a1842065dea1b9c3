"""The networks as a flax user writes them, with flax's own convolution and pooling; parameters are named as ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util


class MLP(nn.Module):
    """Dense layers with ReLU."""

    hidden: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Logits [B, 10]."""
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Two convolutions with pooling."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Logits [B, 10]."""
        for channels in (32, 64):
            x = nn.max_pool(nn.relu(nn.Conv(channels, (3, 3))(x)), (2, 2), (2, 2))
        return MLP((128,), name="head")(x)


class ResNet(nn.Module):
    """ResNet-20 with shortcuts of option A."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Logits [B, 10]."""

        def conv_norm(x: jax.Array, channels: int, stride: int) -> jax.Array:
            x = nn.Conv(channels, (3, 3), strides=stride, padding=1, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(conv_norm(x, 16, 1))
        for stage in range(3):
            for block in range(3):
                stride, channels = (2 if stage and not block else 1), 16 * 2**stage
                y = conv_norm(nn.relu(conv_norm(x, channels, stride)), channels, 1)
                shortcut = x[:, ::stride, ::stride]
                x = nn.relu(y + jnp.pad(shortcut, [(0, 0)] * 3 + [(0, channels - x.shape[-1])]))
        return nn.Dense(10)(x.mean((1, 2)))


NETWORKS: Mapping[str, nn.Module] = {
    "mlp": MLP((512, 512)),
    "digits_mlp": MLP((128,)),
    "cnn": CNN(),
    "resnet20": ResNet(),
}


def loss(net: nn.Module, params: Any, stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    """Mean cross-entropy in training mode, and the updated collections, such as BatchNorm statistics."""
    logits, updated = net.apply({"params": params, **stats}, x, train=True, mutable=list(stats))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), {**stats, **updated}


def start(arrays: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """The parameters and the other collections of `start.npz`."""
    stats = traverse_util.unflatten_dict({name: jnp.asarray(x) for name, x in arrays.items()}, sep="/")
    return stats.pop("params"), stats


def named(params: Any) -> dict[str, np.ndarray]:
    """Parameters, named as in `start.npz`."""
    return {name: np.asarray(x) for name, x in traverse_util.flatten_dict({"params": params}, sep="/").items()}
