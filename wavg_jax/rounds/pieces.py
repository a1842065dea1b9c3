"""The pieces of a round with fragments; see `wavg_jax.rounds.streaming`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.averaging.averager import AveragerState
from wavg_jax.base import Averager, Batch, PyTree, Replicas, SettingsError, TrainState
from wavg_jax.devices.collectives import after as after_exchange
from wavg_jax.devices.placement import Placement
from wavg_jax.rounds import fragments, keys, local, policy, score, sync, wire
from wavg_jax.rounds.common import Setup, carry_statistics, constrained, diagnosed, report
from wavg_jax.rounds.exchange import among, gathers
from wavg_jax.rounds.faults import distort, finite_after, slow_down
from wavg_jax.rounds.local import Pace
from wavg_jax.rounds.sync import Trained
from wavg_jax.weighting.scores import per_replica


class Packet(NamedTuple):
    """What replicas send of a fragment: leaves [K, ...] in the format of the wire, and who is alive, bool [K]."""

    params: PyTree
    alive: jax.Array


@dataclasses.dataclass(frozen=True)
class Piece:
    """A function that is part of a round.

    Attributes:
      run: returns a tuple.
      outs: for each of its results whether it is "stacked" or "shared"; see `Placement`.
      where: lays them out.
      donates: which arguments it may overwrite.
    """

    run: Callable[..., tuple]
    outs: tuple[str, ...]
    where: Placement
    donates: tuple[int, ...] = ()

    def __call__(self, *arguments: PyTree) -> tuple:
        results = zip(self.outs, self.run(*arguments), strict=True)
        return tuple(constrained(self.where, getattr(self.where, kind), x) for kind, x in results)


class Pieces(NamedTuple):
    """The pieces of a round with F fragments.

    Attributes:
      train: `(replicas, params, batches, shared, pace, number) -> (replicas, loss [K], alive [K])`, one segment.
      score: `(replicas, params, losses, alive, batches, held_out, pace, sizes, round) -> (alive, signals)`, [K] each.
      swap: F of `(replicas, alive, before, after, mutable, round) -> (replicas, packet, keys)`: after a segment puts
        the fragment that arrived in the place of the replicas' own, restarts the dead, and packs the next fragment.
      exchange: F of `(packet, start, averager, weights, views) -> (params, averager, views, sound)`, of a fragment.
      close: `(state, params, views, replicas, alive, signals, keys, batches, shared, pace, held_out, sound, stop) ->
        (weights, weighting state, round, mutable, smoothed, the replicas' mutable, log, stop)`, the end of a round.
    """

    train: Callable
    score: Callable
    swap: Sequence[Callable]
    exchange: Sequence[Callable]
    close: Callable


def make_pieces(setup: Setup) -> Pieces:
    """Builds the pieces of rounds; `exchange` and `close` alone have collectives."""
    count = range(setup.at_sync.fragments)

    def piece(function: Callable, outs: tuple[str, ...], *bound: Any, donates: tuple[int, ...] = ()) -> Piece:
        return Piece(functools.partial(function, setup, *bound), outs, setup.where, donates)

    here, everywhere = ("stacked",), ("shared",)
    return Pieces(
        piece(_train, 3 * here, donates=(0,)),
        piece(_score, 2 * here),
        tuple(piece(_swap, 3 * here, s, donates=(0,)) for s in count),
        tuple(piece(_exchange, 4 * everywhere) for _ in count),
        piece(_close, (*5 * everywhere, *here, *2 * everywhere)),
    )


def reads_views(averager: Averager) -> bool:
    """Whether the weights depend on all replicas' parameters."""
    return averager.reads_replicas or "distance" in averager.needs


def _each(setup: Setup, batches: PyTree) -> int:
    """Local steps of a segment."""
    steps, count = local.longest(batches), setup.at_sync.fragments
    if steps % count:
        raise SettingsError(
            f"AtSync: fragments={count} does not divide a round of {steps} steps: set local_steps= to "
            f"{' or '.join(str(n) for n in (steps - steps % count, steps - steps % count + count) if n)}"
        )
    return steps // count


def _pace(setup: Setup, pace: Pace, batches: PyTree, number: Any) -> Pace:
    """The pace of a segment."""
    each = _each(setup, batches)
    whole = slow_down(setup.faults, pace, local.longest(batches))
    if whole.steps is None:
        return whole
    return whole._replace(steps=jnp.clip(jnp.asarray(whole.steps, jnp.int32) - number * each, 0, each))


def _segment(setup: Setup, batches: PyTree, number: Any) -> PyTree:
    each = _each(setup, batches)
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * each, each, axis=1), batches)


