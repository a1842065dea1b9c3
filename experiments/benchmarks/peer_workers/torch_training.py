"""What the systems on PyTorch share: tensors of a job, its network, and local steps."""

from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from experiments.benchmarks.peer_workers import torch_networks
from experiments.benchmarks.peer_workers.lines import Job

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def tensors(job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [N, C, H, W], labels [N] and indices [K, H, B] of a job."""
    data = job.read("data")
    images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(data["y"]).long(), torch.from_numpy(data["indices"]).long()


def network(job: Job) -> nn.Module:
    """A job's network with the parameters of the start, in training mode."""
    model = torch_networks.NETWORKS[job.network]()
    torch_networks.load(model, job.read("start"))
    return model.train()


def sgd(job: Job, model: nn.Module) -> torch.optim.SGD:
    """A job's optimizer."""
    return torch.optim.SGD(model.parameters(), lr=job.rate, momentum=job.momentum)


def batches(images: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> Iterator[tuple]:
    """The batches of one replica's indices [H, B], from tensors in memory."""
    for rows in order:
        yield images[rows], labels[rows]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, given: Batches) -> None:
    """Takes a step on every batch."""
    for x, y in given:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def notes(*packages: str) -> dict[str, Any]:
    """For the row: versions of PyTorch and more packages, its threads here, and the instruction set it uses."""
    versions = {"torch": torch.__version__} | {name: metadata.version(name) for name in packages}
    return {"versions": versions, "threads": torch.get_num_threads(), "isa": torch.backends.cpu.get_cpu_capability()}
