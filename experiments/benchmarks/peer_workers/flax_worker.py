"""Plain flax and optax, one jitted step per call.

sync: the training loop that a user writes, one model, H steps with K times the batch.
loop: K replicas one after the other, H steps each, then the mean of their parameters.

The data lie on the device, and a step gathers its batch there: feeding could not be cheaper.
"""

from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.peer_workers import stock_flax
from experiments.benchmarks.peer_workers.lines import Arrays, Job, ReadyJob, serve


def build(job: Job) -> ReadyJob:
    """Prepares a job."""
    inner, net = optax.sgd(job.rate, momentum=job.momentum), stock_flax.NETWORKS[job.network]
    arrays = job.read("data")
    x, y, indices = jnp.asarray(arrays["x"]), jnp.asarray(arrays["y"]), arrays["indices"]
    if job.system == "sync":
        indices = indices.transpose(1, 0, 2).reshape(1, job.steps, -1)

    @partial(jax.jit, donate_argnums=0)
    def step(state: tuple[Any, Any, Any], x: jax.Array, y: jax.Array, indices: np.ndarray) -> tuple[Any, Any, Any]:
        params, stats, opt_state = state
        gradient, stats = jax.grad(partial(stock_flax.loss, net), has_aux=True)(params, stats, x[indices], y[indices])
        updates, opt_state = inner.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    @jax.jit
    def mean(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)

    params, stats = stock_flax.start(job.read("start"))
    replicas = [jax.tree.map(jnp.copy, (params, stats, inner.init(params))) for _ in indices]

    def run() -> None:
        for k, rows in enumerate(indices):
            for row in rows:
                replicas[k] = step(replicas[k], x, y, row)
        if job.system == "loop":
            average = mean([replica[:2] for replica in replicas])
            for k, (_, _, opt_state) in enumerate(replicas):
                replicas[k] = (*jax.tree.map(jnp.copy, average), opt_state)
        jax.block_until_ready(replicas)

    def check() -> Arrays:
        run()
        return stock_flax.named(replicas[0][0])

    notes = {name: metadata.version(name) for name in ("jax", "flax", "optax")}
    return ReadyJob(check, run, {"versions": notes, "devices": jax.device_count()})


if __name__ == "__main__":
    serve(build)
