"""The loop over rounds: launches them one after another, and writes their rows and checkpoints.

What a round leaves to be measured and saved, its evaluation and a copy of its state, is launched right behind it, and
the next round behind that. Then the host fetches and writes what the one before gave, and makes the batches of the one
after, so that the devices never wait for the host. A round waits for the row of the one before only for a callback,
which may end the run, where H depends on the last loss, or where no copy of the state fits the devices. Where there are
several processes each runs this loop, and whatever decides its course is the same in all.
"""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from wavg_jax.base import PyTree, TooFew, TrainState
from wavg_jax.devices import processes
from wavg_jax.rounds.round import RoundLog
from wavg_jax.storage.journal import Journal
from wavg_jax.storage.schema import PATIENCE, Row, lost, lost_at_the_end, quality_row, round_row
from wavg_jax.training import liveness, progress
from wavg_jax.training.batches import open_feeder
from wavg_jax.training.callbacks import Told, ends
from wavg_jax.training.run import Run
from wavg_jax.training.schedule import Past

Arrival = concurrent.futures.Future[float]
"""When results were there, on the clock of `time.perf_counter`."""
Watch = Callable[[PyTree], Arrival]


@contextlib.contextmanager
def open_watch() -> Iterator[Watch]:
    """Opens a thread that notes when results are there: the loop's own may be busy, or held up by the launch of another
    program, as on several CPU devices."""

    def arrive(results: PyTree) -> float:
        jax.block_until_ready(results)
        return time.perf_counter()

    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="watch") as pool:
        yield lambda results: pool.submit(arrive, results)


class _Launched(NamedTuple):
    """A round under way.

    Attributes:
      number, steps: which round, and its H.
      log: what it will report.
      heard: what it heard of wishes to stop.
      measured: its evaluation; None if it has none.
      kept: what to save of its state; None if nothing.
      begun: when it was launched.
      done, settled: when its log will be there, and its evaluation.
      entries: what else its row says.
    """

    number: int
    steps: int
    log: RoundLog
    heard: jax.Array | None
    measured: dict[str, jax.Array] | None
    kept: PyTree | None
    begun: float
    done: Arrival
    settled: Arrival
    entries: Row


def _launch(
    run: Run, journal: Journal, watch: Watch, number: int, steps: int, begun: float, state: TrainState, *rest: Any
) -> tuple[TrainState, _Launched]:
    """Launches a round, its evaluation and a copy of its state if they are due, one behind another."""
    try:
        state, log, heard = run.step.program.call(state, *rest)
    except TooFew:  # raised before the state is touched
        _keep(journal, run, state, number)
        raise
    done = watch(log)
    measured = run.evaluate(state) if run.evaluates(number) else None
    settled = watch(measured)
    kept = journal.snapshot(state, copy=run.copies) if run.saves(number) else None
    return state, _Launched(number, steps, log, heard, measured, kept, begun, done, settled, run.step.entries())


def _keep(journal: Journal, run: Run, state: TrainState, number: int) -> None:
    """Saves what the round before this one left, unless that is done, or it was read from a checkpoint."""
    if number > 1 + journal.resumed and not run.saves(number - 1):
        journal.save(journal.snapshot(state, copy=run.copies))
    journal.wait()


