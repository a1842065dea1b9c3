"""Flower's simulation of federated averaging: clients in Ray's processes, one for each core.

As in the example `quickstart-pytorch` of its repository (ClientApp, ServerApp, `FedAvg`), the clients' data in memory
and nothing evaluated. A client's optimizer starts anew in every round. The server looks for messages and replies every
tenth of a second, as the simulation does by default.
"""

import os

# Before the imports that read them: nobody is told of this run.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import queue
import threading

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from experiments.benchmarks.peer_workers import flower_client, torch_networks, torch_training
from experiments.benchmarks.peer_workers.lines import Arrays, Job, ReadyJob, serve


def build(job: Job) -> ReadyJob:
    """Prepares a job."""
    model, cores = torch_training.network(job), len(os.sched_getaffinity(0))
    asked: queue.Queue[bool] = queue.Queue()
    averaged: queue.Queue[ArrayRecord | BaseException] = queue.Queue()
    server = ServerApp()
    config = ConfigRecord(job._asdict())

    @server.main()
    def rounds(grid: Grid, context: Context) -> None:
        everyone = {"min_train_nodes": job.replicas, "min_available_nodes": job.replicas}
        strategy = FedAvg(fraction_evaluate=0.0, **everyone)
        arrays = ArrayRecord(model.state_dict())
        while asked.get():
            result = strategy.start(grid, arrays, num_rounds=1, train_config=config)
            arrays = result.arrays
            averaged.put(arrays)

    def simulate() -> None:
        backend = {
            "init_args": {"num_cpus": cores, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        }
        try:
            run_simulation(server, flower_client.app, job.replicas, backend_config=backend)
            raise RuntimeError("the simulation ended")
        except BaseException as error:
            averaged.put(error)

    simulation = threading.Thread(target=simulate, daemon=True)
    simulation.start()

    def round_() -> ArrayRecord:
        asked.put(True)
        found = averaged.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def check() -> Arrays:
        model.load_state_dict(round_().to_torch_state_dict())
        return torch_networks.named(dict(model.named_parameters()))

    def run() -> None:
        round_()

    def close() -> None:
        asked.put(False)
        simulation.join()  # and with it Ray's processes

    notes = torch_training.notes("flwr", "ray") | {"threads": 1, "processes": cores}
    return ReadyJob(check, run, notes, close)


if __name__ == "__main__":
    serve(build)
