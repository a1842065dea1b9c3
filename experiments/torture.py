"""What a run loses when its processes are killed at random, again and again: nothing.

  python -m experiments.torture --kills=200
  python -m experiments.torture --kills=20 --forms=single,two_processes

Trains on digits with frequent checkpoints. SIGKILL falls at a random moment, while the run starts, compiles, trains,
writes a row, saves, resumes or writes its report; the run resumes, until it is done. Its final parameters, optimizer
states and rows must be those of a run that nobody disturbed, bit for bit. Sometimes the compiled programs are gone in
between, or one of them is cut short.

A kill has survived if the run it hit came to that end. Writes torture.json and torture.md with the figures to
--workdir, and keeps there what was lost. Ends with 1 if anything was.
"""

import collections
import contextlib
import json
import pathlib
import random
import shutil
import sys
import time
from collections.abc import Sequence

from absl import flags

from experiments.setup import app, arms, captions, lives, shared_flags
from experiments.setup.lives import End, Form, Outcome
from experiments.setup.victim import PHASES
from wavg_jax.base import SettingsError
from wavg_jax.devices import machine
from wavg_jax.storage.rows import write_atomically
from wavg_jax.storage.schema import Row
from wavg_jax.training import progress

_RUN = (
    *("--dataset=digits", "--heldout=200", "--score_samples=64", "--model=mlp", "--hidden=16", "--inner=momentum"),
    *("--weighting=softmax_loss", "--lr_weighted=0.05", "--replicas=4", "--local_steps=4", "--batch_size=16"),
    *("--rounds=24", "--checkpoint_every=2", "--replica_map=vmap", "--devices=1"),
)
FORMS = {
    form.name: form
    for form in (
        Form("single", _RUN),
        Form("two_processes", (*_RUN, "--devices=2"), processes=2),
        Form("streamed", (*_RUN, "--feed=stream")),
        Form("varying_h", (*_RUN, "--schedule=linear", "--schedule_rounds=12")),
        Form("smoothed", (*_RUN, "--smoothing=lawa", "--lawa_window=3")),
        Form("delayed", (*_RUN, "--outer=nesterov", "--delayed", "--fragments=2")),
        Form("int8", (*_RUN, "--wire=int8")),
    )
}
"""Name -> what is run."""
_KILLS_OF_A_LIFE = 6

flags.DEFINE_integer("kills", 200, "Kills in all, over all forms.", lower_bound=1)
flags.DEFINE_float("minutes", None, "Begin no further run after so many minutes; by default none ends early.", 0)
flags.DEFINE_list("forms", list(FORMS), f"What to run: {', '.join(FORMS)}.")
flags.DEFINE_integer("kill_seed", 0, "Seed of when to kill.", lower_bound=0)
F = flags.FLAGS
READS = {"workdir"}
for _name in READS:
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Kills, and writes the figures."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    forms = [FORMS[name] for name in shared_flags.names("forms", FORMS)]
    if F.kills < len(forms):
        raise SettingsError(f"--kills={F.kills}: give at least {len(forms)}, one for each of --forms")
    workdir = arms.choose_workdir("torture")
    workdir.mkdir(parents=True, exist_ok=True)
    record = Record(forms)
    lives.prepare()
    expected: dict[str, End] = {}
    with progress.bar(F.kills) as advance:
        while record.left():
            form = min(forms, key=lambda form: record.tried(form.name))
            if form.name not in expected:
                progress.doing(f"{form.name}: undisturbed")
                expected[form.name] = lives.reference(form, workdir / "scratch" / form.name)
            number = record.lives[form.name]
            draw = random.Random(f"{F.kill_seed} {form.name} {number}")
            kills = lives.plan(form, min(_KILLS_OF_A_LIFE, record.left()), draw)
            folder = workdir / "scratch" / f"{form.name}-{number}"
            shutil.copytree(workdir / "scratch" / form.name / "cache", folder / "cache")
            for step in lives.live(form, expected[form.name], folder, kills, draw):
                if isinstance(step, Outcome):
                    record.add(form, step)
                else:
                    advance(f"{form.name}: killed {step}, {record.count_lost()} lost")
            record.write(workdir)
    for name in expected:
        shutil.rmtree(workdir / "scratch" / name)
    with contextlib.suppress(OSError):  # what was lost stays there
        (workdir / "scratch").rmdir()
    app.console().print((workdir / "torture.md").read_text())
    if record.count_lost():
        print(f"error: {record.count_lost()} of {record.tried()} kills lost something", file=sys.stderr)
        raise SystemExit(1)


