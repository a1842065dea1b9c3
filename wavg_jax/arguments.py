"""What an argument must be, and the one line that says so where it is not.

A `Rule` is a question and its answer in words; `check` asks it. Rules ask what a value can do rather than of which
class it is, so numpy's integers are whole numbers and whatever has optax's two functions is an optimizer.
"""

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from wavg_jax.base import SettingsError


class Rule(NamedTuple):
    """What is allowed.

    Attributes:
      fits: whether a value is.
      wanted: what is, in words that follow "it must be".
    """

    fits: Callable[[Any], bool]
    wanted: str


def check(name: str, value: Any, rule: Rule) -> None:
    """Raises SettingsError if the argument of this name is not what the rule allows.

    >>> check("rounds", 2.5, whole(1))
    Traceback (most recent call last):
    wavg_jax.base.SettingsError: rounds is 2.5; it must be a whole number, 1 or more
    """
    if not rule.fits(value):
        raise SettingsError(f"{name} is {_shown(value)}; it must be {rule.wanted}")


def check_all(rules: Mapping[str, Rule], given: Mapping[str, Any]) -> None:
    """Checks the arguments `given` by name; a rule's name has two dashes where there is a flag of that name."""
    for name, rule in rules.items():
        check(name, given[name.removeprefix("--")], rule)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:80]
    return f"a class, {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def whole(least: int, most: int | None = None) -> Rule:
    """A whole number from `least`, to `most` if that is given."""

    def fits(value: Any) -> bool:
        try:
            number = operator.index(value)
        except TypeError:
            return False
        return not isinstance(value, bool) and least <= number and (most is None or number <= most)

    return Rule(fits, f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}")


def number(least: float = -math.inf, most: float = math.inf, *, apart: bool = False) -> Rule:
    """A finite number between `least` and `most`, which are among them unless `apart`."""

    def fits(value: Any) -> bool:
        if isinstance(value, bool | str | bytes):
            return False
        try:
            x = float(value)
        except (TypeError, ValueError):
            return False
        return math.isfinite(x) and (least < x < most if apart else least <= x <= most)

    low = [] if least == -math.inf else [f"greater than {least:g}" if apart else f"{least:g} or more"]
    high = [] if most == math.inf else [f"less than {most:g}" if apart else f"at most {most:g}"]
    bounds = " and ".join([*low, *high])
    return Rule(fits, f"a finite number, {bounds}" if bounds else "a finite number")


def has(wanted: str, *names: str, lacks: str = "") -> Rule:
    """An object with these attributes, and without one by which it would be known for something else."""

    def fits(value: Any) -> bool:
        like = not isinstance(value, type) and all(hasattr(value, name) for name in names)
        return like and not (lacks and hasattr(value, lacks))

    return Rule(fits, wanted)


def instance(kind: type | tuple[type, ...], wanted: str) -> Rule:
    """An instance of a class, or of one of several."""
    return Rule(lambda value: isinstance(value, kind), wanted)


def either(*rules: Rule) -> Rule:
    """What one of the rules allows."""
    return Rule(lambda value: any(rule.fits(value) for rule in rules), ", or ".join(rule.wanted for rule in rules))


def each(rule: Rule, wanted: str, least: int = 0) -> Rule:
    """A sequence of at least so many values that all fit a rule."""

    def fits(values: Any) -> bool:
        listed = isinstance(values, Sequence) and not isinstance(values, str)
        return listed and len(values) >= least and all(map(rule.fits, values))

    return Rule(fits, wanted)


def _floating(value: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except TypeError:
        return False


NONE = Rule(lambda value: value is None, "None")
YES_OR_NO = instance(bool, "True or False")
TEXT = Rule(lambda value: isinstance(value, str) and bool(value), "a text")
PATH = instance((str, os.PathLike), "the path of a folder")
MAPPING = instance(Mapping, "a dict")
FLOATING = Rule(_floating, "a floating dtype, such as jnp.bfloat16")
FUNCTION = Rule(callable, "a function")
OPTIMIZER = has("an optax transformation, such as optax.sgd(0.05)", "init", "update", lacks="needs")
RATE = either(number(), Rule(lambda value: callable(value) and not isinstance(value, type), "an optax schedule"))
SHAPE = each(whole(1), "a shape, such as (28, 28, 1)")
