"""Scores replicas and blends on held-out data, as far as the weighting in use asks for it.

Every replica is scored on the same samples. What a signal costs for one replica and N held-out samples:

    a metric of the task (loss, accuracy, ...)    one forward pass over N samples, shared by all of them
    logits                                        the same forward pass
    grad_norm, layer_grad_norm                    one gradient over COMMON_BATCH samples, shared by both
    fisher                                        FISHER_SAMPLES gradients of one sample each
    distance                                      one subtraction of the parameters, no data
    train_loss, samples, steps                    nothing

`evaluate`, the metrics of a blend, costs one forward pass over N samples per call, and about three with its gradient.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.arguments import FLOATING, NONE, YES_OR_NO, either, instance, whole
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.base import Batch, PyTree, Replicas, SettingsError
from wavg_jax.models.rewrite import fast
from wavg_jax.rounds import keys
from wavg_jax.rounds.forward import Forward, cast, here, labels, metrics, metrics_and_logits, metrics_of, together
from wavg_jax.rounds.guard import SpikeGuard
from wavg_jax.weighting.scores import per_replica
from wavg_jax.weighting.signals import FREE, OF_SAMPLES

GRADIENTS = ("grad_norm", "layer_grad_norm")
"""Signals from one gradient on a batch common to all replicas."""

COMMON_BATCH = 256
"""Held-out samples in that batch."""

FISHER_SAMPLES = 64
"""Held-out samples behind `fisher`."""

FISHER_TOGETHER = 4
"""Samples whose gradients `fisher` holds in memory at a time; a divisor of FISHER_SAMPLES."""

_NO_DATA = (*FREE, "distance")
_NO_METRICS = (*_NO_DATA, *GRADIENTS, "fisher", *OF_SAMPLES)


class Scoring(NamedTuple):
    """How replicas and blends are scored.

    Attributes:
      samples: held-out samples scored in a round, a different window in each; None scores all of them. Scoring costs
        time in proportion.
      dtype: dtype of the scoring passes, such as `jnp.bfloat16`; None keeps that of the parameters. A network that
        fixes its compute dtype, as `wavg_jax.models.MLP` does, computes in that and saves nothing.
      chunk: samples per forward pass, which bounds the memory of scoring and testing.
      test_every: rounds between evaluations on the test split, in `fit`, which always evaluates the last round.
      every: rounds between scorings. The rounds in between blend with the weights of the last one, divided among those
        who are alive, if the weighting reads held-out data. A replica that was dead then has no weight until the next.
      diagnose: keep the replicas' logits also where the weighting does not need them, and report what each replica is
        worth to the blend; see `wavg_jax.rounds.diagnosis`.
      guard: rolls back a round whose blend is much worse than the last ones; see `wavg_jax.SpikeGuard`. None keeps
        every blend.
    """

    samples: int | None = None
    dtype: Any = None
    chunk: int = 1000
    test_every: int = 1
    every: int = 1
    diagnose: bool = False
    guard: SpikeGuard | None = None


SCORING = {
    "samples": either(NONE, whole(1)),
    "dtype": either(NONE, FLOATING),
    "chunk": whole(1),
    "test_every": whole(1),
    "every": whole(1),
    "diagnose": YES_OR_NO,
    "guard": either(NONE, instance(SpikeGuard, "a wavg_jax.SpikeGuard")),
}
"""What the fields of `Scoring` must be."""


def reads_heldout(needs: Iterable[str]) -> bool:
    """Whether anything in `needs` reads held-out data.

    >>> reads_heldout(("train_loss", "distance")), reads_heldout(("evaluate",)), reads_heldout(("loss",))
    (False, True, True)
    """
    return not set(needs) <= set(_NO_DATA)


def weighs_every(needs: Iterable[str], scoring: Scoring) -> int:
    """Rounds between two weighings: a weighting that reads no held-out data weighs in every round."""
    return scoring.every if reads_heldout(needs) else 1


def asked(needs: Iterable[str], scoring: Scoring) -> tuple[str, ...]:
    """What a round measures: what the weighting `needs`, to diagnose, logits, and for a guard, the blend's loss."""
    return (*needs, *["logits"] * scoring.diagnose, *["loss"] * (scoring.guard is not None))


