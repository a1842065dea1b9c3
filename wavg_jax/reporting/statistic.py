"""A quantity over seeds: its mean, its spread and the interval of its mean."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from wavg_jax.storage.schema import LARGEST

Floats = NDArray[np.float64]


class Statistic(NamedTuple):
    """A quantity over seeds.

    Attributes:
      mean: mean over the `n` seeds with a finite value; nan if there are none.
      sd: sample standard deviation (n - 1); nan below two seeds.
      n: seeds with a value that counts.
    """

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float] | Floats) -> Self:
        """Mean and sample standard deviation of `values` [n]; those that are not finite, or beyond `LARGEST` as a ratio
        to next to nothing is, are left out and lower `n`.

        >>> Statistic.of([1.0, 2.0, 3.0, float("nan")])
        Statistic(mean=2.0, sd=1.0, n=3)
        """
        array = np.asarray(values, np.float64)
        finite = array[np.abs(array) <= LARGEST]
        if finite.size < 2 or np.ptp(finite) == 0:  # equal values have spread 0, whatever the rounding of their mean
            first = float(finite[0]) if finite.size else float("nan")
            return cls(first, 0.0 if finite.size > 1 else float("nan"), finite.size)
        return cls(float(finite.mean()), float(finite.std(ddof=1)), finite.size)

    @property
    def half_width(self) -> float:
        """Half the width of the mean's 95 % interval by Student's t, which is 2.5 times the sd with 3 seeds.

        >>> round(Statistic.of([1.0, 2.0, 3.0]).half_width, 3)
        2.484
        """
        return float(scipy.stats.t.ppf(0.975, self.n - 1)) * self.sd / math.sqrt(self.n)

    @property
    def shown(self) -> bool:
        """Whether there are enough seeds and the 95 % interval excludes 0.

        >>> Statistic.of([1.0, 2.0, 3.0]).shown, Statistic.of([3.0, 4.0, 5.0]).shown
        (False, True)
        """
        return not self.too_few and abs(self.mean) > self.half_width

    @property
    def too_few(self) -> bool:
        """Whether there are too few seeds to show anything; two may agree by chance, above all on coarse values."""
        return self.n <= 2


def as_float(value: Any) -> float:
    """A recorded number; None, which stands for a missing or non-finite number, becomes nan."""
    return math.nan if value is None else float(value)
