"""The networks as a Keras user writes them, their layers named as ours; and parameters to and from `start.npz`.

Keras reads its backend when it is imported, so import this module after KERAS_BACKEND is set. Its names take no "/"
and, on PyTorch, no ".", so "__" stands between a module and its part.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

_LEAVES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


def _dense(x: Any, widths: Sequence[int], prefix: str = "") -> Any:
    for i, width in enumerate(widths):
        last = i == len(widths) - 1
        x = layers.Dense(width, activation=None if last else "relu", name=f"{prefix}Dense_{i}")(x)
    return x


def _mlp(*widths: int) -> Callable[[Any], Any]:
    return lambda x: _dense(layers.Flatten()(x), widths)


def _cnn(x: Any) -> Any:
    for i, channels in enumerate((32, 64)):
        x = layers.Conv2D(channels, 3, padding="same", activation="relu", name=f"Conv_{i}")(x)
        x = layers.MaxPooling2D(2)(x)
    return _dense(layers.Flatten()(x), (128, 10), "head__")


def _resnet(x: Any) -> Any:
    def conv_norm(i: int, x: Any) -> Any:
        channels, stride = 16 * 2 ** (max(i - 1, 0) // 6), 2 if i in (7, 13) else 1
        # "same" would pad an even side on one side only where the stride is 2.
        x = layers.Conv2D(channels, 3, stride, use_bias=False, name=f"Conv_{i}")(layers.ZeroPadding2D(1)(x))
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"BatchNorm_{i}")(x)

    x = layers.ReLU()(conv_norm(0, x))
    for i in range(1, 19, 2):
        y = conv_norm(i + 1, layers.ReLU()(conv_norm(i, x)))
        more = y.shape[-1] - x.shape[-1]
        shortcut = ops.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(0, more)]) if more else x
        x = layers.ReLU()(layers.Add()([y, shortcut]))
    return _dense(layers.GlobalAveragePooling2D()(x), (10,))


NETWORKS: Mapping[str, Callable[[Any], Any]] = {
    "mlp": _mlp(512, 512, 10),
    "digits_mlp": _mlp(128, 10),
    "cnn": _cnn,
    "resnet20": _resnet,
}


def build(name: str, shape: Sequence[int], start: Mapping[str, np.ndarray]) -> keras.Model:
    """A network for images of a shape [H, W, C], with the parameters and statistics of `start.npz`."""
    images = keras.Input(shape)
    model = keras.Model(images, NETWORKS[name](images))
    for path, variable in _variables(model):
        variable.assign(start[path])
    return model


def named(model: keras.Model) -> dict[str, np.ndarray]:
    """Parameters as in `start.npz`."""
    return {path: np.asarray(ops.convert_to_numpy(x)) for path, x in _variables(model) if path.startswith("params/")}


def _variables(model: keras.Model) -> list[tuple[str, Any]]:
    found = []
    for layer in model.layers:
        for variable in layer.variables:
            leaf = _LEAVES.get(variable.name, variable.name)
            collection = "batch_stats" if leaf in ("mean", "var") else "params"
            found.append((f"{collection}/{layer.name.replace('__', '/')}/{leaf}", variable))
    return found
