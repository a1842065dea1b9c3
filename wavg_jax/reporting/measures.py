"""What a task may be judged by: how each metric of the test split is named, scaled and compared."""

from collections.abc import Collection
from typing import NamedTuple


class Measure(NamedTuple):
    """A metric of the test split, as reports write it.

    Attributes:
      metric: its name; rows hold it as `test_{metric}`.
      words: its name in a sentence.
      title: its name above a column or beside an axis, with the unit.
      scale: factor from recorded to shown values.
      unit: unit of shown differences; "" for none.
      decimals: digits after the point; None to fit the values.
      higher: whether higher is better.
    """

    metric: str
    words: str
    title: str
    scale: float = 1.0
    unit: str = ""
    decimals: int | None = None
    higher: bool = False

    @property
    def percent(self) -> bool:
        """Whether shown values lie between 0 and 100."""
        return self.scale == 100


KNOWN = {
    measure.metric: measure
    for measure in (
        Measure("bits_per_byte", "test bits per byte", "bits per byte", decimals=3),
        Measure("accuracy", "test accuracy", "accuracy (%)", 100, "points", 2, higher=True),
        Measure("loss", "test loss", "loss"),
        Measure("macro_f1", "macro-F1", "macro-F1 (%)", 100, "points", 2, higher=True),
        Measure("ece", "calibration error", "ECE (%)", 100, "points", 2),
    )
}


def measure_of(metric: str) -> Measure:
    """How a metric is shown; a metric unknown here by its own name and in its own unit.

    >>> measure_of("accuracy").title, measure_of("mean_rank").title
    ('accuracy (%)', 'mean rank')
    """
    plain = metric.replace("_", " ")
    return KNOWN.get(metric, Measure(metric, f"test {plain}", plain))


def in_order(metrics: Collection[str]) -> tuple[Measure, ...]:
    """The metrics of a task: those known here first, then the others as given.

    >>> [measure.metric for measure in in_order(["rank", "loss", "accuracy"])]
    ['accuracy', 'loss', 'rank']
    """
    known = [metric for metric in KNOWN if metric in metrics]
    return tuple(measure_of(metric) for metric in dict.fromkeys([*known, *metrics]))


def judged_by(metrics: Collection[str]) -> Measure:
    """What arms are compared by: bits per byte of a text, else accuracy if it was measured, else the loss.

    >>> [judged_by(["loss", *more]).metric for more in (["accuracy"], ["perplexity"], ["accuracy", "bits_per_byte"])]
    ['accuracy', 'loss', 'bits_per_byte']
    """
    return KNOWN[next((name for name in ("bits_per_byte", "accuracy") if name in metrics), "loss")]
