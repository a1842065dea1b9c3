"""EXO Gym's federated averaging: a process for each replica, which average through gloo.

As in `example/mnist.py` of its repository, with `FedAvgStrategy`: `Trainer(model, ...).fit(strategy, num_nodes, ...)`.
One `fit` goes on for good, and its strategy waits between rounds. Nothing is validated or logged. With less than a core
for each, the processes have a thread each and share the cores.
"""

import os
import threading
from typing import Any

import exogym.trainer
import torch
from exogym import Trainer
from exogym.strategy.federated_averaging import FedAvgStrategy
from exogym.strategy.optim import OptimSpec
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from experiments.benchmarks.peer_workers import torch_networks, torch_training
from experiments.benchmarks.peer_workers.gates import Entrance, Gate
from experiments.benchmarks.peer_workers.lines import Job, ReadyJob, first_line, serve


def _join(backend: str, rank: int, world_size: int) -> None:
    torch.distributed.init_process_group(backend, rank=rank, world_size=world_size)


# Its own asks gloo for the interface lo0, which only macOS has. The replicas' processes import this module too.
exogym.trainer.init_process_group_portsafe = _join


class Loss(nn.Module):
    """The network as EXO Gym wants it: a batch in, its loss out."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of a batch."""
        x, y = batch
        return functional.cross_entropy(self.net(x), y)


class Rounds(FedAvgStrategy):
    """Federated averaging that waits between rounds."""

    def __init__(self, job: Job, gate: str, threads: int):
        optimizer = OptimSpec(torch.optim.SGD, lr=job.rate, momentum=job.momentum)
        super().__init__(optim_spec=optimizer, H=job.steps)
        self.gate, self.threads = gate, threads
        self.entrance: Entrance

    def _init_node(self, model: Any, rank: int, num_nodes: int) -> None:
        torch.set_num_threads(self.threads)
        super()._init_node(model, rank, num_nodes)
        # It counts steps from 0 and looks before it counts: its first round would have a step more than the others.
        self.local_step = 1
        self.entrance = Entrance(self.gate)

    def zero_grad(self) -> None:
        """Begins a step, and the first of a round once the worker says so."""
        if self.local_step % self.H == 1 % self.H:
            self.entrance.wait()
        super().zero_grad()

    def _communicate(self) -> None:
        super()._communicate()
        if self.local_step % self.H == 0:
            first = self.rank == 0 and self.local_step == self.H
            named = {name.removeprefix("net."): x for name, x in self.model.named_parameters()} if first else {}
            self.entrance.done(torch_networks.named(named))


def build(job: Job) -> ReadyJob:
    """Prepares a job."""
    gate = Gate(job)
    images, labels, indices = torch_training.tensors(job)
    # Its sampler deals the samples out to the replicas one by one.
    order = indices.reshape(job.replicas, -1).T.reshape(-1)
    dataset = TensorDataset(images[order], labels[order])
    threads = max(1, len(os.sched_getaffinity(0)) // job.replicas)
    trainer = Trainer(Loss(torch_training.network(job)), dataset, dataset, device="cpu")
    failures: list[str] = []

    def fit() -> None:
        try:
            trainer.fit(
                num_epochs=1,
                strategy=Rounds(job, gate.address, threads),
                num_nodes=job.replicas,
                max_steps=10**9,
                batch_size=job.batch,
                minibatch_size=job.batch,
                shuffle=False,
                val_size=0,
                val_interval=10**9,
                disable_logging=True,
            )
        except Exception as error:
            failures.append(first_line(f"{type(error).__name__}: {error}"))

    threading.Thread(target=fit, daemon=True).start()
    gate.admit(lambda: failures[0] if failures else None)

    def run() -> None:
        gate.round()

    notes = torch_training.notes("exogym") | {"threads": threads, "processes": job.replicas}
    return ReadyJob(gate.round, run, notes, gate.close)


if __name__ == "__main__":
    serve(build)
