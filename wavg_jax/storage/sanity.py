"""What rows must be to be reported on or gone on from: numbers within reach, and every round once."""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wavg_jax.base import DataError
from wavg_jax.storage.schema import FILE, LARGEST, Row


def check_numbers(rows: Iterable[Row]) -> None:
    """Raises DataError if a row holds a number beyond `LARGEST`, which no run records."""
    for row in rows:
        for name, value in row.items():
            if (odd := _beyond(value)) is not None:
                said = f"{'-' * (odd < 0)}1e{len(str(abs(odd))) - 1}" if isinstance(odd, int) else f"{odd:g}"
                raise DataError(
                    f"a row of run {row.get('run')!r:.60} has {name} of {said}, beyond {LARGEST:g}, the largest number "
                    f"of a row; restore the row from a copy"
                )


def _beyond(value: Any) -> int | float | None:
    """The first number beyond `LARGEST` in a value, at any depth; infinity and NaN stand for what was not finite."""
    if isinstance(value, int | float):
        return value if abs(value) > LARGEST and not (isinstance(value, float) and math.isinf(value)) else None
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((odd for odd in map(_beyond, nested) if odd is not None), None)


_MENTIONED = 10
"""Gaps that an error lists."""
Span = tuple[int, int]
"""Whole numbers from the first to the last, both among them."""


def _spans(numbers: Iterable[int]) -> list[Span]:
    """
    >>> _spans([7, 3, 4, 5])
    [(3, 5), (7, 7)]
    """
    spans: list[Span] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = spans[-1][0], number
        else:
            spans.append((number, number))
    return spans


def _between(spans: Sequence[Span], last: int) -> list[Span]:
    """What is missing of 1 to `last` where `spans` are there; without a list of it, as a damaged row may say 10**18.

    >>> _between([(0, 1), (3, 5)], 10**18)
    [(2, 2), (6, 1000000000000000000)]
    """
    ends, starts = [0, *(end for _, end in spans)], [*(start for start, _ in spans), last + 1]
    gaps = [(max(end, 0) + 1, min(start, last + 1) - 1) for end, start in zip(ends, starts, strict=True)]
    return [(first, end) for first, end in gaps if first <= end]


def _in_words(spans: Sequence[Span]) -> str:
    """
    >>> _in_words([(3, 5), (7, 7)])
    '3 to 5, 7'
    """
    return ", ".join(f"{first} to {end}" if first < end else str(first) for first, end in spans)


def check_rounds(run: str, rounds: Sequence[Mapping[str, Any]], last: int, replicas: int | None = None) -> None:
    """Raises DataError unless `rounds` are rounds 1 to `last` of a run, each once, with K weights each."""
    if odd := [row["round"] for row in rounds if not isinstance(row["round"], int)]:
        raise DataError(f"run {run!r} has a round number {odd[0]!r:.40}, not a whole one; restore the row from a copy")
    counts = collections.Counter(row["round"] for row in rounds)
    if missing := _between(_spans(counts), last):
        more = len(missing) - _MENTIONED
        said = _in_words(missing[:_MENTIONED]) + f", and {more} gaps more" * (more > 0)
        raise DataError(f"run {run!r} lacks round {said}; restore the rows from a copy, or train again")
    if twice := [number for number, count in counts.items() if count > 1]:
        raise DataError(
            f"run {run!r} has round {_in_words(_spans(twice))} twice, as if two processes had written at once; keep "
            f"one row of each in {FILE}"
        )
    for row in rounds:
        for name in ("weights", "alive") if replicas is not None else ():
            if len(row[name]) != replicas:
                what = f"run {run!r}, round {row['round']}: {len(row[name])} {name} for {replicas} replicas"
                raise DataError(f"{what}; restore the row from a copy, or train again")
