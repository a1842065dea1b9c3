"""Local training: every replica takes H steps of the inner optimizer on its own shard."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import checks, tree
from wavg_jax.base import Batch, PyTree, Replicas, Task
from wavg_jax.devices.placement import Items, Placement, single
from wavg_jax.models.rewrite import fast
from wavg_jax.rounds.drift import Correction

Fetch = Callable[[PyTree, PyTree, jax.Array], Batch]
"""`(item, shared, rng) -> Batch`: makes the batch of one step inside the compiled loop."""


def as_is(item: Batch, shared: PyTree, rng: jax.Array) -> Batch:
    """Takes the item itself as the batch."""
    del shared, rng
    return item


class Pace(NamedTuple):
    """How many local steps the replicas take in a round, and how large. Numbers may change without recompiling.

    Attributes:
      steps: local steps from 0 to H, int32, a scalar for all or [K]; None takes all H, a length the compiler knows.
      rate: multiplies the updates of the inner optimizer, float32, a scalar or [K]; None leaves them.
    """

    steps: jax.Array | None = None
    rate: jax.Array | None = None


EVERY_STEP = Pace()

LocalSteps = Callable[..., tuple[Replicas, jax.Array]]


def local_steps(
    task: Task,
    inner: optax.GradientTransformation,
    fetch: Fetch = as_is,
    where: Placement | None = None,
    drift: Correction | None = None,
) -> LocalSteps:
    """Builds the local phase of one replica: a loop of optax steps.

    Args:
      task: the network.
      inner: the inner optimizer, any optax transformation.
      fetch: `(item, shared, rng) -> Batch` makes the batch of one step, for instance by gathering rows of a data set on
        the device and augmenting them. By default the item is the batch.
      where: the placement, which may spread a replica's batches over devices; by default one device.
      drift: a correction of the gradients; see `wavg_jax.drift`.

    Returns:
      `(replica, items, shared, pace=EVERY_STEP, mean=()) -> (replica, loss)`: `replica` is a `Replicas` of one replica
      (no leading axis), the leaves of `items` have a leading axis H, the numbers of `pace` are scalars, `mean` is that
      of the replicas' control variates, and `loss` is the mean training loss over the steps taken, a float32 scalar.
      The function is pure; `train` maps it over replicas.
    """

    where = single() if where is None else where
    loss_and_gradient = fast(jax.value_and_grad(task.loss, has_aux=True), task.cpu_forms)

    def step(
        replica: Replicas, item: PyTree, shared: PyTree, rate: jax.Array | None, correct: Callable
    ) -> tuple[Replicas, jax.Array]:
        rng, fetch_rng, loss_rng = jax.random.split(replica.rng, 3)
        batch = fetch(item, shared, where.apart(fetch_rng))
        (loss, (mutable, _)), gradient = loss_and_gradient(
            replica.params, replica.mutable, batch, where.apart(loss_rng)
        )
        loss, gradient, floats = where.average((loss, gradient, tree.floats(mutable)))
        mutable = tree.put_floats(mutable, floats)
        gradient = correct(gradient, replica.params)
        updates, opt_state = inner.update(gradient, replica.opt_state, replica.params)
        if rate is not None:
            updates = jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates)
        params = optax.apply_updates(replica.params, updates)
        return Replicas(params, opt_state, mutable, rng), loss

    def run(
        replica: Replicas, items: PyTree, shared: PyTree, pace: Pace = EVERY_STEP, mean: PyTree = ()
    ) -> tuple[Replicas, jax.Array]:
        start, own, replica = replica.params, replica.drift, replica._replace(drift=())
        correct = functools.partial(_corrected, drift, start, own, mean)
        longest = jax.tree.leaves(items)[0].shape[0]
        steps = longest if pace.steps is None else jnp.clip(pace.steps, 0, longest)

        def body(i: jax.Array, carry: tuple[Replicas, jax.Array]) -> tuple[Replicas, jax.Array]:
            replica, total = carry
            replica, loss = step(replica, jax.tree.map(lambda x: x[i], items), shared, pace.rate, correct)
            return replica, total + loss

        # With the number of steps as an argument, H changes without recompiling. Mapped over different numbers, the
        # loop runs to the largest and freezes the replicas that are done.
        replica, total = jax.lax.fori_loop(0, steps, body, (replica, jnp.float32(0)))
        taken = jnp.asarray(steps, jnp.float32)
        if drift is not None:
            own = _finished(drift, own, mean, start, replica.params, taken if pace.rate is None else taken * pace.rate)
        return replica._replace(drift=own), total / jnp.maximum(taken, 1)

    return run


def _corrected(
    drift: Correction | None, start: PyTree, own: PyTree, mean: PyTree, gradient: PyTree, params: PyTree
) -> PyTree:
    if drift is None:
        return gradient
    corrected = drift.correct(gradient, params, start, own, mean)
    checks.alike("drift: correct(...)", corrected, "the gradient", gradient, "keep its structure and shapes")
    return tree.cast_like(corrected, gradient)


def _finished(drift: Correction, own: PyTree, *given: PyTree) -> PyTree:
    finished = drift.finish(own, *given)
    checks.alike("drift: finish(...)", finished, "the control variate", own, "keep the shapes that init made")
    return tree.cast_like(finished, own)


def train(
    steps: LocalSteps,
    advance: Callable[[Callable], Callable],
    replicas: Replicas,
    batches: PyTree,
    shared: PyTree,
    pace: Pace,
    mean: PyTree = (),
) -> tuple[Replicas, jax.Array, jax.Array]:
    """Trains K replicas for one round.

    Args:
      steps: the local phase of one replica; see `local_steps`.
      advance: maps it over the replicas; see `devices.placement.Placement.advance`.
      replicas: [K, ...].
      batches: what the steps read, [K, H, ...].
      shared: what every replica reads.
      pace: numbers, each a scalar for all or [K].
      mean: of the replicas' control variates; see `wavg_jax.rounds.drift`.

    Returns:
      The replicas after their local steps, their mean training losses [K], and who came through with finite numbers,
      bool [K]. Numbers that were not finite before, such as a mask of -inf among the collections, do not count.
    """
    residual, replicas = replicas.residual, replicas._replace(residual=())  # no matter of the local steps
    # A number common to all stays out of the mapping, so that a loop of one length needs no masking.
    dtypes = {"steps": jnp.int32, "rate": jnp.float32}
    given = {name: jnp.asarray(x, dtypes[name]) for name, x in pace._asdict().items() if x is not None}
    own = {name: x for name, x in given.items() if x.ndim}
    common = {name: x for name, x in given.items() if not x.ndim}

    def one(item: PyTree, everywhere: PyTree) -> tuple[Replicas, tuple[jax.Array, jax.Array]]:
        replica, (items, own) = item
        shared, common, mean = everywhere
        sound = _finite_states(replica)
        after, loss = steps(replica, items.values, shared, Pace(**own, **common), mean)
        # Here each replica's numbers are still in the cache, and those from before the steps need not be kept.
        alive = tree.is_finite((after.params, loss)) & (_finite_states(after) | ~sound)
        return after, (loss, alive)

    after, (loss, alive) = advance(one)((replicas, (Items(batches), own)), (shared, common, mean))
    return after._replace(residual=residual), loss, alive


def _finite_states(replica: Replicas) -> jax.Array:
    return tree.is_finite((replica.opt_state, replica.mutable, replica.rng, replica.drift))


def longest(batches: PyTree) -> int:
    """H, the local steps that batches [K, H, ...] last."""
    return jax.tree.leaves(batches)[0].shape[1]


def steps_taken(batches: PyTree, pace: Pace) -> jax.Array:
    """The local steps that each replica takes: int32 [K]."""
    replicas, most = jax.tree.leaves(batches)[0].shape[0], jnp.int32(longest(batches))
    taken = most if pace.steps is None else jnp.clip(jnp.asarray(pace.steps, jnp.int32), 0, most)
    return jnp.broadcast_to(taken, (replicas,))
