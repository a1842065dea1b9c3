"""How a network runs over many samples, a chunk at a time: the metrics of all of them, and the logits of some."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax.base import Batch, PyTree, SettingsError, Sums, Task
from wavg_jax.models.rewrite import fast

LOGITS = 2**20
"""Numbers in the logits of a replica that a round keeps, at most; of large vocabularies, those of FEWEST positions."""

FEWEST = 64
"""Positions whose logits a round keeps, whatever the number of classes."""


PREDICTIONS = 2**21
"""Numbers that the network predicts in a pass, at most, beyond a single sample: of a vocabulary of 32,000, a window of
64 tokens."""


def as_stored(x: jax.Array) -> jax.Array:
    """Feeds the network its inputs as they are stored."""
    return x


def here(function: Callable) -> Callable:
    """Runs over all samples on the device at hand."""
    return function


class Forward(NamedTuple):
    """How a network runs over many samples.

    Attributes:
      task: the network.
      prepare: stored inputs [B, ...] -> the network's inputs, such as uint8 -> normalised float32.
      dtype, chunk: of `Scoring`; `together` lowers the chunk where samples have many predictions.
      over_samples: `Placement.over_samples`, which spreads the samples over the devices.
    """

    task: Task
    prepare: Callable[[jax.Array], jax.Array] = as_stored
    dtype: Any = None
    chunk: int = 1000
    over_samples: Callable[[Callable], Callable] = here


Network = Callable[[PyTree], tuple[PyTree, PyTree]]
"""`given -> (params, mutable)`: makes a network of what is given, such as a blend of weights."""


def cast(values: PyTree, dtype: Any) -> PyTree:
    """Casts the floating-point leaves to `dtype`, unless it is None."""
    if dtype is None:
        return values
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, values)


def together(forward: Forward, params: PyTree, mutable: PyTree, samples: Batch) -> int:
    """How many samples to run in one pass: `chunk` or, of sequences, as many as have PREDICTIONS; at least one."""
    if samples.y.ndim < 2:
        return forward.chunk
    params, mutable = cast((params, mutable), forward.dtype)
    one = jax.eval_shape(
        lambda x: forward.task.predict(params, mutable, cast(forward.prepare(x), forward.dtype)),
        jax.ShapeDtypeStruct((1, *samples.x.shape[1:]), samples.x.dtype),
    )
    return _fitting(forward, math.prod(getattr(one, "shape", ())))


def _fitting(forward: Forward, predictions: int) -> int:
    return max(min(forward.chunk, PREDICTIONS // max(predictions, 1)), 1)


def _over_chunks(function: Callable[[Batch], tuple[PyTree, PyTree]], samples: Batch, chunk: int) -> tuple:
    """Runs `function(batch) -> (sums, rows)` over chunks of the samples, in the memory of one chunk; adds up the sums
    and puts the rows, leaves [rows of a chunk, ...], one below another."""
    n = len(samples.y)
    if n <= chunk:
        return function(samples)
    full, rest = divmod(n, chunk)
    chunks = jax.tree.map(lambda a: a[: n - rest].reshape(full, chunk, *a.shape[1:]), samples)
    # A gradient recomputes the activations of each chunk rather than keep those of all.
    one = jax.checkpoint(function, prevent_cse=False)
    sums, _ = jax.eval_shape(one, jax.tree.map(lambda a: a[0], chunks))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)

    def add(total: PyTree, part: Batch) -> tuple[PyTree, PyTree]:
        sums, rows = one(part)
        return optax.tree.add(total, sums), rows

    total, rows = jax.lax.scan(add, zeros, chunks)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    if not rest:
        return total, rows
    sums, last = one(jax.tree.map(lambda a: a[n - rest :], samples))
    return optax.tree.add(total, sums), jax.tree.map(lambda x, y: jnp.concatenate([x, y]), rows, last)


def metrics(forward: Forward, params: PyTree, mutable: PyTree, samples: Batch) -> dict[str, jax.Array]:
    """Metrics of one network on samples [N, ...], as `Task.metrics` defines them; differentiable in the parameters."""
    return metrics_of(forward, lambda network: network, (params, mutable), samples)


def metrics_of(forward: Forward, network: Network, given: PyTree, samples: Batch) -> dict[str, jax.Array]:
    """Metrics of the network that every device makes of what is `given`."""

    def over(given: PyTree, samples: Batch) -> Sums:
        params, mutable = cast(network(given), forward.dtype)

        def one(batch: Batch) -> tuple[Sums, PyTree]:
            return _measured(forward, params, mutable, batch)[0], ()

        chunk = together(forward, params, mutable, samples)
        return _over_chunks(fast(one, forward.task.cpu_forms), samples, chunk)[0]

    sums = forward.over_samples(over)(given, samples)
    return dict(forward.task.metrics(sums, jnp.float32(len(samples.y))))


def _measured(forward: Forward, params: PyTree, mutable: PyTree, batch: Batch) -> tuple[Sums, jax.Array]:
    """The sums of `Task.measure`, and the predictions they are of."""
    x = cast(forward.prepare(batch.x), forward.dtype)
    predictions = forward.task.predict(params, mutable, x)
    return forward.task.measure(predictions, Batch(x, batch.y)), predictions


def metrics_and_logits(
    forward: Forward, params: PyTree, mutable: PyTree, samples: Batch
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Metrics of one network on samples [N, ...], and from the same pass its logits there.

    Where targets are more than a label a sample, as tokens [N, T] are, their positions count as samples. Logits of more
    numbers than LOGITS are thinned out: to positions evenly spread over every sample, others for every sample, and, if
    that is not enough, to every n-th sample of a chunk.

    Returns:
      The metrics, and logits [S, C] in float32; `labels` are those of the same positions.

    Raises:
      SettingsError: the network does not predict classes: its targets are not integers [N, ...], or its predictions
        not [N, ..., C].
    """
    params, mutable = cast((params, mutable), forward.dtype)

    def one(batch: Batch) -> tuple[Sums, jax.Array]:
        sums, predictions = _measured(forward, params, mutable, batch)
        y = batch.y
        if not jnp.issubdtype(y.dtype, jnp.integer) or predictions.shape[:-1] != y.shape:
            raise SettingsError(
                "the signal 'logits' needs a network that predicts classes, logits [N, ..., C] for integer targets "
                f"[N, ...]; here predictions are {list(predictions.shape)} and targets {y.dtype}{list(y.shape)}: "
                "choose another weighting, such as learned(), without diagnose=True"
            )
        return sums, _thinned(predictions.astype(jnp.float32), y.ndim, len(samples.y), predictions.shape[-1])

    chunk = together(forward, params, mutable, samples)
    sums, logits = _over_chunks(fast(one, forward.task.cpu_forms), samples, chunk)
    return dict(forward.task.metrics(sums, jnp.float32(len(samples.y)))), logits