def check_measurable(needs: Iterable[str], metrics: Sequence[str]) -> None:
    """Raises SettingsError if nothing measures a signal that the weighting needs; `metrics` are those of the task."""
    unknown = sorted(set(needs) - {*_NO_METRICS, *metrics})
    if unknown:
        known = (*metrics, *(name for name in _NO_METRICS if name not in OF_SAMPLES))
        raise SettingsError(
            f"the weighting needs the signal {unknown[0]!r}, which a round does not measure; it measures "
            f"{', '.join(known)}. Pass other signals to Averager.update in a loop of your own."
        )


def window(held_out: Batch | None, round: jax.Array, samples: int | None) -> Batch | None:
    """Takes the samples that a round scores, another window in each: after the last one, which wraps around to have as
    many samples as the others, the first comes again.

    Args:
      held_out: [N, ...], or None.
      round: rounds done, an int32 scalar, which may be traced.
      samples: how many; None or N and more takes all of them.

    >>> split = Batch(jnp.arange(5.0), jnp.arange(5))
    >>> [window(split, jnp.int32(r), 2).y.tolist() for r in range(4)]
    [[0, 1], [2, 3], [4, 0], [0, 1]]
    """
    if held_out is None or samples is None or samples >= len(held_out.y):
        return held_out
    n = len(held_out.y)
    start = jnp.asarray(round, jnp.int32) % -(-n // samples) * samples  # the remainder first, lest int32 overflow
    taken = (start + jnp.arange(samples, dtype=jnp.int32)) % n
    return Batch(*(jnp.asarray(a)[taken] for a in held_out))


def scalar_metrics(forward: Forward, params: PyTree, mutable: PyTree, samples: Batch) -> dict[str, jax.Array]:
    """The metrics that are scalars, which weightings may ask for.

    Raises:
      SettingsError: while tracing, if a metric has the name of another signal.
    """
    return _scalars(metrics(forward, params, mutable, samples))


def _scalars(found: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    if taken := sorted(set(found) & set(_NO_METRICS)):
        raise SettingsError(f"the task's metric {taken[0]!r} has the name of a signal; rename it in Task.measure")
    return {name: value for name, value in found.items() if not jnp.ndim(value)}


class Evaluate:
    """The signal `evaluate`: `(params, weights [K]) -> {metric: scalar}` of a blend on held-out samples.

    Attributes:
      cpu_forms: of the task, for those who differentiate; see `wavg_jax.models.fast`.
    """

    def __init__(self, forward: Forward, mean: Callable[[PyTree], PyTree], held_out: Batch):
        """`mean` is `weights [K] -> mutable`, the collections that belong to a blend."""
        self._forward, self._mean, self._held_out = forward, mean, held_out
        self.cpu_forms = forward.task.cpu_forms

    def __call__(self, params: PyTree, weights: jax.Array) -> dict[str, jax.Array]:
        return scalar_metrics(self._forward, params, self._mean(weights), self._held_out)

    def of_blend(self, blend: Callable[[PyTree], PyTree], weights: PyTree) -> dict[str, jax.Array]:
        """`self(blend(weights), per_replica(weights))`, whose slope in the weights is all that devices exchange."""

        def network(weights: PyTree) -> tuple[PyTree, PyTree]:
            return blend(weights), self._mean(per_replica(weights))

        return _scalars(metrics_of(self._forward, network, weights, self._held_out))


def of_blends(
    needs: Iterable[str],
    forward: Forward,
    mean: Callable[[PyTree], PyTree],
    held_out: Batch | None,
    signals: Mapping[str, PyTree],
) -> dict[str, Any]:
    """The signals that all replicas share: `labels`, and `evaluate`.

    Args:
      needs: names of signals.
      forward: how a blend runs over the held-out samples.
      mean: `weights [K] -> mutable`, the collections that belong to a blend.
      held_out: [N, ...]; None if no signal reads it.
      signals: those of the replicas.
    """
    if held_out is None:
        return {}
    shared: dict[str, Any] = {"evaluate": Evaluate(forward, mean, held_out)}
    if "labels" in needs:
        shared["labels"] = labels(forward, held_out, signals["logits"].shape[-1])
    return shared


def _logits(forward: Forward, params: PyTree, mutable: PyTree, held_out: Batch) -> dict[str, jax.Array]:
    """The logits of a network, and from the same pass its metrics."""
    found, logits = metrics_and_logits(forward, params, mutable, held_out)
    return _scalars(found) | {"logits": logits}


def _common_batch(forward: Forward, held_out: Batch, samples: int) -> Batch:
    """The first `samples` held-out samples, starting over if there are fewer."""
    taken = jnp.arange(samples, dtype=jnp.int32) % len(held_out.y)
    return Batch(cast(forward.prepare(held_out.x[taken]), forward.dtype), held_out.y[taken])


def _gradient_norms(forward: Forward, params: PyTree, mutable: PyTree, held_out: Batch) -> dict[str, PyTree]:
    """Norms of the gradient of the training loss on one batch common to all replicas, as GRAWA's code takes them.

    Norms on each replica's own batches would not do: they are smallest where a shard's labels are noise, and so would
    trust the worst replicas most.
    """
    batch = _common_batch(forward, held_out, min(COMMON_BATCH, len(held_out.y)))
    loss_rng, state_rng = jax.random.split(keys.roots(jax.random.key(0)).gradient)
    mutable = keys.own(mutable, state_rng)  # draws apart from those of the next local step

    def loss(params: PyTree, batch: Batch) -> jax.Array:
        cast_params, cast_mutable = cast((params, mutable), forward.dtype)
        return forward.task.loss(cast_params, cast_mutable, batch, loss_rng)[0]

    gradient = _in_parts(
        fast(jax.grad(loss), forward.task.cpu_forms), params, batch, together(forward, params, mutable, held_out)
    )
    norms = jax.tree.map(lambda g: optax.tree.norm(g.astype(jnp.float32)), gradient)
    return {"grad_norm": optax.tree.sum(norms), "layer_grad_norm": norms}


def _in_parts(gradient: Callable[[PyTree, Batch], PyTree], params: PyTree, batch: Batch, most: int) -> PyTree:
    """The mean gradient over parts of at most so many samples; the whole batch at once where it is no larger."""
    if len(batch.y) <= most:
        return gradient(params, batch)
    parts = jax.tree.map(lambda a: a[: len(a) // most * most].reshape(-1, most, *a.shape[1:]), batch)

    def add(total: PyTree, part: Batch) -> tuple[PyTree, None]:
        return optax.tree.add(total, gradient(params, part)), None

    total, _ = jax.lax.scan(add, optax.tree.zeros_like(params), parts)
    return optax.tree.scale(1 / len(parts.y), total)


def _diagonal_fisher(forward: Forward, params: PyTree, mutable: PyTree, held_out: Batch) -> dict[str, PyTree]:
    """Diagonal of the Fisher information on one batch common to all replicas (Matena and Raffel 2022).

        F = 1/N sum_n (d log p(y_n | x_n) / d params)^2,    y_n drawn from p(. | x_n) with a fixed key

    The predictions are those of evaluation mode, since the batch statistics of one sample mean nothing. Per-sample
    gradients share no work as those of a batch do: this costs about FISHER_SAMPLES local steps of one sample each.

    Raises:
      SettingsError: the targets are not integers, so the network predicts no distribution over classes.
    """
    if not jnp.issubdtype(held_out.y.dtype, jnp.integer):
        raise SettingsError("the signal 'fisher' needs a network that predicts classes; choose another weighting")
    batch = _common_batch(forward, held_out, FISHER_SAMPLES)

    def log_likelihood(params: PyTree, x: jax.Array, key: jax.Array) -> jax.Array:
        cast_params, cast_mutable = cast((params, mutable), forward.dtype)
        log_p = jax.nn.log_softmax(forward.task.predict(cast_params, cast_mutable, x[None])[0].astype(jnp.float32))
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_p))
        return jnp.take_along_axis(log_p, drawn[..., None], axis=-1).sum()

    gradient = fast(jax.grad(log_likelihood), forward.task.cpu_forms)

    def add(total: PyTree, some: tuple[jax.Array, jax.Array]) -> tuple[PyTree, None]:
        gradients = jax.vmap(gradient, in_axes=(None, 0, 0))(params, *some)
        squares = jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)).sum(0), gradients)
        return optax.tree.add(total, squares), None

    few = next(n for n in (FISHER_TOGETHER, 2, 1) if n <= max(together(forward, params, mutable, held_out), 1))

    def cut(a: jax.Array) -> jax.Array:
        return a.reshape(-1, few, *a.shape[1:])

    each = jax.random.split(keys.roots(jax.random.key(0)).fisher, FISHER_SAMPLES)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    total, _ = jax.lax.scan(add, nothing, (cut(batch.x), cut(each)))
    return {"fisher": optax.tree.scale(1 / FISHER_SAMPLES, total)}


