"""The figure of an elastic run: a lane per worker, with what it did when."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from wavg_jax.reporting import canvas
from wavg_jax.reporting.canvas import SMALL, Plot, Theme
from wavg_jax.reporting.runs import RecordedRun
from wavg_jax.reporting.wording import clock_unit
from wavg_jax.storage.schema import Row

Span = tuple[float, float]
"""When something began, in seconds since the run did, and how long it lasted."""

KINDS = {"computed": (2, ""), "late": (1, "////"), "away": (3, "xxxx")}
"""What a lane shows: the place among a theme's colours, and a hatch for grey prints. What is left blank was waiting."""


def kind_of(entry: Row) -> str:
    """Which of `KINDS` a worker's entry in a round is."""
    if entry["was"] == "computed":
        return "computed"
    return "late" if entry["was"].startswith("late") else "away"


def spans(run: RecordedRun) -> dict[int, dict[str, list[Span]]]:
    """{worker: {kind: when}} of a run's rows, neighbours joined."""
    lanes: dict[int, dict[str, list[Span]]] = {}
    for elapsed, seconds, workers in zip(run.elapsed, run.seconds, run.workers, strict=True):
        begun = float(elapsed - seconds)
        for entry in workers:
            kind = kind_of(entry)
            span = begun, float(seconds)
            if kind == "computed":
                span = begun + max(entry["ended"] - entry["computed"], 0.0), min(entry["computed"], float(seconds))
            lane = lanes.setdefault(entry["worker"], {name: [] for name in KINDS})[kind]
            if kind != "computed" and lane and np.isclose(sum(lane[-1]), span[0]):
                span = lane[-1][0], lane.pop()[1] + span[1]
            lane.append(span)
    return dict(sorted(lanes.items()))


def shares(run: RecordedRun) -> dict[str, float]:
    """Shares of the workers' time by kind, and what is left, "waited"."""
    lanes = spans(run)
    whole = sum(float(s) * len(workers) for s, workers in zip(run.seconds, run.workers, strict=True))
    spent = {kind: sum(length for lane in lanes.values() for _, length in lane[kind]) for kind in KINDS}
    part = {kind: seconds / whole if whole else 0.0 for kind, seconds in spent.items()}
    return part | {"waited": max(1.0 - sum(part.values()), 0.0)}


def draw_lanes(runs: Sequence[RecordedRun], made_from: str) -> Plot | None:
    """Draws the first run that had workers; None if none had."""
    run = next((run for run in runs if any(run.workers)), None)
    if run is None:
        return None
    lanes, title = spans(run), f"What the workers did: {run.arm}, seed {run.seed}"
    unit, scale = clock_unit([float(run.elapsed[-1])])

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.make_axes(theme, title, made_from, max(2.8, min(1.9 + 0.34 * len(lanes), 8)))
        for place, lane in enumerate(lanes.values()):
            for kind, (colour, hatch) in KINDS.items():
                bars = [(scale * start, scale * length) for start, length in lane[kind]]
                axes.broken_barh(
                    bars,
                    (place - 0.38, 0.76),
                    facecolor=theme.colours[colour],
                    hatch=hatch,
                    edgecolor=theme.paper,
                    lw=0,
                )
        axes.set_yticks(range(len(lanes)), [str(worker) for worker in lanes])
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(0, scale * float(run.elapsed[-1]))
        axes.set_xlabel(f"wall time of rounds ({unit})")
        axes.set_ylabel("worker")
        names = [
            Patch(facecolor=theme.colours[colour], hatch=hatch, edgecolor=theme.paper, lw=0, label=kind)
            for kind, (colour, hatch) in KINDS.items()
        ]
        axes.legend(
            handles=[*names, Patch(facecolor=theme.paper, edgecolor=theme.faint, label="waited")],
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=4,
            frameon=False,
            fontsize=SMALL,
            labelcolor=theme.ink,
        )
        return figure

    part = shares(run)
    said = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in part.items())
    caption = f"Arm {run.arm}, seed {run.seed}. Of the workers' time: {said}. Rows of rounds say why one was away."
    return canvas.make_plot("workers", title, caption, paint)