class Record:
    """Which kills fell where, and what survived."""

    def __init__(self, forms: Sequence[Form]):
        self._begun = time.monotonic()
        self._tried: dict[str, collections.Counter[str]] = {form.name: collections.Counter() for form in forms}
        self._survived: dict[str, collections.Counter[str]] = {form.name: collections.Counter() for form in forms}
        self.lives = collections.Counter[str]()
        self._lost: list[str] = []

    def add(self, form: Form, outcome: Outcome) -> None:
        """Adds a life; if it lost something, none of its kills has survived."""
        self.lives[form.name] += 1
        self._tried[form.name].update(outcome.phases)
        if outcome.lost is None:
            self._survived[form.name].update(outcome.phases)
        else:
            self._lost.append(f"{form.name}: {outcome.lost}")

    def tried(self, form: str | None = None) -> int:
        """The kills so far, of one form or all."""
        return sum(counts.total() for name, counts in self._tried.items() if form in (None, name))

    def left(self) -> int:
        """The kills to come; none once --minutes are over."""
        over = F.minutes is not None and time.monotonic() > self._begun + 60 * F.minutes
        return 0 if over else max(F.kills - self.tried(), 0)

    def count_lost(self) -> int:
        """The kills that did not survive, and a life that failed without any."""
        return max(self.tried() - sum(counts.total() for counts in self._survived.values()), len(self._lost))

    def write(self, folder: pathlib.Path) -> None:
        """Writes the figures."""
        figures = self._figures()
        write_atomically(folder / "torture.json", (json.dumps(figures, indent=1) + "\n").encode())
        write_atomically(folder / "torture.md", _markdown(figures).encode())

    def _figures(self) -> Row:
        forms = {
            name: {
                "lives": self.lives[name],
                "phases": {phase: [self._survived[name][phase], tried[phase]] for phase in PHASES},
                "all": [self._survived[name].total(), tried.total()],
            }
            for name, tried in self._tried.items()
        }
        return {
            "command": captions.command_line(),
            "hardware": machine.hardware(),
            "versions": machine.versions(),
            "seconds": time.monotonic() - self._begun,
            "survived": sum(counts.total() for counts in self._survived.values()),
            "tried": self.tried(),
            "forms": forms,
            "lost": self._lost,
        }


def _markdown(figures: Row) -> str:
    hardware = figures["hardware"]
    lines = [
        "# Runs killed at random and resumed",
        "",
        f"    {figures['command']}",
        "",
        f"{hardware['processor']}, {hardware['isa']}, {hardware['cores']} cores; {figures['seconds'] / 60:.0f} min.",
        "",
        f"{figures['survived']:,} of {figures['tried']:,} kills survived: the run that was killed and resumed ended in "
        "the state of an undisturbed one, bit for bit, with the same rows.",
        "",
        "Survived / tried, by where the kill fell:",
        "",
        f"| | {' | '.join(PHASES)} | all | runs |",
        f"|---|{'--:|' * (len(PHASES) + 2)}",
    ]
    for name, found in figures["forms"].items():
        cells = [_share(found["phases"][phase]) for phase in PHASES]
        lines.append(f"| {name} | {' | '.join(cells)} | {_share(found['all'])} | {found['lives']} |")
    lines += ["", *(f"- lost: {line}" for line in figures["lost"])]
    return "\n".join(lines).rstrip() + "\n"


def _share(pair: list[int]) -> str:
    return f"{pair[0]} / {pair[1]}" if pair[1] else ""


if __name__ == "__main__":
    app.run(main)