def due(every: int, round: jax.Array) -> jax.Array | None:
    """Whether a round is scored, a bool scalar; None if every round is."""
    return None if every == 1 else round % every == 0


def when(due: jax.Array | None, now: Callable[[], PyTree]) -> PyTree:
    """What `now` measures, or NaN in its place unless it is due; None always is."""
    if due is None:
        return now()
    shapes = jax.eval_shape(now)
    return jax.lax.cond(due, now, lambda: jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes))


def measure(
    forward: Forward, needs: Iterable[str], *, diagnose: bool = False
) -> Callable[[PyTree, Batch], dict[str, PyTree]]:
    """Builds `((params, mutable), held_out) -> {signal: float32 scalar or tree}` for one replica.

    Args:
      forward: how the replica runs. Parameters, collections and inputs are cast to its dtype; signals are float32.
      needs: names of signals; those that read no held-out data are left out.
      diagnose: measure logits and all metrics that are scalars, too.
    """
    needs = set(needs) - {*_NO_DATA, "labels", "evaluate"}
    forward = forward._replace(over_samples=here)  # a replica is scored where it lives
    passes: list[Callable[..., dict[str, Any]]] = [
        pass_
        for pass_, provides in ((_gradient_norms, GRADIENTS), (_diagonal_fisher, ("fisher",)))
        if needs.intersection(provides)
    ]
    of_task = needs - set(_NO_METRICS)
    if diagnose or "logits" in needs:
        passes.append(_logits)
    elif of_task:
        passes.append(scalar_metrics)

    def signals(network: PyTree, held_out: Batch) -> dict[str, PyTree]:
        measured: dict[str, PyTree] = {}
        for pass_ in passes:
            measured |= pass_(forward, *network, held_out)
        check_measurable(of_task, [name for name in measured if name not in _NO_METRICS])
        return {name: value for name, value in measured.items() if diagnose or name in needs}

    return signals


