"""The closed form of averaging on a quadratic loss: by hand, against its own recurrence, and against the library."""

import doctest
import itertools

import numpy as np
import pytest
import scipy.optimize

import wavg_jax as wavg
from experiments.setup import overlay, quadratic, quadratic_runs, quadratic_shards
from experiments.setup.quadratic import Quadratic, State, local, loss, parts, steady
from experiments.setup.quadratic_runs import Case, computed, simulated
from experiments.setup.quadratic_shards import RATE, Arm, arms, settled, skewed, with_bad
from wavg_jax.base import SettingsError


def flat(curvature, optimum, noise=0.0, judge=1.0):
    """Shards in one direction."""
    optimum = np.array(optimum, np.float64)[:, None]
    curvature, noise = (np.broadcast_to(np.array(one, np.float64), len(optimum))[:, None] for one in (curvature, noise))
    return Quadratic(curvature, optimum, noise, np.array([judge]))


HALF = np.full(2, 0.5)


@pytest.mark.parametrize(("module", "least"), [(quadratic, 5), (overlay, 1)])
def test_the_examples_hold(module, least):
    done = doctest.testmod(module)
    assert (done.failed, done.attempted >= least) == (0, True)


def test_two_steps_by_hand():
    # Rates 0.5 and 0.25 at curvature 1 leave 0.5 * 0.75; the first step's noise 0.25 c shrinks to 0.75^2 of it.
    steps = local(flat(1, [4.0, 0.0], noise=2.0), np.array([0.5, 0.25]))
    assert steps.keep[:, 0] == pytest.approx(0.375)
    assert steps.pull[:, 0] == pytest.approx([0.625 * 4, 0])
    assert steps.spread[:, 0] == pytest.approx(0.5625 * 0.25 * 2 + 0.0625 * 2)
    # Three quarters and one quarter of them, from 1 with variance 1.
    state = quadratic.blend(State(np.ones(1), np.ones(1)), steps, np.array([0.75, 0.25]))
    assert state.mean == pytest.approx(0.375 + 0.75 * 2.5)
    assert state.variance == pytest.approx(0.375**2 + (0.5625 + 0.0625) * steps.spread[0, 0])


def test_parts_are_half_the_curvature_times_squares():
    problem = flat(1, [0.0], judge=3.0)
    assert parts(problem, State(np.array([2.0]), np.array([5.0]))) == pytest.approx((6.0, 7.5))
    assert loss(problem, State(np.array([2.0]), np.array([5.0]))) == pytest.approx(13.5)


def test_rounds_end_at_the_fixed_point():
    problem, weights = skewed(4, apart=1, spread=0.5, noise_loss=0.1, seed=3), np.array([0.1, 0.2, 0.3, 0.4])
    ended = quadratic.rounds(problem, np.full((800, 5), RATE), quadratic.fixed(weights), quadratic_shards.origin(2.0))
    for a, b in zip(ended[-1], steady(local(problem, np.full(5, RATE)), weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("bad_noise", [1.0, 5.0])
def test_at_a_common_curvature_h_cancels_and_noise_is_that_of_sgd(bad_noise):
    problem = with_bad(4, 1, bad_loss=2.0, noise_loss=0.1, bad_noise=bad_noise)
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    found = [parts(problem, steady(local(problem, np.full(h, RATE)), weights)) for h in (1, 7, 500)]
    assert found[0] == pytest.approx((2.0 * 0.1**2, 0.1 * (bad_noise * 0.01 + 0.04 + 0.09 + 0.16)))
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0])


def test_one_step_finds_the_best_of_shards_that_differ_and_many_the_mean_of_their_optima():
    problem = skewed(8, apart=1, spread=1, noise_loss=0.1, seed=0)
    bias = [parts(problem, settled(Arm(problem, quadratic.equal(problem)), h))[0] for h in (1, 10, 100, 5000)]
    assert bias[0] < 1e-20
    assert bias == sorted(bias)
    assert bias[-1] == pytest.approx(problem.judge @ problem.optimum.mean(axis=0) ** 2 / 2, rel=1e-2)


def numerically(apart, noise):
    """The best weights by a general method."""

    def cost(w):
        return np.sum((apart @ w) ** 2) + noise @ w**2

    k = len(noise)
    total = {"type": "eq", "fun": lambda w: w.sum() - 1}
    options = {"ftol": 1e-14, "maxiter": 500}
    return scipy.optimize.minimize(cost, np.full(k, 1 / k), bounds=[(0, 1)] * k, constraints=total, options=options).x