class _Books:
    """Writes the rows and checkpoints of rounds, and keeps their clock: a round lasts from its launch, or from the end
    of the round before and its evaluation if that is later, until its results are there."""

    def __init__(self, run: Run, journal: Journal, show: Callable[[Row], Any], done: int):
        self._run, self._journal, self._show = run, journal, show
        last = journal.rows()[-1] if done else {}
        self._elapsed, self._samples, self._ended = last.get("elapsed", 0.0), last.get("samples", 0), 0.0
        self._died = np.zeros(run.replicas, bool)
        self.lost = lost_at_the_end(journal.rows())
        """Rounds lost in a row, up to the last one closed."""
        self.heard = False
        """Whether a process wished to stop, as far as all processes know by the last round closed."""

    def past(self, number: int, steps: int) -> Past:
        """What a schedule of H may look at before round `number`, after `steps` local steps."""
        rows = self._journal.rows()[1:] if self._run.plan.schedule.varies else []
        losses = tuple(float("nan") if row["train_loss"] is None else row["train_loss"] for row in rows)
        return Past(number - 1, steps, losses)

    def close(self, launched: _Launched, state: TrainState | None) -> None:
        """Waits for a round, writes its row and starts its checkpoint; evaluating a lost one needs the state."""
        seconds = launched.done.result() - max(launched.begun, self._ended)
        self._ended = launched.settled.result()
        self._elapsed += seconds
        log = jax.device_get(launched.log)
        self.heard = launched.heard is not None and bool(launched.heard)
        self.lost = self.lost + 1 if lost(log.weights) else 0
        over = self.lost >= PATIENCE or (self.lost and launched.number == self._run.plan.rounds)
        if not over:  # else it is an error
            absent = np.isin(np.arange(len(log.alive)), [int(k) for k in launched.entries.get("missing", {})])
            liveness.warn(launched.number, log.weights, log.alive, self._died | absent)
            if log.guard and not self.lost:
                liveness.warn_of_spike(launched.number, log.guard)
            self._died |= ~log.alive & ~absent & (not self.lost)
        self._samples += int(log.steps.sum()) * self._run.plan.batch_size
        row = round_row(
            number=launched.number,
            local_steps=launched.steps,
            samples=self._samples,
            seconds=seconds,
            elapsed=self._elapsed,
            train_loss=log.train_loss,
            weights=log.weights,
            effective_replicas=log.effective_replicas,
            alive=log.alive,
            scores=log.scores,
            diagnosis=log.diagnosis,
            guard=log.guard,
        )
        own = {} if state is None or launched.number < self._run.plan.rounds else self._run.final(state)
        self._journal.append(own | row | launched.entries | self._quality(launched, state))
        if launched.kept is not None:
            self._journal.save(launched.kept)
        self._show(self._journal.last())

    def _quality(self, launched: _Launched, state: TrainState | None) -> Row:
        measured = launched.measured
        if measured is None and self.lost and state is not None:  # it may be the last
            measured = self._run.evaluate(state)
        last = launched.number == self._run.plan.rounds
        return quality_row(scalars=self._run.metrics, measured=jax.device_get(measured), last=last)

    def end_early(self, state: TrainState) -> None:
        """Marks the last round as the run's last, with everything that a last row holds."""
        last = quality_row(scalars=self._run.metrics, measured=jax.device_get(self._run.evaluate(state)), last=True)
        self._journal.amend({**self._run.final(state), **last, "stopped_early": True})


def train(
    run: Run,
    journal: Journal,
    state: TrainState,
    callbacks: Sequence[Told],
    show: Callable[[Row], Any],
    stopped: Callable[[], bool],
) -> tuple[TrainState, str | None]:
    """Runs the rounds that are left, until `PATIENCE` are lost in a row or a callback ends the run.

    Args:
      run: what to run.
      journal: where rows and checkpoints go.
      state: to start from.
      callbacks: of every round.
      show: called with every row, to show progress.
      stopped: whether SIGTERM or Ctrl-C has come.

    Returns:
      The last state, and, if the run was stopped before its last round, a line that says so.
    """
    plan = run.plan
    done = int(state.round)
    if done and journal.rows()[-1].get("stopped_early"):  # a run that a callback ended is complete
        return state, None
    books = _Books(run, journal, show, done)
    given = sum(row["local_steps"] for row in journal.rows()[1:])
    called = bool(processes.gather(bool(callbacks)).any())  # one process may have callbacks alone
    waits = plan.schedule.varies or called or run.step.waits
    pending: _Launched | None = None
    # Processes agree on the round to stop after, by what its program carried.
    stops = stopped if processes.count() == 1 else lambda: books.heard
    progress.doing(f"{run.name}: round {done + 1}")
    with open_feeder(run.work) as feeder, open_watch() as watch:
        for number in range(done + 1, plan.rounds + 1):
            steps = plan.schedule.steps(books.past(number, given))
            begun = time.perf_counter()
            work = feeder.take(given, steps)
            given += steps
            if number < plan.rounds and not plan.schedule.varies:
                feeder.prepare(given, steps)
            rest = work, run.shared, run.ask(stopped())
            state, launched = _launch(run, journal, watch, number, steps, begun, state, *rest)
            if pending is not None:
                books.close(pending, None)
            pending = launched
            crowded = run.saves(number) and not run.copies
            if books.lost or waits or crowded or number == plan.rounds or stops():
                books.close(pending, state)  # which saves before a callback, which may raise
                pending = None
            if crowded:
                journal.wait()
            early = called and bool(processes.gather(ends(callbacks, journal.last(), state)).any())
            # Asked once: a request that comes later must find the next round's checkpoint.
            stop = pending is None and number < plan.rounds and stops()
            over = books.lost >= PATIENCE
            if early and number < plan.rounds:
                books.end_early(state)
            if (stop or over or early) and not run.saves(number):
                journal.save(journal.snapshot(state, copy=run.copies))
            if over or early:
                break
            if stop:
                journal.wait()
                return state, (
                    f"stopped after round {number} of {run.name!r}, with a checkpoint; to resume, repeat the settings "
                    f"with workdir={str(journal.workdir)!r} and resume=True"
                )
    return state, None
