"""What runs in a worker's process: a group of replicas, their shards, and the program that trains and scores them.

A worker keeps nothing between rounds but its shards and its program. Each order brings the replicas as the last blend
left them, so a worker that was killed rejoins with the next order, and nothing has to be recovered from it.
"""

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax import tree
from wavg_jax.base import Averager, Batch, PyTree, Replicas, Task
from wavg_jax.devices.placement import Parts, place
from wavg_jax.rounds import score
from wavg_jax.rounds.common import Brought
from wavg_jax.rounds.faults import Faults
from wavg_jax.rounds.forward import Forward
from wavg_jax.rounds.local import Pace
from wavg_jax.rounds.score import Scoring
from wavg_jax.rounds.sync import AtSync
from wavg_jax.training.recipe import Recipe, rounds_of

Hook = Callable[[str, int, int, Any], Any]
"""`(point, worker, round, reply) -> reply`, called in the worker's process; see `Workers.hook`."""

CONFIG = (
    *("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_x64"),
    *("jax_persistent_cache_min_entry_size_bytes", "jax_default_matmul_precision", "jax_default_prng_impl"),
    *("jax_threefry_partitionable", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion"),
    *("jax_disable_most_optimizations",),
)
"""Settings of JAX that a worker takes over from the driver."""


class Kit(NamedTuple):
    """What every worker is made with.

    Attributes:
      task, averager, inner, scoring, at_sync, faults, prepare, augment: of the `Recipe`.
      replica_map: how a worker runs its replicas.
      held_out: the samples to score on; None if the rounds read none.
      replicas: K, those of all workers.
      batch_size, longest: samples per replica and step, and H of the longest round.
      dynamic: whether the number of local steps is an argument.
      config: settings of JAX.
      threads: of XLA on a CPU.
      audits: whether workers score replicas of others.
      hook: see `Workers.hook`.
    """

    task: Task
    averager: Averager
    inner: optax.GradientTransformation
    scoring: Scoring
    at_sync: AtSync
    faults: Faults | None
    prepare: Callable
    augment: Callable | None
    replica_map: str
    held_out: Batch | None
    replicas: int
    batch_size: int
    longest: int
    dynamic: bool
    config: Mapping[str, Any]
    threads: int
    audits: bool
    hook: Hook | None


class Shard(NamedTuple):
    """A replica's shard: its indices into the training split, in ascending order, and their samples [n, ...]."""

    indices: np.ndarray
    x: np.ndarray
    y: np.ndarray


class Ticket(NamedTuple):
    """Names an order: a result counts for this one alone.

    Attributes:
      round: from 1.
      version: of the global parameters that the replicas start from.
      worker: whose order it is.
      replicas: which ones.
    """

    round: int
    version: str
    worker: int
    replicas: tuple[int, ...]


class Reply(NamedTuple):
    """What a worker sends back.

    Attributes:
      ticket: of the order.
      leaves: of what was asked for, as NumPy arrays.
      seconds: that training and scoring took.
    """

    ticket: Ticket
    leaves: list[np.ndarray]
    seconds: float


def to_host(values: PyTree) -> list[np.ndarray]:
    """The leaves of a tree in the host's memory, random keys as their data; on a CPU without a copy."""
    leaves = jax.tree.leaves(values)
    return [np.asarray(jax.random.key_data(x) if tree.is_key(x) else x) for x in leaves]


def from_host(leaves: list[np.ndarray], like: PyTree, *, copy: bool = True) -> PyTree:
    """The inverse of `to_host`, on the default device; `like` has the structure and the kinds of keys.

    Without `copy` a CPU device may go on using the memory of `leaves`, which no program can then overwrite.
    """

    def leaf(x: np.ndarray, shape: Any) -> jax.Array:
        array = jax.device_put(x, may_alias=not copy)
        if not tree.is_key(shape):
            return array
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty((0,), shape.dtype)))

    shapes, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [leaf(x, shape) for x, shape in zip(leaves, shapes, strict=True)])


