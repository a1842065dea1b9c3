"""Local training: one replica takes H steps of an inner optimizer on its own shard."""

from collections.abc import Callable

import jax
import optax

from wavg_jax.base import Batch, PyTree, Replicas, Task

Fetch = Callable[[PyTree, PyTree, jax.Array], Batch]


def as_is(item: Batch, shared: PyTree, rng: jax.Array) -> Batch:
    """Takes the step's item as the batch itself."""
    del shared, rng
    return item


def local_steps(task: Task, inner: optax.GradientTransformation, fetch: Fetch = as_is) -> Callable:
    """Builds the local phase of one replica: a scan of H optax steps.

    Args:
      task: the network.
      inner: the inner optimizer, any optax transformation.
      fetch: `(item, shared, rng) -> Batch` makes one step's batch inside the scan, for instance by gathering rows of a
        data set on the device and augmenting them. By default the item is the batch.

    Returns:
      `(replica, items, shared) -> (replica, loss)`: `replica` is a `Replicas` of one replica (no leading axis), the
      leaves of `items` have a leading axis H, and `loss` is the mean training loss over the H steps, a float32 scalar.
      The function is pure; `jax.vmap` or `wavg_jax.placement` map it over the replicas.
    """

    def step(replica: Replicas, item: PyTree, shared: PyTree) -> tuple[Replicas, jax.Array]:
        rng, fetch_rng, loss_rng = jax.random.split(replica.rng, 3)
        batch = fetch(item, shared, fetch_rng)
        (loss, (mutable, _)), gradient = jax.value_and_grad(task.loss, has_aux=True)(
            replica.params, replica.mutable, batch, loss_rng
        )
        updates, opt_state = inner.update(gradient, replica.opt_state, replica.params)
        return Replicas(optax.apply_updates(replica.params, updates), opt_state, mutable, rng), loss

    def run(replica: Replicas, items: PyTree, shared: PyTree) -> tuple[Replicas, jax.Array]:
        replica, losses = jax.lax.scan(lambda carry, item: step(carry, item, shared), replica, items)
        return replica, losses.mean()

    return run


def refresh(task: Task, fetch: Fetch = as_is) -> Callable:
    """Builds `(params, mutable, items, shared, rng) -> mutable`: the mutable collections after the network has run in
    training mode over the items, its parameters fixed. Re-estimates BatchNorm statistics."""

    def run(params: PyTree, mutable: PyTree, items: PyTree, shared: PyTree, rng: jax.Array) -> PyTree:
        def step(carry: tuple[PyTree, jax.Array], item: PyTree) -> tuple[tuple[PyTree, jax.Array], None]:
            mutable, rng = carry
            rng, fetch_rng, loss_rng = jax.random.split(rng, 3)
            _, (mutable, _) = task.loss(params, mutable, fetch(item, shared, fetch_rng), loss_rng)
            return (mutable, rng), None

        (mutable, _), _ = jax.lax.scan(step, (mutable, rng), items)
        return mutable

    return run