@pytest.mark.parametrize("seed", range(5))
def test_the_best_weights_are_those_of_a_general_method(seed):
    rng = np.random.default_rng(seed)
    apart, noise = rng.normal(size=(4, 6)), rng.exponential(size=6)
    found = quadratic.best_weights(apart, noise)
    np.testing.assert_allclose(found, numerically(apart, noise), atol=1e-4)
    # On its support M w is constant, and nowhere else is it less: the conditions of Karush, Kuhn and Tucker.
    slope = (apart.T @ apart + np.diag(noise)) @ found
    assert np.ptp(slope[found > 0]) < 1e-9 * slope.max()
    assert slope.min() >= slope[found > 0].min() - 1e-9


@pytest.mark.parametrize(("bad_loss", "bad_noise"), [(4.0, 1.0), (0.02, 3.0), (0.0, 10.0)])
def test_two_groups_share_their_weights_as_resistors_share_a_current(bad_loss, bad_noise):
    problem = with_bad(8, 2, bad_loss=bad_loss, noise_loss=0.08, bad_noise=bad_noise)
    weights = quadratic.best_steady(problem, RATE)
    good, bad = 0.08 / 6, 0.08 * bad_noise / 2 + bad_loss
    assert weights[:2].sum() == pytest.approx(good / (good + bad))
    ended = steady(local(problem, np.full(3, RATE)), weights)
    assert loss(problem, ended) == pytest.approx(good * bad / (good + bad))