Form = list[tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of every array that `to_host` makes."""


def form_of(shapes: PyTree) -> Form:
    """The form of what `to_host` makes of a tree of these shapes."""
    data = jax.eval_shape(lambda x: jax.tree.map(lambda a: jax.random.key_data(a) if tree.is_key(a) else a, x), shapes)
    return [(x.shape, np.dtype(x.dtype)) for x in jax.tree.leaves(data)]


def recipe_of(kit: Kit, replicas: tuple[int, ...]) -> Recipe:
    """The recipe of some of the replicas, on this process's first device."""
    faults = kit.faults and Faults(*(tuple(row[k] for k in replicas) for row in kit.faults))
    return Recipe(
        kit.task,
        kit.averager,
        kit.inner,
        kit.scoring,
        kit.at_sync,
        faults,
        place(len(replicas), 1, kit.replica_map),
        kit.prepare,
        kit.augment,
        resident=True,
    )


def locally(kit: Kit, recipe: Recipe) -> Callable[..., Brought]:
    """`(replicas, drift, items, data, held_out, round, steps) -> Brought`, what a worker computes in a round."""
    apart = rounds_of(recipe).apart
    assert apart is not None  # `elastic.fit` refuses fragments

    def run(
        replicas: Replicas,
        drift: PyTree,
        items: jax.Array,
        data: PyTree,
        held_out: Batch | None,
        round: jax.Array,
        steps: jax.Array,
    ) -> Brought:
        pace = Pace(steps if kit.dynamic else None)
        return apart.locally(replicas, items, held_out, round, drift, shared=data, pace=pace)

    return run


def scores_of(kit: Kit, recipe: Recipe) -> Callable[..., dict[str, PyTree]]:
    """`((params, mutable), held_out, round) -> signals` of one replica, for audits."""
    forward = Forward(kit.task, kit.prepare, kit.scoring.dtype, kit.scoring.chunk, recipe.placement.over_samples)
    measured = score.measure(forward, kit.averager.needs, diagnose=kit.scoring.diagnose)

    def run(network: PyTree, held_out: Batch, round: jax.Array) -> dict[str, PyTree]:
        window = score.window(held_out, round, kit.scoring.samples)
        assert window is not None
        return measured(network, window)

    return run


class Unprepared(RuntimeError):
    """An order came to a process that holds nothing: the one before it died in between."""


class Worker:
    """The actor. A restart runs its constructor again; `hold` and the orders follow."""

    def __init__(self, number: int):
        self._number, self._held_out = number, None
        self._kit: Kit | None = None
        self._network: PyTree = None
        self._scores: Callable = _unasked

    def hold(self, kit: Kit, replicas: tuple[int, ...], shapes: PyTree, *shards: Shard) -> None:
        """Takes over replicas with their shards, and compiles their program.

        Args:
          kit: the same in every call.
          replicas: their numbers.
          shapes: `(Replicas, drift)`, with leaves [len(replicas), ...] of the former.
          *shards: one per replica.
        """
        os.environ["NPROC"] = str(kit.threads)  # XLA's, unless its client has started
        for name, value in kit.config.items():
            jax.config.update(name, value)
        self._kit = kit
        self._hook("hold", 0)
        self._shapes, self._indices = shapes, [shard.indices for shard in shards]
        starts = np.cumsum([0] + [len(indices) for indices in self._indices])
        self._starts = starts[:-1, None, None].astype(np.int32)
        split = [np.concatenate(parts)[None] for parts in ([s.x for s in shards], [s.y for s in shards])]
        self._data = jax.device_put(Parts(tuple(split)))
        if self._held_out is None and self._kit.held_out is not None:
            self._held_out = jax.device_put(self._kit.held_out)
        self._recipe = recipe_of(self._kit, replicas)
        items = jax.ShapeDtypeStruct((len(replicas), self._kit.longest, self._kit.batch_size), np.int32)
        number = jax.ShapeDtypeStruct((), np.int32)
        program = jax.jit(locally(self._kit, self._recipe), donate_argnums=0)
        self._program = program.lower(*shapes, items, self._data, self._held_out, number, number).compile()
        to_host(from_host([np.zeros(*one) for one in form_of(shapes)], shapes))  # compiles what handles random keys
        if kit.audits and self._held_out is not None:
            whole = (shapes[0].params, shapes[0].mutable)
            self._network = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), whole)
            scores = jax.jit(scores_of(kit, self._recipe))
            self._scores = scores.lower(self._network, self._held_out, number).compile()
        self._hook("ready", 0)

    def train(self, ticket: Ticket, leaves: list[np.ndarray], items: np.ndarray, steps: int) -> Reply:
        """Trains and scores the replicas for one round.

        Args:
          ticket: of the order.
          leaves: of `(Replicas, drift)`.
          items: indices into the training split [k, H, B].
          steps: how many of the H steps to take, where the kit says that this varies.
        """
        begun = time.perf_counter()
        if self._kit is None:
            raise Unprepared
        self._hook("train", ticket.round)
        given = from_host(leaves, self._shapes)
        local = np.stack([np.searchsorted(own, rows) for own, rows in zip(self._indices, items, strict=True)])
        local = local.astype(np.int32) + self._starts
        numbers = np.int32(ticket.round - 1), np.int32(steps)
        out = self._program(*given, *jax.device_put((local,)), self._data, self._held_out, *jax.device_put(numbers))
        reply = Reply(ticket, to_host(out), time.perf_counter() - begun)
        return self._hook("reply", ticket.round, reply)

    def score(self, ticket: Ticket, leaves: list[np.ndarray]) -> Reply:
        """Scores another worker's replica: the leaves of its `(params, mutable)`."""
        begun = time.perf_counter()
        if self._kit is None:
            raise Unprepared
        network, round = from_host(leaves, self._network), jax.device_put(np.int32(ticket.round - 1))
        out = self._scores(network, self._held_out, round)
        return self._hook("score", ticket.round, Reply(ticket, to_host(out), time.perf_counter() - begun))

    def _hook(self, point: str, round: int, reply: Any = None) -> Any:
        hook = None if self._kit is None else self._kit.hook
        return reply if hook is None else hook(point, self._number, round, reply)


def _unasked(*given: Any) -> Any:
    raise RuntimeError("this worker was not told that there would be audits")


@functools.cache
def actor() -> Any:
    """`Worker` as Ray runs it: restarted however often it dies, its calls made at most once."""
    import ray

    return ray.remote(max_restarts=-1, max_task_retries=0)(Worker)
