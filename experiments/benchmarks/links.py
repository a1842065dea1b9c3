"""The link bench: time to accuracy of the arms, measured on slow links between nodes of this machine.

  python -m experiments.benchmarks.links --flagfile=experiments/presets/fashion_links.flags --data_dir=DIR
  python -m experiments.benchmarks.links --link_rates=100mbit --nodes=2 --link_steps=50 --seeds=0 --link_seconds=20

Every cell is a run of experiments.train in one process per node. Nodes are network namespaces whose links are shaped,
see `namespaces`; that takes root on Linux. Elsewhere all cells run over the loopback, unshaped, and no bytes are
counted. K is the number of nodes, unless --replicas says otherwise. A run ends once it has reached the highest of
--targets, or after --link_seconds on the measured clock; to compare final accuracies, add a target out of reach.
sequential runs alone, in one process with a node's share of the cores. sequential and sync take --link_steps only as
the number of steps between two evaluations, so they run at its smallest.

Further flags, such as --dataset or --lr_weighted, go to experiments.train and are part of a cell: run again with others
and the same --workdir, and the cells are added. A cell that is there already, measured up to the same --targets and
--link_seconds, is skipped, so an interrupted bench goes on with the same command.

Writes rows.jsonl and a picture for each link and number of nodes to --workdir, and, where the same runs were measured
unshaped too, points.jsonl, which `experiments.plan --check` compares with what it computes. A row's entries beside
those of `link_cells.Cell`, `link_cells.Limits.entries`, `link_cells.summary` and `link_cells.sent`: started, load
(`load.between`), command.
"""

import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from experiments.benchmarks import link_report, load, namespaces
from experiments.benchmarks.harness import Recording, begin
from experiments.benchmarks.link_cells import ALONE, LOOPBACK, UNSHAPED, Cell, Limits, measure
from experiments.setup import app, shared_flags
from experiments.setup.shared_flags import names, numbers
from wavg_jax.base import SettingsError, WavgError
from wavg_jax.devices import machine
from wavg_jax.training import progress

WIRES = ("float32", "bfloat16", "int8")
POOLED = ("sequential", "sync")
"""Arms that change neither with H nor with the wire's format."""

flags.DEFINE_list(
    "link_rates", ["50mbit", "100mbit", "1gbit", UNSHAPED], f"Rates of the links, as tc writes them, or {UNSHAPED}."
)
flags.DEFINE_list("link_steps", ["10", "50", "200"], "The values of H.")
flags.DEFINE_list(
    "wires", list(WIRES), f"Formats on the wire of plain, accumulate and weighted, of {', '.join(WIRES)}."
)
flags.DEFINE_list("nodes", ["2", "4"], "Numbers of nodes.")
LINKED = tuple(arm for arm in shared_flags.ARMS if arm not in shared_flags.DILOCO)  # an outer step sends nothing
flags.DEFINE_list("link_arms", list(LINKED), f"Which arms, of {', '.join(LINKED)}.")
flags.DEFINE_list("targets", ["0.8", "0.82", "0.85"], "Test accuracies; a run ends once it has reached the highest.")
flags.DEFINE_float("link_seconds", 60.0, "Seconds of a run on the measured clock.", lower_bound=0.1)
flags.DEFINE_float("link_patience", 600.0, "Seconds without a new row after which a run fails.", lower_bound=1)
F = flags.FLAGS

