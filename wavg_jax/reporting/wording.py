"""How reports write numbers, settings and lists."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wavg_jax.reporting.statistic import Statistic

MINUS = "\N{MINUS SIGN}"  # in numbers and differences alike: a hyphen is narrower than a plus
TIMES = "\N{MULTIPLICATION SIGN}"


def seeds(count: int) -> str:
    """A number of seeds, in words.

    >>> seeds(1), seeds(3)
    ('1 seed', '3 seeds')
    """
    return f"{count} seed{'s' if count > 1 else ''}"


def signed(value: float, decimals: int) -> str:
    """A difference, with its sign.

    >>> signed(1.26, 1), signed(-0.04, 1)
    ('+1.3', '0.0')
    """
    shown = f"{value:+z.{decimals}f}"
    return _printed(shown) if float(shown) else shown[1:]


def interval(difference: Statistic, scale: float = 100.0, decimals: int = 2) -> str:
    """The 95 % interval of a difference over two seeds or more; by default of a share, in points.

    >>> interval(Statistic.of([0.01, 0.02, 0.03]))
    '−0.48 to +4.48'
    """
    low, high = (scale * (difference.mean + side * difference.half_width) for side in (-1, 1))
    return f"{signed(low, decimals)} to {signed(high, decimals)}"


def mean_sd(
    value: Statistic, scale: float = 1.0, decimals: int | None = None, *, sign: str = "", exact: bool = False
) -> str:
    """Writes `mean ± sd`, by default to three significant digits.

    Args:
      value: the statistic.
      scale: factor on mean and sd.
      decimals: digits after the point; None for three significant ones.
      sign: "+" to sign the mean.
      exact: leave out the spread of a quantity that is counted, or taken once for all seeds.

    >>> mean_sd(Statistic(0.8412, 0.0031, 3), scale=100, decimals=2)
    '84.12 ± 0.31'
    >>> mean_sd(Statistic(0.0123, float("nan"), 1), sign="+")
    '+0.0123 ± n/a'
    """
    mean, sd = scale * value.mean, scale * value.sd
    places = decimals
    if places is None:
        size = max(abs(mean), 0.0 if math.isnan(sd) else sd)
        places = min(max(2 - math.floor(math.log10(size)), 0), 6) if size > 0 else 0
    shown = _printed(f"{mean:{sign}z,.{places}f}")
    if exact and not sd > 0:
        return shown
    return f"{shown} ± {'n/a' if math.isnan(sd) else f'{sd:,.{places}f}'}"


def _printed(number: str) -> str:
    """A number with the minus sign of a printed page."""
    return number.replace("-", MINUS)


def clock_unit(seconds: Sequence[float]) -> tuple[str, float]:
    """The unit of times shown together, and the factor from seconds to it: milliseconds below one second.

    >>> clock_unit([0.0123, 0.4]), clock_unit([0.0123, 4.0]), clock_unit([])
    (('ms', 1000.0), ('s', 1.0), ('s', 1.0))
    """
    return ("ms", 1e3) if 0 < _largest(seconds) < 1 else ("s", 1.0)


def common_decimals(values: Sequence[float]) -> int:
    """Decimals of values shown together: three, and more or fewer where the largest is below 0.1 or above 100.

    >>> common_decimals([0.914, 0.1]), common_decimals([0.0021, 0.0004]), common_decimals([1234.5])
    (3, 5, 0)
    """
    largest = _largest(values)
    if not largest or 0.1 <= largest < 100:
        return 3
    return max(2 - math.floor(math.log10(largest)), 0)


def _largest(values: Sequence[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def in_words(value: Any) -> str:
    """A setting as text: `[0, 1]` is "0, 1"; an empty list and None are "none"."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def setting_value(value: Any) -> str:
    """A setting as configuration files write it.

    >>> setting_value(True), setting_value([1, 2]), setting_value(0.5)
    ('true', '1,2', '0.5')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def name_value_pairs(mapping: Mapping[str, Any]) -> str:
    """Names and values in one line, without those that are None."""
    return ", ".join(f"{name} {value}" for name, value in mapping.items() if value is not None)


def capitalised(sentence: str) -> str:
    """A sentence with its first letter in upper case."""
    return sentence[:1].upper() + sentence[1:]


def distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    """The distinct values, which need not be hashable, in order of appearance."""
    result: list[Any] = []
    for value in values:
        if value not in result:
            result.append(value)
    return tuple(result)
