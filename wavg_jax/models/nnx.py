"""Flax NNX modules as tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from wavg_jax.arguments import FUNCTION, SHAPE, Rule, check
from wavg_jax.base import PyTree, SettingsError, Task
from wavg_jax.models.task import Apply, Init, classifier

if TYPE_CHECKING:
    from flax import nnx


def from_nnx(
    make_module: Callable[[nnx.Rngs], nnx.Module],
    input_shape: Sequence[int],
    *,
    dtype: DTypeLike = jnp.float32,
    make: Callable[[Init, Apply], Task] = classifier,
) -> Task:
    """Makes a task of an NNX module.

    `nnx.Param` variables are the parameters; all others (such as BatchNorm's statistics) are `mutable`, except random
    streams, which start afresh from the key of each call, and the state of `nnx.metrics`, which each call finds as it
    was made and leaves behind: totals and counts of different replicas have no average. Parameters and `mutable` are
    plain dicts, since dispatching an `nnx.State` costs 2 to 4 times more. Each call rebuilds the module from them, so
    replicas and traces share nothing.

    Args:
      make_module: `nnx.Rngs -> nnx.Module`; the module's `__call__` takes `x [B, *input_shape]` and returns what
        `make` needs: logits [B, classes] for a classifier. `module.train()` and `module.eval()` switch dropout and
        BatchNorm.
      input_shape: shape of one input, without the batch axis. The module is traced on it here, without computing
        anything, so that a wrong shape fails now.
      dtype: dtype of the inputs; an integer dtype for tokens.
      make: `classifier`, `language_model`, `regressor`, or your own function from `init` and `apply` to a task.

    Returns:
      A `Task` over plain dicts.

    Raises:
      SettingsError: `make_module` returns no NNX module, or the module returns outputs that `make` refuses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> task = from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs), input_shape=(4,))
      >>> params, mutable = task.init(jax.random.key(0))
      >>> jax.tree.map(jnp.shape, params), mutable
      ({'bias': (3,), 'kernel': (4, 3)}, {})
      >>> task.predict(params, mutable, jnp.ones((5, 4))).shape
      (5, 3)
      >>> from wavg_jax.models import regressor
      >>> task = from_nnx(lambda rngs: nnx.Linear(4, 1, rngs=rngs), input_shape=(4,), make=regressor)
      >>> task.predict(*task.init(jax.random.key(0)), jnp.ones((5, 4))).shape
      (5, 1)
    """
    # Importing it takes longer than flax.linen (0.6 s against 0.4 s), so only NNX users should wait for it.
    from flax import nnx

    makes = Rule(lambda f: callable(f) and not isinstance(f, nnx.Module), "a function, nnx.Rngs -> flax.nnx.Module")
    check("make_module", make_module, makes)
    check("input_shape", input_shape, SHAPE)
    check("make", make, FUNCTION)
    mutable_filter = nnx.Not(nnx.Any(nnx.Param, nnx.RngState, nnx.metrics.MetricState))
    abstract = nnx.eval_shape(lambda: make_module(nnx.Rngs(0)))
    if not isinstance(abstract, nnx.Module):
        raise SettingsError(f"make_module= must return a flax.nnx.Module, but returned a {type(abstract).__name__}")
    streams = nnx.to_pure_dict(nnx.state(abstract, nnx.RngState))
    metrics: PyTree = nnx.to_pure_dict(nnx.state(abstract, nnx.metrics.MetricState))
    if metrics:  # of all that is made, the compiler keeps these alone
        metrics = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make_module(nnx.Rngs(0)), nnx.metrics.MetricState)))()
    graphs = {}
    abstract.train()
    graphs[True] = nnx.graphdef(abstract)
    abstract.eval()
    graphs[False] = nnx.graphdef(abstract)

    def init(rng: jax.Array) -> tuple[PyTree, PyTree]:
        params, mutable = nnx.state(make_module(nnx.Rngs(rng)), nnx.Param, mutable_filter)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(mutable)

    def apply(
        params: PyTree, mutable: PyTree, x: jax.Array, *, train: bool, rng: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        # Evaluation may never draw from the module's streams, but they still need some key.
        keys = _seed(streams, jax.random.key(0) if rng is None else rng)
        module: Any = nnx.merge(graphs[train], params, mutable, keys, metrics)
        logits = module(x)
        if not train:
            return logits, mutable
        return logits, nnx.to_pure_dict(nnx.state(module, mutable_filter))

    task = make(init, apply)
    jax.eval_shape(lambda: task.predict(*task.init(jax.random.key(0)), jnp.zeros((1, *input_shape), dtype)))
    return task


def _seed(streams: PyTree, rng: jax.Array) -> PyTree:
    """Fills the abstract random streams of a module: each key becomes its own child of `rng`, each counter 0."""
    leaves, treedef = jax.tree.flatten(streams)
    filled = [
        jax.random.split(jax.random.fold_in(rng, i), leaf.shape)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, filled)
