"""The table, the pictures and the points of the link bench."""

import itertools
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.link_cells import ALONE, LOOPBACK, UNSHAPED, limits_of
from experiments.benchmarks.namespaces import bits
from experiments.setup.simulation import predicted
from wavg_jax.devices.network import COLLECTIVES, Link
from wavg_jax.reporting import canvas
from wavg_jax.reporting.canvas import MARKERS, Plot, Theme
from wavg_jax.reporting.wording import seeds
from wavg_jax.storage.rows import as_lines, write_atomically
from wavg_jax.storage.schema import Row

PLACES = {"sequential": 0, "sync": 1, "plain": 2, "weighted": 3, "accumulate": 4}
"""Arm -> its place among colours and markers, as in the reports of experiments.compare."""
_DASHES: Mapping[str, Any] = {"float32": "-", "bfloat16": (0, (5, 2)), "int8": (0, (2, 1.3))}
_OTHER = ("--lr_", "--replicas", "--data_dir")
"""Options that the table's other columns tell, or that change nothing."""


class Group(NamedTuple):
    """The seeds of one setting.

    Attributes:
      link, nodes, arm, local_steps, wire, options: as of the cells.
      rows: one for each seed.
    """

    link: str
    nodes: int
    arm: str
    local_steps: int
    wire: str
    options: tuple[str, ...]
    rows: tuple[Row, ...]

    def median(self, entry: str) -> float | None:
        """Over the seeds; None if one has no such entry."""
        values = [row[entry] for row in self.rows]
        return None if None in values else statistics.median(values)

    def reached(self, target: str) -> float | None:
        """Median seconds to an accuracy, where a seed that did not reach it counts as later than all; None if it is."""
        times = sorted(row["reached"].get(target) or np.inf for row in self.rows)
        middle = float(np.median(times))
        return middle if np.isfinite(middle) else None


def groups(rows: Sequence[Row]) -> list[Group]:
    """The rows by setting, in the order of links and nodes; runs alone come first."""

    def key(row: Row) -> tuple:
        return (row["link"], row["nodes"], row["arm"], row["local_steps"], row["wire"], tuple(row["options"]))

    # Runs that ended at other limits are no other seeds of the same.

    links = [ALONE, *dict.fromkeys(row["link"] for row in rows if row["link"] != ALONE)]
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((key(row), limits_of(row)), []).append(row)
    every = [Group._make((*of, tuple(some))) for (of, _), some in found.items()]
    return sorted(every, key=lambda one: (one.nodes, links.index(one.link)))


def point(one: Group, every: Sequence[Group]) -> Row | None:
    """A measured point for `experiments.plan --check`; None unless the links have a rate and the same runs none."""
    same = one._replace(link=UNSHAPED, rows=())
    bare = next((other for other in every if other._replace(rows=()) == same), None)
    if bare is None or one.link in (ALONE, LOOPBACK, UNSHAPED):
        return None
    found = {
        **one._asdict(),
        "rate": bits(one.link),
        "parameters": one.median("parameters"),
        "seconds_per_round": one.median("seconds"),
        "local_seconds": bare.median("seconds"),
    }
    del found["link"], found["options"], found["rows"]
    return found | {"collective": _collective(one)}


def _collective(one: Group) -> str:
    """How the runs exchanged: on a narrow wire all replicas are gathered, else the bytes that were counted tell."""
    size, counted = one.median("parameters"), one.median("bytes_per_round")
    if one.wire != "float32":
        return "gather"
    if one.arm == "sync" or size is None or counted is None:
        return "ring"
    would = {name: COLLECTIVES[name](size, one.nodes, one.wire).sent for name in ("ring", "gather")}
    return min(would, key=lambda name: abs(would[name] - counted))


def line(row: Row) -> str:
    """A cell's result in a line."""
    times = [f"{100 * float(target):g} % in {at:.3g} s" for target, at in row["reached"].items() if at is not None]
    final = "no test accuracy" if row["final_accuracy"] is None else f"{100 * row['final_accuracy']:.1f} % at the end"
    sent = "" if row["bytes_per_round"] is None else f", {_amount(row['bytes_per_round'])} a round"
    return f"{row['rounds']} rounds of {row['seconds']:.3g} s{sent}; {', '.join([*times, final])}"


def _amount(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.3g} MB" if size >= 1e5 else f"{size / 1e3:.3g} kB"


def table(every: Sequence[Group]) -> Table:
    """The medians over the seeds; times to a target with the factor to sync on the same links in brackets."""
    targets = sorted({target for one in every for row in one.rows for target in row["reached"]}, key=float)
    shared = set.intersection(*(set(one.options) for one in every))
    shown = Table(
        title="Time to test accuracy on slow links",
        caption="Medians over the seeds, in seconds on the measured clock; in brackets: how many times sooner than "
        "sync. Sent: by a node in a round, headers included. Predicted: s/round from the unshaped one and the bytes "
        "that the link takes, and how many times what was measured.",
    )
    columns = ("nodes", "link", "arm", "H", "wire", "lr", "options", "seeds", "s/round")
    for name in (*columns, *(f"{100 * float(target):g} %" for target in targets), "final %", "sent", "B/sample"):
        shown.add_column(name)
    points = [point(one, every) for one in every]
    if any(points):
        shown.add_column("predicted")
    for one, measured in zip(every, points, strict=True):
        extra = " ".join(o for o in one.options if o not in shared and not o.startswith(_OTHER))
        final, per_sample, seconds = one.median("final_accuracy"), one.median("bytes_per_sample"), one.median("seconds")
        cells = [
            *(str(one.nodes), one.link, one.arm, str(one.local_steps), one.wire),
            "/".join(f"{lr:g}" for lr in dict.fromkeys(row["lr"] for row in one.rows if row["lr"] is not None)),
            *(extra, str(len(one.rows)), f"{seconds:.3g}"),
            *(_time(one, target, every) for target in targets),
            "" if final is None else f"{100 * final:.1f}",
            _amount(one.median("bytes_per_round")),
            "" if per_sample is None else f"{per_sample:.3g}",
        ]
        if measured is not None:
            computed = predicted(measured, Link())
            cells.append(f"{computed:.3g} ({computed / measured['seconds_per_round']:.2f}x)")
        shown.add_row(*cells)
    return shown


