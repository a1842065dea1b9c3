"""What is measured of each replica, for the weightings that need it.

A signal is one number per replica [K], or a tree like the parameters with one number per tensor (leaves [K]) or per
element (leaves [K, *shape]). Those that cost a pass are measured on held-out data, the same for every replica, and only
if the weighting in use `needs` them. What each costs, for one replica and a held-out split of N samples:

    loss, accuracy, macro_f1, ece    one forward pass over N samples, shared by all four
    grad_norm, layer_grad_norm       one gradient of COMMON_BATCH samples, shared by both
    fisher                           FISHER_SAMPLES gradients of one sample each, FISHER_TOGETHER at a time in memory
    distance                         one subtraction of the parameters, no data
    train_loss, samples, steps       nothing

`evaluate`, the held-out score of a blend, costs one forward pass over N samples per call, and about four with its
gradient, which computes activations again rather than keep those of all samples.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax.base import Batch, PyTree, SettingsError, Task
from wavg_jax.rounds import keys
from wavg_jax.weighting.signals import HIGHER_IS_BETTER

COMMON_BATCH = 256
"""Samples of the held-out split in the batch common to all replicas on which `grad_norm` is taken."""

FISHER_SAMPLES = 64
"""Samples of the held-out split on which `fisher` is taken."""

FISHER_TOGETHER = 4
"""Samples whose gradients `fisher` holds in memory at a time; it must divide FISHER_SAMPLES."""

BINS = 15
"""Bins of the confidence in `ece`, as in `wavg_jax.training.metrics`."""


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


def window(chunks: Chunks, round: jax.Array, count: int) -> Chunks:
    """Takes `count` of the C chunks, others each round: `(round * count + i) mod C` for i < count.

    Scoring on a window costs count / C of scoring on the whole split, and C / count rounds go through all of it.

    Args:
      chunks: the split.
      round: rounds done, an int32 scalar, which may be traced.
      count: chunks to take; C or more takes all of them, in their order.

    Raises:
      SettingsError: `count` is not positive.

    >>> split = chunked(np.arange(5.0), np.arange(5), 1)
    >>> [window(split, jnp.int32(r), 2).y.ravel().tolist() for r in range(3)]
    [[0, 1], [2, 3], [4, 0]]
    """
    if count < 1:
        raise SettingsError(f"a window of {count} chunks scores nothing; take at least 1")
    of = chunks.y.shape[0]
    if count >= of:
        return chunks
    start = jnp.asarray(round, jnp.int32) % of * count  # the remainder first: rounds times chunks may overflow
    which = (start + jnp.arange(count, dtype=jnp.int32)) % of
    return Chunks(*(jnp.asarray(a)[which] for a in chunks))


def _cast(values: PyTree, dtype: jnp.dtype | None) -> PyTree:
    """Casts the floating leaves to `dtype`, if one is given."""
    if dtype is None:
        return values
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, values)


Spread = Callable[[Callable], Callable]


def _as_is(run: Callable) -> Callable:
    return run


def predict(
    task: Task,
    prepare: Callable,
    params: PyTree,
    mutable: PyTree,
    chunks: Chunks,
    dtype: jnp.dtype | None = None,
    spread: Spread = _as_is,
) -> jax.Array:
    """Returns one network's logits [C, B, classes] float32 over all chunks, padding included.

    Differentiated, it computes the activations of each chunk again instead of keeping those of all. `spread` lays the
    samples of a chunk out over several devices, as `wavg_jax.devices.placement.Placement.over_samples` does.
    """

    def run(network: PyTree, x: jax.Array) -> jax.Array:
        params, mutable = network

        def one(x: jax.Array) -> jax.Array:
            return task.predict(params, mutable, _cast(prepare(x), dtype)).astype(jnp.float32)

        return jax.lax.map(jax.checkpoint(one, prevent_cse=False), x)

    return spread(run)(_cast((params, mutable), dtype), jnp.asarray(chunks.x))


def _macro_f1(predicted: jax.Array, labels: jax.Array, valid: jax.Array, classes: int) -> jax.Array:
    """Mean over the classes of `2 tp / (predicted + true)`, 0 for a class that is neither predicted nor there."""
    guess = jax.nn.one_hot(predicted, classes, dtype=bool) & valid[..., None]
    truth = jax.nn.one_hot(labels, classes, dtype=bool) & valid[..., None]
    samples = tuple(range(predicted.ndim))
    both = (guess & truth).sum(samples, dtype=jnp.float32)
    either = guess.sum(samples, dtype=jnp.float32) + truth.sum(samples, dtype=jnp.float32)
    return (2 * both / jnp.maximum(either, 1)).mean()


def _calibration_error(logits: jax.Array, right: jax.Array, valid: jax.Array) -> jax.Array:
    """`sum_b |sum of (right - confidence) in bin b| / n`, as `wavg_jax.training.metrics.expected_calibration_error`."""
    confidence = jax.nn.softmax(logits).max(-1)
    where = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    member = jax.nn.one_hot(where, BINS, dtype=bool) & valid[..., None]
    gap = (right.astype(jnp.float32) - confidence)[..., None]
    gaps = jnp.where(member, gap, 0).sum(tuple(range(confidence.ndim)))
    return jnp.abs(gaps).sum() / valid.sum(dtype=jnp.float32)


def _held_out_scores(
    task: Task,
    prepare: Callable,
    params: PyTree,
    mutable: PyTree,
    chunks: Chunks,
    dtype: jnp.dtype | None,
    spread: Spread = _as_is,
) -> dict:
    """All that one forward pass over the held-out split tells; what is not used is not computed under jit."""
    logits = predict(task, prepare, params, mutable, chunks, dtype, spread)
    labels, valid = jnp.asarray(chunks.y), jnp.asarray(chunks.valid)
    n = valid.sum(dtype=jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    predicted = logits.argmax(-1)
    right = predicted == labels
    return {
        "loss": jnp.where(valid, losses, 0).sum() / n,
        "accuracy": (right & valid).sum(dtype=jnp.float32) / n,
        "macro_f1": _macro_f1(predicted, labels, valid, logits.shape[-1]),
        "ece": _calibration_error(logits, right, valid),
    }


def _common_batch(prepare: Callable, chunks: Chunks, samples: int, dtype: jnp.dtype | None) -> Batch:
    """The first `samples` samples without the padding, from the start again if there are fewer."""
    some = -(-samples // chunks.y.shape[1])
    x, y, valid = (jnp.asarray(a[:some]).reshape(-1, *a.shape[2:])[:samples] for a in chunks)
    # The padded chunk may come first or in the middle of a window.
    real = jnp.argsort(~valid, stable=True)
    take = real[jnp.arange(samples, dtype=jnp.int32) % valid.sum(dtype=jnp.int32)]
    return Batch(_cast(prepare(x[take]), dtype), y[take])


def _common_gradient(
    task: Task, prepare: Callable, params: PyTree, mutable: PyTree, chunks: Chunks, dtype: jnp.dtype | None
) -> dict:
    """Norms of the gradient of the training loss on one batch common to all replicas, as GRAWA's code takes them.

    The mean norm over each replica's own training batches must not be used instead: it is smallest where a shard's
    labels are noise, and so trusts the worst replicas most.
    """
    batch = _common_batch(prepare, chunks, min(COMMON_BATCH, chunks.y.size), dtype)
    loss_rng, state_rng = jax.random.split(keys.roots(jax.random.key(0)).gradient)
    mutable = keys.own(mutable, state_rng)  # what is drawn here is not what the next step draws

    def loss(params: PyTree) -> jax.Array:
        cast_params, cast_mutable = _cast((params, mutable), dtype)
        return task.loss(cast_params, cast_mutable, batch, loss_rng)[0]

    norms = jax.tree.map(lambda g: optax.tree.norm(g.astype(jnp.float32)), jax.grad(loss)(params))
    return {"grad_norm": optax.tree.sum(norms), "layer_grad_norm": norms}


def _diagonal_fisher(
    task: Task, prepare: Callable, params: PyTree, mutable: PyTree, chunks: Chunks, dtype: jnp.dtype | None
) -> dict:
    """Diagonal of the Fisher information on one batch common to all replicas (Matena and Raffel 2022).

        F = 1/N sum_n (d log p(y_n | x_n) / d params)^2,    y_n drawn from p(. | x_n) with a fixed key

    The gradient is that of the network's prediction in evaluation mode, since batch statistics of one sample say
    nothing. Gradients per sample are not shared work as those of a batch are: it costs about as much as FISHER_SAMPLES
    local steps of one sample each.
    """
    batch = _common_batch(prepare, chunks, FISHER_SAMPLES, dtype)

    def log_likelihood(params: PyTree, x: jax.Array, key: jax.Array) -> jax.Array:
        cast_params, cast_mutable = _cast((params, mutable), dtype)
        log_p = jax.nn.log_softmax(task.predict(cast_params, cast_mutable, x[None])[0].astype(jnp.float32))
        return log_p[jax.random.categorical(key, jax.lax.stop_gradient(log_p))]

    def add(total: PyTree, few: tuple[jax.Array, jax.Array]) -> tuple[PyTree, None]:
        gradients = jax.vmap(jax.grad(log_likelihood), in_axes=(None, 0, 0))(params, *few)
        squares = jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)).sum(0), gradients)
        return optax.tree.add(total, squares), None

    def cut(a: jax.Array) -> jax.Array:
        return a.reshape(-1, FISHER_TOGETHER, *a.shape[1:])

    each = jax.random.split(keys.roots(jax.random.key(0)).fisher, FISHER_SAMPLES)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    total, _ = jax.lax.scan(add, nothing, (cut(batch.x), cut(each)))
    return {"fisher": optax.tree.scale(1 / FISHER_SAMPLES, total)}


_PASSES = {
    ("loss", "accuracy", "macro_f1", "ece"): _held_out_scores,
    ("grad_norm", "layer_grad_norm"): _common_gradient,
    ("fisher",): _diagonal_fisher,
}


def measurable(needs: Iterable[str]) -> None:
    """Raises SettingsError when a weighting needs a signal that nothing here measures."""
    unknown = sorted(set(needs) - set(HIGHER_IS_BETTER) - {"evaluate"})
    if unknown:
        raise SettingsError(
            f"the weighting needs the signal {unknown[0]!r}, which fit does not measure; it measures "
            f"{', '.join(HIGHER_IS_BETTER)}. Other signals can be handed to Averager.update in a loop of your own."
        )


def measured(needs: Iterable[str]) -> tuple[str, ...]:
    """Those of `needs` that cost a pass over held-out data for every replica.

    >>> measured(("train_loss", "loss", "distance", "evaluate"))
    ('loss',)
    """
    return tuple(n for n in needs if any(n in provides for provides in _PASSES))


def reads_heldout(needs: Iterable[str]) -> bool:
    """Whether anything in `needs` reads the held-out split.

    >>> reads_heldout(("train_loss", "distance")), reads_heldout(("evaluate",))
    (False, True)
    """
    needs = tuple(needs)
    return bool(measured(needs)) or "evaluate" in needs


def measure(
    task: Task, prepare: Callable, needs: Iterable[str], dtype: jnp.dtype | None = None
) -> Callable[[PyTree, Chunks], dict]:
    """Builds `((params, mutable), held_out_chunks) -> {signal: float32 scalar or tree}` for one replica.

    Args:
      task: the network.
      prepare: stored inputs -> the network's inputs, such as uint8 -> normalised float32.
      needs: names of signals; only the passes that provide one of them are made.
      dtype: what floating parameters, collections and inputs are cast to before the forward pass, such as
        `jnp.bfloat16`; None leaves them as they are. The signals are float32 either way. A network that fixes the dtype
        it computes in, as `wavg_jax.models.MLP` does, computes in that all the same, and saves nothing.
    """
    needs = set(needs)
    passes = [take for provides, take in _PASSES.items() if needs.intersection(provides)]

    def signals(one: PyTree, held_out: Chunks) -> dict:
        params, mutable = one
        taken: dict = {}
        for take in passes:
            taken |= take(task, prepare, params, mutable, held_out, dtype)
        return {name: value for name, value in taken.items() if name in needs}

    return signals


def evaluator(
    task: Task, prepare: Callable, dtype: jnp.dtype | None = None, spread: Spread = _as_is
) -> Callable[[PyTree, PyTree, Chunks], dict[str, jax.Array]]:
    """Builds `(params, mutable, chunks) -> {"loss", "accuracy"}`, float32 scalars, differentiable in the parameters.

    It is taken chunk by chunk, and so is its gradient, which computes the activations of each chunk again, so that
    either needs the memory of one chunk beside the logits. Arguments as `measure` and `predict`.
    """

    def evaluate(params: PyTree, mutable: PyTree, chunks: Chunks) -> dict[str, jax.Array]:
        scores = _held_out_scores(task, prepare, params, mutable, chunks, dtype, spread)
        return {name: scores[name] for name in ("loss", "accuracy")}

    return evaluate


def distance(params: PyTree, centre: PyTree) -> jax.Array:
    """L2 distance of one replica's parameters from `centre`, over the whole tree: a float32 scalar.

    >>> float(distance({"w": jnp.array([3.0, 1.0]), "b": jnp.zeros(1)}, {"w": jnp.ones(2), "b": jnp.full(1, -1.5)}))
    2.5
    """
    return optax.tree.norm(jax.tree.map(lambda x, c: x.astype(jnp.float32) - c.astype(jnp.float32), params, centre))
