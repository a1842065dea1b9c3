"""How a run deals with numbers that are not finite: it warns when a replica dies, and ends when none is left.

A replica that died restarts from the last blend on other data, so the run survives one death and mentions it once. A
round is *lost* if all replicas die or the outer step is not finite; the parameters then stay as they were. The run
survives one lost round, since the next one has other data; a second in a row, or a lost last round, ends it. The rule
ends a run at the same round whether or not the next one was launched before the loss was known.
"""

import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wavg_jax.base import WavgWarning
from wavg_jax.storage.schema import Row, lost, lost_at_the_end


def warn(number: int, weights: Any, alive: np.ndarray, told: np.ndarray) -> None:
    """Warns of a lost round, or of replicas that died in it and have not been mentioned yet.

    Args:
      number: of the round.
      weights: [K], of the blend.
      alive: bool [K].
      told: bool [K], the replicas already mentioned.
    """
    died = np.flatnonzero(~alive & ~told).tolist()
    if lost(weights):
        text = f"round {number} was lost: {_cause(alive)}; the next one starts from the same parameters"
    elif len(died) == 1:
        text = f"replica {died[0]} is not finite in round {number} and has no weight; it restarts from the blend"
    elif died:
        which = ", ".join(map(str, died))
        text = f"replicas {which} are not finite in round {number} and have no weight; they restart from the blend"
    else:
        return
    warnings.warn(text, WavgWarning, stacklevel=2)


def warn_of_spike(number: int, found: Mapping[str, Any]) -> None:
    """Warns of a round that the guard rolled back; `found` is of `RoundLog.guard`."""
    if found["rolled_back"]:
        warnings.warn(
            f"round {number} was rolled back: its blend has a held-out loss of {found['loss']:.4g}, beyond "
            f"{found['bound']:.4g}; updates are multiplied by {found['rate']:.4g} from now on",
            WavgWarning,
            stacklevel=2,
        )


def _cause(alive: Any) -> str:
    return "the outer step is not finite, though the blend is" if any(alive) else "no replica is finite after its steps"


def explain(rows: Sequence[Row], workdir: pathlib.Path | None, *, outer: bool) -> str:
    """Says in one line why a run ended with lost rounds, and what to try.

    Args:
      rows: of the run.
      workdir: its folder, if it has one.
      outer: whether it has an outer optimizer, one of whose steps may be huge but finite, so that all replicas die in
        the round after.
    """
    row, count = rows[-1], lost_at_the_end(rows)
    good = row["round"] - count
    when = f"round {row['round']}" if count == 1 else f"rounds {good + 1} to {row['round']}"
    if any(row["alive"]):
        remedy = "lower the outer learning rate (outer=)"
    else:
        also = " or the outer one (outer=)" if outer else ""
        remedy = f"lower the inner learning rate (inner=){also}, or look for extreme inputs"
    before = f"those after round {good}" if good else "the initial ones"
    saved = "" if workdir is None else f", saved in {workdir}; resume=True would continue with the next round's data"
    return f"{row['run']!r} diverged in {when}: {_cause(row['alive'])}; {remedy}. The parameters are {before}{saved}"
