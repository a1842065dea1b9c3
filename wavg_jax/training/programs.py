"""The compiled programs of a recipe, shared by all runs of a process with an equal one."""

import concurrent.futures
import functools
import hashlib
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import Sharding

from wavg_jax.base import Batch, PyTree, Task, TrainState
from wavg_jax.devices import machine, processes
from wavg_jax.devices.collectives import after
from wavg_jax.devices.placement import compiler_options
from wavg_jax.devices.transfer import put
from wavg_jax.rounds import keys
from wavg_jax.rounds.forward import metrics
from wavg_jax.rounds.round import RoundLog, everywhere, initial_state, place_state
from wavg_jax.training.batches import Shared, Work
from wavg_jax.training.recipe import Recipe, forward_of, rounds_of


class Programs(NamedTuple):
    """The programs of a recipe.

    Attributes:
      begin: `(rng) -> (shapes, state)`: starts compiling what makes the first `TrainState`. The shapes, with shardings,
        are known at once; `state()` waits, and makes it.
      run: `(state, work, shared, stop) -> (state, RoundLog, stop)`; donates the state. `stop` goes in as bool [D], one
        entry per device, and comes out as whether any is true; None where nobody asks.
      evaluate: `(params, mutable, test) -> {metric: value}` on the test split, a `Batch` [N, ...].
    """

    begin: Callable[[jax.Array], tuple[TrainState, Callable[[], TrainState]]]
    run: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped

    def init(self, rng: jax.Array) -> TrainState:
        """The first state, from the key of a run."""
        return self.begin(rng)[1]()


QUICKLY = {"xla_backend_optimization_level": 0}
"""Compiler options for programs that run once: optimising an initialiser takes ten times longer than running it."""


@functools.lru_cache(maxsize=16)
def initialiser(task: Task) -> jax.stages.Wrapped:
    """Jits a task's `init`, as a function of the key of a run."""
    return jax.jit(lambda rng: task.init(keys.roots(rng).init), compiler_options=QUICKLY)


@functools.lru_cache(maxsize=16)
def programs_of(recipe: Recipe, replicas: int) -> Programs:
    """Jits a recipe's functions for K replicas, once for all runs of this process that share it."""
    rounds, forward, placement = rounds_of(recipe), forward_of(recipe), recipe.placement

    def assemble(params: PyTree, mutable: PyTree, rng: jax.Array) -> TrainState:
        state = initial_state(
            params, mutable, rng, replicas, recipe.averager, recipe.inner, recipe.scoring, recipe.at_sync
        )
        return place_state(placement, state)

    def run(
        state: TrainState, work: Work, shared: Shared, stop: jax.Array | None = None
    ) -> tuple[TrainState, RoundLog, jax.Array | None]:
        held_out, train, sizes = shared.held_out, shared.train, shared.sizes
        state, log = rounds.step(state, work.items, held_out, shared=train, pace=work.pace, sizes=sizes)
        if stop is None:
            return state, log, None
        return state, log, everywhere(placement, after(stop, (state, log)).any())

    def evaluate(params: PyTree, mutable: PyTree, test: Batch) -> dict[str, jax.Array]:
        return placement.together(functools.partial(metrics, forward))(params, mutable, test)

    initialise, assembled = initialiser(recipe.task), jax.jit(assemble, compiler_options=QUICKLY)

    def begin(rng: jax.Array) -> tuple[TrainState, Callable[[], TrainState]]:
        rng = put(rng, placement.shared)
        network = laid_out(jax.eval_shape(initialise, rng), placement.shared)
        jobs = [_started(initialise, (rng,), _compile), _started(assembled, (*network, rng), _compile)]
        shapes = laid_out(jax.eval_shape(assembled, *network, rng), placement.shared)
        shapes = shapes._replace(replicas=laid_out(shapes.replicas, placement.stacked))

        def state() -> TrainState:
            first, second = _finished(jobs)
            return second.call(*first.call(rng), rng)

        return shapes, state

    patient = compiler_options(placement)
    return Programs(
        begin,
        jax.jit(run, donate_argnums=0, compiler_options=patient),
        jax.jit(evaluate, compiler_options=patient),
    )


def laid_out(tree: PyTree, sharding: Sharding) -> PyTree:
    """The shapes of a tree, each with this sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


class Compiled(NamedTuple):
    """A program compiled ahead of time.

    Attributes:
      call: the program.
      seconds: that tracing and compiling took.
      digest: tells apart programs before compilation, with all constants in them; "" in a process by itself.
      temporary: bytes on each device that it needs beside its arguments, as the compiler plans; None if unknown.
    """

    call: Callable
    seconds: float
    digest: str = ""
    temporary: int | None = None


def compiled(program: jax.stages.Wrapped, *arguments: PyTree) -> Compiled:
    """Compiles a jitted program for the shapes, dtypes and shardings of `arguments`.

    The result never recompiles: called with other shapes it raises. A second request for the same returns the same,
    with the seconds of the first.
    """
    return compiled_together((program, *arguments))[0]


def compiled_together(*requests: tuple, keep: bool = True) -> list[Compiled]:
    """Compiles several `(program, *arguments)`, each as `compiled` does.

    Tracing, which is Python, goes one after another; compiling goes in parallel. `keep` says whether to remember them.
    """
    return _finished(
        [_started(request[0], request[1:], _compile if keep else _compile.__wrapped__) for request in requests]
    )


def _finished(jobs: list[concurrent.futures.Future[Compiled]]) -> list[Compiled]:
    try:
        return [job.result() for job in jobs]
    except BaseException:
        _compile.cache_clear()  # a request that failed, for lack of memory, say, may be made again
        raise


def _started(program: jax.stages.Wrapped, arguments: tuple, start: Callable) -> concurrent.futures.Future[Compiled]:
    leaves, structure = jax.tree.flatten(arguments)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves)
    return start(cast(Hashable, program), structure, shapes)


_COMPILING = concurrent.futures.ThreadPoolExecutor(machine.cores(), thread_name_prefix="compile")


@functools.lru_cache(maxsize=64)
def _compile(
    program: Any, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> concurrent.futures.Future[Compiled]:
    start = time.perf_counter()
    lowered = program.lower(*jax.tree.unflatten(structure, shapes))
    digest = hashlib.sha256(lowered.as_text().encode()).hexdigest() if processes.count() > 1 else ""
    traced = time.perf_counter() - start

    def finish() -> Compiled:
        start = time.perf_counter()
        call = lowered.compile()
        return Compiled(call, traced + time.perf_counter() - start, digest, _temporary(call))

    return _COMPILING.submit(finish)


def _temporary(call: jax.stages.Compiled) -> int | None:
    plan = call.memory_analysis()
    if plan is None:
        return None
    return int(plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes)
