"""Cases drawn at random, what became of each, and the record of all: `--fuzz=N` and `--fuzz_record=FOLDER`.

A case runs, or is refused by one error of the library with one line. Anything else is a defect: another error, no end
within `LIMIT`, or a change that nobody is told of, which is whatever a test asserts of a case that ran.
"""

import collections
import contextlib
import json
import pathlib
import re
import shlex
import signal
import sys
import time
import traceback

from hypothesis import HealthCheck, Phase, given, settings

from wavg_jax.base import WavgError
from wavg_jax.devices import machine

LONGEST = 1500
"""Characters of a line that says what is wrong."""
LIMIT = 60
"""Seconds after which a case hangs; on a busy machine a compilation takes long."""
OUTCOMES = ("ran", "refused", "tracebacks", "hangs", "silent changes")


class Hang(BaseException):
    """A case has not come to an end."""


class Cases:
    """The cases of a kind.

    Attributes:
      kind: what the cases are.
      tries: how many are to be drawn.
      counts: {outcome: cases}.
      defects: {its last line: a defect in words}.
    """

    def __init__(self, kind, tries):
        self.kind, self.tries = kind, tries
        self.counts, self.defects = collections.Counter(), dict[str, str]()

    @contextlib.contextmanager
    def case(self, shown):
        """A case; `shown` is what its defect is to be found by."""
        try:
            with limited(LIMIT):
                yield
            self.counts["ran"] += 1
        except WavgError as error:
            self.refused(str(error), shown)
        except Hang:
            self.defect("hangs", shown, f"no end within {LIMIT} s")
        except AssertionError as error:
            self.defect("silent changes", shown, str(error))
        except Exception:
            self.defect("tracebacks", shown, traceback.format_exc(limit=-3))

    def refused(self, said, shown):
        """Counts a refusal, if it is one line."""
        if not said.strip() or "\n" in said or len(said) > LONGEST:
            self.defect("tracebacks", shown, f"not one line: {said[: 2 * LONGEST]}")
        else:
            self.counts["refused"] += 1

    def defect(self, outcome, shown, said):
        """Counts a defect and keeps its description; of those with the same last line the shortest."""
        self.counts[outcome] += 1
        shown = shown if isinstance(shown, str) else repr(shown)[:500]
        text, last = f"{outcome}: {shown}\n{said}", re.sub(r"\d+", "", said.strip().rpartition("\n")[2])[:80]
        self.defects[last] = min(self.defects.get(last, text), text, key=len)

    def draw(self, strategy, body, *, counted=True):
        """Calls a function with values of a strategy of hypothesis: each is a case, unless it counts them itself."""

        @settings(
            max_examples=self.tries,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def each(value):
            with self.case(value) if counted else contextlib.nullcontext():
                body(value)

        each()


@contextlib.contextmanager
def limited(seconds):
    """Raises Hang in the block after so many seconds."""

    def end(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def cases_of(kind, tries, record):
    """Yields the cases of a kind, records what became of them, and fails if one has a defect."""
    cases = Cases(kind, tries)
    try:
        yield cases
    finally:
        record("fuzz", [kind, {name: cases.counts[name] for name in OUTCOMES}])
    found = sum(cases.counts[name] for name in OUTCOMES[2:])
    shown = "\n".join(cases.defects.values())
    assert not found, f"{found} of {cases.counts.total()} cases have a defect:\n{shown}"


class Record:
    """Pytest's plugin that writes how many cases of each kind there were, and what became of them."""

    def __init__(self, folder):
        self._folder, self._begun = pathlib.Path(folder), time.monotonic()
        self._kinds = collections.defaultdict(collections.Counter)

    def pytest_runtest_logreport(self, report):
        """Adds up a test's cases; a report of a later phase repeats those before."""
        if report.when == "teardown":
            for kind, counts in (value for name, value in report.user_properties if name == "fuzz"):
                self._kinds[kind].update(counts)

    def pytest_sessionfinish(self):
        """Writes fuzz.json and fuzz.md; a kind that was drawn before gives way, the others stay."""
        path, seconds = self._folder / "fuzz.json", time.monotonic() - self._begun
        before = json.loads(path.read_text()) if path.exists() else {"kinds": {}, "commands": {}}
        counts = {kind: {name: found[name] for name in OUTCOMES} for kind, found in self._kinds.items()}
        command = " ".join(["python -m pytest", *map(shlex.quote, sys.argv[1:])])
        figures = {
            "commands": before["commands"] | {command: round(seconds)},
            "hardware": machine.hardware(),
            "versions": machine.versions(),
            "kinds": dict(sorted((before["kinds"] | counts).items())),
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
        (self._folder / "fuzz.md").write_text(markdown(figures))


def markdown(figures):
    """The figures as a page."""
    kinds, hardware = figures["kinds"], figures["hardware"]
    total = {name: sum(counts[name] for counts in kinds.values()) for name in OUTCOMES}
    minutes = sum(figures["commands"].values()) / 60
    lines = [
        "# Cases drawn at random",
        "",
        *(f"    {command}" for command in figures["commands"]),
        "",
        f"{hardware['processor']}, {hardware['isa']}, {hardware['cores']} cores; {minutes:.0f} min.",
        "",
        f"{sum(total.values()):,} cases: {total['ran']:,} ran, {total['refused']:,} were refused by one error of the "
        "library with one line.",
        "",
        f"| | cases | {' | '.join(OUTCOMES)} |",
        f"|---|{'--:|' * (1 + len(OUTCOMES))}",
    ]
    for kind, counts in (*kinds.items(), ("all", total)):
        cells = [f"{n:,}" for n in (sum(counts.values()), *counts.values())]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