def distance(params: PyTree, centre: PyTree) -> jax.Array:
    """L2 distance of one replica's parameters from `centre`, over the whole tree: a float32 scalar.

    >>> float(distance({"w": jnp.array([3.0, 1.0]), "b": jnp.zeros(1)}, {"w": jnp.ones(2), "b": jnp.full(1, -1.5)}))
    2.5
    """
    return optax.tree.norm(jax.tree.map(lambda x, c: x.astype(jnp.float32) - c.astype(jnp.float32), params, centre))


def distances(stacked: PyTree, alive: jax.Array) -> jax.Array:
    """L2 distance of every replica's parameters from the mean of the living: float32 [K]."""
    centre = weighted_mean(stacked, tree.equal_weights(alive))
    return jax.vmap(distance, in_axes=(0, None))(stacked, centre)


def of_replicas(
    measured: Callable,
    over_replicas: Callable[[Callable], Callable],
    replicas: Replicas,
    held_out: Batch | None,
    due: jax.Array | None = None,
) -> dict[str, PyTree]:
    """Scores K replicas on the same held-out samples.

    Args:
      measured: of `measure`.
      over_replicas: of the placement.
      replicas: [K, ...].
      held_out: [N, ...]; None if no signal reads it.
      due: whether to score them now; None always does.

    Returns:
      {signal: [K] or tree with leaves [K, ...]}, NaN where nothing is due.
    """
    if held_out is None:
        return {}

    return when(due, lambda: over_replicas(measured)((replicas.params, replicas.mutable), held_out))


def free(train_loss: jax.Array, sizes: jax.Array | None, steps: jax.Array) -> dict[str, jax.Array]:
    """The signals that cost nothing, [K] each: mean training loss, samples in the shard (else equal), local steps."""
    samples = jnp.ones_like(train_loss) if sizes is None else sizes
    return {"train_loss": train_loss, "samples": samples, "steps": steps.astype(jnp.float32)}
