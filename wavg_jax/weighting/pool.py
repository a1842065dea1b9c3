"""Weights by pooling predictions: the blend's logits, taken as linear in the weights, are fitted to held-out labels."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.arguments import check, number
from wavg_jax.base import PyTree, SettingsError, Weighting
from wavg_jax.weighting.blends import Held, blended
from wavg_jax.weighting.make import make_weighting
from wavg_jax.weighting.scores import normalise
from wavg_jax.weighting.signals import values_of

_STEPS = 8
"""Newton steps at most; from last round's weights two to four suffice."""

_STILL = 1e-4
"""A Newton step is the last if it moves every logit by less."""

_WIDEST = 100.0
"""Logits count up to this far from the mean of their sample; those of a broken network would be beyond float32's
resolution for the others."""

_FINITE = 1e30
"""Logits within it have a mean."""

_LONGEST = 2.0
"""The longest Newton step of a logit: a longer one overshoots where predictions saturate."""

_FAINTEST = 1e-3
"""The least prior weight of a replica, before normalising, so that one that recovers regains weight in a few rounds."""

_TOGETHER = 2**20
"""Logits of all replicas that the fit looks at together; those of large vocabularies come in blocks of samples."""

_HUGE = float(jnp.finfo(jnp.float32).max) / 2
"""The loss of a blend whose loss is not finite."""


class PoolState(NamedTuple):
    """The weights that fitted best in the last round, before pruning: float32 [K]; equal at first."""

    fitted: jax.Array


class _Problem(NamedTuple):
    """What the weights are fitted to.

    Attributes:
      logits: [K, S, C], of replicas some of which may be broken.
      labels: integers [S].
      share: [S], of each sample in the mean; 0 where the label is no class.
      sound: bool [K], which replicas count.
      prior: weights [K], 0 for replicas that do not count.
      strength: weight of the prior, in nats per nat of a sample.
    """

    logits: jax.Array
    labels: jax.Array
    share: jax.Array
    sound: jax.Array
    prior: jax.Array
    strength: jax.Array


def _problem(logits: jax.Array, labels: jax.Array, sound: jax.Array, prior: jax.Array, samples: float) -> _Problem:
    """Makes the problem of logits [K, S, C] of the `sound` replicas, with a prior worth that many samples."""
    valid = ((labels >= 0) & (labels < logits.shape[-1])).astype(jnp.float32)
    count = jnp.maximum(valid.sum(), 1)
    return _Problem(logits, labels, valid / count, sound, prior, samples / count)


class _Block(NamedTuple):
    """Some samples of a problem: logits [K, s, C], centred over the classes, within _WIDEST, and 0 for replicas that do
    not count; labels and share [s]."""

    logits: jax.Array
    labels: jax.Array
    share: jax.Array


