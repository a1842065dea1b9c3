"""How busy a machine was while a benchmark ran, and what others had in it."""

import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

BUSY = 0.5
"""Cores that others use, or processes that run where that is not known, for each core of the machine: above it, figures
are not to be trusted."""
_STAT = pathlib.Path("/proc/stat")


class Moment(NamedTuple):
    """The load at one moment.

    Attributes:
      wall: seconds of a clock.
      average: processes that ran or waited for a core in the last minute; None where the system does not say.
      busy: seconds of a core that the machine has used, or its hypervisor took from it; None outside Linux.
      own: seconds of a core that this process and its children used; children once they have ended.
    """

    wall: float
    average: float | None
    busy: float | None
    own: float


def now() -> Moment:
    """The load at this moment."""
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Moment(time.perf_counter(), average, _busy(), sum(os.times()[:4]))


def _busy() -> float | None:
    if not _STAT.exists():
        return None
    user, nice, system, idle, waiting, *more = map(int, _STAT.read_text().split(maxsplit=11)[1:9])
    del idle, waiting
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")


def between(before: Moment, after: Moment) -> dict[str, float | int | None]:
    """What a row says of the load during a run.

    Returns:
      before, after: load averages at its two ends, of which the second holds the run itself.
      others: cores that all other processes used, on average; None outside Linux.
      of: cores of the machine.
    """
    others = None
    if before.busy is not None and after.busy is not None and after.wall > before.wall:
        spent = (after.busy - before.busy) - (after.own - before.own)
        others = max(spent, 0.0) / (after.wall - before.wall)
    return {"before": before.average, "after": after.average, "others": others, "of": os.cpu_count() or 1}


def lines(found: Mapping[str, Any]) -> list[str]:
    """What a report says of it: a line, and a warning if others kept the machine busy."""
    parts = []
    if found["before"] is not None:
        parts.append(f"load average {found['before']:.2f} before and {found['after']:.2f} after")
    if found["others"] is not None:
        parts.append(f"other processes used {found['others']:.2f} of {found['of']} cores meanwhile")
    said = "; ".join(parts)
    told = [f"{said[:1].upper()}{said[1:]}."] if said else []
    # A load average remembers what ended a minute ago, such as the benchmark before this one.
    busy = found["others"] if found["others"] is not None else found["before"] or 0.0
    if busy > BUSY * found["of"]:
        told += [f"**Warning: others kept this machine busy, with more than {BUSY} a core. Measure again when idle.**"]
    return told
