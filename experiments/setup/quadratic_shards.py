"""Shards of a quadratic problem, made from a few numbers that a practitioner knows or can guess, and arms on them."""

from typing import NamedTuple

import numpy as np

from experiments.setup import quadratic
from experiments.setup.quadratic import Choose, Floats, Quadratic, State
from wavg_jax.base import SettingsError

RATE = 0.1
CURVATURE = np.geomspace(0.1, 1.0, 8)
"""Of good shards in their 8 directions. Gradient noise is proportional to it, as that of a cross-entropy is near its
optimum; a loss of noise and of bias is all that results depend on, but for how soon a run arrives."""

BAD_LOSS, NOISE_LOSS = 4.0, 0.08
"""What a bad optimum and what noise cost in nats by default: about as in the recorded runs on Fashion-MNIST."""


def with_bad(replicas: int, bad: int, *, bad_loss: float, noise_loss: float, bad_noise: float = 1.0) -> Quadratic:
    """Shards that are equal but for the first `bad` ones, which share one wrong optimum.

    Args:
      replicas: K.
      bad: how many are bad, fewer than K.
      bad_loss: what the wrong optimum costs, `0.5 b' A b`, in nats.
      noise_loss: what gradient noise costs a network alone at the constant rate, in nats.
      bad_noise: variance of the bad shards' gradients relative to that of the others.

    Raises:
      SettingsError: no shard is good.
    """
    if not 0 <= bad < replicas:
        raise SettingsError(f"bad is {bad} of {replicas} shards; leave one good")
    optimum = np.zeros((replicas, len(CURVATURE)))
    optimum[:bad] = np.sqrt(2 * bad_loss / (len(CURVATURE) * CURVATURE))
    noise = np.tile(_noise(noise_loss), (replicas, 1))
    noise[:bad] *= bad_noise
    return Quadratic(np.tile(CURVATURE, (replicas, 1)), optimum, noise, CURVATURE)


def skewed(replicas: int, *, apart: float, spread: float, noise_loss: float, seed: int) -> Quadratic:
    """Shards drawn at random, with optima and curvatures of their own; all together lead to the optimum that counts.

    Args:
      replicas: K.
      apart: what the optimum of one shard costs, mean over shards, in nats.
      spread: standard deviation of the logarithm of a curvature.
      noise_loss: as for `with_bad`.
      seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    curvature = CURVATURE * np.exp(spread * rng.standard_normal((replicas, len(CURVATURE))))
    curvature *= CURVATURE / curvature.mean(axis=0)
    optimum = rng.standard_normal(curvature.shape) / np.sqrt(CURVATURE)
    optimum -= (curvature * optimum).mean(axis=0) / CURVATURE
    optimum *= np.sqrt(2 * apart / (optimum**2 @ CURVATURE).mean())
    return Quadratic(curvature, optimum, np.tile(_noise(noise_loss), (replicas, 1)), CURVATURE)


def _noise(noise_loss: float) -> Floats:
    """The variance [d] of gradients that costs a network alone as much at the constant rate."""
    per_unit = np.sum(RATE * CURVATURE / (2 - RATE * CURVATURE)) / 2
    return CURVATURE * noise_loss / per_unit


def rates(rounds: int, local_steps: int, *, decayed: bool) -> Floats:
    """Rates of a run [rounds, H]: constant, or falling to 0 as a cosine."""
    done = np.arange(rounds * local_steps) / (rounds * local_steps)
    factor = 0.5 * (1 + np.cos(np.pi * done)) if decayed else np.ones_like(done)
    return RATE * factor.reshape(rounds, local_steps)


def origin(loss: float) -> State:
    """Parameters that lose as much as this, in equal parts in all directions, and are known for certain."""
    return State(np.sqrt(2 * loss / (len(CURVATURE) * CURVATURE)), np.zeros_like(CURVATURE))


class Arm(NamedTuple):
    """A way to train on the shards.

    Attributes:
      problem: the shards that it sees, pooled into one for a single network.
      choose: its weights.
      faster: local steps that it takes while a replica takes one.
    """

    problem: Quadratic
    choose: Choose
    faster: int = 1


def arms(problem: Quadratic, bad: int, batch_size: int) -> dict[str, Arm]:
    """Every way to train, of which all see as many samples in a round."""
    k = problem.replicas
    good = problem.take(list(range(bad, k)))
    one = quadratic.fixed(np.ones(1))
    return {
        "sequential": Arm(quadratic.pooled(problem, 1, batch_size), one, k),
        "sync": Arm(quadratic.pooled(problem, k, batch_size), one),
        "plain": Arm(problem, quadratic.equal(problem)),
        "weights of each round": Arm(problem, quadratic.best_round(problem)),
        "best weights": Arm(problem, quadratic.fixed(quadratic.best_steady(problem, RATE))),
        "oracle": Arm(good, quadratic.equal(good)),
    }


def settled(arm: Arm, local_steps: int) -> State:
    """Where an arm ends at the constant rate: rounds, until they change nothing."""
    steps = quadratic.local(arm.problem, np.full(local_steps * arm.faster, RATE))
    state = quadratic.steady(steps, np.full(arm.problem.replicas, 1 / arm.problem.replicas))
    moved = np.inf
    while moved > 1e-12:
        new = quadratic.blend(state, steps, arm.choose(state, steps))
        moved = max(np.abs(a - b).max() for a, b in zip(new, state, strict=True))
        state = new
    return state


def finished(arm: Arm, rounds: int, local_steps: int, *, decayed: bool, start: State) -> State:
    """Where a run of an arm ends that starts from `start`."""
    own = rates(rounds, local_steps * arm.faster, decayed=decayed)
    return quadratic.rounds(arm.problem, own, arm.choose, start)[-1]
