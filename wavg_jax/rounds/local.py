"""Local training: one replica takes H steps of an inner optimizer on its own shard."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax.base import Batch, PyTree, Replicas, Task

Fetch = Callable[[PyTree, PyTree, jax.Array], Batch]


def as_is(item: Batch, shared: PyTree, rng: jax.Array) -> Batch:
    """Takes the step's item as the batch itself."""
    del shared, rng
    return item


class Pace(NamedTuple):
    """How a replica works in a round. Numbers that are given may change from round to round without recompiling.

    Attributes:
      steps: local steps to take, int32 scalar, at most the number of items; None takes them all, in a loop whose length
        the compiler knows.
      rate: multiplies what the inner optimizer adds to the parameters, float32 scalar; None leaves it as it is.
    """

    steps: jax.Array | None = None
    rate: jax.Array | None = None


EVERY_STEP = Pace()


def local_steps(task: Task, inner: optax.GradientTransformation, fetch: Fetch = as_is) -> Callable:
    """Builds the local phase of one replica: a loop of optax steps.

    Args:
      task: the network.
      inner: the inner optimizer, any optax transformation.
      fetch: `(item, shared, rng) -> Batch` makes one step's batch inside the loop, for instance by gathering rows of a
        data set on the device and augmenting them. By default the item is the batch.

    Returns:
      `(replica, items, shared, pace=EVERY_STEP) -> (replica, loss)`: `replica` is a `Replicas` of one replica (no
      leading axis), the leaves of `items` have a leading axis H, `pace` is a `Pace` (by default all H steps), and
      `loss` is the mean training loss over the steps taken, a float32 scalar. The function is pure; `jax.vmap` or
      `wavg_jax.devices.placement` map it over the replicas.
    """

    def step(replica: Replicas, item: PyTree, shared: PyTree, rate: jax.Array | None) -> tuple[Replicas, jax.Array]:
        rng, fetch_rng, loss_rng = jax.random.split(replica.rng, 3)
        batch = fetch(item, shared, fetch_rng)
        (loss, (mutable, _)), gradient = jax.value_and_grad(task.loss, has_aux=True)(
            replica.params, replica.mutable, batch, loss_rng
        )
        updates, opt_state = inner.update(gradient, replica.opt_state, replica.params)
        if rate is not None:
            updates = jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates)
        return Replicas(optax.apply_updates(replica.params, updates), opt_state, mutable, rng), loss

    def run(replica: Replicas, items: PyTree, shared: PyTree, pace: Pace = EVERY_STEP) -> tuple[Replicas, jax.Array]:
        steps = jax.tree.leaves(items)[0].shape[0] if pace.steps is None else pace.steps

        def body(i: jax.Array, carry: tuple[Replicas, jax.Array]) -> tuple[Replicas, jax.Array]:
            replica, total = carry
            replica, loss = step(replica, jax.tree.map(lambda x: x[i], items), shared, pace.rate)
            return replica, total + loss

        # Where the number of steps is an argument, H can change without recompiling. Mapped over numbers that differ,
        # the loop runs to the largest and holds the others still.
        replica, total = jax.lax.fori_loop(0, steps, body, (replica, jnp.float32(0)))
        return replica, total / jnp.asarray(steps, jnp.float32)

    return run
