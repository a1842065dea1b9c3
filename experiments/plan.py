"""Plans a cluster: what a round would take on 100 to 100,000 workers, and what of it is communication and lost work.

  python -m experiments.plan --parameters=1e9 --batch_size=16384 --flops=2e14 --link_bandwidth=1e10 --link_latency=1e-4
  python -m experiments.plan --check=points.jsonl --link_latency=1e-4

Computes, for sync and for averaging once in every H of --steps, in every wire format and for every number of workers,
the time of a round, the share of communication, the bytes a second that would hide it, the work that failures cost, and
what is left. Nothing is measured. Prints a table, and writes plan.md and plan.png to --workdir.

--check compares with what was measured instead, and ends with exit code 1 if a prediction is off by more than
--tolerance. The file has a JSON object per line: nodes, rate (bits a second, null for an unshaped link), local_steps,
arm (sequential, sync, accumulate, plain or weighted), wire, parameters, seconds_per_round (measured), local_seconds
(the same round's, measured without a link), and maybe collective (ring, halving or gather; by default ring in float32
and gather in narrower formats).
"""

import datetime
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.setup import app, shared_flags
from experiments.setup.shared_flags import numbers
from experiments.setup.simulation import ASSUMPTIONS, Cluster, Load, Outcome, collective_of, predicted, simulate
from wavg_jax.base import DataError, SettingsError
from wavg_jax.devices.network import COLLECTIVES, WIRES, Link
from wavg_jax.storage.rows import check_writable, write_atomically

BUILT = "library"
flags.DEFINE_float("parameters", 1e9, "Numbers of the network, N.", lower_bound=1)
flags.DEFINE_float(
    "flop_per_sample",
    None,
    "Operations of a sample, forward and backward; by default 6 a parameter, as for a dense network and a token.",
    lower_bound=1,
)
flags.DEFINE_float("flops", 1e14, "Operations a second that a worker achieves.", lower_bound=1)
flags.DEFINE_list("worker_counts", "100,1000,10000,100000", "Numbers of workers, K.")
flags.DEFINE_list("wire_formats", list(WIRES), f"Formats on the wire, of {', '.join(WIRES)}.")
flags.DEFINE_enum(
    "collective",
    BUILT,
    [BUILT, *COLLECTIVES],
    "How workers exchange: as the library does, float32 in a ring and narrower formats by gathering every replica; in "
    "a ring; by recursive halving, as many bytes in fewer steps; or averaging gathers every replica in any format, as "
    "weightings that try blends out do. Sync uses a ring then. What the library has not built is marked.",
)
flags.DEFINE_float(
    "failure_rate",
    2e-5,
    "Failures per worker and hour; by default as of the GPUs that trained Llama 3 (arXiv:2407.21783).",
    lower_bound=0,
)
flags.DEFINE_float("restart_seconds", 300.0, "Seconds from a failure until work goes on.", lower_bound=0)
flags.DEFINE_float("checkpoint_seconds", 600.0, "Seconds between two checkpoints of sync.", lower_bound=1e-3)
flags.DEFINE_string("check", None, "File of measured points to compare with instead.")
flags.DEFINE_float("tolerance", 0.2, "Largest relative error of a prediction that --check allows.", lower_bound=0)
F = flags.FLAGS
NOT_BUILT = ", not built"
"""Marks the rows of an exchange that the library does not make: it reduces and sums in float32 alone."""

PLANNED = (
    *("parameters", "flop_per_sample", "flops", "batch_size", "worker_counts", "steps", "wire_formats", "collective"),
    *("link_bandwidth", "failure_rate", "restart_seconds", "checkpoint_seconds", "workdir"),
)
"""Flags of a plan alone."""
READS = (*PLANNED, *shared_flags.LINK, "check", "tolerance")
for _name in READS:
    flags.declare_key_flag(_name)

SYNC = "sync"
Case = tuple[int, int, str]
"""Workers, H (0 for sync), wire."""


