"""Classifiers, language models and regressors as tasks: initialise, loss, predict, measure."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

from wavg_jax.arguments import FUNCTION, check, number, shown
from wavg_jax.base import Batch, DataError, PyTree, SettingsError, Sums, Task, means
from wavg_jax.models import quality


class Init(Protocol):
    """`init(rng) -> (params, mutable)`; `mutable` is `{}` for a network with parameters alone."""

    def __call__(self, rng: jax.Array, /) -> tuple[PyTree, PyTree]: ...


class Apply(Protocol):
    """`apply(params, mutable, x, *, train, rng) -> (logits, mutable)`; `rng` is None in evaluation mode."""

    def __call__(
        self, params: PyTree, mutable: PyTree, x: jax.Array, /, *, train: bool, rng: jax.Array | None
    ) -> tuple[jax.Array, PyTree]: ...


def classifier(
    init: Init, apply: Apply, *, class_weights: ArrayLike | None = None, label_smoothing: float = 0.0
) -> Task:
    """Makes a task of a network written by hand over plain pytrees.

    The loss is the mean cross-entropy `-1/B sum_b c[y_b] log softmax(logits_b)[y_b]`, computed in float32, with c = 1
    unless `class_weights` are given; with `label_smoothing` s, of the targets `(1 - s) onehot(y_b) + s / classes`.

    Args:
      init: `rng -> (params, mutable)`.
      apply: `(params, mutable, x [B, ...], *, train, rng) -> (logits [B, classes], mutable)`. The loss calls it with
        `train=True` and a key, `predict` with `train=False` and `rng=None`.
      class_weights: c [classes], how much a sample of each class counts in the training loss, such as
        `wavg_jax.data.class_weights` makes. Scores and test metrics stay plain.
      label_smoothing: s, from 0 to less than 1, the share of each target spread over all classes in the training loss;
        scores and test metrics stay plain. Szegedy et al., 2016 (arXiv:1512.00567), section 7.

    Returns:
      A `Task` with the metrics `loss`, `accuracy`, `macro_f1` and `ece`, and the counts `confusion` [classes, classes];
      see `wavg_jax.models.quality`.

    Raises:
      SettingsError: `class_weights` are no finite numbers [classes] of 0 or more, or `label_smoothing` is out of range;
        or, while tracing, the logits are not [B, classes].
      DataError: while tracing, if the labels are not integers [B].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from wavg_jax.base import Batch
      >>> def init(rng):
      ...     return {"w": jax.random.normal(rng, (4, 3))}, {}
      >>> def apply(params, mutable, x, *, train, rng):
      ...     return x @ params["w"], mutable
      >>> task = classifier(init, apply)
      >>> params, mutable = task.init(jax.random.key(0))
      >>> batch = Batch(x=jnp.zeros((2, 4)), y=jnp.array([0, 2]))
      >>> loss, (mutable, metrics) = task.loss(params, mutable, batch, jax.random.key(1))
      >>> print(f"{loss:.4f} {metrics['accuracy']:.1f}")  # log 3, and a tie goes to class 0
      1.0986 0.5
    """
    check("label_smoothing", label_smoothing, number(0, below=1))
    counts = None if class_weights is None else _class_weights(class_weights)

    def score(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        found = _cross_entropy(logits, labels)
        if label_smoothing:
            targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
            found["loss"] = optax.softmax_cross_entropy(logits, targets)
        if counts is None:
            return found
        if logits.shape[-1] != len(counts):
            raise SettingsError(
                f"there are {len(counts)} class_weights= for logits of {logits.shape[-1]} classes; give one for each"
            )
        return found | {"loss": found["loss"] * jnp.asarray(counts)[labels]}

    return _task(init, apply, _CLASSIFIER._replace(score=score))


def _class_weights(given: ArrayLike) -> np.ndarray:
    weights = np.asarray(given)
    fits = weights.ndim == 1 and weights.dtype.kind in "uif" and np.isfinite(weights).all() and (weights >= 0).all()
    if not fits or not weights.any():
        raise SettingsError(
            f"class_weights is {shown(given)}; it must be a finite number of 0 or more for each class, not all 0"
        )
    return weights.astype(np.float32)


def language_model(init: Init, apply: Apply, *, bytes_per_token: float | None = None) -> Task:
    """Makes a task of a network that predicts the next token at every position.

    The loss is the mean cross-entropy `-1/(B T) sum_bt log softmax(logits_bt)[y_bt]` in nats per token, computed in
    float32. The labels are the next tokens themselves: the task shifts nothing.

    Args:
      init: `rng -> (params, mutable)`.
      apply: `(params, mutable, x [B, T, ...], *, train, rng) -> (logits [B, T, vocabulary], mutable)`, called as for
        `classifier`.
      bytes_per_token: bytes of text that a token stands for on average, 1 for a text read byte by byte; see
        `wavg_jax.data.Dataset`.

    Returns:
      A `Task` over batches with y [B, T] and the metrics `loss`, `accuracy`, the share of correct tokens, and, with
      `bytes_per_token`, `bits_per_byte = loss / (log 2 * bytes_per_token)`, which compares across vocabularies.

    Raises:
      SettingsError: while tracing, if the logits are not [B, T, vocabulary].
      DataError: while tracing, if the labels are not integers [B, T].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from wavg_jax.base import Batch
      >>> def init(rng):  # the next token depends on this one alone
      ...     return {"table": jax.random.normal(rng, (4, 4))}, {}
      >>> def apply(params, mutable, x, *, train, rng):
      ...     return params["table"][x], mutable
      >>> task = language_model(init, apply)
      >>> text = jnp.array([[0, 1, 2, 3, 0, 1]], jnp.uint8)
      >>> table = {"table": 10 * jnp.roll(jnp.eye(4), 1, axis=1)}
      >>> loss, (mutable, metrics) = task.loss(table, {}, Batch(text[:, :-1], text[:, 1:]), jax.random.key(1))
      >>> print(f"{loss:.4f} {metrics['accuracy']:.1f}")  # log(1 + 3 exp(-10))
      0.0001 1.0
    """
    if bytes_per_token is None:
        return _task(init, apply, _LANGUAGE_MODEL)
    check("bytes_per_token", bytes_per_token, number(above=0))

    def metrics(sums: Sums, samples: jax.Array) -> dict[str, jax.Array]:
        found = means(sums, samples)
        return found | {"bits_per_byte": found["loss"] / (math.log(2) * bytes_per_token)}

    return _task(init, apply, _LANGUAGE_MODEL._replace(metrics=metrics))


def regressor(init: Init, apply: Apply) -> Task:
    """Makes a task of a network that predicts numbers.

    The loss is the mean squared error over samples and outputs, computed in float32.

    Args:
      init: `rng -> (params, mutable)`.
      apply: `(params, mutable, x [B, ...], *, train, rng) -> (predictions, mutable)`, called as for `classifier`; the
        predictions have the shape of the targets y.

    Returns:
      A `Task` with the metrics `loss` and `absolute_error`, both means over samples and outputs.

    Raises:
      SettingsError: while tracing, if predictions and targets differ in shape.
      DataError: while tracing, if the targets are not floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from wavg_jax.base import Batch
      >>> task = regressor(
      ...     lambda rng: ({"w": jnp.ones(2)}, {}),
      ...     lambda params, mutable, x, *, train, rng: (x @ params["w"], mutable),
      ... )
      >>> batch = Batch(x=jnp.array([[1.0, 2.0], [0.0, 1.0]]), y=jnp.array([1.0, 1.0]))
      >>> loss, _ = task.loss({"w": jnp.ones(2)}, {}, batch, jax.random.key(0))
      >>> print(f"{loss:.1f}")  # errors 2 and 0
      2.0
    """
    return _task(init, apply, _REGRESSOR)


class _Kind(NamedTuple):
    """What sets one kind of task apart from another.

    Attributes:
      outputs: `(outputs, x) -> outputs`, cast to float32; raises if they do not match the inputs.
      targets: `(y, outputs) -> y`, cast; raises if they do not match the outputs.
      score: `(outputs, y) -> {"loss": ..., ...}`, one number per output; the training loss is their mean.
      measure: `(outputs, y) -> {name: sum}`, the sums over the samples.
      metrics: the task's `metrics`.
    """

    outputs: Callable[[jax.Array, jax.Array], jax.Array]
    targets: Callable[[jax.Array, jax.Array], jax.Array]
    score: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
    measure: Callable[[jax.Array, jax.Array], Sums]
    metrics: Callable


def _task(init: Init, apply: Apply, kind: _Kind) -> Task:
    check("init", init, FUNCTION)
    check("apply", apply, FUNCTION)

    def loss(
        params: PyTree, mutable: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        raw, mutable = apply(params, mutable, batch.x, train=True, rng=rng)
        outputs = kind.outputs(raw, batch.x)
        scores = {name: x.mean() for name, x in kind.score(outputs, kind.targets(batch.y, outputs)).items()}
        return scores.pop("loss"), (mutable, scores)

    def predict(params: PyTree, mutable: PyTree, x: jax.Array) -> jax.Array:
        return kind.outputs(apply(params, mutable, x, train=False, rng=None)[0], x)

    def measure(logits: jax.Array, batch: Batch) -> Sums:
        return kind.measure(logits, kind.targets(batch.y, logits))

    return Task(init, loss, predict, measure, kind.metrics)


def _logits(name: str, axes: tuple[str, ...]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Builds the check that logits have these axes, and share all but the last with the inputs."""
    shared = len(axes) - 1

    def check(logits: jax.Array, x: jax.Array) -> jax.Array:
        if logits.ndim != len(axes) or logits.shape[:-1] != x.shape[:shared]:
            sizes = [*map(str, x.shape[:shared]), *axes[len(x.shape[:shared]) :]]
            raise SettingsError(
                f"the network returned logits of shape {logits.shape} for inputs of shape {x.shape}; "
                f"{name} must return [{', '.join(axes)}], here ({', '.join(sizes)})"
            )
        return logits.astype(jnp.float32)

    return check


