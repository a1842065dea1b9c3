"""Rounds whose parameters are synchronised in fragments, each while the next local steps compute.

Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512) with quality weights. With F fragments
(`AtSync(fragments=F)`) a round of H local steps is F segments of H / F:

    replicas   | segment 0        | segment 1        | ...   | segment F - 1      | score
    exchange   | fragment F - 1   | fragment 0       | ...   | fragment F - 2     |         | fragment F - 1 ...

After segment s every replica sends fragment s, in the format of the wire. While segment s + 1 trains, the fragment is
exchanged, blended and stepped by an outer optimizer of its own; after that segment it takes the place of the replicas'
own (`Averager.restart`, which may pull instead). So every fragment arrives one segment late. What the replicas sent of
the last fragment stays in the state, `Replicas.pending`, and the next round exchanges it first.

The weights of the fragments that a round exchanges are those of the scores at the end of the round before; the first
round has equal ones. A weighting that reads replicas reads what was last received of each, `Stream.views`. A replica
that is not finite after a segment has no weight in what is sent then and restarts from the global parameters; in the
round's scores it counts as dead. Mutable collections are averaged at the end of the round, as scores are.

A round is made of pieces, and only those that exchange have a collective. `play` puts them together: under one `jit`,
or, on CPU, where one program or one thread would run one after the other, as programs of which those with a collective
run in a thread of their own (`wavg_jax.training.overlap`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.averaging.averager import AveragerState
from wavg_jax.base import Averager, Batch, PyTree, Replicas, SettingsError, TrainState
from wavg_jax.devices.placement import Placement
from wavg_jax.rounds import fragments, keys, local, policy, score, sync, wire
from wavg_jax.rounds.common import Parts, RoundLog, carry_statistics, constrained, survivors
from wavg_jax.rounds.exchange import gathers
from wavg_jax.rounds.faults import distort, slow_down
from wavg_jax.rounds.local import Pace
from wavg_jax.rounds.sync import AtSync, Trained
from wavg_jax.weighting.scores import effective_replicas, normalise, per_replica
from wavg_jax.weighting.signals import FREE
from wavg_jax.weighting.wrappers import weights_like


class Packet(NamedTuple):
    """What replicas send of a fragment: leaves [K, ...] in the format of the wire, and who is alive, bool [K]."""

    params: PyTree
    alive: jax.Array


class Stream(NamedTuple):
    """What a round leaves for the next one, the same on every device.

    Attributes:
      weights: of the last scores, as the weighting gave them; 0 before the first.
      views: the replicas' parameters [K, ...] as they were last received; `()` unless the averager reads them.
    """

    weights: PyTree
    views: PyTree


class Piece(NamedTuple):
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


def make_pieces(parts: Parts) -> Pieces:
    """Builds the pieces of rounds; `exchange` and `close` alone have collectives."""
    count = range(parts.at_sync.fragments)

    def piece(function: Callable, outs: tuple[str, ...], *bound: Any, donates: tuple[int, ...] = ()) -> Piece:
        return Piece(functools.partial(function, parts, *bound), outs, parts.where, donates)

    here, everywhere = ("stacked",), ("shared",)
    return Pieces(
        piece(_train, 3 * here, donates=(0,)),
        piece(_score, 2 * here),
        tuple(piece(_swap, 3 * here, s, donates=(0,)) for s in count),
        tuple(piece(_exchange, 4 * everywhere) for _ in count),
        piece(_close, (*5 * everywhere, *here, *2 * everywhere)),
    )


def begin(state: TrainState, averager: Averager, at_sync: AtSync) -> TrainState:
    """The state before the first round, given that of rounds without fragments.

    Raises:
      SettingsError: there are fewer tensors than fragments, the averager cannot be taken apart, or the replicas'
        optimizer states are averaged, which no segment could hide.
    """
    if averager.halves is None:
        raise SettingsError("AtSync: fragments= needs an averager with halves, as wavg_jax.averager makes it")
    if sync.averages(at_sync.opt_state, state.replicas.opt_state):
        raise SettingsError("AtSync: fragments= exchange no optimizer state: set opt_state to keep or reset it")
    params, replicas = state.params, tree.count_replicas(state.replicas.params)
    taken = [fragments.take(params, group) for group in fragments.groups(params, at_sync.fragments)]
    own = [averager.init(part, replicas) for part in taken]
    whole: AveragerState = state.averager
    outer = None if whole.outer is None else tuple(one.outer for one in own)
    masters = None if whole.outer is None else tuple(one.masters for one in own)
    residual = tuple(wire.no_residual(at_sync.wire, part, replicas) for part in taken)
    like = weights_like(averager.halves.weighting, whole.weighting, params, replicas)
    reads = _reads_views(averager)
    return state._replace(
        replicas=state.replicas._replace(residual=residual, pending=_nothing_sent(at_sync.wire, taken[-1], replicas)),
        averager=AveragerState(whole.weighting, outer, masters),
        stream=Stream(_zeros(like), tree.replicate(params, replicas) if reads else ()),
    )


def _zeros(like: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _nothing_sent(how: str, part: PyTree, replicas: int) -> Packet:
    def pack(part: PyTree) -> PyTree:
        residual = jax.tree.map(lambda x: x[0], wire.no_residual(how, part, 1))
        return tree.replicate(wire.pack(how, part, part, residual, jax.random.key(0))[0], replicas)

    return Packet(_zeros(jax.eval_shape(pack, part)), jnp.zeros(replicas, bool))


def _reads_views(averager: Averager) -> bool:
    return averager.reads_replicas or "distance" in averager.needs


def _each(parts: Parts, batches: PyTree) -> int:
    """Local steps of a segment."""
    steps, count = local.longest(batches), parts.at_sync.fragments
    if steps % count:
        raise SettingsError(
            f"AtSync: fragments={count} does not divide a round of {steps} steps: set local_steps= to "
            f"{' or '.join(str(n) for n in (steps - steps % count, steps - steps % count + count) if n)}"
        )
    return steps // count


def _pace(parts: Parts, pace: Pace, batches: PyTree, number: Any) -> Pace:
    """The pace of a segment."""
    each = _each(parts, batches)
    whole = slow_down(parts.faults, pace, local.longest(batches))
    if whole.steps is None:
        return whole
    return whole._replace(steps=jnp.clip(jnp.asarray(whole.steps, jnp.int32) - number * each, 0, each))


def _segment(parts: Parts, batches: PyTree, number: Any) -> PyTree:
    each = _each(parts, batches)
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * each, each, axis=1), batches)


def _distorted(parts: Parts, stacked: PyTree, start: PyTree) -> PyTree:
    return distort(parts.faults, stacked, jax.tree.map(lambda x: x[None], start))


def _train(
    parts: Parts, replicas: Replicas, params: PyTree, batches: PyTree, shared: PyTree, pace: Pace, number: jax.Array
) -> tuple[Replicas, jax.Array, jax.Array]:
    """`Pieces.train`."""
    own = _pace(parts, pace, batches, number)
    segment = _segment(parts, batches, number)
    after, loss = local.train(parts.steps, parts.where.map, replicas, segment, shared, own)
    sent = after._replace(params=_distorted(parts, after.params, params))
    return after, loss, survivors(replicas, sent, loss)


def _score(
    parts: Parts,
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
    taken = [local.steps_taken(_segment(parts, batches, s), _pace(parts, pace, batches, s)) for s in range(len(losses))]
    steps = sum(taken[1:], taken[0])
    total = sum((loss * n.astype(loss.dtype) for loss, n in zip(losses, taken, strict=True)), jnp.zeros_like(losses[0]))
    loss = total / jnp.maximum(steps.astype(total.dtype), 1)
    sent = replicas._replace(params=_distorted(parts, replicas.params, params))
    window = score.window(held_out, round, parts.scoring.samples)
    signals = score.of_replicas(parts.measured, parts.where.map, sent, window) | score.free(loss, sizes, steps)
    return jnp.stack(list(alive)).all(0), signals


def _swap(
    parts: Parts,
    number: int,
    replicas: Replicas,
    alive: jax.Array,
    before: PyTree,
    after: PyTree,
    mutable: PyTree,
    round: jax.Array,
) -> tuple[Replicas, Packet, keys.AtSyncKeys]:
    """`Pieces.swap`, after segment `number`."""
    count, at_sync, where = parts.at_sync.fragments, parts.at_sync, parts.where
    groups, last = fragments.groups(after, count), number == count - 1
    arrived, leaving = groups[number - 1], groups[number]
    old, new, own = (fragments.take(x, arrived) for x in (before, after, replicas.params))
    moved = parts.averager.restart(own, old, new, alive=alive, check_finite=False)
    if not number:  # before the first round nothing was sent
        moved = tree.select(round > 0, moved, own)
    params = fragments.put(replicas.params, arrived, moved)
    params = tree.select_replicas(alive, params, tree.replicate(after, len(alive)))
    opt_state = sync.carry_opt_state(
        at_sync.opt_state if last else policy.keep,
        parts.inner,
        where.reduce,
        replicas.opt_state,
        after,
        alive,
        tree.equal_weights(alive),
    )
    stats = tree.select_replicas(alive, replicas.mutable, tree.with_floats(replicas.mutable, mutable))
    split, start = keys.at_sync(replicas.rng), fragments.take(after, leaving)
    sent = _distorted(parts, fragments.take(params, leaving), start)
    packed, residual = where.map(functools.partial(_pack, at_sync.wire))(
        (sent, replicas.residual[number], split.wire), start
    )
    residual = tree.select_replicas(alive, residual, optax.tree.zeros_like(residual))
    residuals = (*replicas.residual[:number], residual, *replicas.residual[number + 1 :])
    replicas = Replicas(params, opt_state, stats, split.following, residuals)
    return replicas, Packet(packed, alive), split._replace(following=(), wire=())  # type: ignore[arg-type]


def _pack(how: str, one: tuple[PyTree, PyTree, jax.Array], start: PyTree) -> tuple[PyTree, PyTree]:
    params, residual, rng = one
    return wire.pack(how, params, start, residual, rng)


def _exchange(
    parts: Parts, packet: Packet, start: PyTree, state: AveragerState, weights: PyTree, views: PyTree
) -> tuple[PyTree, AveragerState, PyTree, jax.Array]:
    """`Pieces.exchange`."""
    averager, how, where = parts.averager, parts.at_sync.wire, parts.where
    assert averager.halves is not None  # `begin` has checked
    step = averager.halves.step

    def among(alive: jax.Array, weights: PyTree) -> PyTree:
        return jax.tree.map(lambda w: normalise(w, alive), weights)

    def blended(
        packet: Packet, start: PyTree, state: AveragerState, weights: PyTree, views: PyTree
    ) -> tuple[PyTree, AveragerState, PyTree, jax.Array]:
        arrived, alive = jax.vmap(lambda one: wire.unpack(how, one, start))(packet.params), packet.alive
        params, state, taken = step(arrived, among(alive, weights), state, start, alive=alive)
        if _reads_views(averager):
            views = tree.select_replicas(alive, arrived, tree.replicate(start, len(alive)))
        return params, state, views, taken | ~alive.any()

    if gathers(averager, how):
        return where.together(blended)(where.gather(packet), start, state, weights, views)
    alive = where.gather(packet.alive)
    params, state, taken = step(packet.params, among(alive, weights), state, start, alive=alive, place=where.reduce)
    return params, state, views, taken | ~alive.any()


def _close(
    parts: Parts,
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
    averager = parts.averager
    window = score.window(held_out, state.round, parts.scoring.samples)
    weights, weighting, told_alive, told = _weigh(parts, state, views, replicas, alive, signals, window)
    kept = functools.reduce(jnp.logical_and, sound)  # no outer step went astray
    taken = kept & told_alive.any()
    weights = tree.select(kept, weights, optax.tree.zeros_like(weights))
    weighting = tree.select(taken, weighting, state.averager.weighting)
    share, steps = (
        per_replica(weights),
        local.steps_taken(batches, slow_down(parts.faults, pace, local.longest(batches))),
    )
    trained = Trained(batches, shared, steps, told_alive & (share.sum() > 0))
    stats, mutable, smoothed = carry_statistics(parts, state, replicas.mutable, split, params, share, trained)
    scores = {name: x for name, x in told.items() if name in averager.needs and name not in FREE}
    logged = {name: x for name, x in scores.items() if isinstance(x, jax.Array) and x.ndim == 1}
    log = RoundLog(told["train_loss"], logged, share, effective_replicas(share), told_alive, steps)
    asked = None if stop is None else stop.any()
    return weights, weighting, state.round + 1, mutable, smoothed, stats, log, asked


def _weigh(
    parts: Parts,
    state: TrainState,
    views: PyTree,
    replicas: Replicas,
    alive: jax.Array,
    signals: dict[str, PyTree],
    window: Batch | None,
) -> tuple[PyTree, PyTree, jax.Array, dict[str, PyTree]]:
    """Weighs the replicas by what devices tell one another: `(weights, weighting state, alive, signals)`."""
    averager, where, reads = parts.averager, parts.where, _reads_views(parts.averager)
    assert averager.halves is not None
    weigh = averager.halves.weigh

    def run(reduce: sync.Over, stacked: PyTree, mutable: PyTree, alive: jax.Array, told: dict[str, PyTree]) -> tuple:
        def mean(weights: PyTree) -> PyTree:
            return sync.mean_over_living(reduce, mutable, weights, state.mutable)

        if "distance" in averager.needs:
            told = told | {"distance": score.distances(stacked, alive)}
        evaluate = {} if window is None else {"evaluate": score.Evaluate(parts.forward, mean, window)}
        # The views are of what replicas sent while these were the global parameters.
        given = (stacked, state.averager.weighting, state.params)
        return *weigh(*given, alive=alive, place=reduce, **(told | evaluate)), alive, told

    if not reads:
        return run(where.reduce, replicas.params, replicas.mutable, *where.gather((alive, signals)))
    mutable, alive, told = where.gather((replicas.mutable, alive, signals))
    return where.together(functools.partial(run, lambda reduction: reduction))(views, mutable, alive, told)


Launch = Callable[..., Callable[[], tuple]]
"""`(piece, *arguments) -> wait`: starts a piece that has a collective; `wait()` returns its results. Arguments may be
functions to wait for, such as this returns."""


def at_once(piece: Callable, *arguments: PyTree) -> Callable[[], tuple]:
    """Runs a piece in the program that is being traced; see `Launch`."""
    results = piece(*arguments)
    return lambda: results


def play(
    pieces: Pieces,
    launch: Launch,
    numbers: Sequence[Any],
    state: TrainState,
    batches: PyTree,
    held_out: Batch | None,
    shared: PyTree,
    pace: Pace,
    sizes: Any,
    stop: jax.Array | None = None,
) -> tuple[TrainState, RoundLog, jax.Array | None]:
    """One round: starts every exchange, trains a segment, and waits for the exchange only then.

    Args:
      pieces: of the rounds.
      launch: starts an exchange.
      numbers: 0 to F - 1, int32 scalars.
      state, batches, held_out, shared, pace, sizes: as for `Rounds.step`.
      stop: bool [D], one entry per device; None where nobody asks.

    Returns:
      The next state, what the round reports, and whether any entry of `stop` is true.
    """
    entry, count = state._replace(replicas=()), len(pieces.exchange)  # type: ignore[arg-type]
    groups = fragments.groups(state.params, count)
    weights = fragments.spread(state.stream.weights, state.params)
    params, views, own = state.params, state.stream.views, _apart(state.averager, count)
    replicas, packet = state.replicas._replace(pending=()), state.replicas.pending
    losses, living, sound = [], [], []
    for s in range(count):
        f = (s - 1) % count
        start, w, seen = (fragments.take(x, groups[f]) for x in (params, weights, views))
        landing = launch(pieces.exchange[f], packet, start, own[f], w, seen)
        replicas, loss, alive = pieces.train(replicas, params, batches, shared, pace, numbers[s])
        losses.append(loss)
        living.append(alive)
        if s == count - 1:
            told = pieces.score(replicas, params, losses, living, batches, held_out, pace, sizes, state.round)
        part, own[f], seen, well = landing()
        after = fragments.put(params, groups[f], part)
        views = fragments.put(views, groups[f], seen) if jax.tree.leaves(views) else views
        sound.append(well)
        replicas, packet, split = pieces.swap[s](replicas, alive, params, after, state.mutable, state.round)
        params = after
    closing = launch(
        pieces.close, entry, params, views, replicas, *told, split, batches, shared, pace, held_out, sound, stop
    )
    weights, weighting, round, mutable, smoothed, stats, log, asked = closing()
    replicas = replicas._replace(mutable=stats, pending=packet)
    averager = _together(weighting, own)
    return TrainState(params, mutable, replicas, averager, round, smoothed, Stream(weights, views)), log, asked


def _apart(state: AveragerState, count: int) -> list[AveragerState]:
    """The averager's state of every fragment."""
    if state.outer is None:
        return [AveragerState((), None, None)] * count
    return [AveragerState((), outer, masters) for outer, masters in zip(state.outer, state.masters, strict=True)]


def _together(weighting: PyTree, own: Sequence[AveragerState]) -> AveragerState:
    if own[0].outer is None:
        return AveragerState(weighting, None, None)
    return AveragerState(weighting, tuple(one.outer for one in own), tuple(one.masters for one in own))
