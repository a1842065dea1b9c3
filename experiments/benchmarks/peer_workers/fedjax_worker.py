"""FedJAX's federated averaging: a round of K clients, H local steps each.

FedJAX passes over its clients' samples in the order they are in and does not shuffle them here: it is spared that time,
and sees the batches that all others see. As federated averaging says, a client's momentum starts at zero in every
round. BatchNorm works with the statistics of its batch; there is nowhere to keep running ones.
"""

from functools import partial
from importlib import metadata
from typing import Any

import jax

# FedJAX 0.0.17 is from before these names were taken away, and nothing newer is published.
jax.tree_map = jax.tree.map  # type: ignore[attr-defined]

import fedjax  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402

from experiments.benchmarks.peer_workers import stock_flax  # noqa: E402
from experiments.benchmarks.peer_workers.lines import Arrays, Job, System, serve  # noqa: E402


def build(case: Job) -> System:
    """Builds the system of a job."""
    net, (params, stats) = stock_flax.NETWORKS[case.network], stock_flax.start(case.read("start"))

    def gradient(params: Any, batch: Any, rng: jax.Array) -> Any:
        return jax.grad(partial(stock_flax.loss, net), has_aux=True)(params, stats, batch["x"], batch["y"])[0]

    algorithm = fed_avg.federated_averaging(
        gradient,
        fedjax.optimizers.sgd(case.rate, case.momentum),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(case.batch, num_epochs=None, num_steps=case.steps, skip_shuffle=True),
    )
    data = case.read("data")
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
    return System(check, run, {"versions": versions, "devices": jax.device_count()})


if __name__ == "__main__":
    serve(build)
