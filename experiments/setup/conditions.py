"""Conditions: a number of noisy shards, and the learning rates there. compare and tune run several."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from absl import flags

from experiments.setup.shared_flags import ARMS, RATES, numbers
from wavg_jax.base import SettingsError
from wavg_jax.data.text_sets import is_text

F = flags.FLAGS


class Condition(NamedTuple):
    """How many of the shards are spoilt, and the learning rate of every arm there."""

    noisy: int
    rates: Mapping[str, float]


def title(noisy: int) -> str:
    """A condition in words."""
    noise = "shuffled bytes" if is_text(F.dataset) else "random labels"
    return f"{noisy} of {F.replicas} shards with {noise}" if noisy else "clean shards"


def read_conditions() -> tuple[Condition, ...]:
    """Reads --noisy, by default none and half of the shards, and the learning rates for each.

    Raises:
      SettingsError: --noisy has a number above K, or one twice, or there are not as many rates.
    """
    given = F.noisy is not None
    return _conditions(numbers("noisy", int, least=0) if given else tuple(sorted({0, F.replicas // 2})))


def read_condition() -> Condition:
    """Reads --noisy, by default none of the shards, and the learning rates, for commands that take one condition.

    Raises:
      SettingsError: --noisy has several numbers, or one above K.
    """
    noisy = (0,) if F.noisy is None else numbers("noisy", int, least=0)
    if len(noisy) > 1:
        raise SettingsError(f"--noisy={_text(noisy)}: give one number; compare and tune take several, one per scenario")
    return _conditions(noisy)[0]


def settings_of(names: Collection[str], condition: Condition) -> dict[str, object]:
    """The values of flags to record; of those with a value per condition, this condition's."""
    own = {"noisy": condition.noisy} | {f"lr_{arm}": rate for arm, rate in condition.rates.items()}
    return {name: own.get(name, F[name].value) for name in sorted(names)}


def _conditions(noisy: tuple[int, ...]) -> tuple[Condition, ...]:
    if len(set(noisy)) < len(noisy) or max(noisy) > F.replicas:
        raise SettingsError(
            f"--noisy={_text(noisy)}: give numbers from 0 to {F.replicas}, the shards (--replicas), each once"
        )
    rates = {arm: _rates(arm, noisy) for arm in ARMS}
    return tuple(Condition(one, {arm: rates[arm][at] for arm in ARMS}) for at, one in enumerate(noisy))


def _rates(arm: str, noisy: tuple[int, ...]) -> tuple[float, ...]:
    """The learning rate of an arm under each condition."""
    name = f"lr_{arm}"
    if F[name].value is None:
        return tuple(RATES[arm][one > 0] for one in noisy)
    rates = numbers(name, float, least=0)
    if len(rates) == 1:
        return rates * len(noisy)
    if len(rates) != len(noisy):
        several = f", or one for each of the {len(noisy)} scenarios" if len(noisy) > 1 else " for the one scenario"
        raise SettingsError(f"--{name}={_text(rates)}: give one rate{several} (--noisy)")
    return rates


def _text(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
