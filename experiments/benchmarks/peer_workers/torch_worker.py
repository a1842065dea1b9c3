"""PyTorch on the CPU, with as many threads as there are cores.

loop: K replicas one after the other, H steps each, then the mean of their parameters and buffers; tensors in memory.
channels_last: the same with networks and images in that memory format.
loader: the same, the batches from a DataLoader in the worker's own process, in the order that all others see; with
  channels_last for convolutions.
vmap: torch.func.vmap of the gradient over stacked modules.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from experiments.benchmarks.peer_workers import torch_networks, torch_training
from experiments.benchmarks.peer_workers.lines import Arrays, Job, ReadyJob, serve


def build(job: Job) -> ReadyJob:
    """Prepares a job."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    images, labels, indices = torch_training.tensors(job)
    models = [torch_training.network(job) for _ in range(job.replicas)]
    made = _stacked if job.system == "vmap" else _in_turn
    check, run = made(job, models, images, labels, indices)
    return ReadyJob(check, run, torch_training.notes())


def _in_turn(job: Job, models: list[nn.Module], images: Any, labels: Any, indices: torch.Tensor) -> tuple[Any, Any]:
    """One model after another."""
    convolutional = job.network in torch_networks.CONVOLUTIONAL
    memory_format = torch.contiguous_format
    if job.system == "channels_last" or (job.system == "loader" and convolutional):
        memory_format = torch.channels_last
        images = images.contiguous(memory_format=memory_format)
        models = [model.to(memory_format=memory_format) for model in models]
    optimizers = [torch_training.sgd(job, model) for model in models]
    dataset = TensorDataset(images, labels)

    def given(order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        found: torch_training.Batches = torch_training.batches(images, labels, order)
        if job.system == "loader":
            found = DataLoader(dataset, job.batch, sampler=order.reshape(-1).tolist())
        for x, y in found:
            yield x.contiguous(memory_format=memory_format), y

    def run() -> None:
        for model, optimizer, order in zip(models, optimizers, indices, strict=True):
            torch_training.train(model, optimizer, given(order))
        _average([model.state_dict() for model in models])

    def check() -> Arrays:
        run()
        return torch_networks.named(dict(models[0].named_parameters()))

    return check, run


@torch.no_grad()
def _average(states: list[dict[str, torch.Tensor]]) -> None:
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            mean = torch.stack([state[name] for state in states]).mean(0)
            for state in states:
                state[name].copy_(mean)


def _stacked(job: Job, models: list[nn.Module], images: Any, labels: Any, indices: torch.Tensor) -> tuple[Any, Any]:
    """All models in one call."""
    params, buffers = torch.func.stack_module_state(models)
    skeleton = models[0].to("meta")
    optimizer = torch.optim.SGD(params.values(), lr=job.rate, momentum=job.momentum)

    def loss(params: Any, buffers: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(torch.func.functional_call(skeleton, (params, buffers), (x,)), y)

    gradients = torch.func.vmap(torch.func.grad(loss))

    def run() -> None:
        for h in range(job.steps):
            rows = indices[:, h]
            found = gradients(params, buffers, images[rows], labels[rows])
            for name, tensor in params.items():
                tensor.grad = found[name]
            optimizer.step()
        with torch.no_grad():
            for tensor in (*params.values(), *buffers.values()):
                if tensor.is_floating_point():
                    tensor.copy_(tensor.mean(0, keepdim=True).expand_as(tensor))

    def check() -> Arrays:
        run()
        return torch_networks.named({name: tensor[0] for name, tensor in params.items()})

    return check, run


if __name__ == "__main__":
    serve(build)
