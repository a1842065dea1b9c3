"""A recipe's functions as compiled programs, shared by all runs of a process that are made alike."""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.base import PyTree, Replicas, Smoothed, Task, TrainState
from wavg_jax.devices import machine
from wavg_jax.devices.placement import compiler_options
from wavg_jax.rounds import keys
from wavg_jax.rounds import score as scoring
from wavg_jax.rounds.recipe import Recipe
from wavg_jax.rounds.round import make_round


def initial_state(recipe: Recipe, params: PyTree, mutable: PyTree, rng: jax.Array, replicas: int) -> TrainState:
    """The state before the first round: K equal replicas with different keys, those in their states too.

    Args:
      recipe: what a round is made of.
      params, mutable: of `Task.init`, with the key `wavg_jax.rounds.keys.roots(rng).init`.
      rng: the key of the run.
      replicas: K.
    """
    smoothing, roots = recipe.smoothing, keys.roots(rng)
    states = tree.replicate((recipe.inner.init(params), mutable), replicas)
    opt_state, own_mutable = jax.vmap(keys.own)(states, jax.random.split(roots.states, replicas))
    return TrainState(
        params=params,
        mutable=mutable,
        replicas=Replicas(
            tree.replicate(params, replicas),
            opt_state,
            own_mutable,
            jax.random.split(roots.replicas, replicas),
        ),
        averager=recipe.averager.init(params, replicas),
        round=jnp.zeros((), jnp.int32),
        smoothed=None if smoothing is None else Smoothed(params, mutable, smoothing.init(params)),
    )


class Programs(NamedTuple):
    """The compiled programs of a recipe.

    Attributes:
      init: `(rng) -> TrainState`.
      run: `(state, work, shared) -> (state, RoundLog)`; the state is donated.
      predict: `(params, mutable, chunks) -> logits [C, B, classes]`.
    """

    init: Callable
    run: jax.stages.Wrapped
    predict: jax.stages.Wrapped


_QUICKLY = {"xla_backend_optimization_level": 0}
"""Compiler options for what runs once: optimising an initialiser takes ten times longer than running it."""


@functools.lru_cache(maxsize=16)
def _initialiser(task: Task) -> Callable:
    return jax.jit(lambda rng: task.init(keys.roots(rng).init), compiler_options=_QUICKLY)


@functools.lru_cache(maxsize=16)
def programs(recipe: Recipe, replicas: int) -> Programs:
    """Jits a recipe's functions, once for all runs of this process that share it."""
    stacked, shared = recipe.placement.stacked, recipe.placement.shared
    smoothed = None if recipe.smoothing is None else shared
    state: Any = TrainState(shared, shared, stacked, shared, shared, smoothed)  # type: ignore[arg-type]  # shardings
    patient = compiler_options(recipe.placement)
    assemble = jax.jit(
        functools.partial(initial_state, recipe, replicas=replicas), out_shardings=state, compiler_options=_QUICKLY
    )

    def predict(params: PyTree, mutable: PyTree, chunks: scoring.Chunks) -> jax.Array:
        return scoring.predict(
            recipe.task, recipe.prepare, params, mutable, chunks, spread=recipe.placement.over_samples
        )

    return Programs(
        lambda rng: assemble(*_initialiser(recipe.task)(rng), rng),
        jax.jit(make_round(recipe), donate_argnums=0, out_shardings=(state, shared), compiler_options=patient),
        jax.jit(predict, out_shardings=shared, compiler_options=patient),
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
    return compiled_together((program, *arguments))[0]


def compiled_together(*requests: tuple, keep: bool = True) -> list[Compiled]:
    """Compiles several `(program, *arguments)` at a time, each as `compiled` does.

    They are traced one after another, which is Python, and then compiled side by side, which is not. `keep` says
    whether they are remembered.
    """
    jobs = [_started(request[0], request[1:], _compile if keep else _compile.__wrapped__) for request in requests]
    try:
        return [job.result() for job in jobs]
    except BaseException:
        _compile.cache_clear()  # what failed once, for lack of memory, say, may be asked for again
        raise


def _started(program: jax.stages.Wrapped, arguments: tuple, start: Callable) -> concurrent.futures.Future[Compiled]:
    leaves, structure = jax.tree.flatten(arguments)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves)
    return start(cast(Hashable, program), structure, shapes)


_COMPILING = concurrent.futures.ThreadPoolExecutor(machine.cores(), thread_name_prefix="compile")


@functools.lru_cache(maxsize=16)
def _compile(
    program: Any, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> concurrent.futures.Future[Compiled]:
    start = time.perf_counter()
    lowered = program.lower(*jax.tree.unflatten(structure, shapes))
    traced = time.perf_counter() - start

    def finish() -> Compiled:
        start = time.perf_counter()
        return Compiled(lowered.compile(), traced + time.perf_counter() - start)

    return _COMPILING.submit(finish)
