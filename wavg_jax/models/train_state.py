"""Flax's `TrainState`, in and out."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, freeze, unfreeze
from flax.training.train_state import TrainState

from wavg_jax import tree
from wavg_jax.arguments import FUNCTION, check, instance
from wavg_jax.base import PyTree, SettingsError, Task
from wavg_jax.models.linen import applied
from wavg_jax.models.task import Apply, Init, classifier

_STATE = instance(TrainState, "a flax.training.train_state.TrainState")


def from_train_state(state: TrainState, *, make: Callable[[Init, Apply], Task] = classifier) -> Task:
    """Makes a task of a `TrainState`, which starts from its parameters, trained or not.

    Fields of your own that are dicts, such as `batch_stats`, are the network's mutable collections of that name; all
    other fields are left alone.

    Args:
      state: its `apply_fn` must be the `apply` of a Linen module, whose `__call__` takes `x [B, ...]` and, if it
        behaves differently in training, `train: bool`. Give its `tx` to `fit(inner=)`, or any other optimizer.
      make: `classifier`, `language_model`, `regressor`, or your own function from `init` and `apply` to a task.

    Returns:
      A `Task`.

    Raises:
      SettingsError: `state` is none, or its `apply_fn` is not a Linen module's `apply`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
      >>> from flax.training.train_state import TrainState
      >>> module = nn.Dense(3)
      >>> params = module.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
      >>> state = TrainState.create(apply_fn=module.apply, params=params, tx=optax.sgd(0.1))
      >>> task = from_train_state(state)
      >>> task.predict(*task.init(jax.random.key(1)), jnp.ones((5, 4))).shape
      (5, 3)
    """
    check("state", state, _STATE)
    check("make", make, FUNCTION)
    module = getattr(state.apply_fn, "__self__", None)
    if not isinstance(module, nn.Module) or state.apply_fn != module.apply:
        raise SettingsError(
            "state.apply_fn is not the apply of a Linen module; make the task of it with models.classifier(lambda rng: "
            "(state.params, {}), apply)"
        )
    trains = "train" in inspect.signature(type(module).__call__).parameters
    mutable = {name: unfreeze(getattr(state, name)) for name in _collections(state)}
    network = jax.tree.map(jnp.asarray, (unfreeze(state.params), mutable))
    return make(lambda rng: network, applied(module, trains=trains))


def _collections(state: TrainState) -> list[str]:
    """The fields of the user's own that are dicts."""
    known = {field.name for field in dataclasses.fields(TrainState)}
    own = [field.name for field in dataclasses.fields(state) if field.name not in known]
    return [name for name in own if isinstance(getattr(state, name), Mapping)]


def to_train_state(state: TrainState, result: Any) -> TrainState:
    """Puts what `fit` found into a `TrainState`, to evaluate it or train on with a loop of your own.

    Args:
      state: the one that the task was made of.
      result: what `fit` returned.

    Returns:
      `state` with the global parameters and mutable collections of `result`; `step` advanced by the local steps of one
      replica; and the optimizer state averaged over replicas, counts as of the first one, or a fresh one if `fit` ran
      another optimizer than `state.tx`.

    Raises:
      SettingsError: `state` is none, or the parameters of `result` are not like its own.
    """
    check("state", state, _STATE)
    if _structure(result.params) != _structure(unfreeze(state.params)):
        raise SettingsError("the result has other parameters than state; give the state that the task was made of")
    replicas = result.state.replicas.opt_state
    params = _as_in(state.params, result.params)
    if _structure(replicas) == _structure(jax.eval_shape(state.tx.init, unfreeze(state.params))):
        opt_state = jax.tree.unflatten(_structure(state.opt_state), jax.tree.leaves(jax.tree.map(_mean, replicas)))
    else:
        opt_state = state.tx.init(params)
    steps = sum(row["local_steps"] for row in result.rows[1:])
    mutable = {name: _as_in(getattr(state, name), result.mutable[name]) for name in _collections(state)}
    return state.replace(step=state.step + steps, params=params, opt_state=opt_state, **mutable)


def _as_in(given: PyTree, found: PyTree) -> PyTree:
    """Frozen like what was given."""
    return freeze(found) if isinstance(given, FrozenDict) else found


def _structure(given: PyTree) -> Any:
    return jax.tree.structure(given)


def _mean(stacked: jax.Array) -> PyTree:
    """Over replicas; of what is no float, the first one's."""
    if not jnp.issubdtype(stacked.dtype, jnp.floating):
        return tree.replica(stacked, 0)
    return stacked.mean(axis=0, dtype=jnp.promote_types(stacked.dtype, jnp.float32)).astype(stacked.dtype)
