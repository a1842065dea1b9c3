"""What a run loses when its processes are killed and stopped at random: elastic, and steady for comparison.

  python -m experiments.chaos --flagfile=experiments/presets/fashion_chaos.flags --data_dir=DIR

Runs one arm in workers of this machine for --seconds, undisturbed, then again while every --kill_every seconds, on
average, a random worker gets SIGKILL, and every --stop_every another one SIGSTOP, for --stop_for seconds. Then the same
arm in two processes of the steady runtime, `jax.distributed`, one of which is killed after five rounds.

Writes the rows of each elastic run with their report to a folder of --workdir, and chaos.json and chaos.md with the
figures.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

import wavg_jax as wavg
from experiments.elastic import READS as ELASTIC
from experiments.elastic import check_arm, read_workers
from experiments.setup import app, arms, captions, problem, shared_flags
from experiments.setup.conditions import read_condition
from wavg_jax import elastic
from wavg_jax.base import SettingsError, WavgWarning
from wavg_jax.devices import machine
from wavg_jax.storage.rows import write_atomically
from wavg_jax.storage.schema import Row

flags.DEFINE_float("seconds", 300.0, "How long each elastic run trains.", lower_bound=1)
flags.DEFINE_float("kill_every", 5.0, "Mean seconds between two kills.", lower_bound=0.1)
flags.DEFINE_float("stop_every", 15.0, "Mean seconds between two stops.", lower_bound=0.1)
flags.DEFINE_float("stop_for", 5.0, "Seconds that a worker stays stopped.", lower_bound=0.1)
flags.DEFINE_bool("steady", True, "Whether to try the steady runtime too.")
F = flags.FLAGS
READS = ELASTIC - {"resume", "rounds"}
for _name in [*READS, "arm", "seed", "workers", "deadline", "min_replicas", "count_late", "audit", "fill", "patience"]:
    flags.declare_key_flag(_name)


@dataclasses.dataclass(frozen=True)
class Pids:
    """A hook that leaves a worker's process id in a folder whenever the worker starts."""

    folder: str

    def __call__(self, point: str, worker: int, round: int, reply: Any) -> Any:
        if point == "hold":
            new = pathlib.Path(self.folder, f".{worker}")
            new.write_text(str(os.getpid()))
            new.replace(new.with_name(str(worker)))  # whole, whoever reads it meanwhile
        return reply


