"""Networks as users write them, with stock layers of flax and `jax.lax` and nothing of ours inside."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from experiments.benchmarks.peer_workers import stock_flax
from wavg_jax import models
from wavg_jax.base import PyTree, Task


class NnxCNN(nnx.Module):
    """`stock_flax.CNN` as an NNX module, for images of one channel and `side` x `side` pixels."""

    def __init__(self, side: int, rngs: nnx.Rngs):
        self.convs = nnx.List([nnx.Conv(1, 32, (3, 3), rngs=rngs), nnx.Conv(32, 64, (3, 3), rngs=rngs)])
        self.hidden = nnx.Linear((side // 4) ** 2 * 64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, 10]."""
        for conv in self.convs:
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
        return self.out(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


class Separable(nn.Module):
    """Residual blocks of depthwise and 1x1 convolutions with BatchNorm and mean pooling, as in MobileNet."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [B, 10]."""

        def conv_norm(x: jax.Array, channels: int, side: int, groups: int = 1) -> jax.Array:
            x = nn.Conv(channels, (side, side), feature_group_count=groups, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(conv_norm(x, 32, 3))
        for channels in (32, 64, 128):
            y = nn.relu(conv_norm(x, x.shape[-1], 3, groups=x.shape[-1]))
            y = conv_norm(y, channels, 1)
            shortcut = x if channels == x.shape[-1] else conv_norm(x, channels, 1)
            x = nn.relu(shortcut + y)
            if min(x.shape[1:3]) > 1:
                # The size as a float, since flax divides by it and strict promotion refuses a whole number.
                x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4.0
        return nn.Dense(10)(x.mean((1, 2)))


def channels_first(side: int) -> Task:
    """`stock_flax.CNN` by hand over a dict, with images [B, C, H, W] inside."""

    def apply(params: PyTree, mutable: PyTree, x: jax.Array, **unused: Any) -> tuple[jax.Array, PyTree]:
        x = x.transpose(0, 3, 1, 2)
        for name in ("first", "second"):
            x = jax.nn.relu(lax.conv(x, params[name], (1, 1), "SAME") + params[f"{name}_bias"].reshape(1, -1, 1, 1))
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["hidden"] + params["hidden_bias"][None])
        return x @ params["out"] + params["out_bias"][None], mutable

    shapes = {
        "first": (32, 1, 3, 3),
        "second": (64, 32, 3, 3),
        "hidden": ((side // 4) ** 2 * 64, 128),
        "out": (128, 10),
    }
    biases = {"first_bias": 32, "second_bias": 64, "hidden_bias": 128, "out_bias": 10}
    return models.classifier(_init(shapes, biases), apply)


def strided(side: int) -> Task:
    """By hand: a convolution, one with stride 2, one dilated, one with stride 2."""

    def apply(params: PyTree, mutable: PyTree, x: jax.Array, **unused: Any) -> tuple[jax.Array, PyTree]:
        for name, stride, dilation in (("a", 1, 1), ("b", 2, 1), ("c", 1, 2), ("d", 2, 1)):
            x = lax.conv_general_dilated(
                x,
                params[name],
                (stride, stride),
                "SAME",
                rhs_dilation=(dilation, dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x)
        return x.mean((1, 2)) @ params["out"], mutable

    shapes = {"a": (3, 3, 1, 32), "b": (3, 3, 32, 64), "c": (3, 3, 64, 64), "d": (3, 3, 64, 64), "out": (64, 10)}
    return models.classifier(_init(shapes, {}), apply)


def _init(shapes: dict[str, tuple[int, ...]], biases: dict[str, int]) -> Callable[[jax.Array], tuple[PyTree, PyTree]]:
    def init(rng: jax.Array) -> tuple[PyTree, PyTree]:
        keys = jax.random.split(rng, len(shapes))
        weights = {name: 0.05 * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}
        return weights | {name: jnp.zeros(size) for name, size in biases.items()}, {}

    return init


class Kind(NamedTuple):
    """A user's network.

    Attributes:
      make: the side of the images in pixels -> the task.
      channels: of the images.
    """

    make: Callable[[int], Task]
    channels: int


KINDS = {
    "linen_cnn": Kind(lambda side: models.from_linen(stock_flax.CNN(), (side, side, 1)), 1),
    "nnx_cnn": Kind(lambda side: models.from_nnx(lambda rngs: NnxCNN(side, rngs), (side, side, 1)), 1),
    "channels_first": Kind(channels_first, 1),
    "strided": Kind(strided, 1),
    "separable": Kind(lambda side: models.from_linen(Separable(), (side, side, 3)), 3),
}
