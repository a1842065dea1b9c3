"""What a run does about numbers that are not finite: it says so when a replica dies, and ends when none is left.

A replica that died restarts from the last blend with other data, so one death is survived, and told once. A round is
*lost* if all die, or if the outer step is not finite: the parameters stay as they were. One lost round is survived too,
since the next one has other data; a second in a row, or a lost last round, ends the run. That rule gives the same end
whether or not the next round was launched before the loss of this one was known.
"""

import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from wavg_jax.base import WavgWarning
from wavg_jax.storage.rows import Row, lost, lost_at_the_end


def warn(number: int, weights: Any, alive: np.ndarray, told: np.ndarray) -> None:
    """Warns of a lost round, or of replicas that died in it, but for those already told of.

    Args:
      number: of the round.
      weights: [K], of the blend.
      alive: bool [K].
      told: bool [K].
    """
    died = np.flatnonzero(~alive & ~told).tolist()
    if lost(weights):
        text = f"nothing came of round {number}: {_seen(alive)}; the next one starts from the same parameters"
    elif len(died) == 1:
        text = f"replica {died[0]} is not finite in round {number} and takes no part in it; it restarts from the blend"
    elif died:
        which = ", ".join(map(str, died))
        text = f"replicas {which} are not finite in round {number} and take no part in it; they restart from the blend"
    else:
        return
    warnings.warn(text, WavgWarning, stacklevel=2)


def _seen(alive: Any) -> str:
    return "the outer step is not finite, though the blend is" if any(alive) else "no replica is finite after its steps"


def explain(rows: Sequence[Row], workdir: pathlib.Path | None, *, outer: bool) -> str:
    """Says in one line why a run ended with lost rounds, and what to try.

    Args:
      rows: of the run.
      workdir: where it was saved.
      outer: whether it has an outer optimizer: a step of its that is huge, though finite, shows a round later, when all
        replicas die.
    """
    row, count = rows[-1], lost_at_the_end(rows)
    good = row["round"] - count
    when = f"round {row['round']}" if count == 1 else f"rounds {good + 1} to {row['round']}"
    if any(row["alive"]):
        remedy = "lower the outer learning rate (--outer_lr)"
    else:
        flag = f"lr_{rows[0]['arm']}"
        inner = f"inner learning rate{f' (--{flag})' if flag in rows[0]['settings'] else ''}"
        also = " or the outer one (--outer_lr)" if outer else ""
        remedy = f"lower the {inner}{also}, or look for extreme inputs"
    before = f"those after round {good}" if good else "the initial ones"
    saved = f", and saved in {workdir}; --resume would go on with the next round's data" if workdir is not None else ""
    return f"{row['run']!r} diverged in {when}: {_seen(row['alive'])}; {remedy}. The parameters are {before}{saved}"