class Chaos:
    """Two threads, of which one kills workers at random and one stops them."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self._folder, self._seed = folder, seed
        self._over = threading.Event()
        self.kills, self.stops = 0, 0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Disturbs until the block ends, and lets everybody go on."""
        threads = [
            threading.Thread(target=self._repeat, args=(F.kill_every, self._kill)),
            threading.Thread(target=self._repeat, args=(F.stop_every, self._stop)),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _repeat(self, every: float, act: Callable[[int], None]) -> None:
        draw = random.Random(f"{self._seed} {act.__name__}")
        while not self._over.wait(draw.expovariate(1 / every)):
            pids = [int(path.read_text()) for path in self._folder.glob("[0-9]*")]
            if pids:
                act(draw.choice(sorted(pids)))

    def _kill(self, pid: int) -> None:
        self.kills += _signalled(pid, signal.SIGKILL)

    def _stop(self, pid: int) -> None:
        stopped = _signalled(pid, signal.SIGSTOP)
        self.stops += stopped
        self._over.wait(F.stop_for)
        if stopped:
            _signalled(pid, signal.SIGCONT)


def _signalled(pid: int, number: signal.Signals) -> bool:
    """Sends a signal; False if the process is gone, or is no worker."""
    try:
        if not pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            return False
        os.kill(pid, number)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


def main(argv: Sequence[str]) -> None:
    """Runs both, and writes the figures."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    check_arm()
    if F.address is not None:
        raise SettingsError("--address: chaos kills processes of this machine alone; leave it out")
    warnings.filterwarnings("ignore", category=WavgWarning)  # somebody is missing all the time
    workdir = arms.choose_workdir("chaos")
    (workdir / "pids").mkdir(parents=True, exist_ok=True)
    F["rounds"].value = _ENDLESS
    calm = _elastic(workdir, "undisturbed", None)
    chaos = Chaos(workdir / "pids", F.seed)
    wild = _elastic(workdir, "disturbed", chaos)
    figures = {
        "command": captions.command_line(),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "undisturbed": _figures(calm.rows),
        "disturbed": _figures(wild.rows, calm.rows) | {"kills": chaos.kills, "stops": chaos.stops},
        "steady": None,
    }
    _write(workdir, figures)  # ten minutes' work is there whatever follows
    if F.steady:
        _write(workdir, figures | {"steady": _steady(workdir)})
    for path in (workdir / "pids").iterdir():
        path.unlink()
    (workdir / "pids").rmdir()
    app.console().print((workdir / "chaos.md").read_text())


def _write(workdir: pathlib.Path, figures: Row) -> None:
    write_atomically(workdir / "chaos.json", (json.dumps(figures, indent=1) + "\n").encode())
    write_atomically(workdir / "chaos.md", _markdown(figures).encode())


_ENDLESS = 10**6
"""More rounds than --seconds have room for."""


def _elastic(workdir: pathlib.Path, name: str, chaos: Chaos | None) -> wavg.Result:
    """One elastic run of --seconds."""
    condition = read_condition()
    dataset = problem.load(texts=True)
    task = problem.make_task(dataset)
    (arm,) = arms.make_arms((F.arm,), condition)
    sharded = problem.make_data(dataset, F.seed, condition.noisy)
    workers = read_workers()._replace(hook=Pids(str(workdir / "pids")))
    with app.reported(workdir / name), contextlib.ExitStack() as stack:

        def on_round(row: Row) -> bool:
            if row["round"] == 1 and chaos is not None:
                stack.enter_context(chaos.at_work())
            return row["elapsed"] >= F.seconds

        fit = functools.partial(elastic.fit, workers=workers)
        given = arm, task, sharded, condition, F.seed, False
        return arms.run_arm(*given, workdir=workdir / name, views=[on_round], fit=fit)


def _figures(rows: Sequence[Row], calm: Sequence[Row] = ()) -> Row:
    """What a run came to; beside `calm`, those of the undisturbed run, also what it lost."""
    rounds = [row for row in rows if row["kind"] == "round"]
    last, replicas = rounds[-1], len(rounds[-1]["alive"])
    accuracy = [row["test_accuracy"] for row in rounds if row["test_accuracy"] is not None]
    found = {
        "rounds": len(rounds),
        "rounds_lost": sum(not any(row["weights"]) for row in rounds),
        "numbered_once": [row["round"] for row in rounds] == list(range(1, len(rounds) + 1)),
        "seconds": last["elapsed"],
        "test_accuracy": accuracy[-1],
        "replica_rounds_missing": sum(len(row["missing"]) for row in rounds) / (replicas * len(rounds)),
        "samples": last["samples"],
    }
    if calm:
        others = [row for row in calm if row["kind"] == "round"]
        same = min(len(rounds), len(others)) - 1
        found["undisturbed_accuracy_at_that_round"] = others[same]["test_accuracy"]
        rate = others[-1]["samples"] / others[-1]["elapsed"]
        found["share_of_rounds_lost"] = 1 - (len(rounds) / last["elapsed"]) / (len(others) / others[-1]["elapsed"])
        found["share_of_samples_lost"] = 1 - last["samples"] / last["elapsed"] / rate
    return found


def _steady(workdir: pathlib.Path) -> Row:
    """Two processes of `jax.distributed` train; one is killed once both are at it."""
    folder = workdir / "steady"
    own = [f"--{name}={F[name].value}" for name in ("dataset", "data_dir", "replicas", "local_steps", "arm")]
    command = [sys.executable, "-m", "experiments.launch", "--processes=2", "--", "-m", "experiments.train", *own]
    started = subprocess.Popen(
        [*command, f"--rounds={_ENDLESS}", f"--workdir={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    rows = folder / "rows.jsonl"
    while started.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") > 5):
        time.sleep(0.1)
    children = pathlib.Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    begun = time.perf_counter()
    try:
        _, told = started.communicate(timeout=300)
    finally:
        started.kill()
    return {
        "exit_code": started.returncode,
        "seconds_until_it_ended": time.perf_counter() - begun,
        "last_line": told.decode().strip().splitlines()[-1],
        "rounds": rows.read_bytes().count(b"\n") - 1,
    }


def _markdown(figures: Row) -> str:
    calm, wild = figures["undisturbed"], figures["disturbed"]
    hardware = figures["hardware"]
    lines = [
        "# Workers killed and stopped at random",
        "",
        f"    {figures['command']}",
        "",
        f"{hardware['processor']}, {hardware['isa']}, {hardware['cores']} cores.",
        "",
        f"In the disturbed run {wild['kills']} kills and {wild['stops']} stops.",
        "",
        "| | undisturbed | disturbed |",
        "|---|--:|--:|",
        f"| rounds completed | {calm['rounds']} | {wild['rounds']} |",
        f"| rounds lost | {calm['rounds_lost']} | {wild['rounds_lost']} |",
        f"| every round there once | {_yes(calm)} | {_yes(wild)} |",
        f"| replicas missing, of all rounds' | {_percent(calm, 'replica_rounds_missing')} | "
        f"{_percent(wild, 'replica_rounds_missing')} |",
        f"| test accuracy at the end | {_percent(calm, 'test_accuracy')} | {_percent(wild, 'test_accuracy')} |",
        f"| of the undisturbed run at that round | | {_percent(wild, 'undisturbed_accuracy_at_that_round')} |",
        f"| rounds a second lost | | {_percent(wild, 'share_of_rounds_lost')} |",
        f"| samples a second lost | | {_percent(wild, 'share_of_samples_lost')} |",
    ]
    if figures["steady"]:
        steady = figures["steady"]
        lines += [
            "",
            f"The steady runtime, 2 processes of `jax.distributed`, one killed after {steady['rounds']} rounds: all "
            f"ended after {steady['seconds_until_it_ended']:.1f} s with exit code {steady['exit_code']}: "
            f"`{steady['last_line']}`",
        ]
    return "\n".join(lines) + "\n"


def _yes(found: Row) -> str:
    return "yes" if found["numbered_once"] else "no"


def _percent(found: Row, name: str) -> str:
    return f"{100 * found[name]:.1f} %"


if __name__ == "__main__":
    app.run(main)