def _labels(what: str, remedy: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Builds the check that labels are integers, one per row of logits."""

    def check(y: jax.Array, logits: jax.Array) -> jax.Array:
        if not jnp.issubdtype(y.dtype, jnp.integer) or y.shape != logits.shape[:-1]:
            raise DataError(
                f"the labels are {y.dtype} of shape {y.shape}; {what} are needed, integers of shape "
                f"{logits.shape[:-1]}: {remedy}"
            )
        # argmax gives int32; under strict promotion, uint8 labels do not compare with it.
        return y.astype(jnp.int32)

    return check


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    return {"loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels), "accuracy": right}


def _token_sums(logits: jax.Array, tokens: jax.Array) -> Sums:
    return {name: score.mean(axis=1).sum() for name, score in _cross_entropy(logits, tokens).items()}


def _predictions(outputs: jax.Array, x: jax.Array) -> jax.Array:
    if outputs.shape[:1] != x.shape[:1]:
        raise SettingsError(
            f"the network returned predictions of shape {outputs.shape} for inputs of shape {x.shape}; a regressor "
            f"must return the shape of its targets, ({len(x)}, ...)"
        )
    return outputs.astype(jnp.float32)


def _numbers(y: jax.Array, outputs: jax.Array) -> jax.Array:
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise DataError(f"the targets are {y.dtype}; a regressor needs floating-point numbers (y.astype(np.float32))")
    if y.shape != outputs.shape:
        raise SettingsError(
            f"the network returned predictions of shape {outputs.shape} for targets of shape {y.shape}; a regressor "
            "must return the shape of its targets (y[:, None] gives them an axis for one output)"
        )
    return y.astype(jnp.float32)


def _errors(outputs: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    return {"loss": jnp.square(outputs - y), "absolute_error": jnp.abs(outputs - y)}


def _error_sums(outputs: jax.Array, y: jax.Array) -> Sums:
    errors = _errors(outputs, y)
    return {name: error.reshape(len(y), -1).mean(axis=1).sum() for name, error in errors.items()}


_CLASSIFIER = _Kind(
    _logits("a classifier", ("B", "classes")),
    _labels(
        "class numbers",
        "cast whole floats with y.astype(int), take the argmax of one-hot labels, or make the task with regressor",
    ),
    _cross_entropy,
    quality.sums,
    quality.metrics,
)
_LANGUAGE_MODEL = _Kind(
    _logits("a language model", ("B", "T", "vocabulary")),
    _labels("token numbers", "give each position the token that follows it"),
    _cross_entropy,
    _token_sums,
    means,
)
_REGRESSOR = _Kind(_predictions, _numbers, _errors, _error_sums, means)
