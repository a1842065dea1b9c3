"""One round as one compiled program: local steps, scoring, blend, and what the replicas start the next round with."""

import functools
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax import local, policy, signals, tree
from wavg_jax.base import Averager, Batch, PyTree, Replicas, SettingsError, Task, TrainState
from wavg_jax.data import ShardedData
from wavg_jax.placement import Placement, put
from wavg_jax.reduce import weighted_mean
from wavg_jax.weighting import effective_replicas, per_replica


class Shared(NamedTuple):
    """What every replica reads: the training split [N, ...] as stored, its labels [N], and the held-out chunks."""

    x: jax.Array | np.ndarray
    y: jax.Array | np.ndarray
    held_out: signals.Chunks | None


class RoundLog(NamedTuple):
    """What a round reports.

    Attributes:
      train_loss: [K], mean over the local steps.
      scores: {signal: [K]}, those that were measured.
      weights: [K], of each replica in the blend.
      effective_replicas: `1 / sum(weights^2)`.
      alive: bool [K], who took part.
    """

    train_loss: jax.Array
    scores: dict[str, jax.Array]
    weights: jax.Array
    effective_replicas: jax.Array
    alive: jax.Array


class Recipe(NamedTuple):
    """Everything a round is made of but the data and the state. Equal recipes share their compiled programs.

    Attributes:
      task: the network.
      averager: how the replicas become the next global parameters.
      inner: the inner optimizer.
      prepare: stored inputs [B, ...] -> the network's inputs, inside the compiled program.
      augment: `(rng, x) -> x` on prepared inputs, with a key per replica and step; or None.
      opt_state_at_sync, stats_at_sync: policies; see `wavg_jax.policy`.
      placement: where the replicas live.
    """

    task: Task
    averager: Averager
    inner: optax.GradientTransformation
    prepare: Callable[[jax.Array], jax.Array]
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None
    opt_state_at_sync: policy.Policy
    stats_at_sync: policy.Policy
    placement: Placement


def put_shared(recipe: Recipe, data: ShardedData, chunk: int) -> Shared:
    """Copies what every replica reads to the devices; the held-out split only if a weighting needs it."""
    scored = signals.measured(recipe.averager.needs)
    if scored and not len(data.heldout.y):
        raise SettingsError("the weighting scores held-out data and there is none; hold out some samples (--heldout)")
    held_out = signals.chunked(data.heldout.x, data.heldout.y, chunk) if scored else None
    return put(Shared(data.train.x, data.train.y.astype(np.int32), held_out), recipe.placement.shared)


def fetch(recipe: Recipe) -> local.Fetch:
    """Builds the gathering of one batch: indices [B] into the shared training split -> Batch."""

    def gather(indices: jax.Array, shared: Shared, rng: jax.Array) -> Batch:
        x = recipe.prepare(shared.x[indices])
        return Batch(x if recipe.augment is None else recipe.augment(rng, x), shared.y[indices])

    return gather


def initial_state(recipe: Recipe, params: PyTree, mutable: PyTree, rng: jax.Array, replicas: int) -> TrainState:
    """The state before the first round: K equal replicas with different keys."""
    return TrainState(
        params=params,
        mutable=mutable,
        replicas=Replicas(
            tree.replicate(params, replicas),
            tree.replicate(recipe.inner.init(params), replicas),
            tree.replicate(mutable, replicas),
            jax.random.split(jax.random.fold_in(rng, 1), replicas),
        ),
        averager=recipe.averager.init(params),
        round=jnp.zeros((), jnp.int32),
    )


def _mean_over_living(recipe: Recipe, stacked: PyTree, weights: jax.Array, otherwise: PyTree) -> PyTree:
    mean = tree.cast_like(recipe.placement.reduce(weighted_mean)(stacked, weights), otherwise)
    return tree.select(weights.sum() > 0, mean, otherwise)


def _sync_opt_state(recipe: Recipe, opt_state: PyTree, params: PyTree, log: RoundLog) -> PyTree:
    fresh = recipe.inner.init(params)
    stacked_fresh = tree.replicate(fresh, log.alive.shape[0])
    mean = _mean_over_living(recipe, opt_state, log.weights, fresh)
    sync = policy.Sync(log.alive, mean, stacked_fresh, stacked_fresh, None)
    return recipe.opt_state_at_sync(opt_state, sync)[0]


def _sync_stats(
    recipe: Recipe,
    after: Replicas,
    before: TrainState,
    params: PyTree,
    log: RoundLog,
    indices: jax.Array,
    shared: Shared,
) -> tuple[PyTree, PyTree]:
    """Returns the replicas' mutable collections and the global ones, which evaluation uses."""
    replicas = log.alive.shape[0]
    mean = _mean_over_living(recipe, after.mutable, log.weights, before.mutable)
    rerun = local.refresh(recipe.task, fetch(recipe))

    def refresh(steps: int) -> PyTree:
        if steps > indices.shape[1]:
            raise SettingsError(
                f"reestimate({steps}) needs {steps} batches, a round has {indices.shape[1]} (--local_steps)"
            )

        def one(item: PyTree, shared: PyTree) -> PyTree:
            mutable, indices, rng = item
            data, params = shared
            # Not the key itself, with which the next round starts.
            return rerun(params, mutable, indices[-steps:], data, jax.random.fold_in(rng, 1))

        start = tree.replicate(mean, replicas)
        refreshed = recipe.placement.map(one)((start, indices, after.rng), (shared, params))
        alive = log.alive.astype(jnp.float32)
        equal = alive / jnp.maximum(alive.sum(), 1)
        return _mean_over_living(recipe, refreshed, equal, mean)

    _, initial = recipe.task.init(jax.random.key(0))
    sync = policy.Sync(log.alive, mean, tree.replicate(initial, replicas), tree.replicate(mean, replicas), refresh)
    return recipe.stats_at_sync(after.mutable, sync)


