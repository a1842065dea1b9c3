"""A classifier as the library sees one: initialise, loss with accuracy, predict."""

from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from wavg_jax.base import Batch, DataError, PyTree, SettingsError, Task


class Init(Protocol):
    """`init(rng) -> (params, mutable)`; `mutable` is `{}` when a network has nothing but parameters."""

    def __call__(self, rng: jax.Array, /) -> tuple[PyTree, PyTree]: ...


class Apply(Protocol):
    """`apply(params, mutable, x, *, train, rng) -> (logits [B, classes], mutable)`; `rng` is None to predict."""

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

    def loss(
        params: PyTree, mutable: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        raw, mutable = apply(params, mutable, batch.x, train=True, rng=rng)
        logits = _logits(raw, batch.x)
        labels = _labels(batch.y, logits)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        accuracy = (logits.argmax(-1) == labels).mean(dtype=jnp.float32)
        return value, (mutable, {"accuracy": accuracy})

    def predict(params: PyTree, mutable: PyTree, x: jax.Array) -> jax.Array:
        return _logits(apply(params, mutable, x, train=False, rng=None)[0], x)

    return Task(init=init, loss=loss, predict=predict)


def _logits(logits: jax.Array, x: jax.Array) -> jax.Array:
    if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        raise SettingsError(
            f"the network returned logits of shape {logits.shape} for inputs of shape {x.shape}; "
            f"a classifier must return [B, classes], here ({x.shape[0]}, classes)"
        )
    return logits.astype(jnp.float32)


def _labels(y: jax.Array, logits: jax.Array) -> jax.Array:
    if not jnp.issubdtype(y.dtype, jnp.integer) or y.shape != logits.shape[:1]:
        raise DataError(
            f"the labels are {y.dtype} of shape {y.shape}; "
            f"class numbers are needed, integers of shape {logits.shape[:1]}: take the argmax of one-hot labels"
        )
    # argmax gives int32, and under strict promotion uint8 labels do not compare with it.
    return y.astype(jnp.int32)
