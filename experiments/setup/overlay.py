"""Recorded matrices beside what is computed for them: what weighting gains where shards have random labels."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.setup.quadratic import cost_of_learning
from wavg_jax.base import DataError
from wavg_jax.reporting.matrix import Entry, Matrix, tabulate
from wavg_jax.reporting.statistic import Statistic
from wavg_jax.storage.rows import read_rows

WEIGHTINGS = ("opinion_pool", "learned")
"""Weightings fitted to held-out samples, which the model speaks of."""
_NOISY = re.compile(r"(\d+) of (\d+) noisy")


class Point(NamedTuple):
    """What a weighting gained over plain averaging in one scenario.

    Attributes:
      recording, scenario, weighting: which.
      share: of shards with random labels, p.
      samples: held-out samples that a round scored, n.
      replicas: K.
      gain: test loss of plain averaging minus the weighting's, in nats, paired by seed.
    """

    recording: str
    scenario: str
    weighting: str
    share: float
    samples: int
    replicas: int
    gain: Statistic

    @property
    def cost(self) -> float:
        """What fitting the weights costs, at most."""
        return cost_of_learning(self.replicas, self.samples)


def mixture(share: float, classes: int) -> float:
    """What random labels on a share p of equally weighted shards cost a cross-entropy, at most: -log(1 - p (1 - 1/C)).

    The minimum of the mean cross-entropy predicts the mixture of the shards' labels, so a class that is certain gets
    1 - p + p/C. Nothing in it is fitted.

    >>> round(mixture(0.25, 10), 3), round(mixture(0.5, 10), 3)
    (0.255, 0.598)
    """
    return -math.log1p(-share * (1 - 1 / classes))


def fitted(points: Sequence[Point]) -> tuple[Point, float]:
    """The point with the smallest share of bad shards, and the `bad_loss` at which the quadratic model goes through it.

    Raises:
      DataError: no point has bad shards.
    """
    bad = [point for point in points if point.share > 0]
    if not bad:
        raise DataError("no recorded scenario has noisy shards; give a folder with noisy2, noisy4 or the like")
    first = min(bad, key=lambda point: point.share)
    return first, first.gain.mean / first.share**2


def read_points(folders: Sequence[pathlib.Path]) -> list[Point]:
    """The scenarios with equal shards, some of them with random labels, of recorded matrices.

    Raises:
      DataError: a folder holds no matrix, or none of these scenarios with plain averaging and a weighting of
        `WEIGHTINGS`.
    """
    points: list[Point] = []
    for folder in folders:
        matrix = tabulate(read_rows(folder), "plain")
        found = list(_points(folder.name, matrix))
        if not found:
            wanted = " or ".join(WEIGHTINGS)
            raise DataError(f"{folder}: no scenario iid or noisyN with plain and {wanted}; record one, or leave it out")
        points += found
    return points


def _points(name: str, matrix: Matrix) -> Sequence[Point]:
    settings = matrix.headers[0]["settings"]
    replicas, samples = int(settings["replicas"]), int(settings["score_samples"] or settings["heldout"])
    return [
        Point(name, title, weighting, share, samples, replicas, _gain(matrix.entries, scenario, weighting))
        for scenario, title in matrix.titles.items()
        if (share := _share(scenario, title)) is not None
        for weighting in WEIGHTINGS
        if (scenario, weighting) in matrix.entries and (scenario, "plain") in matrix.entries
    ]


def _gain(entries: Mapping[tuple[str, str], Entry], scenario: str, weighting: str) -> Statistic:
    over = entries[scenario, weighting].differences["test_loss"]
    return over._replace(mean=-over.mean)


def _share(scenario: str, title: str) -> float | None:
    """The share of shards with random labels; None for other trouble, of which the model says nothing."""
    if scenario == "iid":
        return 0.0
    found = _NOISY.fullmatch(title)
    return int(found[1]) / int(found[2]) if found else None
