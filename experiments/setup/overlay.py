"""Recorded matrices beside what is computed for them: what weighting gains where shards have random labels."""

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.setup.quadratic import cost_of_learning
from wavg_jax.base import DataError
from wavg_jax.reporting.matrix import Entry, Matrix, tabulate
from wavg_jax.reporting.statistic import Statistic
from wavg_jax.storage.rows import read_rows

WEIGHTINGS = ("opinion_pool", "learned")
"""Weightings fitted to held-out samples, which the model speaks of."""
_NOISY = re.compile(r"(\d+) of (\d+) (?:noisy|with (\d+) % random labels)")
_JUDGED = re.compile(r"([\d,]+) held out|(\d+) % wrong")
"""Half of the shards have random labels in these, and something is about the held-out samples."""


class Point(NamedTuple):
    """What a weighting gained over plain averaging in one scenario.

    Attributes:
      recording, scenario, weighting: which.
      share: of random labels among all shards, p.
      wrong: share of random labels among the held-out samples.
      samples: held-out samples that a round scored, n.
      replicas: K.
      gain: test loss of plain averaging minus the weighting's, in nats, paired by seed.
    """

    recording: str
    scenario: str
    weighting: str
    share: float
    wrong: float
    samples: int
    replicas: int
    gain: Statistic

    @property
    def cost(self) -> float:
        """What fitting the weights costs, at most."""
        return cost_of_learning(self.replicas, self.samples)

    def predicted(self, law: Callable[[float], float]) -> float:
        """The gain, where a share of random labels costs `law(share)`: weights can follow held-out samples as far as
        these are wrong."""
        return law(self.share) - law(self.wrong)


def mixture(share: float, classes: int) -> float:
    """What random labels on a share p of equally weighted shards cost a cross-entropy, at most: -log(1 - p (1 - 1/C)).

    The minimum of the mean cross-entropy predicts the mixture of the shards' labels, so a class that is certain gets
    1 - p + p/C. Nothing in it is fitted.

    >>> round(mixture(0.25, 10), 3), round(mixture(0.5, 10), 3)
    (0.255, 0.598)
    """
    return -math.log1p(-share * (1 - 1 / classes))


def fitted(points: Sequence[Point]) -> tuple[Point, float]:
    """The first point with bad shards, and the `bad_loss` at which the quadratic model goes through it.

    Raises:
      DataError: no point has bad shards.
    """
    first = next((point for point in points if point.share > point.wrong == 0), None)
    if first is None:
        raise DataError("no recorded scenario has noisy shards; give a folder with noisy2, noisy4 or the like")
    return first, first.gain.mean / first.share**2


def read_points(folders: Sequence[pathlib.Path]) -> list[Point]:
    """The scenarios of recorded matrices with equal shards, some of them with random labels.

    Raises:
      DataError: a folder holds no matrix, or none of these scenarios with plain averaging and a weighting of
        `WEIGHTINGS`.
    """
    points: list[Point] = []
    for folder in folders:
        matrix = tabulate(read_rows(folder), "plain")
        found = _points(folder.name, matrix)
        if not found:
            wanted = " or ".join(WEIGHTINGS)
            raise DataError(f"{folder}: no scenario iid or noisyN with plain and {wanted}; record one, or leave it out")
        points += found
    return points


def _points(name: str, matrix: Matrix) -> list[Point]:
    settings = matrix.headers[0]["settings"]
    replicas, heldout = int(settings["replicas"]), int(settings["heldout"])
    found = []
    for scenario, title in matrix.titles.items():
        spoilt = _spoilt(title, replicas, heldout)
        for weighting in WEIGHTINGS:
            if spoilt and {(scenario, weighting), (scenario, "plain")} <= set(matrix.entries):
                share, wrong, samples = spoilt
                scored = min(int(settings["score_samples"] or samples), samples)
                gain = _gain(matrix.entries, scenario, weighting)
                found.append(Point(name, title, weighting, share, wrong, scored, replicas, gain))
    return found


def _gain(entries: Mapping[tuple[str, str], Entry], scenario: str, weighting: str) -> Statistic:
    over = entries[scenario, weighting].differences["test_loss"]
    return over._replace(mean=-over.mean)


def _spoilt(title: str, replicas: int, heldout: int) -> tuple[float, float, int] | None:
    """The share of random labels among all shards and among held-out samples, and the number of these; None for other
    trouble, of which the model says nothing."""
    if title == "IID":
        return 0.0, 0.0, heldout
    if found := _NOISY.fullmatch(title):
        return int(found[1]) / int(found[2]) * int(found[3] or 100) / 100, 0.0, heldout
    if found := _JUDGED.fullmatch(title):
        samples = int(found[1].replace(",", "")) if found[1] else heldout
        return replicas // 2 / replicas, int(found[2] or 0) / 100, samples
    return None