def _distorted(setup: Setup, stacked: PyTree, start: PyTree, alive: jax.Array, rng: jax.Array) -> PyTree:
    return distort(setup.faults, setup.where, stacked, jax.tree.map(lambda x: x[None], start), alive, rng)


def _train(
    setup: Setup, replicas: Replicas, params: PyTree, batches: PyTree, shared: PyTree, pace: Pace, number: jax.Array
) -> tuple[Replicas, jax.Array, jax.Array]:
    """`Pieces.train`."""
    own = _pace(setup, pace, batches, number)
    segment = _segment(setup, batches, number)
    after, loss, alive = local.train(setup.steps, setup.where.advance, replicas, segment, shared, own)
    sent = _distorted(setup, after.params, params, alive, after.rng)
    return after, loss, finite_after(setup.faults, alive, sent)


def _score(
    setup: Setup,
    replicas: Replicas,
    params: PyTree,
    losses: Sequence[jax.Array],
    alive: Sequence[jax.Array],
    batches: PyTree,
    held_out: Batch | None,
    pace: Pace,
    sizes: jax.Array | None,
    round: jax.Array,
) -> tuple[jax.Array, dict[str, PyTree]]:
    """`Pieces.score`."""
    taken = [local.steps_taken(_segment(setup, batches, s), _pace(setup, pace, batches, s)) for s in range(len(losses))]
    steps = sum(taken[1:], taken[0])
    total = sum((loss * n.astype(loss.dtype) for loss, n in zip(losses, taken, strict=True)), jnp.zeros_like(losses[0]))
    loss = total / jnp.maximum(steps.astype(total.dtype), 1)
    living = jnp.stack(list(alive)).all(0)
    sent = replicas._replace(params=_distorted(setup, replicas.params, params, living, replicas.rng))
    window = score.window(held_out, round, setup.scoring.samples)
    due = score.due(setup.scoring.every, round)
    signals = score.of_replicas(setup.measured, setup.where.map, sent, window, due) | score.free(loss, sizes, steps)
    return living, signals


def _swap(
    setup: Setup,
    number: int,
    replicas: Replicas,
    alive: jax.Array,
    before: PyTree,
    after: PyTree,
    mutable: PyTree,
    round: jax.Array,
) -> tuple[Replicas, Packet, keys.AtSyncKeys]:
    """`Pieces.swap`, after segment `number`."""
    count, at_sync, where = setup.at_sync.fragments, setup.at_sync, setup.where
    groups, last = fragments.groups(after, count), number == count - 1
    arrived, leaving = groups[number - 1], groups[number]
    old, new, own = (fragments.take(x, arrived) for x in (before, after, replicas.params))
    moved = setup.averager.restart(own, old, new, alive=alive, check_finite=False, round=round)
    if not number:  # before the first round nothing was sent
        moved = tree.select(round > 0, moved, own)
    params = fragments.put(replicas.params, arrived, moved)
    params = tree.select_replicas(alive, params, tree.replicate(after, len(alive)))
    opt_state = sync.carry_opt_state(
        at_sync.opt_state if last else policy.keep,
        setup.inner,
        where.reduce,
        replicas.opt_state,
        after,
        alive,
        tree.equal_weights(alive),
    )
    stats = tree.select_replicas(alive, replicas.mutable, tree.with_floats(replicas.mutable, mutable))
    split, start = keys.at_sync(replicas.rng), fragments.take(after, leaving)
    sent = _distorted(setup, fragments.take(params, leaving), start, alive, replicas.rng)
    packed, residual = where.map(functools.partial(_pack, at_sync.wire))(
        (sent, replicas.residual[number], split.wire), start
    )
    arriving = wire.arriving(at_sync.wire, packed, alive)
    residual = tree.select_replicas(arriving, residual, optax.tree.zeros_like(residual))
    residuals = (*replicas.residual[:number], residual, *replicas.residual[number + 1 :])
    replicas = Replicas(params, opt_state, stats, split.following, residuals)
    return replicas, Packet(packed, arriving), split._replace(following=(), wire=(), lie=())  # type: ignore[arg-type]


def _pack(how: str, one: tuple[PyTree, PyTree, jax.Array], start: PyTree) -> tuple[PyTree, PyTree]:
    params, residual, rng = one
    return wire.pack(how, params, start, residual, rng)


