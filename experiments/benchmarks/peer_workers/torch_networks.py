"""The networks in PyTorch, their layers named as ours; and parameters to and from flax's layouts."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class MLP(nn.Module):
    """Dense layers with ReLU."""

    def __init__(self, *widths: int):
        super().__init__()
        self.last = len(widths) - 2
        for i, (inside, outside) in enumerate(itertools.pairwise(widths)):
            self.add_module(f"Dense_{i}", nn.Linear(inside, outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10]."""
        x = x.flatten(1)
        for i in range(self.last):
            x = functional.relu(self.get_submodule(f"Dense_{i}")(x))
        return self.get_submodule(f"Dense_{self.last}")(x)


class CNN(nn.Module):
    """Two convolutions with pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv_0 = nn.Conv2d(1, 32, 3, padding="same")
        self.Conv_1 = nn.Conv2d(32, 64, 3, padding="same")
        self.head = MLP(7 * 7 * 64, 128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10]."""
        for conv in (self.Conv_0, self.Conv_1):
            x = functional.max_pool2d(functional.relu(conv(x)), 2)
        return self.head(x)


class ResNet(nn.Module):
    """ResNet-20 with shortcuts of option A."""

    def __init__(self) -> None:
        super().__init__()
        inside = 3
        for i in range(19):
            channels = 16 * 2 ** (max(i - 1, 0) // 6)
            stride = 2 if i in (7, 13) else 1
            self.add_module(f"Conv_{i}", nn.Conv2d(inside, channels, 3, stride, padding=1, bias=False))
            self.add_module(f"BatchNorm_{i}", nn.BatchNorm2d(channels))
            inside = channels
        self.Dense_0 = nn.Linear(64, 10)

    def conv_norm(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Convolution and BatchNorm number i."""
        return self.get_submodule(f"BatchNorm_{i}")(self.get_submodule(f"Conv_{i}")(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10]."""
        x = functional.relu(self.conv_norm(0, x))
        for i in range(1, 19, 2):
            y = self.conv_norm(i + 1, functional.relu(self.conv_norm(i, x)))
            more = y.shape[1] - x.shape[1]
            shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, more)) if more else x
            x = functional.relu(y + shortcut)
        return self.Dense_0(x.mean((2, 3)))


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(784, 512, 512, 10),
    "digits_mlp": lambda: MLP(64, 128, 10),
    "cnn": CNN,
    "resnet20": ResNet,
}
CONVOLUTIONAL = ("cnn", "resnet20")
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_FLATTENED = {"head.Dense_0": (7, 7, 64)}
"""Height, width and channels of the image that a dense layer of the CNN reads: PyTorch flattens channels first."""


def load(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Gives a module the parameters and statistics of `start.npz`."""
    state: dict[str, Any] = {}
    for name, array in arrays.items():
        *layers, leaf = name.split("/")[1:]
        layer = ".".join(layers)
        if leaf == "kernel":
            if layer in _FLATTENED:
                array = array.reshape(*_FLATTENED[layer], -1).transpose(2, 0, 1, 3).reshape(array.shape)
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        state[f"{layer}.{_LEAVES[leaf]}"] = torch.tensor(np.ascontiguousarray(array))
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not [*unexpected, *(name for name in missing if not name.endswith("num_batches_tracked"))]


def named(parameters: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Parameters as in `start.npz`."""
    found = {}
    for name, tensor in parameters.items():
        layer, _, leaf = name.rpartition(".")
        array = tensor.detach().contiguous().numpy()
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
        if leaf == "kernel":
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
            if layer in _FLATTENED:
                height, width, channels = _FLATTENED[layer]
                array = array.reshape(channels, height, width, -1).transpose(1, 2, 0, 3).reshape(array.shape)
        found[f"params/{layer.replace('.', '/')}/{leaf}"] = array
    return found