def test_weights_of_each_round_count_noise_up_to_twice_and_not_where_rounds_are_long():
    # In one direction P = 0.9^H.
    problem = flat(1, [0.5, 0, 0, 0], noise=1.0)
    arm = Arm(problem, quadratic.best_round(problem))
    for h in (1, 10, 200):
        steps = local(problem, np.full(h, RATE))
        state = State(np.zeros(1), np.zeros(1))
        for _ in range(2000 // h + 20):
            state = quadratic.blend(state, steps, arm.choose(state, steps))
        dearer = flat(1, [0.5, 0, 0, 0], noise=1 + 0.9**h)
        np.testing.assert_allclose(arm.choose(state, steps), quadratic.best_steady(dearer, RATE), atol=1e-6)


def test_the_best_weights_to_keep_need_one_curvature():
    with pytest.raises(SettingsError, match="the shards' curvatures differ"):
        quadratic.best_steady(skewed(2, apart=1, spread=1, noise_loss=1, seed=0), RATE)


def test_steps_that_diverge_are_refused():
    with pytest.raises(SettingsError, match=r"rate times largest curvature is 2\.5: local steps diverge"):
        local(flat([1.0, 5.0], [0, 0]), np.full(3, 0.5))


def test_one_shard_must_be_good():
    with pytest.raises(SettingsError, match="bad is 4 of 4 shards; leave one good"):
        with_bad(4, 4, bad_loss=1, noise_loss=1)


def test_made_shards_cost_what_was_asked_for():
    problem = with_bad(4, 1, bad_loss=3.0, noise_loss=0.2)
    alone = [parts(problem, settled(Arm(one, quadratic.equal(one)), 5)) for one in map(problem.take, ([0], [1]))]
    assert alone == [pytest.approx((3.0, 0.2)), pytest.approx((0.0, 0.2))]
    drawn = skewed(6, apart=0.7, spread=1, noise_loss=0.2, seed=0)
    assert (drawn.optimum**2 @ drawn.judge).mean() / 2 == pytest.approx(0.7)
    np.testing.assert_allclose((drawn.curvature * drawn.optimum).sum(axis=0), 0, atol=1e-12)


def test_sync_is_plain_averaging_and_sequential_has_no_average():
    every = arms(with_bad(8, 2, bad_loss=4.0, noise_loss=0.08), 2, batch_size=10**9)
    found = {name: parts(arm.problem, settled(arm, 10)) for name, arm in every.items()}
    assert found["sync"] == pytest.approx((0.25, 0.01))
    assert found["plain"] == pytest.approx((0.25, 0.01))
    assert found["sequential"] == pytest.approx((0.25, 0.08))
    assert sum(found["best weights"]) < min(sum(found["weights of each round"]), sum(found["oracle"]))


def test_a_decaying_rate_leaves_bias_and_next_to_no_noise():
    arm = arms(with_bad(8, 2, bad_loss=4.0, noise_loss=0.08), 2, 32)["plain"]
    end = quadratic_shards.finished(arm, 40, 100, decayed=True, start=quadratic_shards.origin(2.0))
    bias, noise = parts(arm.problem, end)
    assert bias == pytest.approx(0.25, rel=1e-6)
    assert noise < 0.01 / 10


def fit_cost(replicas, samples, spread, directions=40, times=300):
    """What weights fitted to samples lose to those fitted to the truth, drawn: replicas that spread as far around a
    blend, and samples whose optimum is off."""
    rng = np.random.default_rng(0)
    lost = []
    for _ in range(times):
        apart = spread * rng.standard_normal((directions, replicas))
        off = rng.standard_normal((directions, 1)) / np.sqrt(samples)
        nothing = np.zeros(replicas)
        fitted, best = (quadratic.best_weights(one, nothing) for one in (apart - off, apart))
        lost.append(np.sum((apart @ fitted) ** 2) - np.sum((apart @ best) ** 2))
    return np.mean(lost) / 2


def test_fitting_weights_costs_half_a_nat_for_each_free_weight_and_sample():
    for replicas, samples in itertools.product((3, 8), (100, 1000)):
        bound = quadratic.cost_of_learning(replicas, samples)
        assert fit_cost(replicas, samples, spread=2.0) == pytest.approx(bound, rel=0.2)
    # Replicas that are close to one another cannot follow the samples so far.
    assert fit_cost(8, 100, spread=0.02) < 0.3 * quadratic.cost_of_learning(8, 100)


def test_samples_to_gain_are_those_that_make_the_cost_the_gain():
    enough = quadratic.samples_to_gain(8, 0.25)
    assert enough == 14
    assert quadratic.cost_of_learning(8, enough) == pytest.approx(0.25)
    assert quadratic.samples_to_gain(8, 0.0) == np.inf


def test_weights_fitted_to_mislabelled_samples_do_as_badly_as_plain_averaging_at_that_share():
    # The samples' optimum is a quarter of the way to the bad one; a quarter of the weight takes the blend there.
    problem = with_bad(8, 4, bad_loss=4.0, noise_loss=1e-6)
    apart = np.sqrt(problem.judge) * (problem.optimum - 0.25 * problem.optimum[:1])
    weights = quadratic.best_weights(apart.T, np.full(8, 1e-9))
    ended = steady(local(problem, np.full(3, RATE)), weights)
    assert parts(problem, ended)[0] == pytest.approx(4.0 * 0.25**2, rel=1e-3)


SEEDS, COPIES = 10, 16


def agree(wanted, losses):
    """Whether losses by seed are what was computed, as far as these can tell."""
    error = losses.std(ddof=1) / np.sqrt(len(losses))
    assert error < 0.05 * wanted, "too few draws to tell"
    return abs(losses.mean() - wanted) < 4 * error


BAD = with_bad(4, 1, bad_loss=2.0, noise_loss=0.3, bad_noise=3.0)
DIFFER = skewed(4, apart=1, spread=1, noise_loss=0.3, seed=1)
CASES = [
    Case("equal weights", Arm(BAD, quadratic.equal(BAD)), 5, 60),
    Case("uneven weights", Arm(BAD, quadratic.fixed(np.array([0.1, 0.2, 0.3, 0.4]))), 5, 60),
    Case("shards that differ", Arm(DIFFER, quadratic.equal(DIFFER)), 20, 30),
    Case("a decaying rate", Arm(BAD, quadratic.fixed(np.array([0.0, 0.4, 0.3, 0.3]))), 10, 20, decayed=True),
    Case("sync", arms(BAD, 1, quadratic_runs.BATCH)["sync"], 5, 60, shards=BAD),
    Case("sequential", arms(BAD, 1, quadratic_runs.BATCH)["sequential"], 5, 60, shards=BAD),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_library_agrees_with_the_closed_form(case):
    assert agree(computed(case), simulated(case, range(SEEDS), COPIES))


def test_a_little_more_weight_for_a_bad_shard_would_be_noticed():
    wrong = Case("", Arm(BAD, quadratic.fixed(np.array([0.31, 0.23, 0.23, 0.23]))), 5, 60)
    assert not agree(computed(wrong), simulated(CASES[0], range(SEEDS), COPIES))


def test_learned_weights_lose_less_than_their_bound_and_more_with_fewer_samples():
    best = arms(with_bad(4, 1, bad_loss=4.0, noise_loss=0.05), 1, 32)["best weights"]
    by_samples = []
    for samples in (16, 512):
        case = Case("", best, 50, 20, weighting=wavg.learned(), heldout=samples)
        by_samples.append(simulated(case, range(4)).mean())
        assert by_samples[-1] < computed(case) + quadratic.cost_of_learning(4, samples)
    assert by_samples[0] > 1.5 * by_samples[1]
