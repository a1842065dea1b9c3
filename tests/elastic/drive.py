"""Drivers of elastic runs, each a process of its own: `python drive.py WHAT WORKDIR`."""

import os
import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import optax
from runs import INNER, TASK, WEIGHTED
from small import sharded

import wavg_jax as wavg
from wavg_jax import elastic

SETTINGS = {"inner": INNER, "local_steps": 4, "rounds": 6, "batch_size": 8, "progress": False}
STORE = wavg.Store(checkpoint_every=2)


def train(workdir, on_round=(), resume=False):
    """A run, killed by `on_round` or not."""
    workers = elastic.Workers(2, hook=note(workdir))
    arguments = TASK, sharded(4), WEIGHTED
    return elastic.fit(
        *arguments, workers=workers, workdir=workdir, on_round=on_round, resume=resume, store=STORE, **SETTINGS
    )


def note(workdir):
    def hook(point, worker, round, reply):
        if point == "hold":
            with open(pathlib.Path(workdir).with_suffix(".pids"), "a") as file:
                file.write(f"{os.getpid()}\n")
        return reply

    return hook


def killed(workdir):
    def die(row):
        if row["round"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    train(workdir, die)


def resumed(workdir):
    result = train(workdir, resume=True)
    np.savez(pathlib.Path(workdir).with_suffix(".npz"), **result.params)


def listening(workdir):
    """Says on which addresses the processes of the cluster listen."""
    from wavg_jax.elastic.cluster import connected

    with connected(None):
        own = {pathlib.Path(f"/proc/{pid}/fd") for pid in descendants(os.getpid())}
        sockets = {os.readlink(fd) for folder in own for fd in folder.iterdir() if fd.is_symlink()}
        for table in ("tcp", "tcp6"):
            for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A" and f"socket:[{columns[9]}]" in sockets:
                    print(columns[1].rpartition(":")[0])


def descendants(pid):
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [d for child in children for d in descendants(child)]


def full(workdir):
    """The object store is full when round 3 begins, until the driver has tried in vain."""
    import ray

    ray.init(
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        _system_config={
            "automatic_object_spilling_enabled": False,
            "object_store_full_delay_ms": 10,
            "oom_grace_period_s": 1,
            "local_fs_capacity_threshold": 0.0,  # else objects without room fill the disk of the machine first
        },
    )
    held, tries = [], []

    def fill(row):
        size = 2**23
        while row["round"] == 2 and size > 2**16:
            try:
                held.append(ray.put(np.zeros(size, np.uint8)))
            except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError):
                size //= 4

    def deadline(seconds):
        if held:
            tries.append(1)
            held.clear()
        return 60.0

    task = wavg.models.from_linen(wavg.models.MLP(hidden=(30_000,), classes=3), (4,))
    run = {"inner": optax.sgd(0.1), "local_steps": 2, "rounds": 4, "batch_size": 8, "progress": False}
    workers = elastic.Workers(2, deadline=deadline, min_replicas=4)
    result = elastic.fit(task, sharded(4), WEIGHTED, workers=workers, on_round=fill, **run)
    print("tries", len(tries), "missing", [row["missing"] for row in result.rows[1:]])


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
