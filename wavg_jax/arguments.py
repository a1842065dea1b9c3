"""Rules for arguments, and one-line errors when an argument breaks one.

A `Rule` pairs a predicate with a description of the allowed values; `check` applies it. Rules are duck-typed: NumPy
integers are whole numbers, and any object with optax's `init` and `update` is an optimizer.
"""

import functools
import inspect
import json
import math
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from wavg_jax.base import DataError, SettingsError

_LEAST = float(np.finfo(np.float32).tiny)
"""The smallest float32 that compiled programs do not flush to 0."""
INT32 = 2**31 - 1
"""The most that counts and indices can be in compiled programs."""
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


class Rule(NamedTuple):
    """A predicate on values, and its description for error messages.

    Attributes:
      fits: `value -> bool`, whether the value is allowed.
      wanted: describes the allowed values, to follow "it must be".
    """

    fits: Callable[[Any], bool]
    wanted: str


def check(name: str, value: Any, rule: Rule) -> None:
    """Raises SettingsError if the argument `name` breaks the rule.

    >>> check("rounds", 2.5, whole(1))
    Traceback (most recent call last):
    wavg_jax.base.SettingsError: rounds is 2.5; it must be a whole number, 1 or more
    """
    if not rule.fits(value):
        raise SettingsError(f"{name} is {shown(value)}; it must be {rule.wanted}")


def check_all(rules: Mapping[str, Rule], given: Mapping[str, Any]) -> None:
    """Checks each argument in `given` against the rule of its name."""
    for name, rule in rules.items():
        check(name, given[name], rule)


def check_fields(group: NamedTuple, rules: Mapping[str, Rule]) -> None:
    """Checks each field of a named tuple against the rule of its name."""
    for name, rule in rules.items():
        check(f"{type(group).__name__}: {name}", getattr(group, name), rule)


def as_whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Returns the argument `name` as an `int`; raises SettingsError unless it is a whole number within the bounds.

    NumPy integers can overflow, and JSON does not accept them.

    >>> as_whole("replicas", np.int64(4), 1)
    4
    """
    check(name, value, whole(least, most))
    return operator.index(value)


def as_number(name: str, value: Any, rule: Rule) -> Any:
    """Returns the argument `name` as a float, since fractions and NumPy's uint8 do not multiply as one; or as it is, if
    it is a schedule or JAX's. Raises SettingsError if it breaks the rule."""
    check(name, value, rule)
    return value if callable(value) or isinstance(value, jax.Array) else float(value)