class Pieces(NamedTuple):
    """The parts of a round, in the order they run.

    Attributes:
      train: `((Replicas, indices [K, H, B]), shared) -> (Replicas, loss [K])`.
      score: `(Replicas, held_out) -> {signal: [K]}`; `{}` when the weighting needs none.
      blend: `(Replicas, state, alive, signals) -> (params, averager state, weights)`.
    """

    train: Callable
    score: Callable
    blend: Callable


def pieces(recipe: Recipe) -> Pieces:
    """Builds the parts of a round."""
    steps = local.local_steps(recipe.task, recipe.inner, fetch(recipe))
    needs = signals.measured(recipe.averager.needs)
    measure = recipe.placement.map(signals.measure(recipe.task, recipe.prepare, needs))

    def score(replicas: Replicas, held_out: signals.Chunks) -> dict[str, jax.Array]:
        return measure((replicas.params, replicas.mutable), held_out) if needs else {}

    def blend(
        replicas: Replicas, state: TrainState, alive: jax.Array, measured: dict[str, jax.Array]
    ) -> tuple[PyTree, PyTree, PyTree]:
        return recipe.averager.update(
            replicas.params,
            state.averager,
            state.params,
            alive=alive,
            place=recipe.placement.reduce,
            **measured,
        )

    return Pieces(recipe.placement.map(lambda one, shared: steps(*one, shared)), score, blend)


def _alive(before: Replicas, after: Replicas, train_loss: jax.Array) -> jax.Array:
    """Who came through the local steps with finite numbers: bool [K].

    What was not finite before, such as a mask of -inf among the collections, is not held against a replica.
    """

    def finite(replicas: Replicas) -> jax.Array:
        return tree.all_finite((replicas.opt_state, replicas.mutable, replicas.rng))

    return tree.all_finite((after.params, train_loss)) & (finite(after) | ~finite(before))


def make_round(recipe: Recipe) -> Callable[[TrainState, jax.Array, Shared], tuple[TrainState, RoundLog]]:
    """Builds one round as a pure function `(state, indices [K, H, B], shared) -> (state, RoundLog)`."""
    part = pieces(recipe)

    def run(state: TrainState, indices: jax.Array, shared: Shared) -> tuple[TrainState, RoundLog]:
        after, train_loss = part.train((state.replicas, indices), shared)
        scores = part.score(after, shared.held_out)
        alive = _alive(state.replicas, after, train_loss)
        params, averager_state, weights = part.blend(after, state, alive, {"train_loss": train_loss, **scores})
        mean_weights = per_replica(weights)
        log = RoundLog(train_loss, scores, mean_weights, effective_replicas(mean_weights), alive)
        mutable, global_mutable = _sync_stats(recipe, after, state, params, log, indices, shared)
        opt_state = _sync_opt_state(recipe, after.opt_state, params, log)
        replicas = Replicas(tree.replicate(params, alive.shape[0]), opt_state, mutable, after.rng)
        return TrainState(params, global_mutable, replicas, averager_state, state.round + 1), log

    return run


class Programs(NamedTuple):
    """The compiled programs of a recipe.

    Attributes:
      init: `(rng) -> TrainState`.
      run: `(state, indices [K, H, B], shared) -> (state, RoundLog)`; the state is donated.
      predict: `(params, mutable, chunks) -> logits [C, B, classes]`.
    """

    init: Callable
    run: jax.stages.Wrapped
    predict: jax.stages.Wrapped


_QUICKLY = {"xla_backend_optimization_level": 0}
"""Compiler options for what runs once: optimising an initialiser takes ten times longer than running it."""


@functools.lru_cache(maxsize=16)
def _initialiser(task: Task) -> Callable:
    return jax.jit(task.init, compiler_options=_QUICKLY)


@functools.lru_cache(maxsize=16)
def programs(recipe: Recipe, replicas: int) -> Programs:
    """Jits a recipe's functions, once for all runs of this process that share it."""
    stacked, shared = recipe.placement.stacked, recipe.placement.shared
    state: Any = TrainState(shared, shared, stacked, shared, shared)  # type: ignore[arg-type]  # shardings, not arrays
    assemble = jax.jit(
        functools.partial(initial_state, recipe, replicas=replicas), out_shardings=state, compiler_options=_QUICKLY
    )

    def predict(params: PyTree, mutable: PyTree, chunks: signals.Chunks) -> jax.Array:
        return signals.predict(recipe.task, recipe.prepare, params, mutable, chunks)

    return Programs(
        lambda rng: assemble(*_initialiser(recipe.task)(rng), rng),
        jax.jit(make_round(recipe), donate_argnums=0, out_shardings=(state, shared)),
        jax.jit(predict, out_shardings=shared),
    )


class Compiled(NamedTuple):
    """A program compiled ahead of time, and the seconds that tracing and compiling took."""

    call: Callable
    seconds: float


def compiled(program: jax.stages.Wrapped, *arguments: PyTree) -> Compiled:
    """Compiles a jitted program for the shapes, dtypes and shardings of `arguments`.

    What it returns cannot recompile: called with anything else it raises. Asked again for the same, it returns the
    same, with the seconds of the first time.
    """
    leaves, structure = jax.tree.flatten(arguments)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves)
    return _compile(cast(Hashable, program), structure, shapes)


@functools.lru_cache(maxsize=16)
def _compile(program: Any, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Compiled:
    start = time.perf_counter()
    executable = program.lower(*jax.tree.unflatten(structure, shapes)).compile()
    return Compiled(executable, time.perf_counter() - start)
