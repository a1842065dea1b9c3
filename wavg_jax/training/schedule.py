"""Schedules of H: how many local steps every replica takes in the next round.

`fit` asks the schedule on the host before every round and passes H to the compiled round as an argument, so that H
changes without recompiling. A schedule is a pure function of recorded rows, so a resumed run continues with the same H.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from wavg_jax.arguments import FUNCTION, as_whole, check, either, number
from wavg_jax.base import SettingsError

__all__ = ["Past", "Schedule", "adacomm", "fixed", "linear", "post_local", "qsr"]


def __dir__() -> list[str]:
    return __all__


class Past(NamedTuple):
    """What a schedule may use, read back from the recorded rows after a resume.

    Attributes:
      round: rounds done.
      steps: local steps that every replica was given in them.
      losses: mean training loss of each of these rounds.
    """

    round: int
    steps: int
    losses: tuple[float, ...]


class Schedule(NamedTuple):
    """H over time.

    Attributes:
      longest: the most steps a round can have, which sizes the compiled round's batches.
      steps: `past -> H`, the local steps of the next round, between 1 and `longest`.
      varies: whether H changes at all; if not, it is a constant of the compiled round.
    """

    longest: int
    steps: Callable[[Past], int]
    varies: bool = True


def fixed(local_steps: int) -> Schedule:
    """The same H in every round: local SGD (Stich 2019, arXiv:1805.09767).

    Args:
      local_steps: H.

    Raises:
      SettingsError: it is not a whole number, 1 or more.

    >>> fixed(50).steps(Past(round=3, steps=150, losses=(2.0, 1.0, 0.5)))
    50
    """
    local_steps = as_whole("local_steps", local_steps, 1)
    return Schedule(local_steps, lambda past: local_steps, varies=False)


def post_local(local_steps: int, after: int) -> Schedule:
    """Every step is averaged at first, then every H steps: post-local SGD (Lin et al. 2020, arXiv:1808.07217).

        H = 1 if steps < after else local_steps

    Args:
      local_steps: H in the second phase.
      after: local steps in the first phase; the paper switches where the learning rate first decays.

    Raises:
      SettingsError: `local_steps` is not a whole number, 1 or more, or `after` not one, 0 or more.

    >>> schedule = post_local(8, after=2)
    >>> [schedule.steps(Past(round, steps, (1.0,) * round)) for round, steps in enumerate([0, 1, 2, 10])]
    [1, 1, 8, 8]
    """
    local_steps, after = as_whole("local_steps", local_steps, 1), as_whole("after", after, 0)
    return Schedule(local_steps, lambda past: 1 if past.steps < after else local_steps)


def linear(first: int, last: int, rounds: int) -> Schedule:
    """H goes from `first` to `last` in a straight line, then stays.

        H = first + floor((last - first) * min(round, rounds) / rounds)

    Args:
      first: H of the first round.
      last: H after `rounds` rounds; less than `first` lets H shrink.
      rounds: how long it takes.

    Raises:
      SettingsError: an argument is not a whole number, 1 or more.

    >>> [linear(10, 50, rounds=4).steps(Past(round, 0, (1.0,) * round)) for round in range(6)]
    [10, 20, 30, 40, 50, 50]
    """
    first, last, rounds = as_whole("first", first, 1), as_whole("last", last, 1), as_whole("rounds", rounds, 1)
    return Schedule(max(first, last), lambda past: first + (last - first) * min(past.round, rounds) // rounds)


def qsr(
    learning_rate: float | Callable[[int], Any], alpha: float, least: int, longest: int, *, warmup: int = 0
) -> Schedule:
    """H grows as the learning rate decays: the quadratic synchronisation rule (Gu et al. 2024, arXiv:2310.14423).

        H = max(least, floor((alpha / learning_rate)^2)), but at most `longest`

    Args:
      learning_rate: of the inner optimizer; a number, or an optax schedule, evaluated at the round's first local step.
      alpha: the growth coefficient, in units of the learning rate.
      least: H0, the paper's base period.
      longest: the most steps of a round, also where the learning rate is 0.
      warmup: local steps of the learning rate's warm-up. As in the paper, H then is that of the first step after it;
        the small rates of a warm-up would otherwise call for many steps.

    Raises:
      SettingsError: a number is out of range.

    >>> schedule = qsr(lambda step: 0.1 if step < 100 else 0.05, alpha=0.2, least=2, longest=50)
    >>> schedule.steps(Past(0, 0, ())), schedule.steps(Past(25, 100, (1.0,) * 25))
    (4, 16)
    """
    least, longest, warmup = as_whole("least", least, 1), as_whole("longest", longest, 1), as_whole("warmup", warmup, 0)
    if longest < least:
        raise SettingsError(f"longest is {longest}; it must not be less than least, which is {least}")
    positive = number(above=0, in_rounds=False)
    check("alpha", alpha, positive)
    check("learning_rate", learning_rate, either(positive, FUNCTION))

    def steps(past: Past) -> int:
        rate = float(learning_rate(max(past.steps, warmup)) if callable(learning_rate) else learning_rate)
        if not rate > 0:
            return longest
        # optax gives float32 rates: with alpha 0.2 and rate 0.1 the square is 3.9999999, which means 4.
        ideal = (alpha / rate) * (alpha / rate) * (1 + 1e-6)
        return max(least, math.floor(min(ideal, longest)))

    return Schedule(longest, steps)


def adacomm(first: int, every: int) -> Schedule:
    """H shrinks as the training loss falls (Wang and Joshi 2019, AdaComm, arXiv:1810.08313).

    After every `every` rounds, with F_0 the mean training loss of the first round and F that of the last:

        next = ceil(sqrt(F / F_0) * first)
        H    = next if next < H else ceil(H / 2)

    So H only falls, and halves when the loss stops falling (the paper's gamma = 1/2). A round whose loss is not finite
    changes nothing and never counts as the first. The paper measures its intervals in seconds; here they are rounds, so
    that a run can be repeated.

    Args:
      first: H of the first rounds, and the longest.
      every: rounds between updates.

    Raises:
      SettingsError: an argument is not a whole number, 1 or more.

    >>> schedule = adacomm(first=16, every=2)
    >>> [schedule.steps(Past(r, 0, (2.0, 0.5, 0.5, 0.5)[:r])) for r in range(5)]  # sqrt(0.5 / 2) * 16 = 8
    [16, 16, 8, 8, 4]
    """
    first, every = as_whole("first", first, 1), as_whole("every", every, 1)

    def steps(past: Past) -> int:
        start = next((r for r, loss in enumerate(past.losses) if 0 < loss < math.inf), past.round)
        current = first
        for last in range(every - 1, past.round, every):
            loss = past.losses[last]
            if last > start and 0 <= loss < math.inf:
                wanted = math.ceil(min(1.0, math.sqrt(loss / past.losses[start])) * first)
                current = max(1, wanted if wanted < current else math.ceil(current / 2))
        return current

    return Schedule(first, steps)