def main(argv: Sequence[str]) -> None:
    """Prints and writes the plan, or checks its predictions."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    for name in PLANNED if F.check is not None else ("tolerance",):
        if F[name].present:
            raise SettingsError(f"--{name} has no effect {'with' if F.check is not None else 'without'} --check")
    if F.check is not None:
        if not _check(_points(pathlib.Path(F.check)), shared_flags.read_link() or Link()):
            raise SystemExit(1)
        return
    folder = pathlib.Path(F.workdir or pathlib.Path("runs") / f"plan-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    found = make_plan()
    check_writable(folder)
    _publish(found, folder)


def _load() -> Load:
    per_sample = 6 * F.parameters if F.flop_per_sample is None else F.flop_per_sample
    return Load(F.parameters, per_sample, F.batch_size)


def make_plan() -> dict[Case, Outcome]:
    """The outcome of every case that the flags ask for, in the order of the tables."""
    cluster = Cluster(F.flops, shared_flags.read_link(), F.failure_rate, F.restart_seconds, F.checkpoint_seconds)
    wires = shared_flags.names("wire_formats", WIRES)
    found = {}
    for workers, steps, wire in itertools.product(numbers("worker_counts", int), (0, *numbers("steps", int)), wires):
        how = _collective(steps, wire)
        found[workers, steps, wire] = simulate(
            _load(),
            cluster,
            arm="plain" if steps else SYNC,
            workers=workers,
            local_steps=steps or 1,
            wire=wire,
            collective=how,
        )
    return found


def _collective(steps: int, wire: str) -> str:
    if F.collective == BUILT:
        return "gather" if steps and wire != "float32" else "ring"
    return "ring" if not steps and F.collective == "gather" else F.collective


def _form(steps: int) -> str:
    return f"H = {steps:,}" if steps else SYNC


HEADS = (
    *("update", "wire", "round (s)", "local step (s)", "communication (%)", "to hide it (MB/s)", "lost (%)"),
    *("efficiency (%)", "samples/s"),
)


def _row(steps: int, wire: str, one: Outcome) -> tuple[str, ...]:
    shares = (one.communication, one.hiding / 1e8, one.lost, one.efficiency)
    times = (one.round_seconds, one.round_seconds / (steps or 1))
    built = wire == "float32" or _collective(steps, wire) == "gather"
    figures = (*map(_figure, times), *(_figure(100 * x) for x in shares), _figure(one.samples))
    return (_form(steps), wire + NOT_BUILT * (not built), *figures)


def _figure(value: float) -> str:
    """Three significant digits, or whole thousands."""
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"


def _premises() -> list[str]:
    """What was planned with, in sentences."""
    load, link = _load(), shared_flags.read_link()
    step = load.batch_size * load.flop_per_sample / F.flops
    how = {
        BUILT: "float32 all-reduces in a ring, 2 (K-1) steps; narrower formats gather every replica, K-1 steps",
        "ring": "all-reduce in a ring, 2 (K-1) steps (int8: in two phases)",
        "halving": "all-reduce by recursive halving and doubling, 2 log2 K steps",
        "gather": "averaging gathers every replica, K-1 steps; sync all-reduces in a ring",
    }[F.collective]
    return [
        f"Network: {load.parameters:,.0f} parameters, {load.flop_per_sample:.3g} FLOP a sample.",
        f"Worker: {F.flops:.3g} FLOP/s, batch {load.batch_size:,}, so a local step computes for {_figure(step)} s.",
        f"Link: {'no network' if link is None else link}. {how[0].upper()}{how[1:]}.",
        f"Failures: {F.failure_rate:g} per worker and hour, {F.restart_seconds:g} s to restart; sync has a checkpoint "
        f"every {F.checkpoint_seconds:g} s.",
    ]


NOTE = (
    "A round of sync is one step: H of them take H times as long. To hide it: bytes a second at which a worker sends a "
    "round's bytes while it computes the round. Lost: expected share of the workers' time that failures cost. "
    "Efficiency: share of the time in which workers compute what is kept. Not built: the library does not exchange so."
)


def _publish(found: Mapping[Case, Outcome], folder: pathlib.Path) -> None:
    """Prints the plan and writes plan.md and plan.png."""
    # matplotlib takes a second to import.
    from experiments.setup.plan_figure import draw_plan
    from wavg_jax.reporting.document import bullets
    from wavg_jax.reporting.tables import TextTable, markdown_table
    from wavg_jax.reporting.terminal import terminal_block

    tables = []
    for workers in dict.fromkeys(case[0] for case in found):
        rows = tuple(_row(*case[1:], one) for case, one in found.items() if case[0] == workers)
        tables.append(TextTable(f"{workers:,} workers", "", HEADS, (rows,)))
    console = app.console(log_width=120)
    console.print(terminal_block("Plan", tables, [*_premises(), NOTE, *ASSUMPTIONS]))
    plot = draw_plan(found, f"{F.parameters:.3g} parameters, link: {shared_flags.read_link() or 'no network'}")
    parts = ["# Plan of a cluster", "Computed, not measured.", bullets(_premises()), f"![{plot.title}](plan.png)"]
    parts += [plot.caption, *(f"## {one.title}\n\n{markdown_table(one)}" for one in tables), NOTE]
    parts += ["## What this takes for granted", bullets(ASSUMPTIONS)]
    write_atomically(folder / "plan.png", plot.png)
    write_atomically(folder / "plan.md", ("\n\n".join(parts) + "\n").encode())
    console.print(f"wrote {folder / 'plan.md'} and plan.png", soft_wrap=True)


POINT = ("nodes", "rate", "local_steps", "arm", "wire", "parameters", "seconds_per_round", "local_seconds")
"""What a measured point must have."""
ARMS = ("sequential", "sync", "accumulate", "plain", "weighted")
"""What its arm may be."""


def _points(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads --check.

    Raises:
      DataError: the file cannot be read, has no points, or one is not complete.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no measured points in {path}: {error}; give a file with a JSON object per line") from error
    points = []
    for number, line in enumerate(lines, 1):
        try:
            point = json.loads(line)
            _check_point(point)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise DataError(f"{path}, line {number}: not a measured point ({error}); fix or delete the line") from error
        points.append(point)
    if not points:
        raise DataError(f"no measured points in {path}: the file is empty")
    return points


def _check_point(point: dict[str, Any]) -> None:
    """Raises ValueError, TypeError, KeyError or ArithmeticError unless its round can be predicted."""
    if lacking := [name for name in POINT if name not in point]:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    for name, allowed in {"arm": ARMS, "wire": WIRES, "collective": COLLECTIVES}.items():
        if name in point and point[name] not in allowed:
            raise ValueError(f"its {name} is {point[name]!r}; choose from {', '.join(allowed)}")
    for name in ("nodes", "local_steps", "parameters"):
        if not point[name] >= 1:
            raise ValueError(f"its {name} is {point[name]!r}; it must be 1 or more")
    if not predicted(point, Link()) > 0 or not 0 < point["seconds_per_round"] < math.inf:
        raise ValueError("its seconds are not positive")


def errors_of(points: Sequence[Mapping[str, Any]], link: Link) -> list[float]:
    """The relative error of the prediction of each point, (predicted - measured) / measured."""
    return [predicted(point, link) / point["seconds_per_round"] - 1 for point in points]


def _check(points: Sequence[Mapping[str, Any]], link: Link) -> bool:
    """Prints what was predicted beside what was measured; whether all predictions are within --tolerance."""
    from wavg_jax.reporting.tables import TextTable
    from wavg_jax.reporting.terminal import terminal_block

    errors = errors_of(points, link)
    heads = ("arm", "wire", "collective", "nodes", "link", "H", "measured (s)", "predicted (s)", "error (%)")
    rows = []
    for point, error in zip(points, errors, strict=True):
        rate = "unshaped" if point["rate"] is None else str(Link(point["rate"]))
        measured = point["seconds_per_round"]
        cells = (point["arm"], point["wire"], collective_of(point), point["nodes"], rate, point["local_steps"])
        figures = (_figure(measured), _figure(measured * (1 + error)), f"{100 * error:+.1f}")
        rows.append((*map(str, cells), *figures))
    off = sum(abs(error) > F.tolerance for error in errors)
    worst = max(errors, key=abs)
    lines = [
        f"Worst error: {100 * worst:+.1f} %. Off by more than {100 * F.tolerance:g} %: {off} of {len(points)} points.",
        f"Counted with every exchange: {_beside(link)}.",
        *_by_collective(points, link),
    ]
    table = TextTable("Seconds of a round", "", heads, (tuple(rows),))
    app.console(log_width=120).print(terminal_block("Predicted against measured", [table], lines))
    return not off


def _by_collective(points: Sequence[Mapping[str, Any]], link: Link) -> list[str]:
    """How long exchanges took beside what was computed for them, which tells a slow collective from a slow link."""
    ratios: dict[tuple[str, int], list[float]] = {}
    for point in points:
        computed = predicted(point, link) - point["local_seconds"]
        if computed > 0:
            taken = (point["seconds_per_round"] - point["local_seconds"]) / computed
            ratios.setdefault((collective_of(point), point["nodes"]), []).append(taken)
    return [
        f"{how.capitalize()} over {nodes} nodes: exchanges took {min(found):.2f} to {max(found):.2f} times what was "
        "computed for them."
        for (how, nodes), found in sorted(ratios.items())
    ]


def _beside(link: Link) -> str:
    """Latency and overhead of a link, in words."""
    return f"{1e3 * link.latency:g} ms latency a step, {1e3 * link.overhead:g} ms overhead"


if __name__ == "__main__":
    app.run(main)
