"""Keras 3: `compile` and `fit`, as in its guide "Training & evaluation with the built-in methods".

loop: on JAX, K models one after the other, `fit` for H steps each, then the mean of their weights.
fit: on JAX, one model, `fit` for H steps with K times the batch.
torch_fit: the same on PyTorch.

The samples lie in memory in the order of the batches, and `fit` does not shuffle them.
"""

import os
from importlib import metadata

from experiments.benchmarks.peer_workers.lines import Arrays, Job, ReadyJob, serve

BACKENDS = {"loop": "jax", "fit": "jax", "torch_fit": "torch"}


def build(job: Job) -> ReadyJob:
    """Prepares a job."""
    backend = os.environ["KERAS_BACKEND"] = BACKENDS[job.system]
    # Imported here, since Keras reads its backend then.
    import keras

    from experiments.benchmarks.peer_workers import keras_networks

    data, start = job.read("data"), job.read("start")
    indices, batch = data["indices"], job.batch
    if job.system != "loop":
        indices, batch = indices.transpose(1, 0, 2).reshape(1, -1), job.replicas * batch
    samples = [(data["x"][rows.reshape(-1)], data["y"][rows.reshape(-1)]) for rows in indices]
    models = []
    for _ in indices:
        model = keras_networks.build(job.network, data["x"].shape[1:], start)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(job.rate, momentum=job.momentum), loss)
        models.append(model)

    def run() -> None:
        for model, (x, y) in zip(models, samples, strict=True):
            model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
        if job.system == "loop":
            all_weights = zip(*(model.get_weights() for model in models), strict=True)
            means = [sum(weights) / len(models) for weights in all_weights]
            for model in models:
                model.set_weights(means)

    def check() -> Arrays:
        run()
        return keras_networks.named(models[0])

    versions = {name: metadata.version(name) for name in ("keras", backend)}
    return ReadyJob(check, run, {"versions": versions, "backend": backend})


if __name__ == "__main__":
    serve(build)