def _over_blocks(problem: _Problem, function: Callable[[_Block], Callable[[jax.Array], PyTree]]) -> Callable:
    """Returns `w -> sum of function(block)(w)` over blocks of samples that have _TOGETHER logits, in the memory of one.

    Of a single block, `function` prepares once what does not change with w.
    """
    replicas, samples, classes = problem.logits.shape
    size = min(max(_TOGETHER // (replicas * classes), 1), samples)

    def block(number: jax.Array | int) -> _Block:
        # The last one starts earlier, to be as large, and does not count again what others did.
        first = jnp.minimum(number * size, samples - size)
        logits, labels, share = (
            jax.lax.dynamic_slice_in_dim(x, first, size, axis)
            for x, axis in ((problem.logits, 1), (problem.labels, 0), (problem.share, 0))
        )
        logits = jnp.clip(logits, -_FINITE, _FINITE)
        centred = logits - logits.mean(-1, keepdims=True)
        logits = jnp.where(problem.sound[:, None, None], jnp.clip(centred, -_WIDEST, _WIDEST), 0)
        return _Block(logits, labels, jnp.where(first + jnp.arange(size) >= number * size, share, 0))

    if size == samples:
        return function(block(0))

    def over_all(w: jax.Array) -> PyTree:
        def add(number: jax.Array, total: PyTree) -> PyTree:
            return optax.tree.add(total, function(block(number))(w))

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: function(block(0))(w)))
        return jax.lax.fori_loop(0, -(-samples // size), add, zeros)

    return over_all


def _derivatives(problem: _Problem) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns `w -> the first [K] and second [K, K] derivatives` of the cross-entropy by the weights."""

    def of_block(block: _Block) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        replicas, _, classes = block.logits.shape
        # As differences from the pool of the prior: smaller numbers, and so smaller rounding errors.
        centre = jnp.tensordot(problem.prior, block.logits, 1, precision="highest")
        apart = jnp.where((problem.prior > 0)[:, None, None], block.logits - centre[None], 0)
        flat, targets = apart.reshape(replicas, -1), jax.nn.one_hot(block.labels, classes, dtype=jnp.float32)
        share = block.share[:, None]

        def at(w: jax.Array) -> tuple[jax.Array, jax.Array]:
            p = jax.nn.softmax(centre + jnp.tensordot(w, apart, 1))
            mean = (apart * p[None]).sum(-1)
            slope = flat @ ((p - targets) * share).reshape(-1)
            product = functools.partial(jnp.matmul, precision="highest")  # the second is a difference of two
            return slope, product(flat * (p * share).reshape(1, -1), flat.T) - product(mean * share.T, mean.T)

        return at

    return _over_blocks(problem, of_block)


def _fit(problem: _Problem) -> jax.Array:
    """The weights [K] that minimise cross-entropy(sum_k w_k logits_k) + strength * KL(w || prior)."""
    prior, strength = problem.prior, problem.strength
    replicas, counts = len(prior), prior > 0
    derivatives = _derivatives(problem)

    def weights(lean: jax.Array) -> jax.Array:
        return jax.nn.softmax(jnp.where(counts, jnp.log(jnp.where(counts, prior, 1)) + lean, -jnp.inf))

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        number, lean, _ = carry
        w = weights(lean)
        gradient, hessian = derivatives(w)
        slope = gradient + strength * lean
        jacobian = hessian @ (jnp.diag(w) - jnp.outer(w, w)) + strength * jnp.eye(replicas, dtype=jnp.float32)
        move = jnp.linalg.solve(jacobian, slope)
        move = jnp.clip(jnp.where(counts, move - w @ move, 0), -_LONGEST, _LONGEST)
        sound = jnp.isfinite(move).all()
        moves = sound & (jnp.abs(move).max() > _STILL)
        return number + 1, jnp.where(sound, lean - move, lean), moves

    def goes_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        number, _, moves = carry
        return moves & (number < _STEPS)

    start = (jnp.int32(0), jnp.zeros(replicas, jnp.float32), jnp.bool_(True))
    return weights(jax.lax.while_loop(goes_on, step, start)[1])


def _gain(problem: _Problem, weights: jax.Array, equal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What weights gain beside equal ones, by the pools of both, and its standard error over the samples."""

    def of_block(block: _Block) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        def losses(weights: jax.Array) -> jax.Array:
            pooled, labels = jnp.tensordot(weights, block.logits, 1), jnp.where(block.share > 0, block.labels, 0)
            return optax.losses.softmax_cross_entropy_with_integer_labels(pooled, labels)

        def moments(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            gains = losses(equal) - losses(weights)
            return block.share @ gains, block.share @ jnp.square(gains)

        return moments

    mean, square = _over_blocks(problem, of_block)(weights)
    count = jnp.maximum((problem.share > 0).sum(), 1).astype(jnp.float32)
    return mean, jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0) / count)


def _losses(held_out: Held, tried: jax.Array) -> jax.Array:
    """The losses [n] of the blends with weights [n, K], _HUGE where not finite; none is evaluated a second time."""
    before = jnp.concatenate([jnp.full((1, tried.shape[1]), -1.0), tried[:-1]])

    def one(carry: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weights, last = given
        loss = jax.lax.cond((weights == last).all(), lambda: carry, lambda: held_out.scores(weights)["loss"])
        return loss, loss

    _, losses = jax.lax.scan(one, jnp.float32(0), (tried, before))
    return jnp.where(jnp.isfinite(losses), losses, _HUGE)


def _check_labels(labels: jax.Array, logits: jax.Array) -> None:
    if logits.ndim != 3 or labels.shape != logits.shape[1:2] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise SettingsError(
            f"opinion_pool: logits= has shape {logits.shape}, labels= is {labels.dtype} of shape {labels.shape}; give "
            "logits [K, S, C] and integer labels [S]"
        )


def opinion_pool(*, prior: float = 100.0, memory: float = 0.95) -> Weighting:
    """Weights fitted to held-out labels as if the blend's logits were linear in them: a logarithmic opinion pool.

        fitted = argmin_w  cross-entropy(sum_k w_k logits_k, labels) + prior / S * KL(w || c),   c_k ~ fitted_k^memory
        w      = the one whose blend has the lowest loss: equal weights, fitted, and fitted without weights below 1 / 4n
                 or without the lowest one

    over the n replicas that are alive, with the fitted weights of the last round in c. The fit is convex in K numbers;
    Newton's method takes no pass over any network. Only the four blends at the end are evaluated, so the result is
    never worse than equal weights on the samples scored. Weights stay equal unless the blend gains more than the pool's
    standard error over these samples, or the pool itself more than twice that. A subset that changes every round
    (`Scoring(samples=256)`) suffices, since c carries what earlier subsets said.

    Labels below 0, or of no class, do not count. A replica with a NaN or infinite logit has weight 0 beside others. The
    memory never falls so low that a replica that recovers could not regain its weight.

    Costs one pass of every replica over the S samples, which devices do side by side, and four evaluations and four
    blends. `learned()` costs 17 passes over the parameters and 8 gradients; its weights are about as good.

    Weights of a product of experts are fitted in this way by Heskes (1998, "Selecting weighting factors in logarithmic
    opinion pools"); that a blend of networks predicts as the pool of their logits does is an observation, good while
    they are close to one another.

    Args:
      prior: how many held-out samples the last round's weights are worth.
      memory: from 0 (every round starts from equal weights) to 1 (evidence adds up for ever).

    Raises:
      SettingsError: `prior` is not positive, or `memory` not between 0 and 1; from `update`, the logits are not
        [K, S, C] or the labels not integers [S].

    >>> import wavg_jax as wavg
    >>> avg = wavg.averager(opinion_pool(prior=1.1))
    >>> stacked, params = {"b": jnp.array([[1.0, -1.0], [-1.0, 1.0]])}, {"b": jnp.zeros(2)}  # logits of any sample
    >>> labels = jnp.array([0] * 12 + [1] * 4)
    >>> def evaluate(params, weights):
    ...     losses = optax.losses.softmax_cross_entropy_with_integer_labels(params["b"][None], labels)
    ...     return {"loss": losses.mean(), "accuracy": jnp.float32(0)}
    >>> logits = jnp.broadcast_to(stacked["b"][:, None], (2, 16, 2))
    >>> given = dict(logits=logits, labels=labels, evaluate=evaluate)
    >>> _, _, weights = avg.update(stacked, avg.init(params, 2), params, **given)
    >>> [round(float(w), 2) for w in weights]
    [0.75, 0.25]
    """
    check("opinion_pool: prior", prior, number(above=0))
    check("opinion_pool: memory", memory, number(0, 1))
    prior, memory = float(prior), float(memory)

    def init(params: PyTree, replicas: int) -> PoolState:
        del params
        return PoolState(jnp.full(replicas, 1 / replicas, jnp.float32))

    def update(
        stacked: PyTree,
        state: PoolState,
        params: PyTree,
        *,
        alive: jax.Array,
        blend: Callable[[PyTree], PyTree],
        **signals: Any,
    ) -> tuple[jax.Array, PoolState]:
        del stacked
        logits, labels = values_of("logits", signals, alive), jnp.asarray(signals["labels"])
        _check_labels(labels, logits)
        held_out = blended(signals["evaluate"], blend, params)
        sound = alive & jnp.isfinite(logits).all((1, 2))
        counts = jnp.where(sound.any(), sound, alive)
        equal = tree.equal_weights(counts)
        remembered = jnp.maximum(jnp.power(state.fitted, jnp.float32(memory)), _FAINTEST)
        before = normalise(jnp.where(counts, remembered, 0), counts)
        problem = _problem(logits, labels, sound, before, prior)
        fitted = _fit(problem)
        lowest = jnp.argmin(jnp.where(counts, fitted, jnp.inf))
        kept = jnp.stack([4 * fitted >= equal, jnp.arange(len(fitted)) != lowest])
        pruned = [normalise(jnp.where(some, fitted, 0), counts) for some in kept]
        tried = jnp.stack([equal, fitted, *pruned])
        losses = _losses(held_out, tried)
        chosen = tried[jnp.argmin(losses)]
        # Where replicas are far apart a pool says little of its blend, and a blend's gain is small beside the pool's
        # noise where one of them is broken: either may speak for the weights.
        gain, error = _gain(problem, chosen, equal)
        beyond_chance = (losses[0] - losses.min() > error) | (gain > 2 * error)
        return jnp.where(beyond_chance, chosen, equal), PoolState(jnp.where(counts, fitted, state.fitted))

    return make_weighting(update, needs=("logits", "labels", "evaluate"), init=init)