def _exchange(
    setup: Setup, packet: Packet, start: PyTree, state: AveragerState, weights: PyTree, views: PyTree
) -> tuple[PyTree, AveragerState, PyTree, jax.Array]:
    """`Pieces.exchange`."""
    averager, how, where = setup.averager, setup.at_sync.wire, setup.where
    assert averager.halves is not None  # `streaming.begin` has checked
    step = averager.halves.step

    def blended(
        packet: Packet, start: PyTree, state: AveragerState, weights: PyTree, views: PyTree
    ) -> tuple[PyTree, AveragerState, PyTree, jax.Array]:
        arrived, alive = jax.vmap(lambda one: wire.unpack(how, one, start))(packet.params), packet.alive
        params, state, taken = step(arrived, among(alive, weights), state, start, alive=alive)
        if reads_views(averager):
            views = tree.select_replicas(alive, arrived, tree.replicate(start, len(alive)))
        return params, state, views, taken | ~alive.any()

    if gathers(averager, how):
        return where.together(blended)(where.gather(packet), start, state, weights, views)
    alive = where.gather(packet.alive)
    shares = where.together(among)(alive, weights)  # left to itself, the compiler cuts it up and exchanges its parts
    params, state, taken = step(packet.params, shares, state, start, alive=alive, place=where.reduce)
    return params, state, views, taken | ~alive.any()


def _close(
    setup: Setup,
    state: TrainState,
    params: PyTree,
    views: PyTree,
    replicas: Replicas,
    alive: jax.Array,
    signals: dict[str, PyTree],
    split: keys.AtSyncKeys,
    batches: PyTree,
    shared: PyTree,
    pace: Pace,
    held_out: Batch | None,
    sound: Sequence[jax.Array],
    stop: jax.Array | None,
) -> tuple:
    """`Pieces.close`; `state` is that before the round, without its replicas."""
    where, averager = setup.where, setup.averager
    window = score.window(held_out, state.round, setup.scoring.samples)
    reads = reads_views(averager)
    # Statistics of all replicas travel only where blends may be tried, each with its own mean.
    told = where.gather((replicas.mutable if reads else (), after_exchange(alive, list(sound)), signals))
    seen = views if reads else tree.replicate(state.params, len(alive))  # nobody reads those
    decided = where.together(functools.partial(_decide, setup))(state, seen, *told, window, sound)
    weights, weighting, share, alive, signals, found = decided
    steps = local.steps_taken(batches, slow_down(setup.faults, pace, local.longest(batches)))
    trained = Trained(batches, shared, steps, alive & (share.sum() > 0))
    stats, mutable, smoothed = carry_statistics(setup, state, replicas.mutable, split, params, share, trained)
    log = report(setup, signals, share, alive, steps, found)
    asked = None if stop is None else after_exchange(stop, tree.floats((share, mutable, smoothed))).any()
    return weights, weighting, state.round + 1, mutable, smoothed, stats, log, asked


def _decide(
    setup: Setup,
    state: TrainState,
    views: PyTree,
    mutable: PyTree,
    alive: jax.Array,
    signals: dict[str, PyTree],
    window: Batch | None,
    sound: Sequence[jax.Array],
) -> tuple[PyTree, PyTree, jax.Array, jax.Array, dict[str, PyTree], dict[str, jax.Array]]:
    """Weighs the replicas, on every device alike, by what all have told.

    Returns:
      The weights, and the weighting's state; the weights [K]; `alive` and `signals`, with those made here; and the
      diagnosis.
    """
    averager = setup.averager
    assert averager.halves is not None  # `streaming.begin` has checked

    def mean(weights: PyTree) -> PyTree:
        return sync.mean_over_living(lambda reduction: reduction, mutable, weights, state.mutable)

    if "distance" in averager.needs:
        signals = signals | {"distance": score.distances(views, alive)}
    shared = score.of_blends(averager.needs, setup.forward, mean, window, signals)
    # The views are of what replicas sent while these were the global parameters.
    weigh, own, due = averager.halves.weigh, state.averager.weighting, score.due(setup.every, state.round)

    def now() -> tuple[PyTree, PyTree]:
        return weigh(views, own, state.params, alive=alive, **(signals | shared))

    # A round that is not scored leaves the weights and the weighting's state as they are.
    weights, weighting = now() if due is None else jax.lax.cond(due, now, lambda: (state.stream.weights, own))
    kept = functools.reduce(jnp.logical_and, sound)  # no outer step went astray
    weights = tree.select(kept, weights, optax.tree.zeros_like(weights))
    weighting = tree.select(kept & alive.any(), weighting, own)
    share = per_replica(weights)
    found = diagnosed(setup, state.round, signals, window, share, alive)
    return weights, weighting, share, alive, signals, found
