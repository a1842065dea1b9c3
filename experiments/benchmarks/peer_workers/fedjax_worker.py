"""FedJAX's federated averaging: a round of K clients, H local steps each.

FedJAX does not shuffle its clients' samples here: it saves that time and sees the same batches as all others. As in
federated averaging, a client's momentum starts at zero in every round. BatchNorm uses its batch's statistics, since
FedJAX has no place for running ones.
"""

from functools import partial
from importlib import metadata
from typing import Any

import jax

# FedJAX 0.0.17, the newest release, uses a name that JAX has removed since.
jax.tree_map = jax.tree.map  # type: ignore[attr-defined]

import fedjax  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402

from experiments.benchmarks.peer_workers import stock_flax  # noqa: E402
from experiments.benchmarks.peer_workers.lines import Arrays, Job, ReadyJob, serve  # noqa: E402


def build(job: Job) -> ReadyJob:
    """Prepares a job."""
    net, (params, stats) = stock_flax.NETWORKS[job.network], stock_flax.start(job.read("start"))

    def gradient(params: Any, batch: Any, rng: jax.Array) -> Any:
        return jax.grad(partial(stock_flax.loss, net), has_aux=True)(params, stats, batch["x"], batch["y"])[0]

    algorithm = fed_avg.federated_averaging(
        gradient,
        fedjax.optimizers.sgd(job.rate, job.momentum),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(job.batch, num_epochs=None, num_steps=job.steps, skip_shuffle=True),
    )
    data = job.read("data")
    clients = []
    for k, rows in enumerate(data["indices"]):
        mine = rows.reshape(-1)
        client = fedjax.ClientDataset({"x": data["x"][mine], "y": data["y"][mine]})
        clients.append((str(k).encode(), client, jax.random.PRNGKey(k)))
    state = algorithm.init(params)

    def run() -> None:
        nonlocal state
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)

    def check() -> Arrays:
        run()
        return stock_flax.named(state.params)

    versions = {name: metadata.version(name) for name in ("fedjax", "jax", "flax")}
    return ReadyJob(check, run, {"versions": versions, "devices": jax.device_count()})


if __name__ == "__main__":
    serve(build)
