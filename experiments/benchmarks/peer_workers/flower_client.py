"""A Flower client on PyTorch, in a module of its own for the processes that import it."""

import functools
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from experiments.benchmarks.peer_workers import torch_networks, torch_training
from experiments.benchmarks.peer_workers.lines import Job

app = ClientApp()


@functools.cache
def _tensors(job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch_training.tensors(job)


@app.train()
def train(msg: Message, context: Context) -> Message:
    """H local steps from the parameters received."""
    given: Any = msg.content
    job = Job(**{name: given["config"][name] for name in Job._fields})
    images, labels, indices = _tensors(job)
    model = torch_networks.NETWORKS[job.network]()
    model.load_state_dict(given["arrays"].to_torch_state_dict())
    order = indices[int(context.node_config["partition-id"])]
    batches = torch_training.batches(images, labels, order)
    torch_training.train(model.train(), torch_training.sgd(job, model), batches)
    metrics = MetricRecord({"num-examples": order.numel()})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)
