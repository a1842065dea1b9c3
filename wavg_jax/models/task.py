"""Classifiers and language models as the library sees them: initialise, loss with accuracy, predict."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from wavg_jax.arguments import FUNCTION, check
from wavg_jax.base import Batch, DataError, PyTree, SettingsError, Task


class Init(Protocol):
    """`init(rng) -> (params, mutable)`; `mutable` is `{}` when a network has nothing but parameters."""

    def __call__(self, rng: jax.Array, /) -> tuple[PyTree, PyTree]: ...


class Apply(Protocol):
    """`apply(params, mutable, x, *, train, rng) -> (logits, mutable)`; `rng` is None to predict."""

    def __call__(
        self, params: PyTree, mutable: PyTree, x: jax.Array, /, *, train: bool, rng: jax.Array | None
    ) -> tuple[jax.Array, PyTree]: ...


def classifier(init: Init, apply: Apply) -> Task:
    """Makes a task of a network written by hand over plain pytrees.

    The loss is the mean cross-entropy `-1/B sum_b log softmax(logits_b)[y_b]`, in float32 whatever the logits are in.

    Args:
      init: `rng -> (params, mutable)`.
      apply: `(params, mutable, x [B, ...], *, train, rng) -> (logits [B, classes], mutable)`. It is called with
        `train=True` and a key for the loss, with `train=False` and `rng=None` to predict.

    Returns:
      A `Task` whose loss reports the metric `accuracy`, the share of the batch that is classified right.

    Raises:
      SettingsError: when traced, if the logits are not [B, classes].
      DataError: when traced, if the labels are not integers [B].

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
    return _task(init, apply, _CLASSIFIER)


def language_model(init: Init, apply: Apply) -> Task:
    """Makes a task of a network that predicts the next token at every position.

    The loss is the mean cross-entropy `-1/(B T) sum_bt log softmax(logits_bt)[y_bt]` in nats per token, in float32
    whatever the logits are in. The labels are the next tokens themselves: nothing is shifted here.

    Args:
      init: `rng -> (params, mutable)`.
      apply: `(params, mutable, x [B, T, ...], *, train, rng) -> (logits [B, T, vocabulary], mutable)`, called as that
        of `classifier`.

    Returns:
      A `Task` over batches with y [B, T], whose loss reports the metric `accuracy`, the share of the tokens that are
      predicted right, and whose `predict` returns logits [B, T, vocabulary].

    Raises:
      SettingsError: when traced, if the logits are not [B, T, vocabulary].
      DataError: when traced, if the labels are not integers [B, T].

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
    return _task(init, apply, _LANGUAGE_MODEL)


class _Kind(NamedTuple):
    """What the logits of a network are for: their axes, of which the labels have all but the last."""

    name: str
    axes: tuple[str, ...]
    labels: str
    remedy: str


_CLASSIFIER = _Kind("a classifier", ("B", "classes"), "class numbers", "take the argmax of one-hot labels")
_LANGUAGE_MODEL = _Kind(
    "a language model", ("B", "T", "vocabulary"), "token numbers", "give each position the token that follows it"
)


def _task(init: Init, apply: Apply, kind: _Kind) -> Task:
    check("init", init, FUNCTION)
    check("apply", apply, FUNCTION)

    def loss(
        params: PyTree, mutable: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        raw, mutable = apply(params, mutable, batch.x, train=True, rng=rng)
        logits = _logits(raw, batch.x, kind)
        labels = _labels(batch.y, logits, kind)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        accuracy = (logits.argmax(-1) == labels).mean(dtype=jnp.float32)
        return value, (mutable, {"accuracy": accuracy})

    def predict(params: PyTree, mutable: PyTree, x: jax.Array) -> jax.Array:
        return _logits(apply(params, mutable, x, train=False, rng=None)[0], x, kind)

    return Task(init=init, loss=loss, predict=predict)


def _logits(logits: jax.Array, x: jax.Array, kind: _Kind) -> jax.Array:
    shared = len(kind.axes) - 1
    if logits.ndim != len(kind.axes) or logits.shape[:-1] != x.shape[:shared]:
        sizes = [*map(str, x.shape[:shared]), *kind.axes[len(x.shape[:shared]) :]]
        raise SettingsError(
            f"the network returned logits of shape {logits.shape} for inputs of shape {x.shape}; "
            f"{kind.name} must return [{', '.join(kind.axes)}], here ({', '.join(sizes)})"
        )
    return logits.astype(jnp.float32)


def _labels(y: jax.Array, logits: jax.Array, kind: _Kind) -> jax.Array:
    if not jnp.issubdtype(y.dtype, jnp.integer) or y.shape != logits.shape[:-1]:
        raise DataError(
            f"the labels are {y.dtype} of shape {y.shape}; "
            f"{kind.labels} are needed, integers of shape {logits.shape[:-1]}: {kind.remedy}"
        )
    # argmax gives int32, and under strict promotion uint8 labels do not compare with it.
    return y.astype(jnp.int32)