def _time(one: Group, target: str, every: Iterable[Group]) -> str:
    at = one.reached(target)
    if at is None:
        return "-"
    sync = [
        late
        for other in every
        if (other.arm, other.link, other.nodes) == ("sync", one.link, one.nodes)
        and (late := other.reached(target)) is not None
    ]
    return f"{at:.3g}" + (f" ({min(sync) / at:.1f}x)" if sync and one.arm != "sync" else "")


def publish(rows: Sequence[Row], folder: pathlib.Path, out: Console) -> None:
    """Prints the table, and writes the points, and a picture for each link and number of nodes."""
    every = groups(rows)
    out.print(table(every))
    if points := [found for one in every if (found := point(one, every)) is not None]:
        write_atomically(folder / "points.jsonl", as_lines(points))
        out.print(f"wrote {folder / 'points.jsonl'}", soft_wrap=True)
    for plot in plots(every):
        write_atomically(folder / f"{plot.name}.png", plot.png)
        out.print(f"wrote {folder / plot.name}.png", soft_wrap=True)


def plots(every: Sequence[Group]) -> list[Plot]:
    """Test accuracy against seconds, one picture for each link and number of nodes."""
    found = []
    for (nodes, link), some in itertools.groupby(every, lambda one: (one.nodes, one.link)):
        if link != ALONE:
            alone = [one for one in every if one.link == ALONE and one.nodes == nodes]
            found.append(_draw(link, nodes, [*alone, *some]))
    return found


def _best(some: Sequence[Group]) -> list[Group]:
    """Of each arm and wire the group that reaches the highest target first, or else ends highest."""

    def rank(one: Group) -> tuple:
        target = max(one.rows[0]["reached"], key=float)
        return (-(one.reached(target) or np.inf), one.median("final_accuracy") or 0)

    best: dict[tuple, Group] = {}
    for one in some:
        key = (one.arm, one.wire)
        best[key] = max(best.get(key, one), one, key=rank)
    return sorted(best.values(), key=lambda one: (list(PLACES).index(one.arm), list(_DASHES).index(one.wire)))


def _draw(link: str, nodes: int, some: Sequence[Group]) -> Plot:
    whole = [one for one in some if not any(option.startswith("--fragments") for option in one.rows[0]["options"])]
    best = _best([one for one in whole if all(row["curve"] for row in one.rows)])
    counts = sorted({len(one.rows) for one in best}) or [0]
    several = f"{counts[0]} to " if len(counts) > 1 else ""
    tried = {(one.arm, one.wire, one.local_steps) for one in whole}
    chosen = "each arm at its best H" if len(tried) > len(best) else "H as in the legend"
    subtitle = f"{nodes} nodes, links of {link}, {several}{seeds(counts[-1])}, {chosen}"

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.make_axes(theme, "Test accuracy on the measured clock", subtitle, 5.0)
        for one in best:
            place = PLACES[one.arm]
            times, accuracy = _middle(one)
            steps = "" if one.arm in ("sequential", "sync") else f", H={one.local_steps}"
            wire = "" if one.wire == "float32" else f", {one.wire}"
            axes.plot(
                times,
                100 * accuracy,
                color=theme.colours[place],
                linestyle=_DASHES[one.wire],
                linewidth=2,
                marker=MARKERS[place],
                markersize=5,
                markevery=max(len(times) // 6, 1),
                label=f"{one.arm}{steps}{wire}",
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
        axes.set_xlabel("wall time without compilation and evaluation (s)")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(axis="y", color=theme.faint, linewidth=0.8)
        axes.set_ylim(bottom=_bottom(best))
        canvas.legend(theme, axes)
        return figure

    caption = "Line: median over the seeds, while all of them run. The frame cuts off the start."
    return canvas.make_plot(f"accuracy_{link}_{nodes}nodes", f"Test accuracy on links of {link}", caption, paint)


def _bottom(some: Sequence[Group]) -> float:
    """Where the frame starts, in percent: the way up to the lowest target would squash the part where arms differ."""
    lowest = min((float(target) for one in some for row in one.rows for target in row["reached"]), default=0.0)
    return max(100 * lowest - _BELOW, 0)


_BELOW = 15
"""Percentage points below the lowest target that a picture shows."""


def _middle(one: Group) -> tuple[np.ndarray, np.ndarray]:
    """The median curve over the seeds: seconds and accuracies, each accuracy held until the next evaluation."""
    curves = [np.array(row["curve"], np.float64) for row in one.rows]
    times = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    times = times[(times >= max(c[0, 0] for c in curves)) & (times <= min(c[-1, 0] for c in curves))]
    held = [curve[np.searchsorted(curve[:, 0], times, side="right") - 1, 1] for curve in curves]
    return times, np.median(held, axis=0)
