"""One run, killed again and again until it is done, beside the same run undisturbed."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

from experiments.setup import victim
from experiments.setup.processes import free_port, share
from experiments.setup.victim import PHASES, STARTING, Marks, Orders
from wavg_jax.base import DataError, WavgError
from wavg_jax.devices.processes import EXIT_CODE
from wavg_jax.storage.rows import read_rows
from wavg_jax.storage.schema import FILE, Row

_CLOCKS = ("seconds", "elapsed", "compile_seconds", "started", "memory", "peak_memory")
"""Entries of rows that tell the time, or the memory that a process happened to hold."""
_PATIENCE = 900.0
"""Seconds after which a process that has not ended hangs; on a busy machine others take long to start."""
_POLL = 0.002
_SOON = 3
"""A kill waits for at most so many entries into its phase, so that a run survives many kills."""
_REPEATED = ("writing rows", "saving", "sealing", "tidying")
"""Phases that a process enters many times."""
_COLD, _TORN = 0.1, 0.2
"""How often an attempt finds no compiled programs, and how often one of them cut short."""
_CONTEXT = multiprocessing.get_context("forkserver")


class Lost(Exception):
    """Something did not survive a kill."""


class Form(NamedTuple):
    """A kind of run.

    Attributes:
      name: of the form.
      flags: of `experiments.train`.
      processes: how many processes train it.
    """

    name: str
    flags: tuple[str, ...]
    processes: int = 1


class Kill(NamedTuple):
    """When to kill.

    Attributes:
      phase: the phase to be hit.
      entry: how often it is entered before; 1 for the first time.
      share: of the phase's time that passes before the kill.
      victims: which of the processes.
    """

    phase: str
    entry: int
    share: float
    victims: tuple[int, ...]


class End(NamedTuple):
    """What an undisturbed run came to.

    Attributes:
      digests: of each process's part of the final state.
      rows: without times.
      seconds: phase -> how long it takes.
    """

    digests: list[dict[str, str]]
    rows: list[Row]
    seconds: dict[str, float]


def prepare() -> None:
    """Names what the server of the forks imports; it starts with the first process."""
    _CONTEXT.set_forkserver_preload([victim.__name__])


class Life:
    """A run in a folder of its own, from its first process to its end."""

    def __init__(self, form: Form, folder: pathlib.Path):
        self._form, self._folder = form, folder
        self._run, self.cache = folder / "run", folder / "cache"
        folder.mkdir(parents=True, exist_ok=True)

    def _orders(self) -> list[Orders]:
        own, variables = [*self._form.flags, f"--workdir={self._run}", f"--compilation_cache={self.cache}"], {}
        count = self._form.processes
        variables = share(count)
        if count > 1:
            own += [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        orders = []
        for index in range(count):
            mine = [*own, f"--process_id={index}"] if count > 1 else own
            orders.append(Orders([*mine, "--resume"], self._folder, index, variables))
            for path in (orders[-1].marks, orders[-1].digest):
                path.unlink(missing_ok=True)
        return orders

    @contextlib.contextmanager
    def _started(self) -> Iterator[tuple[list[ForkServerProcess], list[Marks]]]:
        orders = self._orders()
        marks = [Marks(order.marks) for order in orders]
        running = [_CONTEXT.Process(target=victim.run, args=(order,), daemon=True) for order in orders]
        try:
            for process in running:
                process.start()
            yield running, marks
        finally:
            for process in running:
                process.kill()
                process.join()

    def finish(self) -> End:
        """Lets the run come to its end.

        Raises:
          Lost: it does not, or leaves no whole report.
        """
        begun, starting = time.monotonic(), 0.0
        with self._started() as (running, marks):
            while any(process.is_alive() for process in running):
                if not starting and marks[0].entered(PHASES[1]):
                    starting = time.monotonic() - begun
                if time.monotonic() > begun + _PATIENCE:
                    raise Lost(f"did not end within {_PATIENCE:g} s")
                time.sleep(_POLL)
            codes = [process.exitcode for process in running]
            if any(codes):
                raise Lost(f"ended with {codes}: {self._said()}")
            digests = [json.loads(order.digest.read_text()) for order in self._listed()]
            self.check(reported=True)
            return End(digests, self.rows(), marks[0].seconds() | {STARTING: starting})

    def _listed(self) -> list[Orders]:
        return [Orders((), self._folder, index, {}) for index in range(self._form.processes)]

    def _said(self) -> str:
        """The last line of each process."""
        texts = [order.log.read_text(errors="replace") for order in self._listed()]
        return "; ".join((text.strip().splitlines() or [""])[-1] for text in texts)

    def rows(self) -> list[Row]:
        """The recorded rows, without times, and without a last one that a kill cut short."""
        path = self._run / FILE
        rows = read_rows(path) if path.exists() and b"\n" in path.read_bytes() else []
        return [{key: value for key, value in row.items() if key not in _CLOCKS} for row in rows]

    def check(self, *, reported: bool = False) -> None:
        """Looks for files that are not whole.

        Raises:
          Lost: there is one.
        """
        for name, ending in (("report.md", b"\n"), ("report.html", b"</html>")):
            path = self._run / name
            if reported and not path.exists():
                raise Lost(f"there is no {name}")
            if path.exists() and not path.read_bytes().rstrip(b" ").endswith((ending, ending + b"\n")):
                raise Lost(f"{name} is not whole")
        for path in (self._run / "plots").glob("[!.]*.png"):
            if not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
                raise Lost(f"{path.name} is not whole")

    def die(self, kill: Kill, seconds: dict[str, float]) -> str | None:
        """Starts the run, or resumes it, and kills it.

        Args:
          kill: when.
          seconds: that each phase takes; put right by what is seen.

        Returns:
          The phase in which the kill fell; None if the run came to its end before.

        Raises:
          Lost: a process ended by itself with an error, or survives the others.
        """
        with self._started() as (running, marks):
            end = time.monotonic() + _PATIENCE
            while marks[0].entered(kill.phase) < kill.entry and all(process.is_alive() for process in running):
                if time.monotonic() > end:
                    raise Lost(f"hung before it was killed: {self._said()}")
                time.sleep(_POLL)
            time.sleep(kill.share * seconds.get(kill.phase, 0.0))
            for index in kill.victims:
                running[index].kill()
            for index in kill.victims:
                running[index].join()
            phase = marks[0].now()
            seconds.update(marks[0].seconds())
            for process in running:
                process.join(_PATIENCE)
            codes = [process.exitcode for process in running]
            if None in codes:
                raise Lost(f"a process survives the others, which ended with {codes}")
            allowed = {0, -9} if len(kill.victims) == len(running) else {0, -9, EXIT_CODE}
            if set(codes) - allowed:
                raise Lost(f"ended with {codes}: {self._said()}")
            self.check()
            return phase if -9 in codes else None

    def tear(self, draw: random.Random) -> None:
        """Sometimes removes the compiled programs, and sometimes cuts one short."""
        chance = draw.random()
        kept = sorted(self.cache.glob("*-cache"))
        if chance < _COLD:
            shutil.rmtree(self.cache, ignore_errors=True)
        elif chance < _COLD + _TORN and kept:
            path = draw.choice(kept)
            os.truncate(path, draw.randrange(path.stat().st_size))


def reference(form: Form, folder: pathlib.Path) -> End:
    """Runs a form undisturbed, and leaves its compiled programs in the folder.

    Raises:
      WavgError: it fails.
    """
    life = Life(form, folder)
    try:
        return life.finish()
    except Lost as lost:
        raise WavgError(f"the run {form.name!r} fails undisturbed: {lost}") from lost


def compare(expected: End, found: End) -> None:
    """Raises Lost unless two runs ended in the same state, bit for bit, with the same rows."""
    for index, (then, now) in enumerate(zip(expected.digests, found.digests, strict=True)):
        if wrong := sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
            raise Lost(f"the state of process {index} differs in {', '.join(wrong)}")
    same_rows(expected.rows, found.rows)
    if len(expected.rows) != len(found.rows):
        raise Lost(f"{len(found.rows)} rows instead of {len(expected.rows)}")


def same_rows(expected: Sequence[Row], found: Sequence[Row]) -> None:
    """Raises Lost unless the rows, as far as they go, are the expected ones."""
    for number, (then, now) in enumerate(zip(expected, found, strict=False)):
        if wrong := sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
            raise Lost(f"row {number} differs in {', '.join(wrong)}")


def plan(form: Form, kills: int, draw: random.Random) -> list[Kill]:
    """The kills of a life, of every phase about as many; those while it reports come last, since it is done then."""

    def make(phase: str) -> Kill:
        everybody = tuple(range(form.processes))
        alone = [(index,) for index in everybody] if form.processes > 1 else []
        entry = draw.randint(1, _SOON) if phase in _REPEATED else 1
        return Kill(phase, entry, draw.random(), draw.choice([*alone, everybody]))

    *early, last = PHASES
    most = round(kills / len(PHASES)) or 1
    return [make(draw.choice(early)) for _ in range(kills - most)] + [make(last) for _ in range(most)]


class Outcome(NamedTuple):
    """What became of a life.

    Attributes:
      phases: in which its kills fell.
      lost: what did not survive; None if everything did.
    """

    phases: list[str]
    lost: str | None


def live(form: Form, expected: End, folder: pathlib.Path, kills: Sequence[Kill], draw: random.Random) -> Iterator[Any]:
    """Kills a run again and again, and lets it end. Yields the phase of every kill, and last the `Outcome`.

    The folder is kept if something was lost.
    """
    life, phases = Life(form, folder), list[str]()
    try:
        for kill in kills:
            phase = life.die(kill, expected.seconds)
            if phase is None:
                break
            phases.append(phase)
            yield phase
            same_rows(expected.rows, life.rows())
            life.tear(draw)
        compare(expected, life.finish())
    except (Lost, DataError) as lost:
        yield Outcome(phases, f"{lost} (in {folder})")
        return
    shutil.rmtree(folder)
    yield Outcome(phases, None)