def fits_memory(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Makes a DataError of one line of a function's MemoryError: a shape can promise more than any machine has."""

    @functools.wraps(function)
    def called(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        try:
            return function(*args, **kwargs)
        except MemoryError as error:
            said = " ".join(str(error).split())
            raise DataError(f"{function.__name__}: out of memory ({said}); give it less") from None

    return called


_SIMPLE = (bool, int, float, str, bytes, np.generic, np.ndarray, type(None))


def shown(value: Any) -> str:
    """Formats a value for an error message: a number, a string or a short list of them as such, else its type.

    >>> shown([1, 2, 3, 4, 5, 6, 7, 8]), shown({}), shown(dict)
    ('[1, 2, 3, 4, 5, 6, ...]', 'of type dict', 'a class, dict')
    """
    items = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(item, _SIMPLE) for item in items):
        return " ".join(reprlib.repr(value).split())
    return f"a class, {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def whole(least: int | None = None, most: int | None = None) -> Rule:
    """Allows a whole number; `least` and `most` are inclusive bounds."""
    low, high = -math.inf if least is None else least, math.inf if most is None else most

    def fits(value: Any) -> bool:
        try:
            n = operator.index(value)
        except TypeError:
            return False
        return not isinstance(value, bool) and low <= n <= high

    if most is not None:
        return Rule(fits, f"a whole number from {low} to {most}")
    return Rule(fits, "a whole number" if least is None else f"a whole number, {least} or more")


def number(
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    in_rounds: bool = True,
) -> Rule:
    """Allows a finite number from `least` to `most`, greater than `above`, less than `below`, or any traced scalar.

    A number for rounds (`in_rounds`) must stay so in float32, in which they compute: 1e-40 is 0 there, 1e50 infinite.
    """

    def fits(value: Any) -> bool:
        if isinstance(value, jax.core.Tracer):  # `optax.inject_hyperparams` passes tracers
            return value.ndim == 0
        # float() takes texts, too, and of NumPy arrays of one number, texts and complex numbers.
        if isinstance(value, bool | str | bytes) or getattr(value, "shape", None) not in (None, ()):
            return False
        if getattr(getattr(value, "dtype", None), "kind", "f") in "bcSUO":
            return False
        try:
            x = float(value)
        except (TypeError, ValueError, OverflowError):
            return False
        with np.errstate(over="ignore", under="ignore"):
            narrow = float(np.float32(x)) if in_rounds else x
        if in_rounds and abs(narrow) < _LEAST:
            narrow = 0.0
        within = least <= x <= most and above < x < below
        return math.isfinite(narrow) and within and above < narrow < below

    said = {f"{least:g} or more": least, f"greater than {above:g}": above}
    said |= {f"at most {most:g}": most, f"less than {below:g}": below}
    bounds = " and ".join(words for words, bound in said.items() if math.isfinite(bound))
    closed = above == -math.inf and below == math.inf and math.isfinite(least) and math.isfinite(most)
    where = "" if closed or not in_rounds else " (in float32)"
    return Rule(fits, f"a finite number, {bounds}{where}" if bounds else f"a finite number{where}")


def has(wanted: str, *names: str, lacks: str = "") -> Rule:
    """Allows an object, not a class, that has the attributes `names` and not `lacks`, the mark of another kind."""

    def fits(value: Any) -> bool:
        like = not isinstance(value, type) and all(hasattr(value, name) for name in names)
        return like and not (lacks and hasattr(value, lacks))

    return Rule(fits, wanted)


def takes(arguments: int, wanted: str) -> Rule:
    """Allows a function that accepts `arguments` positional arguments; one without a signature passes."""

    def fits(value: Any) -> bool:
        if not callable(value):
            return False
        try:
            inspect.signature(value).bind(*range(arguments))
        except TypeError:
            return False
        except ValueError:  # a C function without a signature
            pass
        return True

    return Rule(fits, wanted)


def instance(kind: type | tuple[type, ...], wanted: str) -> Rule:
    """Allows an instance of `kind`."""
    return Rule(lambda value: isinstance(value, kind), wanted)


def either(*rules: Rule) -> Rule:
    """Allows a value that fits any of the rules."""
    return Rule(lambda value: any(rule.fits(value) for rule in rules), ", or ".join(rule.wanted for rule in rules))


def each(rule: Rule, wanted: str, least: int = 0) -> Rule:
    """Allows a sequence of at least `least` values that all fit the rule."""

    def fits(values: Any) -> bool:
        listed = isinstance(values, Sequence) and not isinstance(values, str)
        return listed and len(values) >= least and all(map(rule.fits, values))

    return Rule(fits, wanted)


def one_of(names: Iterable[str]) -> Rule:
    """Allows one of some names."""
    names = tuple(names)
    return Rule(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


def iterable(wanted: str) -> Rule:
    """Allows what yields values."""

    def fits(value: Any) -> bool:
        try:
            iter(value)
        except TypeError:  # an array without axes has __iter__
            return False
        return not isinstance(value, str | bytes | type)

    return Rule(fits, wanted)


def _floating(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic | jax.Array):  # has a dtype, and is none
        return False
    try:
        return bool(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except TypeError:
        return False


def _listed(value: Any) -> Any:
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    raise TypeError


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, default=_listed)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


NONE = Rule(lambda value: value is None, "None")
YES_OR_NO = instance(bool, "True or False")
TEXT = Rule(lambda value: isinstance(value, str) and bool(value), "a non-empty string")
PATH = instance((str, os.PathLike), "the path of a folder")
MAPPING = instance(Mapping, "a dict")
JSON = Rule(_is_json, "a JSON value: a string, number, bool, None, or a list, dict or array of them")
FLOATING = Rule(_floating, "a floating dtype, such as jnp.bfloat16")
FUNCTION = Rule(callable, "a function")
OPTIMIZER = has("an optax transformation, such as optax.sgd(0.05)", "init", "update", lacks="needs")
RATE = either(number(), Rule(lambda value: callable(value) and not isinstance(value, type), "an optax schedule"))
SHAPE = each(whole(1), "a shape, such as (28, 28, 1)")
