"""A quantity over seeds: its mean, spread and interval, and how a reader reads them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Show = Callable[["Statistic", str], str]
"""`(statistic, "+" to sign it) -> text`."""

MINUS = "\N{MINUS SIGN}"  # wherever a number or a difference is shown: a hyphen is narrower than a plus


class Statistic(NamedTuple):
    """A quantity over seeds.

    Attributes:
      mean: mean over the `n` seeds that have a finite value; nan when none has.
      sd: sample standard deviation (n - 1); nan below two seeds.
      n: seeds with a finite value.
    """

    mean: float
    sd: float
    n: int

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean by Student's t: with 3 seeds it is 2.5 times their sd.

        >>> round(statistic([1.0, 2.0, 3.0]).half_width, 3)
        2.484
        """
        return float(scipy.stats.t.ppf(0.975, self.n - 1)) * self.sd / math.sqrt(self.n)

    @property
    def shown(self) -> bool:
        """Whether there are seeds enough, and the 95 % interval leaves 0 out.

        >>> statistic([1.0, 2.0, 3.0]).shown, statistic([3.0, 4.0, 5.0]).shown
        (False, True)
        """
        return not self.too_few and abs(self.mean) > self.half_width

    @property
    def too_few(self) -> bool:
        """Whether nothing can be shown for lack of seeds: two may agree by chance, above all where values are steps."""
        return self.n <= 2


def statistic(values: Sequence[float] | Floats) -> Statistic:
    """Mean and sample standard deviation of `values` [n]; non-finite ones are left out and lower `n`.

    >>> statistic([1.0, 2.0, 3.0, float("nan")])
    Statistic(mean=2.0, sd=1.0, n=3)
    """
    array = np.asarray(values, np.float64)
    finite = array[np.isfinite(array)]
    if finite.size < 2 or np.ptp(finite) == 0:  # equal values get the spread 0, without the mean's rounding
        first = float(finite[0]) if finite.size else float("nan")
        return Statistic(first, 0.0 if finite.size > 1 else float("nan"), finite.size)
    return Statistic(float(finite.mean()), float(finite.std(ddof=1)), finite.size)


def as_float(value: Any) -> float:
    """A recorded number; None, which stands for one that is missing or not finite, becomes nan."""
    return math.nan if value is None else float(value)


def seeds(count: int) -> str:
    """How many seeds, in words.

    >>> seeds(1), seeds(3)
    ('1 seed', '3 seeds')
    """
    return f"{count} seed{'s' if count > 1 else ''}"


def minus(shown: str) -> str:
    """Gives a number, as Python writes it, the minus sign of a printed page."""
    return shown.replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    """A difference as a reader reads it.

    >>> signed(1.26, 1), signed(-0.04, 1)
    ('+1.3', '0.0')
    """
    shown = f"{value:+z.{decimals}f}"
    return minus(shown) if float(shown) else shown[1:]


def interval(d: Statistic, decimals: int = 2) -> str:
    """The 95 % interval of a share, in points; of two seeds or more.

    >>> interval(statistic([0.01, 0.02, 0.03]))
    '−0.48 to +4.48'
    """
    low, high = (100 * (d.mean + side * d.half_width) for side in (-1, 1))
    return f"{signed(low, decimals)} to {signed(high, decimals)}"


def number(scale: float = 1.0, decimals: int | None = None, *, exact: bool = False) -> Show:
    """Shows `mean ± sd`, with three significant digits unless `decimals` says otherwise.

    `exact` leaves out the spread of what is counted, or taken once for all seeds, and so has none.

    >>> number(scale=100, decimals=2)(Statistic(0.8412, 0.0031, 3), "")
    '84.12 ± 0.31'
    >>> number()(Statistic(0.0123, float("nan"), 1), "+")
    '+0.0123 ± n/a'
    """

    def show(value: Statistic, sign: str) -> str:
        mean, sd = scale * value.mean, scale * value.sd
        size = max(abs(mean), 0.0 if math.isnan(sd) else sd)
        places = decimals
        if places is None:
            places = min(max(2 - math.floor(math.log10(size)), 0), 6) if size > 0 else 0
        shown = minus(f"{mean:{sign}z,.{places}f}")
        if exact and not sd > 0:
            return shown
        return f"{shown} ± {'n/a' if math.isnan(sd) else f'{sd:,.{places}f}'}"

    return show


def clock_unit(seconds: Sequence[float]) -> tuple[str, float]:
    """The unit for times that are shown together, and what seconds are multiplied by: milliseconds below one second.

    >>> clock_unit([0.0123, 0.4]), clock_unit([0.0123, 4.0]), clock_unit([])
    (('ms', 1000.0), ('s', 1.0), ('s', 1.0))
    """
    largest = max((abs(value) for value in seconds if math.isfinite(value)), default=0.0)
    return ("ms", 1e3) if 0 < largest < 1 else ("s", 1.0)
