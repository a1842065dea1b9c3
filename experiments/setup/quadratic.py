"""What K replicas on a quadratic loss lose: means and variances of their blend, in closed form.

The loss of shard k is `0.5 (x - b_k)' A_k (x - b_k)`, what counts is `0.5 x' A x`, and all matrices share their
eigenvectors, so that everything is an array over d directions. The gradient of a local step has noise of variance c_k.
After H steps at rates eta from the global parameters x, replica k is

    x_k = P_k x + q_k + n_k        P_k = prod (1 - eta A_k),   q_k = (1 - P_k) b_k,   n_k: noise of variance u_k

and the blend `sum_k w_k x_k` has the mean and the variance that `blend` gives. Nothing here trains or draws numbers;
`experiments.setup.quadratic_runs` does.

Where the curvature is common and weights stay, a blend is one network whose noise is averaged: H cancels, as Woodworth
et al. (2020, arXiv:2002.07839) found for equal weights. Without bias the best weights are inverse variances.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from wavg_jax.base import SettingsError

Floats = NDArray[np.float64]


class Quadratic(NamedTuple):
    """K shards in d directions.

    Attributes:
      curvature: A_k [K, d], positive.
      optimum: b_k [K, d], the bias: where shard k alone leads, counted from the best parameters.
      noise: c_k [K, d], variance of a mini-batch's gradient.
      judge: A [d], the curvature of the loss that counts, whose optimum is 0.
    """

    curvature: Floats
    optimum: Floats
    noise: Floats
    judge: Floats

    @property
    def replicas(self) -> int:
        return len(self.optimum)

    def take(self, shards: Floats | list[int]) -> "Quadratic":
        """The problem of some of the shards alone, such as the good ones."""
        return Quadratic(self.curvature[shards], self.optimum[shards], self.noise[shards], self.judge)


class State(NamedTuple):
    """The global parameters: their mean [d] and variance [d] around it."""

    mean: Floats
    variance: Floats


class Local(NamedTuple):
    """What H local steps do: x -> keep x + pull + noise of variance `spread`; each [K, d]."""

    keep: Floats
    pull: Floats
    spread: Floats


Choose = Callable[[State, Local], Floats]
"""Weights [K] of a round, given the state before it and what its local steps do."""


def local(problem: Quadratic, rates: Floats) -> Local:
    """H local steps, at any rates [H].

    Raises:
      SettingsError: a rate is so high that steps overshoot further and further.
    """
    top = float(np.max(rates)) * float(problem.curvature.max())
    if not top < 2:
        raise SettingsError(f"rate times largest curvature is {top:g}: local steps diverge; take less than 2")
    keep = np.ones_like(problem.optimum)
    spread = np.zeros_like(problem.optimum)
    for rate in rates:
        left = 1 - rate * problem.curvature
        keep = left * keep
        spread = left**2 * spread + rate**2 * problem.noise
    return Local(keep, (1 - keep) * problem.optimum, spread)


def blend(state: State, steps: Local, weights: Floats) -> State:
    """The global parameters after a round, with weights [K]."""
    keep = weights @ steps.keep
    return State(keep * state.mean + weights @ steps.pull, keep**2 * state.variance + weights**2 @ steps.spread)


def steady(steps: Local, weights: Floats) -> State:
    """Where rounds with the same steps and weights [K] end, the fixed point of `blend`.

    One direction at the rate 1, two shards of curvature 1 and 0.5 whose optima are 1 and -2. At H = 1 the blend finds
    the optimum of the mean loss; at a large H the mean of the optima.

    >>> skewed = Quadratic(np.array([[1.0], [0.5]]), np.array([[1.0], [-2.0]]), np.zeros((2, 1)), np.array([0.75]))
    >>> for H in (1, 50):
    ...     print(round(float(steady(local(skewed, np.full(H, 1.0)), np.full(2, 0.5)).mean[0]), 3))
    0.0
    -0.5
    """
    keep = weights @ steps.keep
    return State(weights @ steps.pull / (1 - keep), weights**2 @ steps.spread / (1 - keep**2))


def rounds(problem: Quadratic, rates: Floats, choose: Choose, start: State) -> list[State]:
    """The global parameters after each round of a run, at rates [rounds, H]."""
    states = [start]
    steps = None
    for i, own in enumerate(rates):
        if steps is None or not np.array_equal(own, rates[i - 1]):
            steps = local(problem, own)
        states.append(blend(states[-1], steps, choose(states[-1], steps)))
    return states[1:]


def loss(problem: Quadratic, state: State) -> float:
    """The expected loss above that of the best parameters."""
    return sum(parts(problem, state))


def parts(problem: Quadratic, state: State) -> tuple[float, float]:
    """That loss in two: of the bias, and of the noise."""
    return float(problem.judge @ state.mean**2) / 2, float(problem.judge @ state.variance) / 2


def best_weights(apart: Floats, noise: Floats) -> Floats:
    """The weights [K] that minimise `|apart w|^2 + sum_k w_k^2 noise_k`, not negative and with the sum 1.

    With `M = apart' apart + diag(noise)` the conditions of Karush, Kuhn and Tucker say that they are `M^-1 1`, scaled
    to sum to 1, over the shards that have a weight at all; non-negative least squares find which.

    Args:
      apart: how far shard k leads from the optimum [any, K], in units in which squares are losses.
      noise: the loss that its noise costs [K].

    >>> best_weights(np.zeros((1, 3)), np.array([1.0, 1.0, 2.0]))  # inverse variances
    array([0.4, 0.4, 0.2])
    >>> best_weights(np.array([[0.0, 0.0, 2.0]]), np.ones(3)).round(3)  # M = diag(1, 1, 5)
    array([0.455, 0.455, 0.091])
    """
    rows = np.concatenate([apart, np.diag(np.sqrt(noise))])
    scaled = rows / max(np.abs(rows).max(), np.finfo(np.float64).tiny)
    # The best multiple of any weights has the residual q / (1 + q), so the direction is that of the smallest q.
    asked = np.concatenate([scaled, np.ones((1, rows.shape[1]))])
    found, _ = scipy.optimize.nnls(asked, np.append(np.zeros(len(rows)), 1.0))
    return found / found.sum()


def best_steady(problem: Quadratic, rate: float) -> Floats:
    """The best weights [K] to keep for good at a constant rate, where all shards have the same curvature.

        M_kl = b_k' A b_l + delta_kl sum_i A_i V_ki        V = rate c / (A (2 - rate A)), with no H in it

    Raises:
      SettingsError: the curvatures differ.
    """
    if np.ptp(problem.curvature, axis=0).max() > 1e-12 * problem.curvature.max():
        raise SettingsError("the shards' curvatures differ, so their best weights have no closed form; use best_round")
    variance = rate * problem.noise / (problem.curvature * (2 - rate * problem.curvature))
    return best_weights((np.sqrt(problem.judge) * problem.optimum).T, variance @ problem.judge)


def best_round(problem: Quadratic) -> Choose:
    """Weights that make each round's own blend best, as weightings do that score blends on held-out data.

    They count noise too much: a round's noise is fresh, while most of its bias was there before. At a common curvature
    rounds end at the weights that were best to keep if the noise of a direction cost 1 + P times as much: at small H
    twice, at large H what it does. (A direction also counts in proportion to 1 - P, how fast it is learned.)
    """

    def choose(state: State, steps: Local) -> Floats:
        apart = np.sqrt(problem.judge) * (steps.keep * state.mean + steps.pull)
        common = np.sqrt(problem.judge * state.variance) * steps.keep
        return best_weights(np.concatenate([apart.T, common.T]), steps.spread @ problem.judge)

    return choose


def fixed(weights: Floats) -> Choose:
    """The same weights [K] in every round."""
    return lambda state, steps: weights


def equal(problem: Quadratic) -> Choose:
    """Plain averaging."""
    return fixed(np.full(problem.replicas, 1 / problem.replicas))


def pooled(problem: Quadratic, batches: int, batch_size: int) -> Quadratic:
    """One network on the samples of all shards together, mixed: `batches` is K for sync and 1 for sequential.

    Its step takes `batches` times the samples of a replica's, and which shard each is from is noise as well.
    """
    curvature = problem.curvature.mean(axis=0)
    pull = problem.curvature * problem.optimum
    noise = problem.noise.mean(axis=0) / batches + pull.var(axis=0) / (batches * batch_size)
    return Quadratic(curvature[None], (pull.mean(axis=0) / curvature)[None], noise[None], problem.judge)


def cost_of_learning(replicas: int, samples: int, per_sample: float = 1.0) -> float:
    """What weights fitted to held-out samples lose to the best ones, at most: (K - 1) / 2n nats.

    The samples' own optimum is off by a noise of the variance `per_sample / (n A)`, and the fit follows it in the K - 1
    directions in which it can move the blend, each at half of `per_sample / n`. In nats `per_sample` is 1 for the
    cross-entropy of a network whose probabilities are right (then the gradients' covariance is A). Weights that may not
    be negative, or are held near equal ones, follow less.

    >>> cost_of_learning(8, 256)
    0.013671875
    """
    return per_sample * (replicas - 1) / (2 * samples)


def samples_to_gain(replicas: int, gain: float, per_sample: float = 1.0) -> float:
    """The held-out samples from which on weights gain `gain` (in nats) more than fitting them costs, at the latest."""
    return cost_of_learning(replicas, 1, per_sample) / gain if gain > 0 else float("inf")
