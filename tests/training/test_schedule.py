"""Schedules of H: numbers worked by hand, and what no schedule may do."""

import math

import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavg_jax import SettingsError
from wavg_jax.training import schedule
from wavg_jax.training.schedule import Past

NAN, INF = math.nan, math.inf


def run(plan, rounds, losses=()):
    """H of each round, with `losses` as they come in."""
    losses = tuple(losses) or (1.0,) * rounds
    given = []
    for r in range(rounds):
        given.append(plan.steps(Past(r, sum(given), losses[:r])))
    return given


def test_fixed():
    assert run(schedule.fixed(7), 3) == [7, 7, 7]
    assert schedule.fixed(np.int64(7)).longest == 7


def test_post_local_averages_every_step_first():
    assert run(schedule.post_local(5, after=3), 6) == [1, 1, 1, 5, 5, 5]
    assert run(schedule.post_local(5, after=0), 2) == [5, 5]


def test_linear_grows_and_shrinks_in_whole_steps():
    assert run(schedule.linear(1, 4, rounds=6), 8) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert run(schedule.linear(4, 2, rounds=2), 4) == [4, 3, 2, 2]
    assert schedule.linear(4, 2, rounds=2).longest == 4


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.1, 4),  # (0.2 / 0.1)^2, also where the rate is a float32 a little above 0.1
        (np.float32(0.1), 4),
        (0.2, 2),  # (0.2 / 0.2)^2 = 1, less than the base period
        (0.06, 11),  # (3.33)^2 = 11.1
        (0.02, 40),  # 100, more than the longest
        (1e-200, 40),
    ],
)
def test_qsr_against_its_formula(rate, expected):
    assert schedule.qsr(rate, alpha=0.2, least=2, longest=40).steps(Past(0, 0, ())) == expected


def test_qsr_follows_an_optax_schedule_of_the_local_step():
    rate = optax.piecewise_constant_schedule(0.4, {10: 0.5, 18: 0.5, 30: 0.0})
    # (0.4 / 0.4)^2 = 1 before step 10; then (0.4 / 0.2)^2 = 4, at steps 10 and 14; 16 at 18; at rate 0 the longest.
    assert run(schedule.qsr(rate, alpha=0.4, least=1, longest=20), 15) == [1] * 10 + [4, 4, 16, 20, 20]


def test_qsr_takes_the_period_of_the_peak_during_warm_up():
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, warmup_steps=10, decay_steps=100)
    warm = schedule.qsr(rate, alpha=0.2, least=1, longest=50, warmup=10)
    assert [warm.steps(Past(0, t, ())) for t in (0, 5, 10)] == [4, 4, 4]
    assert schedule.qsr(rate, alpha=0.2, least=1, longest=50).steps(Past(0, 0, ())) == 50


def test_adacomm_against_its_formula():
    # F_0 = 4. After round 2: sqrt(2.25/4) * 10 = 7.5 -> 8. After 4: sqrt(1/4) * 10 = 5. After 6 the formula says
    # sqrt(1.5/4) * 10 = 6.1 -> 7, no less than 5: halved to 3. After 8: sqrt(0.09/4) * 10 = 1.5 -> 2.
    losses = [4, 2.25, 2, 1, 1, 1.5, 1, 0.09, 0.09]
    assert run(schedule.adacomm(10, every=2), 9, losses) == [10, 10, 8, 8, 5, 5, 3, 3, 2]


def test_adacomm_halves_on_a_plateau_down_to_one():
    assert run(schedule.adacomm(20, every=1), 8, [1.0] * 8) == [20, 20, 10, 5, 3, 2, 1, 1]


@pytest.mark.parametrize("bad", [NAN, INF, -INF, -1.0])
def test_adacomm_stays_after_a_loss_without_meaning(bad):
    assert run(schedule.adacomm(16, every=1), 5, [4.0, 1.0, bad, 0.25, 0.25]) == [16, 16, 8, 8, 4]
    # Without meaning in the first round, the next one is F_0.
    assert run(schedule.adacomm(16, every=1), 4, [bad, 4.0, 1.0, 1.0]) == [16, 16, 16, 8]
    assert run(schedule.adacomm(16, every=1), 4, [bad] * 4) == [16] * 4


PLANS = {
    "fixed": schedule.fixed(9),
    "post_local": schedule.post_local(9, after=20),
    "linear": schedule.linear(3, 9, rounds=5),
    "qsr": schedule.qsr(lambda step: 0.1 / (1 + step), alpha=0.1, least=2, longest=9),
    "adacomm": schedule.adacomm(9, every=2),
}


@pytest.mark.parametrize("name", PLANS)
@given(losses=st.lists(st.floats(width=32), max_size=12), extra=st.integers(0, 10**6))
def test_every_schedule_gives_a_whole_number_between_one_and_its_longest(name, losses, extra):
    plan = PLANS[name]
    steps = plan.steps(Past(len(losses), len(losses) + extra, tuple(losses)))
    assert isinstance(steps, int)
    assert 1 <= steps <= plan.longest == 9


@given(st.lists(st.floats(width=32), min_size=1, max_size=12), st.integers(1, 3))
def test_adacomm_never_grows(losses, every):
    given_steps = run(schedule.adacomm(32, every), len(losses), losses)
    assert given_steps == sorted(given_steps, reverse=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: schedule.fixed(0), "local_steps is 0"),
        (lambda: schedule.fixed(2.5), "local_steps is 2.5; it must be a whole number"),
        (lambda: schedule.post_local(0, 1), "local_steps"),
        (lambda: schedule.post_local(5, -1), "after is -1"),
        (lambda: schedule.linear(0, 5, 5), "first"),
        (lambda: schedule.linear(1, 0, 5), "last"),
        (lambda: schedule.linear(1, 5, 0), "rounds"),
        (lambda: schedule.qsr(0.1, 0.0, 1, 5), "alpha"),
        (lambda: schedule.qsr(0.1, INF, 1, 5), "alpha"),
        (lambda: schedule.qsr(0.0, 0.2, 1, 5), "learning_rate"),
        (lambda: schedule.qsr(NAN, 0.2, 1, 5), "learning_rate"),
        (lambda: schedule.qsr(0.1, 0.2, 0, 5), "least"),
        (lambda: schedule.qsr(0.1, 0.2, 6, 5), "longest is 5"),
        (lambda: schedule.qsr(0.1, 0.2, 1, 5, warmup=-1), "warmup"),
        (lambda: schedule.adacomm(0, 1), "first"),
        (lambda: schedule.adacomm(5, 0), "every"),
    ],
)
def test_bad_numbers_are_refused_by_name(make, says):
    with pytest.raises(SettingsError, match=says):
        make()
