"""Every public weighting as a row of one table, a problem for it, and how its rounds are run and compared."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavg_jax import tree
from wavg_jax.averaging.averager import averager
from wavg_jax.base import Weighting
from wavg_jax.weighting import penalty, pool, robust, scores, search, wrappers
from wavg_jax.weighting.signals import HIGHER_IS_BETTER

NAN, INF = float("nan"), float("inf")
K = 5
ALL = (True,) * K


class Row(NamedTuple):
    """A weighting as the table runs it, and the few invariants that it has a reason to break.

    Attributes:
      make: builds it.
      floors: every living replica gets some weight, also one whose score is of no use.
      falls_back: what it falls back to when no score is usable is not equal weights.
      ordered: replicas that tie are tried in the order of their numbers.
      fewest: the fewest replicas that `init` accepts.
    """

    make: Callable[[], Weighting]
    floors: bool = False
    falls_back: bool = False
    ordered: bool = False
    fewest: int = 1


TABLE = {
    "uniform": Row(scores.uniform),
    "proportional": Row(lambda: scores.proportional("accuracy")),
    "proportional/power": Row(lambda: scores.proportional("accuracy", chance=0.2, power=3.0)),
    "token_weighted": Row(lambda: scores.token_weighted("samples")),
    "inverse": Row(lambda: scores.inverse("loss")),
    "inverse/layers": Row(lambda: scores.inverse("layer_grad_norm")),
    "softmax": Row(lambda: scores.softmax("loss", 0.2)),
    "softmax/standardise": Row(lambda: scores.softmax("accuracy", 0.5, standardise=True)),
    "rank": Row(lambda: scores.rank("macro_f1")),
    "best": Row(lambda: scores.best("train_loss")),
    "fisher_merging": Row(scores.fisher_merging),
    "fisher_merging/normalise": Row(lambda: scores.fisher_merging(normalise=True)),
    "uniform_floor": Row(lambda: wrappers.uniform_floor(scores.fisher_merging(), 0.1), floors=True),
    "momentum": Row(lambda: wrappers.momentum(scores.softmax("loss", 0.2), 0.9)),
    "momentum/layers": Row(lambda: wrappers.momentum(scores.inverse("layer_grad_norm"), 0.5)),
    "smooth_signals": Row(lambda: wrappers.smooth_signals(scores.fisher_merging())),
    "shortlist": Row(lambda: wrappers.shortlist(scores.softmax("loss", 0.2), 3)),
    "shortlist/robust": Row(lambda: wrappers.shortlist(robust.coordinate_median(), 3), falls_back=True),
    "grawa": Row(wrappers.grawa),
    "grawa/layers": Row(lambda: wrappers.grawa(layerwise=True)),
    "greedy_soup": Row(lambda: search.greedy_soup("accuracy"), ordered=True),
    "learned": Row(lambda: search.learned(scores.softmax("loss", 0.2), steps=3)),
    "learned/carry": Row(lambda: search.learned(steps=3, carry=True), floors=True),
    "opinion_pool": Row(pool.opinion_pool),
    "opinion_pool/smooth": Row(lambda: wrappers.momentum(pool.opinion_pool(prior=10.0), 0.5)),
    "best_of": Row(lambda: search.best_of(scores.best("ece"), wrappers.momentum(scores.softmax("loss", 0.2), 0.9))),
    "best_of/mixed": Row(lambda: search.best_of(scores.fisher_merging(), robust.krum(1), signal="accuracy"), fewest=4),
    "coordinate_median": Row(robust.coordinate_median),
    "trimmed_mean": Row(lambda: robust.trimmed_mean(1), fewest=3),
    "geometric_median": Row(robust.geometric_median),
    "krum": Row(lambda: robust.krum(1), fewest=4),
    "multi_krum": Row(lambda: robust.multi_krum(1, keep=3), fewest=4),
    "mean_around_median": Row(lambda: robust.mean_around_median(1), fewest=3),
    "pseudo_gradient_penalty": Row(penalty.pseudo_gradient_penalty),
    "pseudo_gradient_penalty/layers": Row(
        lambda: penalty.pseudo_gradient_penalty(0.5, threshold=0.1, rate=0.5, warmup=1, layerwise=True)
    ),
    "bulyan": Row(lambda: robust.bulyan(1), fewest=4),
}

every_scheme = pytest.mark.parametrize("name", TABLE)


# A problem: K replicas with a few small tensors, and a signal of every kind.


def stack(replicas=K, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    kernel, scale = rng.normal(size=(replicas, 3, 4)).astype(dtype), rng.normal(size=replicas).astype(dtype)
    return {"dense": {"kernel": kernel}, "scale": scale}


PARAMS = jax.device_put(tree.replica(stack(1, seed=99), 0))


def signals(stacked, seed=0):
    """A signal of every kind, positive and without ties; those in COMMON are added where a run is built."""
    rng = np.random.default_rng(seed + 1000)
    shape = jax.tree.leaves(stacked)[0].shape[:1]

    def numbers(shape):
        return rng.uniform(0.1, 0.9, size=shape).astype(np.float32)

    return {name: numbers(shape) for name in HIGHER_IS_BETTER} | {
        "layer_grad_norm": jax.tree.map(lambda x: numbers(shape), stacked),
        "fisher": jax.tree.map(lambda x: numbers(x.shape), stacked),
        "logits": of_quality(numbers(shape), rng),
    }


def of_quality(quality, rng):
    """Logits [K, S, C] of replicas that know the labels to some degree, so that the weights have something to find."""
    noise = rng.normal(size=(*quality.shape, len(LABELS), 3))
    return (4 * quality[:, None, None] * np.eye(3)[LABELS] + noise).astype(np.float32)


def same_score(values, stacked):
    """Every signal says the same of a replica: `values` [K], in all layers and elements."""
    values = np.asarray(values, np.float32)

    def wide(x):
        return np.broadcast_to(values.reshape((-1,) + (1,) * (x.ndim - 1)), x.shape).copy()

    return dict.fromkeys(signals(stacked), values) | {
        "layer_grad_norm": jax.tree.map(lambda x: values, stacked),
        "fisher": jax.tree.map(wide, stacked),
        "logits": values[:, None, None] * np.ones((len(LABELS), 3), np.float32),
    }


BEYOND = 1e6


def evaluate(params, weights):
    """Held-out score of a network: a bowl around 0.1, and NaN where a replica whose first element is BEYOND takes part
    in an equal blend."""
    del weights
    leaves = [x.astype(jnp.float32).reshape(-1) for x in jax.tree.leaves(params)]
    flat = jnp.concatenate(leaves)
    loss = jnp.mean((flat - 0.1) ** 2)
    loss = jnp.where(jnp.abs(flat[0]) >= BEYOND / K, jnp.nan, loss)
    return {"loss": loss, "accuracy": 1 / (1 + loss)}


LABELS = np.tile([0, 1, 2], 20)
COMMON = {"evaluate": evaluate, "labels": LABELS}
"""The signals that are not the replicas' own."""


