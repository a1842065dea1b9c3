"""Flax Linen modules as tasks."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from wavg_jax.arguments import FUNCTION, SHAPE, check, instance
from wavg_jax.base import PyTree, SettingsError, Task
from wavg_jax.models.task import Apply, Init, classifier


def from_linen(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: DTypeLike = jnp.float32,
    make: Callable[[Init, Apply], Task] = classifier,
) -> Task:
    """Makes a task of a Linen module.

    Every collection except `params` (such as BatchNorm's `batch_stats`) becomes `mutable`: the loss updates it, predict
    reads it. The loss's key feeds every random stream of the module, `dropout` or any other.

    Args:
      module: a module whose `__call__` takes `(x [B, *input_shape], train: bool)` and returns what `make` needs:
        logits [B, classes] for a classifier.
      input_shape: shape of one input, without the batch axis.
      dtype: dtype of the inputs; an integer dtype for tokens.
      make: `classifier`, `language_model`, `regressor`, or your own function from `init` and `apply` to a task.

    Returns:
      A `Task` over plain dicts.

    Raises:
      SettingsError: `module` is not a Linen module, or its `__call__` takes no `train`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from wavg_jax.models import MLP
      >>> task = from_linen(MLP(hidden=(16,), classes=3), input_shape=(8, 8, 1))
      >>> params, mutable = task.init(jax.random.key(0))
      >>> mutable
      {}
      >>> task.predict(params, mutable, jnp.ones((5, 8, 8, 1))).shape
      (5, 3)
      >>> from wavg_jax.models import Transformer, language_model
      >>> net = Transformer(vocabulary=50, layers=1, width=16)
      >>> task = from_linen(net, input_shape=(12,), dtype=jnp.int32, make=language_model)
      >>> tokens = jnp.zeros((5, 12), jnp.int32)
      >>> jax.eval_shape(lambda: task.predict(*task.init(jax.random.key(0)), tokens)).shape
      (5, 12, 50)
    """
    check("module", module, instance(nn.Module, "a flax.linen.Module (for NNX, use from_nnx)"))
    name = type(module).__name__
    check("input_shape", input_shape, SHAPE)
    check("make", make, FUNCTION)
    if "train" not in inspect.signature(type(module).__call__).parameters:
        raise SettingsError(f"{name}.__call__ takes no `train`: write it as __call__(self, x, train: bool)")

    def init(rng: jax.Array) -> tuple[PyTree, PyTree]:
        mutable = dict(module.init(rng, jnp.zeros((1, *input_shape), dtype), train=False))
        return mutable.pop("params", {}), mutable

    return make(init, applied(module, trains=True))


def applied(module: nn.Module, *, trains: bool) -> Apply:
    """A module as a function over plain dicts.

    Args:
      module: the module.
      trains: whether its `__call__` takes `train`.
    """

    def apply(
        params: PyTree, mutable: PyTree, x: jax.Array, *, train: bool, rng: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        variables: PyTree = {"params": params, **mutable}
        options: dict[str, Any] = {"train": train} if trains else {}
        if not train:
            logits: Any = module.apply(variables, x, **options)
            return logits, mutable
        # Linen uses a bare key for streams of any name, so none has to be listed here.
        logits, updated = module.apply(variables, x, **options, rngs=rng, mutable=list(mutable))
        return logits, {**mutable, **updated}

    return apply
