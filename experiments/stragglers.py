"""Time to an accuracy where one worker is slower than the others, by what a round does about it.

  python -m experiments.stragglers --flagfile=experiments/presets/fashion_stragglers.flags --data_dir=DIR

Trains one arm in workers of this machine, the last of which sleeps after every order until it has taken --slowdown
times as long as it computed, in five ways: waiting for all; dropping what is late (at --factor times the median);
counting it at a discount; letting slower workers take fewer local steps, as many as fit (fill); and, for comparison,
with no worker slowed down. Seeds and ways alternate.

Writes rows of all runs, stragglers.json and stragglers.md to --workdir.
"""

import contextlib
import dataclasses
import functools
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.elastic import READS as ELASTIC
from experiments.elastic import check_arm
from experiments.setup import app, arms, captions, problem, shared_flags
from experiments.setup.conditions import read_condition
from wavg_jax import elastic
from wavg_jax.base import WavgWarning
from wavg_jax.devices import machine
from wavg_jax.storage.rows import write_atomically
from wavg_jax.storage.schema import Row
from wavg_jax.training import progress

flags.DEFINE_float("slowdown", 4.0, "How many times slower the last worker is.", lower_bound=1)
flags.DEFINE_float("factor", 1.5, "Deadline of the ways that have one, in medians.", lower_bound=1)
F = flags.FLAGS
READS = (ELASTIC - {"resume"}) | {"seeds"}
for _name in [*READS, "arm", "workers"]:
    flags.declare_key_flag(_name)


@dataclasses.dataclass(frozen=True)
class Slow:
    """A hook that makes a worker slower, by sleeping."""

    worker: int
    factor: float

    def __call__(self, point: str, worker: int, round: int, reply: Any) -> Any:
        if point != "reply" or worker != self.worker:
            return reply
        time.sleep((self.factor - 1) * reply.seconds)
        return reply._replace(seconds=self.factor * reply.seconds)


def ways() -> dict[str, elastic.Workers]:
    """The ways to deal with a slow worker, by name."""
    slow = elastic.Workers(F.workers, deadline=elastic.wait_for_all, hook=Slow(F.workers - 1, F.slowdown))
    soon = elastic.quantile(0.5, F.factor)
    return {
        "wait for all": slow,
        "drop the late": slow._replace(deadline=soon),
        "count the late": slow._replace(deadline=soon, late=elastic.polynomial()),
        "as many steps as fit": slow._replace(fill=True),
        "nobody slow": slow._replace(hook=None),
    }


def main(argv: Sequence[str]) -> None:
    """Runs every way for every seed, and writes the figures."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    check_arm()
    warnings.filterwarnings("ignore", category=WavgWarning)  # somebody is missing all the time
    condition, seeds = read_condition(), shared_flags.read_seeds()
    workdir = arms.choose_workdir("stragglers")
    found: dict[str, list[Row]] = {name: [] for name in ways()}
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress.bar(F.rounds * len(seeds) * len(found)))
        dataset = problem.load(texts=True)
        task = problem.make_task(dataset)
        (arm,) = arms.make_arms((F.arm,), condition)
        for seed in seeds:
            sharded = problem.make_data(dataset, seed, condition.noisy)
            for name, workers in ways().items():
                fit = functools.partial(elastic.fit, workers=workers)
                run = f"{name.replace(' ', '-')}-seed{seed}"
                given = arm, task, sharded, condition, seed, advance
                result = arms.run_arm(*given, workdir=workdir, name=run, views=[_at_target], fit=fit)
                found[name].append(_figures(result.rows))
    head: Row = {"command": captions.command_line()}
    head |= {"hardware": machine.hardware(), "versions": machine.versions(), "seeds": list(seeds)}
    write_atomically(workdir / "stragglers.json", (json.dumps(head | {"ways": found}, indent=1) + "\n").encode())
    text = _markdown(head, found)
    write_atomically(workdir / "stragglers.md", text.encode())
    app.console().print(text)


def _at_target(row: Row) -> bool:
    """Whether a run is at its target; it then ends."""
    return (row["test_accuracy"] or 0.0) >= F.target_accuracy


def _figures(rows: Sequence[Row]) -> Row:
    rounds = [row for row in rows if row["kind"] == "round"]
    last = rounds[-1]
    return {
        "reached": _at_target(last),
        "seconds": last["elapsed"],
        "rounds": len(rounds),
        "samples": last["samples"],
        "missing": sum(len(row["missing"]) for row in rounds) / (len(rounds) * len(last["alive"])),
    }


def _markdown(head: Row, found: dict[str, list[Row]]) -> str:
    hardware = head["hardware"]
    lines = [
        f"# One of {F.workers} workers {F.slowdown:g} times slower: to {100 * F.target_accuracy:g} %",
        "",
        f"    {head['command']}",
        "",
        f"{hardware['processor']}, {hardware['isa']}, {hardware['cores']} cores; {len(head['seeds'])} seeds.",
        "",
        "| | reached | seconds, median (lowest to highest) | rounds | samples | replicas missing |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        middle = {key: statistics.median(run[key] for run in runs) for key in ("rounds", "samples", "missing")}
        lines.append(
            f"| {name} | {sum(run['reached'] for run in runs)} of {len(runs)} | {statistics.median(seconds):.1f} "
            f"({min(seconds):.1f} to {max(seconds):.1f}) | {middle['rounds']:g} | {middle['samples']:,.0f} | "
            f"{100 * middle['missing']:.0f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