def own_needs(name):
    return [need for need in scheme(name).needs if need not in COMMON]


@functools.cache
def scheme(name):
    return averager(TABLE[name].make())


def step_of(name, **place):
    """`(stacked, state, params, alive, signals) -> (params, state, weights)`."""
    avg = scheme(name)
    extra = place | {need: COMMON[need] for need in avg.needs if need in COMMON}
    return lambda stacked, state, params, alive, arrays: avg.update(
        stacked, state, params, alive=alive, **arrays, **extra
    )


@functools.cache
def compiled(name, replicas, dtype):
    """One program per scheme and shape, shared by all tests; it must never be compiled for a second time."""
    return jax.jit(step_of(name))


class Rounds(NamedTuple):
    """What every round returned."""

    params: list
    state: list
    weights: list


def run(name, rounds, alive=ALL, params=PARAMS, step=None):
    """Runs `[(stacked, signals), ...]` from a new state on; every round starts from `params`."""
    avg, alive = scheme(name), jnp.asarray(alive)
    step = step or compiled(name, len(alive), jax.tree.leaves(params)[0].dtype.name)
    state, done = avg.init(params, len(alive)), Rounds([], [], [])
    for stacked, arrays in rounds:
        stacked, arrays = jax.device_put((stacked, {need: arrays[need] for need in own_needs(name)}))
        new, state, weights = step(stacked, state, params, alive, arrays)
        for log, value in zip(done, jax.device_get((new, state, weights)), strict=True):
            log.append(value)
    return done


def two_rounds(replicas=K, seed=0, dtype=np.float32):
    stacks = [stack(replicas, seed, dtype), stack(replicas, seed + 1, dtype)]
    return [(s, signals(s, seed + r)) for r, s in enumerate(stacks)]


def take(values, which):
    """Some of the replicas, or all in another order, of a tree or of rounds."""
    return jax.tree.map(lambda x: x[np.asarray(which)], values)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def exact(name):
    """Whether the weights hang on each replica's own numbers alone. A search compares blends by what a network says of
    them, and a network's arithmetic is rounded by the program that it stands in."""
    return "evaluate" not in scheme(name).needs


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def assert_normalised(weights, alive, params=PARAMS):
    """Not negative, 0 for the dead, and 1 in sum over the living; a prefix tree of `params` with leaves [K, ...]."""
    alive = np.asarray(alive)

    def leaf(w, below):
        assert w.shape == alive.shape or w.shape == alive.shape + below.shape
        assert np.isfinite(w).all()
        assert (w >= 0).all()
        assert (w[~alive] == 0).all()
        np.testing.assert_allclose(w.sum(axis=0), float(alive.any()), rtol=1e-5)

    jax.tree.map(lambda w, below: jax.tree.map(lambda x: leaf(np.asarray(w), x), below), weights, params)


def assert_sound(done, alive, params=PARAMS):
    for new, weights in zip(done.params, done.weights, strict=True):
        assert_normalised(weights, alive, params)
        assert all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(new))


def described(states):
    return [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), state) for state in states]


QUICKLY = {"xla_backend_optimization_level": 0}
"""Compiler options for where nothing hangs on the last bit."""