OWN = ("link_rates", "link_steps", "wires", "nodes", "link_arms", "targets", "link_seconds", "link_patience", "seeds")
_SET = {"seeds", "steps", "local_steps", "checkpoint_every", "workdir", "resume", "target_accuracy", "wire", "data_dir"}
_SET |= {"log_to", "tuning_seeds", *shared_flags.LINK}
OPTIONS = sorted(shared_flags.NAMES - _SET)
"""Flags that go to experiments.train as they are."""
READS = (*OWN, *OPTIONS, "data_dir")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Runs every cell that is not recorded yet, and writes the table and the pictures."""
    app.refuse_arguments(argv)
    cells, limits = _cells(), _limits()
    jax.config.update("jax_platforms", "cpu")  # this process only names the hardware
    recording = begin("links", READS, again=True)
    if reason := namespaces.unavailable():
        app.console().print(f"{reason}: measuring over the loopback, unshaped", soft_wrap=True)
        cells = list(dict.fromkeys(cell._replace(link=LOOPBACK) if cell.link != ALONE else cell for cell in cells))
    failed = _fill(recording, cells, limits)
    for line in load.lines(load.between(recording.began, load.now())):
        app.console().print(line.strip("*"), soft_wrap=True)
    if recording.cases():
        link_report.publish(recording.cases(), recording.folder, app.console(log_width=180))
    if failed:
        raise WavgError(
            f"{len(failed)} of {len(cells)} cells failed, first: {failed[0]}; the same command retries them"
        )


def _limits() -> Limits:
    targets = numbers("targets", float)
    if max(targets) > 1:
        raise SettingsError(f"--targets={','.join(F.targets)}: give accuracies up to 1")
    return Limits(tuple(sorted(targets)), F.link_seconds, F.link_patience)


def _cells() -> list[Cell]:
    """All cells, the seeds outermost, so that a slow spell of the machine hits all arms.

    Raises:
      SettingsError: a flag has a bad value.
    """
    arms, wires = names("link_arms", LINKED), names("wires", WIRES)
    links, steps = _links(), numbers("link_steps", int)
    cells = []
    for seed in shared_flags.read_seeds():
        for nodes in numbers("nodes", int):
            for link in links:
                for arm in arms:
                    own_link = ALONE if arm == "sequential" else link
                    for h in [min(steps)] if arm in POOLED else steps:
                        for wire in ["float32"] if arm in POOLED else wires:
                            cells.append(Cell(own_link, nodes, arm, h, wire, seed, _options(arm, nodes)))
    return list(dict.fromkeys(cells))


def _links() -> list[str]:
    links = list(F.link_rates or ())
    if not links or len(set(links)) < len(links):
        raise SettingsError(f"--link_rates={','.join(links)}: give rates such as 100mbit,{UNSHAPED}, each once")
    for link in set(links) - {UNSHAPED}:
        namespaces.bits(link)
    return links


def _options(arm: str, nodes: int) -> tuple[str, ...]:
    """The flags given that the arm's run takes; the learning rates of other arms would only tell equal cells apart."""
    other = {f"lr_{name}" for name in shared_flags.ARMS if name != arm}
    replicas = () if F["replicas"].present else (f"--replicas={nodes}",)
    return (*replicas, *(F[name].serialize() for name in OPTIONS if F[name].present and name not in other))


def _fill(recording: Recording, cells: Sequence[Cell], limits: Limits) -> list[str]:
    """Runs the cells that are not recorded, with a line for each; returns what the failed ones said."""
    done = recording.cases()
    todo = [cell for cell in cells if not any(cell.same_as(row) and limits.same_as(row) for row in done)]
    failed, out = [], app.console(log_width=180)
    with progress.bar(len(cells), len(cells) - len(todo)) as advance:
        for number, cell in enumerate(todo, len(cells) - len(todo) + 1):
            progress.doing(cell.words)
            folder = pathlib.Path(recording.folder).absolute() / "cells" / f"{number}"
            try:
                started, began = machine.now(), load.now()
                row = measure(cell, limits, folder, F.data_dir)
                loaded = load.between(began, load.now())
                recording.case(started=started, load=loaded, command=recording.command, **row)
                said = link_report.line(row)
            except WavgError as error:
                said = f"failed: {error}"
                failed.append(f"{cell.words}: {error}")
            out.print(f"{number}/{len(cells)}  {cell.words}: {said}", soft_wrap=True)
            advance(cell.words)
    return failed


if __name__ == "__main__":
    app.run(main)
