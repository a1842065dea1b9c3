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
round's scores it counts as dead. Mutable collections are averaged at the end of the round, as scores are. A round of
fewer steps than H cuts the last segments short, or out. An averager's `transform`, such as one that clips changes, and
a reduction other than the mean see one fragment at a time.

A round is made of pieces, and only those that exchange have a collective. `play` puts them together: under one `jit`,
or, on CPU, where one program or one thread would run one after the other, as programs of which those with a collective
run in a thread of their own (`wavg_jax.training.overlap`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.averaging.stepping import AveragerState
from wavg_jax.base import Averager, Batch, PyTree, SettingsError, TrainState
from wavg_jax.rounds import fragments, sync, wire
from wavg_jax.rounds.common import RoundLog
from wavg_jax.rounds.local import Pace
from wavg_jax.rounds.pieces import Packet, Pieces, reads_views
from wavg_jax.rounds.sync import AtSync
from wavg_jax.weighting.make import weights_like


class Stream(NamedTuple):
    """What a round leaves for the next one, the same on every device.

    Attributes:
      weights: of the last scores, as the weighting gave them; 0 before the first.
      views: the replicas' parameters [K, ...] as they were last received; `()` unless the averager reads them.
    """

    weights: PyTree
    views: PyTree


def begin(state: TrainState, averager: Averager, at_sync: AtSync) -> TrainState:
    """The state before the first round, given that of rounds without fragments.

    Raises:
      SettingsError: there are fewer tensors than fragments, the averager cannot be taken apart, the local steps are
        corrected, or the replicas' optimizer states are averaged, which no segment could hide.
    """
    if averager.halves is None:
        raise SettingsError("AtSync: fragments= needs an averager with halves, as wavg_jax.averager makes it")
    if sync.averages(at_sync.opt_state, state.replicas.opt_state):
        raise SettingsError("AtSync: fragments= exchange no optimizer state: set opt_state to keep or reset it")
    if at_sync.drift is not None:
        raise SettingsError(
            "AtSync: drift= corrects steps from parameters that arrive together, and fragments= arrive in turn: leave "
            "one of them out"
        )
    params, replicas = state.params, tree.count_replicas(state.replicas.params)
    taken = [fragments.take(params, group) for group in fragments.groups(params, at_sync.fragments)]
    own = [averager.init(part, replicas) for part in taken]
    whole: AveragerState = state.averager
    outer = None if whole.outer is None else tuple(one.outer for one in own)
    masters = None if whole.outer is None else tuple(one.masters for one in own)
    residual = tuple(wire.no_residual(at_sync.wire, part, replicas) for part in taken)
    like = weights_like(averager.halves.weighting, whole.weighting, params, replicas)
    reads = reads_views(averager)
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


Launch = Callable[..., Callable[[], tuple]]
"""`(piece, *arguments) -> wait`: starts a piece that has a collective; `wait()` returns its results."""


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
