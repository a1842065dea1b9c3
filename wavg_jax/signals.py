"""What is measured of each replica, for the weightings that need it.

A signal is one number per replica. Those that cost a pass are measured on held-out data, the same for every replica,
and only if the weighting in use `needs` them. `train_loss`, the mean loss over the round's local steps, is free.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax.base import Batch, PyTree, SettingsError, Task

HIGHER_IS_BETTER = {"accuracy": True, "loss": False, "grad_norm": False, "train_loss": False}
"""Every signal that `fit` can measure, and which way is better."""

COMMON_BATCH = 256
"""Samples of the held-out split in the batch common to all replicas on which `grad_norm` is taken."""


class Chunks(NamedTuple):
    """A data split cut into chunks of equal size, so that a pass over it needs the memory of one chunk.

    Attributes:
      x: [C, B, ...] inputs as stored (uint8 or float32); the last chunk is padded.
      y: [C, B] int32 labels.
      valid: [C, B] bool, False on the padding.
    """

    x: jax.Array | np.ndarray
    y: jax.Array | np.ndarray
    valid: jax.Array | np.ndarray


def chunked(x: np.ndarray, y: np.ndarray, size: int) -> Chunks:
    """Cuts a split of N samples into ceil(N / size) chunks on the host.

    >>> chunked(np.zeros((5, 2)), np.zeros(5, np.int32), 3).valid.tolist()
    [[True, True, True], [True, True, False]]
    """
    size = min(size, len(y))
    padding = -len(y) % size

    def cut(a: np.ndarray) -> np.ndarray:
        return np.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, size, *a.shape[1:])

    return Chunks(cut(x), cut(y.astype(np.int32)), cut(np.ones(len(y), bool)))


def predict(task: Task, prepare: Callable, params: PyTree, mutable: PyTree, chunks: Chunks) -> jax.Array:
    """Returns one network's logits [C, B, classes] over all chunks, padding included."""
    return jax.lax.map(lambda x: task.predict(params, mutable, prepare(x)), chunks.x)


def _held_out_scores(task: Task, prepare: Callable, params: PyTree, mutable: PyTree, chunks: Chunks) -> dict:
    """Mean cross-entropy and accuracy over the held-out split."""
    logits = predict(task, prepare, params, mutable, chunks)
    n = chunks.valid.sum(dtype=jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(chunks.y))
    right = (logits.argmax(-1) == chunks.y) & chunks.valid
    return {
        "loss": jnp.where(chunks.valid, losses, 0).sum() / n,
        "accuracy": right.sum(dtype=jnp.float32) / n,
    }


def _common_gradient(task: Task, prepare: Callable, params: PyTree, mutable: PyTree, chunks: Chunks) -> dict:
    """Norm of the gradient on one batch common to all replicas, as GRAWA's code does.

    The mean norm over each replica's own training batches must not be used instead: it is smallest where a shard's
    labels are noise, and so trusts the worst replicas most.
    """
    x, y = jnp.asarray(chunks.x[0])[:COMMON_BATCH], jnp.asarray(chunks.y[0])[:COMMON_BATCH]
    batch = Batch(prepare(x), y)
    gradient = jax.grad(lambda p: task.loss(p, mutable, batch, jax.random.key(0))[0])(params)
    return {"grad_norm": optax.tree.norm(gradient).astype(jnp.float32)}


_PASSES = {("loss", "accuracy"): _held_out_scores, ("grad_norm",): _common_gradient}


def measurable(needs: Iterable[str]) -> None:
    """Raises SettingsError when a weighting needs a signal that nothing here measures."""
    unknown = sorted(set(needs) - set(HIGHER_IS_BETTER))
    if unknown:
        raise SettingsError(
            f"the weighting needs the signal {unknown[0]!r}, which fit does not measure; it measures "
            f"{', '.join(HIGHER_IS_BETTER)}. Other signals can be handed to Averager.update in a loop of your own."
        )


def measured(needs: Iterable[str]) -> tuple[str, ...]:
    """Those of `needs` that cost a pass over held-out data."""
    return tuple(n for n in needs if any(n in provides for provides in _PASSES))


def measure(task: Task, prepare: Callable, needs: Iterable[str]) -> Callable[[PyTree, Chunks], dict]:
    """Builds `((params, mutable), held_out_chunks) -> {signal: float32 scalar}` for one replica.

    Args:
      task: the network.
      prepare: stored inputs -> the network's inputs, such as uint8 -> normalised float32.
      needs: names of signals; only the passes that provide one of them are made.
    """
    needs = set(needs)
    passes = [take for provides, take in _PASSES.items() if needs.intersection(provides)]

    def signals(one: PyTree, held_out: Chunks) -> dict:
        params, mutable = one
        taken: dict = {}
        for take in passes:
            taken |= take(task, prepare, params, mutable, held_out)
        return {name: value for name, value in taken.items() if name in needs}

    return signals
