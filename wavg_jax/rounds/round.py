"""One round as a pure function: train, score, blend, carry over."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.arguments import (
    FUNCTION,
    NONE,
    OPTIMIZER,
    as_whole,
    check_all,
    check_fields,
    either,
    has,
    instance,
)
from wavg_jax.base import Averager, Batch, PyTree, Replicas, SettingsError, Smoothed, Task, TrainState
from wavg_jax.devices.collectives import after as after_exchange
from wavg_jax.devices.placement import Placement, check_spread, single
from wavg_jax.devices.transfer import put
from wavg_jax.rounds import guard, keys, local, score, streaming, sync, wire
from wavg_jax.rounds.common import (
    Apart,
    Brought,
    RoundLog,
    Setup,
    carry_statistics,
    check_data,
    diagnosed,
    everywhere,
    place_state,
    report,
)
from wavg_jax.rounds.exchange import Sent, make_exchange, warn_of_wire
from wavg_jax.rounds.faults import Faults, check_apart, check_replicas, distort, finite_after, slow_down
from wavg_jax.rounds.forward import Forward, as_stored
from wavg_jax.rounds.local import EVERY_STEP, Fetch, Pace
from wavg_jax.rounds.pieces import Pieces, make_pieces
from wavg_jax.rounds.reestimation import reestimate
from wavg_jax.rounds.score import SCORING, Scoring
from wavg_jax.rounds.sync import AT_SYNC, AtSync, Trained
from wavg_jax.weighting.make import weights_like
from wavg_jax.weighting.scores import per_replica


class Rounds(NamedTuple):
    """Rounds of one recipe, as two pure functions.

    Attributes:
      init: `(rng, replicas) -> TrainState`: K equal replicas.
      step: `(state, batches, held_out=None, *, shared=(), pace=EVERY_STEP, sizes=None) -> (TrainState, RoundLog)`.
        `batches` is a `Batch` with leaves [K, H, B, ...], or whatever `fetch` makes batches of. `held_out`, a `Batch`
        [N, ...], is needed if the weighting scores on held-out data. `shared` goes to `fetch`. `pace` sets fewer local
        steps or other rates without recompiling. `sizes` [K] is the signal `samples`, by default equal.
      pieces: of which `step` is made where `AtSync(fragments=)` is more than 1; see `wavg_jax.rounds.streaming`.
      apart: `step` in two; None with fragments.
    """

    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, RoundLog]]
    pieces: Pieces | None = None
    apart: Apart | None = None


TASK = has("a Task: wavg_jax.models.from_linen, from_nnx and classifier make one", *Task._fields)
AVERAGER = has("an Averager: wavg_jax.averager(weighting) makes one", *Averager._fields)
_ARGUMENTS = {
    "task": TASK,
    "averager": AVERAGER,
    "inner": OPTIMIZER,
    "scoring": instance(Scoring, "a wavg_jax.Scoring"),
    "at_sync": instance(AtSync, "a wavg_jax.AtSync"),
    "faults": either(NONE, instance(Faults, "made by wavg_jax.faults.simulate")),
    "placement": either(NONE, instance(Placement, "made by wavg_jax.place")),
    "prepare": FUNCTION,
    "fetch": FUNCTION,
}


def make_rounds(
    task: Task,
    averager: Averager,
    inner: optax.GradientTransformation,
    *,
    scoring: Scoring = Scoring(),  # noqa: B008 - immutable
    at_sync: AtSync = AtSync(),  # noqa: B008
    faults: Faults | None = None,
    placement: Placement | None = None,
    prepare: Callable[[jax.Array], jax.Array] = as_stored,
    fetch: Fetch = local.as_is,
) -> Rounds:
    """Builds rounds: K replicas train for H local steps, are scored, and blend into the next global parameters.

    No files, no signals, no progress bar, no loop on the host: `jax.jit` the step and call it as you like. `fit` is a
    loop over it.

    Args:
      task: the network; see `wavg_jax.models`.
      averager: how the replicas become the next global parameters; see `wavg_jax.averager`.
      inner: the inner optimizer, any optax transformation.
      scoring: how replicas and blends are scored.
      at_sync: how optimizer state and BatchNorm statistics carry across a blend, and smoothing over rounds.
      faults: simulated ones; see `wavg_jax.faults.simulate`.
      placement: one device, or a mesh; see `wavg_jax.place`. By default the default device.
      prepare: stored held-out inputs [B, ...] -> the network's inputs; by default the same.
      fetch: `(item, shared, rng) -> Batch`, makes a step's batch; see `wavg_jax.local_steps`.

    Returns:
      `Rounds(init, step)`.

    Raises:
      SettingsError: an argument is none of the above.

    >>> import wavg_jax as wavg
    >>> task = wavg.models.regressor(
    ...     lambda rng: ({"w": jnp.zeros(2)}, {}), lambda params, mutable, x, *, train, rng: (x @ params["w"], mutable)
    ... )
    >>> rounds = make_rounds(task, wavg.averager(wavg.softmax("loss")), optax.sgd(0.5))
    >>> state = rounds.init(jax.random.key(0), replicas=4)
    >>> x = jax.random.normal(jax.random.key(1), (4, 5, 8, 2))  # 4 replicas, 5 local steps, batches of 8
    >>> state, log = jax.jit(rounds.step)(state, Batch(x, x @ jnp.array([1.0, 2.0])), Batch(x[0, 0], x[0, 0].sum(-1)))
    >>> state.params["w"].shape, log.weights.shape, int(state.round)
    ((2,), (4,), 1)
    """
    _check_arguments(locals())
    if at_sync.fragments > 1:
        check_apart(faults, "rounds in fragments (AtSync)")
    where = single() if placement is None else placement
    forward = Forward(task, prepare, scoring.dtype, scoring.chunk, where.over_samples)
    every = score.weighs_every(averager.needs, scoring)
    setup = Setup(
        forward=forward,
        task=task,
        averager=averager,
        inner=inner,
        scoring=scoring,
        at_sync=at_sync,
        faults=faults,
        where=where,
        batches=Batch if fetch is local.as_is else object,
        steps=local.local_steps(task, inner, fetch, where, at_sync.drift),
        measured=score.measure(forward, averager.needs, diagnose=scoring.diagnose),
        exchange=make_exchange(averager, forward, where, at_sync.wire, every),
        every=every,
        rerun=reestimate(task, fetch),
    )
    init = functools.partial(_init, setup)
    if at_sync.fragments == 1:
        apart = Apart(functools.partial(_locally, setup), functools.partial(_together, setup))
        return Rounds(init, functools.partial(_step, setup), apart=apart)
    pieces = make_pieces(setup)
    return Rounds(init, functools.partial(_streamed, setup, pieces), pieces)


def _init(setup: Setup, rng: jax.Array, replicas: int) -> TrainState:
    """`Rounds.init`."""
    where = setup.where
    check_spread(as_whole("replicas", replicas, 1), where)
    warn_of_wire(setup.averager, setup.at_sync.wire, replicas, where)

    def make(rng: jax.Array) -> TrainState:
        params, mutable = setup.task.init(keys.roots(rng).init)
        kept = setup.averager, setup.inner, setup.scoring, setup.at_sync
        state = initial_state(params, mutable, rng, replicas, *kept)
        return place_state(where, state)

    if where.shared.is_fully_addressable or isinstance(rng, jax.core.Tracer):
        return make(rng)
    return jax.jit(make)(put(rng, where.shared))  # only a program makes arrays that several processes share


def _step(
    setup: Setup,
    state: TrainState,
    batches: PyTree,
    held_out: Batch | None = None,
    *,
    shared: PyTree = (),
    pace: Pace = EVERY_STEP,
    sizes: jax.Array | None = None,
) -> tuple[TrainState, RoundLog]:
    """`Rounds.step`."""
    check_state(state, setup)
    check_data(state, batches, held_out, score.asked(setup.averager.needs, setup.scoring), setup.batches)
    pace = guard.paced(state.guard, pace)
    brought, sent = _trained(
        setup, state.replicas, batches, held_out, state.round, state.drift, shared=shared, pace=pace
    )
    return _blended(setup, state, brought, sent, batches, held_out, shared=shared, sizes=sizes)


def _locally(setup: Setup, *given: Any, **options: Any) -> Brought:
    """`Apart.locally`: train and score."""
    return _trained(setup, *given, **options)[0]


def _together(setup: Setup, state: TrainState, brought: Brought, *given: Any, **options: Any) -> tuple:
    """`Apart.together`: blend and carry over."""
    return _blended(
        setup, state, brought, _sent(setup, brought.replicas, state.replicas, brought.alive), *given, **options
    )


def _sent(setup: Setup, after: Replicas, before: Replicas, alive: jax.Array) -> PyTree:
    """The parameters that the replicas send."""
    return distort(setup.faults, setup.where, after.params, before.params, alive, after.rng)


def _trained(
    setup: Setup,
    replicas: Replicas,
    batches: PyTree,
    held_out: Batch | None,
    round: jax.Array,
    drift: PyTree = (),
    *,
    shared: PyTree = (),
    pace: Pace = EVERY_STEP,
) -> tuple[Brought, PyTree]:
    """Trains and scores; also returns the parameters that the replicas send."""
    where = setup.where
    pace = slow_down(setup.faults, pace, local.longest(batches))
    after, train_loss, alive = local.train(setup.steps, where.advance, replicas, batches, shared, pace, drift)
    sent = _sent(setup, after, replicas, alive)
    alive = finite_after(setup.faults, alive, sent)
    window = score.window(held_out, round, setup.scoring.samples)
    due = score.due(setup.scoring.every, round)
    signals = score.of_replicas(setup.measured, where.map, after._replace(params=sent), window, due)
    return Brought(after, train_loss, alive, local.steps_taken(batches, pace), signals), sent


def _blended(
    setup: Setup,
    state: TrainState,
    brought: Brought,
    sent: PyTree,
    batches: PyTree,
    held_out: Batch | None,
    *,
    shared: PyTree = (),
    sizes: jax.Array | None = None,
) -> tuple[TrainState, RoundLog]:
    """Blends what the replicas send [K, ...], and carries over."""
    where, after, taken = setup.where, brought.replicas, brought.steps
    window = score.window(held_out, state.round, setup.scoring.samples)
    signals = brought.signals | score.free(brought.train_loss, sizes, taken)
    # Blend.
    split = keys.at_sync(after.rng)
    outgoing = Sent(sent, after.mutable, brought.alive, signals)
    blended, told, residual = setup.exchange(state, outgoing, after.residual, split.wire, window)
    params, averager_state, weights, distances = blended
    share = everywhere(where, per_replica(weights))
    logits = {name: x for name, x in told.signals.items() if name == "logits"}
    found = where.together(functools.partial(diagnosed, setup))(state.round, logits, window, share, told.alive)
    # Carry over.
    kept = told.alive & (share.sum() > 0)  # else all replicas restart from the old parameters
    trained = Trained(batches, shared, taken, kept)
    follows = after_exchange(share, params)
    stats, mutable, smoothed = carry_statistics(setup, state, after.mutable, split, params, follows, trained)
    restarted = setup.averager.restart(
        after.params, state.params, params, alive=kept, check_finite=False, round=state.round
    )
    follows = after_exchange(follows, tree.floats((mutable, smoothed)))
    variates, drift = sync.carry_drift(where.reduce, after.drift, state.drift, kept, follows)
    follows = after_exchange(follows, drift)
    opt_state = sync.carry_opt_state(
        setup.at_sync.opt_state, setup.inner, where.reduce, after.opt_state, params, kept, follows
    )
    replicas = Replicas(restarted, opt_state, stats, split.following, residual, drift=variates)
    weighed = score.due(setup.every, state.round)
    last = () if weighed is None else tree.select(weighed & (share.sum() > 0), weights, state.weights)
    new = TrainState(params, mutable, replicas, averager_state, state.round + 1, smoothed, (), last, drift)
    log = report(setup, told.signals | distances, share, told.alive, taken, found)
    if setup.scoring.guard is not None and window is not None:
        new, found = guard.judged(setup.scoring.guard, state, new, _loss(setup, new, window), share.sum() > 0)
        log = log._replace(guard=found)
    return place_state(where, new), everywhere(where, log)


def _loss(setup: Setup, new: TrainState, window: Batch) -> jax.Array:
    """The held-out loss of a blend; measured after all exchanges, as devices share the samples."""
    samples = Batch(window.x, after_exchange(window.y, tree.floats((new.params, new.mutable, new.smoothed, new.drift))))
    return setup.where.together(functools.partial(score.scalar_metrics, setup.forward))(*new[:2], samples)["loss"]


def _streamed(
    setup: Setup,
    pieces: Pieces,
    state: TrainState,
    batches: PyTree,
    held_out: Batch | None = None,
    *,
    shared: PyTree = (),
    pace: Pace = EVERY_STEP,
    sizes: jax.Array | None = None,
) -> tuple[TrainState, RoundLog]:
    """`Rounds.step` with fragments."""
    check_state(state, setup)
    check_data(state, batches, held_out, score.asked(setup.averager.needs, setup.scoring), setup.batches)
    numbers = [jnp.int32(s) for s in range(setup.at_sync.fragments)]
    given = (state, batches, held_out, shared, pace, sizes)
    new, log, _ = streaming.play(pieces, streaming.at_once, numbers, *given)
    return place_state(setup.where, new), everywhere(setup.where, log)


def initial_state(
    params: PyTree,
    mutable: PyTree,
    rng: jax.Array,
    replicas: int,
    averager: Averager,
    inner: optax.GradientTransformation,
    scoring: Scoring,
    at_sync: AtSync,
) -> TrainState:
    """The state before the first round: K equal replicas with different keys, also for keys in their states.

    Args:
      params, mutable: of `Task.init`, called with the key `keys.roots(rng).init`.
      rng: the key of the run.
      replicas: K.
      averager, inner, scoring, at_sync: of the rounds.
    """
    replicas, roots = as_whole("replicas", replicas, 1), keys.roots(rng)
    states = tree.replicate((inner.init(params), mutable), replicas)
    opt_state, own_mutable = jax.vmap(keys.own)(states, jax.random.split(roots.states, replicas))
    drift = _first_variate(at_sync, params)
    state = TrainState(
        params=params,
        mutable=mutable,
        replicas=Replicas(
            tree.replicate(params, replicas),
            opt_state,
            own_mutable,
            jax.random.split(roots.replicas, replicas),
            wire.no_residual(at_sync.wire, params, replicas),
            drift=tree.replicate(drift, replicas),
        ),
        averager=averager.init(params, replicas),
        round=jnp.zeros((), jnp.int32),
        smoothed=None if at_sync.smoothing is None else _unsmoothed(params, mutable, at_sync.smoothing),
        drift=drift,
        guard=guard.begin(scoring.guard),
    )
    if at_sync.fragments > 1:
        return streaming.begin(state, averager, at_sync)
    weighs_all = score.weighs_every(averager.needs, scoring) == 1
    return state if weighs_all else state._replace(weights=_no_weights(averager, state, replicas))


def _no_weights(averager: Averager, state: TrainState, replicas: int) -> PyTree:
    """Weights of 0, in the shapes in which the weighting gives them."""
    if averager.halves is None:
        raise SettingsError("Scoring: every= needs an averager with halves, as wavg_jax.averager makes it")
    like = weights_like(averager.halves.weighting, state.averager.weighting, state.params, replicas)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _first_variate(at_sync: AtSync, params: PyTree) -> PyTree:
    """The control variate of a replica, and the mean of all, before the first round."""
    return () if at_sync.drift is None else at_sync.drift.init(params)


def _unsmoothed(params: PyTree, mutable: PyTree, smoothing: optax.GradientTransformation) -> Smoothed:
    copies = jax.tree.map(jnp.copy, (params, mutable))  # so that the state can be donated
    return Smoothed(copies[0], copies[1], smoothing.init(params))


def _check_arguments(given: Mapping[str, Any]) -> None:
    check_all(_ARGUMENTS, given)
    check_fields(given["scoring"], SCORING)
    guard.check(given["scoring"].guard, given["at_sync"].fragments)
    check_fields(given["at_sync"], AT_SYNC)


def check_state(state: TrainState, setup: Setup) -> None:
    """Raises SettingsError if the state was not made for these faults, and by rounds of this form."""
    faults, every, at_sync, scoring = setup.faults, setup.every, setup.at_sync, setup.scoring
    check_replicas(faults, tree.count_replicas(state.replicas.params))
    variate = jax.eval_shape(lambda params: _first_variate(at_sync, params), state.params)
    for field, differs in (
        ("AtSync(smoothing=)", (state.smoothed is None) != (at_sync.smoothing is None)),
        ("AtSync(fragments=)", (state.stream == ()) != (at_sync.fragments == 1)),
        ("Scoring(every=)", bool(jax.tree.leaves(state.weights)) != (every > 1 and at_sync.fragments == 1)),
        ("Scoring(guard=)", (state.guard == ()) != (scoring.guard is None)),
        ("AtSync(drift=)", bool(jax.tree.leaves(state.drift)) != bool(jax.tree.leaves(variate))),
    ):
        if differs:
            raise SettingsError(f"the state was made by rounds that differ in {field}; make it with these rounds' init")
