"""torchft's LocalSGD: a process for each replica, which average through gloo under a lighthouse.

As in `examples/localsgd/train_localsgd.py` of its repository: an optimizer inside `LocalSGD(manager, model, optimizer,
sync_every)`, every replica a group of one. All start from the same parameters, so that none sends its own at first.
With less than a core for each, the processes have a thread each and share the cores.
"""

import multiprocessing
import os
from datetime import timedelta

import numpy as np
import torch
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import LocalSGD

from experiments.benchmarks.peer_workers import torch_networks, torch_training
from experiments.benchmarks.peer_workers.gates import Entrance, Gate
from experiments.benchmarks.peer_workers.lines import Job, ReadyJob, serve

LONG = timedelta(minutes=30)


def build(job: Job) -> ReadyJob:
    """Prepares a job."""
    gate = Gate(job)
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=job.replicas, quorum_tick_ms=10)
    images, labels, indices = torch_training.tensors(job)
    spawn, processes = multiprocessing.get_context("spawn"), []
    for k, rows in enumerate(indices):
        batches = images[rows].numpy(), labels[rows].numpy()
        given = (job, k, *batches, gate.address, lighthouse.address())
        processes.append(spawn.Process(target=replica, args=given, daemon=True))
        processes[-1].start()
    gate.admit(lambda: next((f"a replica ended with {p.exitcode}" for p in processes if p.exitcode), None))

    def run() -> None:
        assert lighthouse is not None  # it lives as long as this function
        gate.round()

    notes = torch_training.notes("torchft") | {"threads": threads(job), "processes": job.replicas}
    return ReadyJob(gate.round, run, notes, gate.close)


def threads(job: Job) -> int:
    """Threads of a replica's process."""
    return max(1, len(os.sched_getaffinity(0)) // job.replicas)


def replica(job: Job, k: int, images: np.ndarray, labels: np.ndarray, gate: str, lighthouse: str) -> None:
    """Trains replica k on its batches [H, B, ...], round after round."""
    torch.set_num_threads(threads(job))
    batches = list(zip(torch.from_numpy(images), torch.from_numpy(labels), strict=True))
    model = torch_training.network(job)
    optimizer = torch_training.sgd(job, model)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=LONG),
        load_state_dict=lambda state: None,  # nobody falls behind
        state_dict=dict,
        min_replica_size=job.replicas,
        use_async_quorum=False,
        timeout=LONG,
        quorum_timeout=LONG,
        heartbeat_interval=timedelta(seconds=1),  # by default ten times as often, while others are measured
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica_{k}",
        hostname="127.0.0.1",
        init_sync=False,
    )
    entrance, rounds = Entrance(gate), 0
    with LocalSGD(manager, model, optimizer, sync_every=job.steps):
        while True:
            entrance.wait()
            torch_training.train(model, optimizer, batches)
            rounds += 1
            assert manager.current_step() == rounds, "a round was not averaged"
            entrance.done(torch_networks.named(dict(model.named_parameters())) if k == 0 and rounds == 1 else None)


if __name__ == "__main__":
    serve(build)