def labels(forward: Forward, samples: Batch, classes: int) -> jax.Array:
    """The labels [S] of the positions whose logits `metrics_and_logits` keeps, given C, the number of classes."""

    def one(batch: Batch) -> tuple[PyTree, jax.Array]:
        return (), _thinned(batch.y, batch.y.ndim, len(samples.y), classes)

    own = math.prod(samples.y.shape[1:])
    return _over_chunks(one, samples, forward.chunk if samples.y.ndim < 2 else _fitting(forward, classes * own))[1]


def _thinned(values: jax.Array, positions: int, samples: int, classes: int) -> jax.Array:
    """Keeps the values [B, ..., *rest] of some positions, whose axes are the first few: [S, *rest]."""
    most = max(LOGITS // classes, FEWEST)
    own, rest = math.prod(values.shape[1:positions]), values.shape[positions:]
    each, every = min(max(most // samples, 1), own), max(-(-samples // most), 1)
    kept = np.arange(0, len(values), every)
    # Shifted from sample to sample, so that a few positions of each are not the same few of all.
    shift = kept[:, None] * _stride(own) if each < own else np.zeros_like(kept)[:, None]
    spread = (np.arange(each) * own // each + shift) % own
    return values.reshape(-1, own, *rest)[kept[:, None], spread].reshape(-1, *rest)


def _stride(positions: int) -> int:
    """About 0.6 of the positions, and without a common divisor, so that multiples of it visit them all, far apart.

    >>> _stride(8), _stride(1), _stride(128)
    (5, 1, 79)
    """
    return next(n for n in range(max(round(0.618 * positions), 1), positions + 2) if math.gcd(n, positions) == 1)
