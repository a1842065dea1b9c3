"""The loop over rounds: launches them one after another, and writes their rows and checkpoints.

A round is launched before the row of the round before it is written, and its batches are made while that one runs, so
that the devices do not wait for the host. Where the host needs the state between two rounds, to evaluate or to save it,
or where H varies and so may depend on the last loss, the next round waits.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from wavg_jax.base import Stopped, TrainState
from wavg_jax.rounds.round import RoundLog
from wavg_jax.storage.journal import Journal
from wavg_jax.storage.rows import PATIENCE, Row, lost, lost_at_the_end
from wavg_jax.training import liveness, progress
from wavg_jax.training.batches import open_feeder
from wavg_jax.training.run import Run
from wavg_jax.training.schedule import Past


class _Launched(NamedTuple):
    """A round that is on its way: its number, its H, what it will report, and when it was begun."""

    number: int
    steps: int
    log: RoundLog
    begun: float


class _Books:
    """Writes the rows of rounds, and keeps their clock: a round lasts from when it was begun, or from the end of the
    one before where that is later, until its results are there."""

    def __init__(self, run: Run, journal: Journal, on_round: Callable[[Row], None], done: int):
        self._run, self._journal, self._on_round = run, journal, on_round
        last = journal.rows()[-1] if done else {}
        self._elapsed, self._samples, self._ended = last.get("elapsed", 0.0), last.get("samples", 0), 0.0
        self._died = np.zeros(run.replicas, bool)
        self.lost = lost_at_the_end(journal.rows())
        """How many rounds in a row, up to the last one closed, have left the parameters as they were."""

    def past(self, number: int, steps: int) -> Past:
        """What a schedule of H may look at before the round of this number, after so many local steps."""
        rows = self._journal.rows()[1:] if self._run.plan.schedule.varies else []
        losses = tuple(float("nan") if row["train_loss"] is None else row["train_loss"] for row in rows)
        return Past(number - 1, steps, losses)

    def close(self, launched: _Launched, state: TrainState | None) -> None:
        """Waits for a round and writes its row; the state after it is needed if the round is evaluated."""
        jax.block_until_ready(launched.log)
        now = time.perf_counter()
        seconds = now - max(launched.begun, self._ended)
        self._ended = now
        self._elapsed += seconds
        log = jax.device_get(launched.log)
        self.lost = self.lost + 1 if lost(log.weights) else 0
        ends = self.lost >= PATIENCE or (self.lost and launched.number == self._run.plan.rounds)
        if not ends:  # else it is an error
            liveness.warn(launched.number, log.weights, log.alive, self._died)
            self._died |= ~log.alive & (not self.lost)
        self._samples += int(log.steps.sum()) * self._run.plan.batch_size
        row = _round_row(self._run, launched, log, state)
        self._journal.append(row | {"samples": self._samples, "seconds": seconds, "elapsed": self._elapsed})
        self._on_round(self._journal.rows()[-1])


def train(
    run: Run,
    journal: Journal,
    state: TrainState,
    on_round: Callable[[Row], None],
    stopped: Callable[[], bool],
) -> TrainState:
    """Runs the rounds that are left, but none after `PATIENCE` lost ones, and returns the last state."""
    plan = run.plan
    done = int(state.round)
    books = _Books(run, journal, on_round, done)
    given = sum(row["local_steps"] for row in journal.rows()[1:])
    pending: _Launched | None = None
    progress.doing(f"{run.name}: round {done + 1}")
    with open_feeder(run.work) as feeder:
        for number in range(done + 1, plan.rounds + 1):
            steps = plan.schedule.steps(books.past(number, given))
            journal.wait()  # a checkpoint that is still being written would be on the clock of this round
            begun = time.perf_counter()
            state, log = run.step.call(state, feeder.take(given, steps), run.shared)
            given += steps
            if number < plan.rounds and not plan.schedule.varies:
                feeder.prepare(given, steps)
            if pending is not None:
                books.close(pending, None)
            pending = _Launched(number, steps, log, begun)
            due = number % plan.checkpoint_every == 0 or number == plan.rounds
            if due or books.lost or plan.schedule.varies or run.evaluates(number) or stopped():
                books.close(pending, state)
                pending = None
            # Asked once more and then kept: a request that comes later must find the next round's checkpoint. After
            # the last round there is nothing to go on with.
            stop = pending is None and number < plan.rounds and stopped()
            over = books.lost >= PATIENCE
            if due or stop or over:
                journal.save(state)
            if over:
                break
            if stop:
                journal.wait()
                raise Stopped(
                    f"stopped after round {number} of {run.name!r}, with a checkpoint; go on with the same settings, "
                    f"the same --workdir ({journal.workdir}) and --resume"
                )
    return state


def _round_row(run: Run, launched: _Launched, log: RoundLog, state: TrainState | None) -> Row:
    """A round's row, but for the clocks and the samples so far."""
    living = log.train_loss[log.alive]
    due = run.evaluates(launched.number) or lost(log.weights)
    quality = run.evaluate(state) if state is not None and due else None
    row = {
        "kind": "round",
        "round": launched.number,
        "local_steps": launched.steps,
        "train_loss": float(living.mean()) if len(living) else float("nan"),
        **{f"test_{name}": getattr(quality, name, None) for name in ("accuracy", "loss", "macro_f1", "ece")},
        "weights": log.weights,
        "effective_replicas": float(log.effective_replicas),
        "alive": log.alive,
        "scores": log.scores,
    }
    if quality is not None and launched.number == run.plan.rounds:
        row["confusion"] = quality.confusion
    return row
