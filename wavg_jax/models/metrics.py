"""Metrics of the user's own, beside those of a task."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wavg_jax.arguments import FUNCTION, check
from wavg_jax.base import Batch, SettingsError, Sums, Task, means

Metric = Callable[[jax.Array, jax.Array], jax.Array]
"""`(logits [B, ...], y [B, ...]) -> a number for each sample [B]`."""


def with_metrics(task: Task, **metrics: Metric) -> Task:
    """Adds metrics to a task, each the mean over samples of a function.

    They are recorded as `test_{name}`, and are signals for weightings, such as `softmax("top3",
    higher_is_better=True)`. What is no mean over samples, such as the area under a curve, needs all predictions at
    once: compute it in a callback made by `wavg_jax.with_state`, or by `Task._replace(measure=, metrics=)` from sums of
    any shape.

    Args:
      task: the task; its own metrics stay.
      metrics: name -> `(logits [B, ...], y [B, ...]) -> values [B]`, inside jit. Higher must be better where a
        weighting prefers high scores.

    Returns:
      The task with more metrics.

    Raises:
      SettingsError: one is no function or has the name of another; or, while tracing, returns no number for each
        sample.

    Example:
      >>> import jax.numpy as jnp
      >>> from wavg_jax.models import classifier
      >>> def top2(logits, y):
      ...     return (jnp.argsort(logits)[:, -2:] == y[:, None]).any(axis=1)
      >>> task = with_metrics(classifier(lambda rng: ({}, {}), lambda *_, **__: None), top2=top2)
      >>> logits, y = jnp.array([[0.1, 0.2, 0.3], [0.5, 0.3, 0.2]]), jnp.array([1, 2])
      >>> print(task.metrics(task.measure(logits, Batch(None, y)), 2)["top2"])
      0.5
    """
    for name, metric in metrics.items():
        check(f"with_metrics: {name}", metric, FUNCTION)

    def measure(logits: jax.Array, batch: Batch) -> Sums:
        own = task.measure(logits, batch)
        _check_names(metrics, own)
        return {**own, **{name: _sum(name, metric(logits, batch.y), batch.y) for name, metric in metrics.items()}}

    def finish(sums: Sums, samples: Any) -> Mapping[str, jax.Array]:
        found = task.metrics({name: total for name, total in sums.items() if name not in metrics}, samples)
        _check_names(metrics, found)
        return {**found, **means({name: sums[name] for name in metrics}, samples)}

    return task._replace(measure=measure, metrics=finish)


def _check_names(metrics: Mapping[str, Metric], own: Mapping[str, Any]) -> None:
    if taken := sorted(set(metrics) & set(own)):
        raise SettingsError(f"with_metrics: the task has a metric {taken[0]!r} already; choose another name")


def _sum(name: str, values: jax.Array, y: jax.Array) -> jax.Array:
    if jnp.shape(values) != y.shape[:1]:
        raise SettingsError(
            f"with_metrics: {name} returned shape {jnp.shape(values)} for {len(y)} samples; it must return a number "
            f"for each, ({len(y)},)"
        )
    return jnp.asarray(values, jnp.float32).sum()
