"""What a run does about numbers that are not finite: it says so when a replica dies, and ends when none is left.

A replica that died restarts from the last blend with other data, so one death is survived, and told once. Where all
die, the parameters stay as they were and the next round would start from them again: the run ends at once, and it is
its user who decides whether other data (a resumed run goes on with those of the next round) or another rate may help.
"""

import pathlib
import warnings
from typing import Any

import numpy as np

from wavg_jax.base import WavgWarning
from wavg_jax.records import Row


def lost(weights: Any) -> bool:
    """Whether nothing came of a round, by its weights [K]: they are all 0."""
    return not np.any(weights)


def warn_of_the_dead(number: int, alive: np.ndarray, told: np.ndarray) -> None:
    """Warns of replicas that died in the round of this number, but for those already told of.

    Args:
      number: of the round.
      alive: bool [K].
      told: bool [K].
    """
    died = np.flatnonzero(~alive & ~told).tolist()
    if died:
        which = f"replica {died[0]} is" if len(died) == 1 else f"replicas {', '.join(map(str, died))} are"
        one = "it restarts" if len(died) == 1 else "they restart"
        warnings.warn(
            f"{which} not finite in round {number} and {'takes' if len(died) == 1 else 'take'} no part in it; {one} "
            "from the blend",
            WavgWarning,
            stacklevel=2,
        )


def explain(row: Row, workdir: pathlib.Path | None) -> str:
    """Says in one line why a run ended with a lost round, and what to try."""
    seen, remedy = (
        ("the outer step is not finite, though the blend is", "lower the outer learning rate (--outer_lr)")
        if any(row["alive"])
        else ("no replica is finite after its local steps", "lower the learning rate, or look for extreme inputs")
    )
    saved = f", and saved in {workdir}; --resume would go on with the next round's data" if workdir is not None else ""
    before = f"those after round {row['round'] - 1}" if row["round"] > 1 else "the initial ones"
    return f"{row['run']!r} diverged in round {row['round']}: {seen}; {remedy}. The parameters are {before}{saved}"
