"""Computes what averaging and weighting can be expected to gain.

  python -m experiments.expected --replicas=8 --bad=2 --heldout=256 --local_steps=50
  python -m experiments.expected --measured=experiments/results/scenarios_256,experiments/results/scenarios
  python -m experiments.expected --simulate

For a quadratic loss, in closed form: what bias and noise cost sequential, sync and plain training, weights of each
round, the best weights, and an oracle without the bad shards, at a constant rate and at one that falls to zero; and
what fitting weights to --heldout samples costs, at most. Nothing is measured. Prints tables, and writes expected.md,
figures and rows to --workdir.

--measured lays recorded matrices of `experiments.scenarios` and `experiments.evidence` over it: scenarios with equal
shards, some with random labels; the first of them with bad shards gives the quadratic prediction of the others its
bad_loss. --simulate trains such problems with the library, over --seeds, and takes some minutes.
"""

import datetime
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments.setup import app, captions, expectations, overlay, quadratic_runs, shared_flags
from experiments.setup.expectations import Asked
from experiments.setup.overlay import Point
from experiments.setup.quadratic_shards import BAD_LOSS, NOISE_LOSS
from experiments.setup.shared_flags import numbers
from wavg_jax.base import SettingsError
from wavg_jax.devices import machine
from wavg_jax.reporting.canvas import Plot
from wavg_jax.reporting.tables import TextTable
from wavg_jax.storage.rows import Records, check_writable, write_atomically
from wavg_jax.storage.schema import Row
from wavg_jax.training import progress

flags.DEFINE_integer("bad", 1, "Bad shards, which share one wrong optimum.", lower_bound=0)
flags.DEFINE_float("bad_loss", BAD_LOSS, "What that optimum costs, in nats.", lower_bound=0)
flags.DEFINE_float(
    "noise_loss", NOISE_LOSS, "What gradient noise costs one network at the constant rate, in nats.", lower_bound=1e-9
)
flags.DEFINE_integer("classes", 10, "With --measured: classes of the data, C.", lower_bound=2)
flags.DEFINE_list("measured", [], "Folders of recorded matrices to lay over what is computed.")
flags.DEFINE_bool("simulate", False, "Train quadratic problems with the library and compare.")
F = flags.FLAGS

READS = (*Asked._fields, "steps", "classes", "measured", "simulate", "seeds", "workdir")
for _name in READS:
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Prints and writes what to expect."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    asked = _asked()
    steps, seeds = numbers("steps", int), shared_flags.read_seeds()
    points = overlay.read_points([pathlib.Path(name) for name in F.measured])
    folder = pathlib.Path(F.workdir or pathlib.Path("runs") / f"expected-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    rows: list[Row] = [*expectations.computed_rows(asked), *expectations.curves(asked, steps)]
    rows += expectations.measured_rows(points, F.classes)
    check_writable(folder)
    records = Records(folder)
    if records.rows:
        raise SettingsError("the folder already holds rows; choose another --workdir")
    settings = asked._asdict() | {"steps": list(steps)}
    records.append({"kind": "expected", "run": "expected", "settings": settings, "versions": machine.versions()})
    for row in rows:
        records.append(row)
    if F.simulate:
        cases = quadratic_runs.cases()
        with progress.bar(len(cases)) as advance:
            for case in cases:
                records.append(expectations.simulated_row(case, seeds))
                advance(case.name)
    _publish(asked, records.rows, points, folder)


def _asked() -> Asked:
    """Reads the flags of the problem.

    Raises:
      SettingsError: they cannot work, or one has no effect.
    """
    for name, needed in (("seeds", "simulate"), ("classes", "measured")):
        if F[name].present and not F[needed].value:
            raise SettingsError(f"--{name} has no effect without --{needed}")
    if F.heldout < 1:
        raise SettingsError("--heldout=0: weights are fitted to held-out samples, so hold some out")
    if F.bad >= F.replicas:
        raise SettingsError(f"--bad={F.bad} of --replicas={F.replicas}: leave one shard good")
    given: dict[str, Any] = {name: F[name].value for name in Asked._fields}
    return Asked(**given)


def _tables(rows: Sequence[Row]) -> Iterator[TextTable]:
    """The tables of those kinds of rows that there are."""
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("computed", "measured", "simulated")}
    fitted = [row for row in kinds["simulated"] if row["cost"]]
    exact = [row for row in kinds["simulated"] if not row["cost"]]
    for title, note, heads, cells in (
        ("Computed", LOSSES, ARMS, [_computed(row) for row in kinds["computed"]]),
        ("Measured", GAINS, POINTS, [_measured(row) for row in kinds["measured"]]),
        ("Simulated", CHECKED, ("case", "computed", "simulated"), [_simulated(row) for row in exact]),
        ("Simulated, fitted weights", LEARNED, ("case", "best", "at most", "simulated"), list(map(_learned, fitted))),
    ):
        if cells:
            yield TextTable(title, note, heads, (tuple(cells),))


LOSSES = "Loss above the best in nats: all (of bias + of noise)."
ARMS = ("arm", "constant rate, for ever", "this run, constant rate", "this run, decaying rate")
GAINS = (
    "Test loss of plain averaging minus the weighting's, in nats, with its 95 % interval; two predictions of it; and "
    "what fitting the weights costs at most."
)
POINTS = ("recording", "scenario", "weighting", "samples", "gain", "quadratic", "mixture", "cost")
CHECKED = "Loss above the best in nats that the library reaches, mean over seeds with its 95 % interval."
LEARNED = (
    "Likewise, beside the best fixed weights, alone and with the most that fitting costs. In 8 directions the weights "
    "of 8 replicas can also cancel a round's noise, so simulated losses may be below those of fixed weights; a network "
    "has far more directions than replicas."
)


def _computed(row: Row) -> tuple[str, ...]:
    return (row["run"], *map(_both, ((row["bias"], row["noise"]), row["constant"], row["decaying"])))


def _measured(row: Row) -> tuple[str, ...]:
    names = (row["recording"], row["scenario"], row["weighting"], f"{row['samples']:,}")
    predicted = (f"{row['quadratic']:.3f}{' (fitted)' * row['fitted']}", f"{row['mixture']:.3f}", f"{row['cost']:.4f}")
    return (*names, _spread(row, "gain", 3), *predicted)


def _simulated(row: Row) -> tuple[str, ...]:
    return (row["run"], f"{row['computed']:.5f}", _spread(row, "simulated", 5))


def _learned(row: Row) -> tuple[str, ...]:
    computed, most = row["computed"], row["computed"] + row["cost"]
    return (row["run"], f"{computed:.4f}", f"{most:.4f}", _spread(row, "simulated", 4))


def _both(parts: tuple[float, float]) -> str:
    return f"{sum(parts):.4f} ({parts[0]:.4f} + {parts[1]:.4f})"


def _spread(row: Row, name: str, digits: int) -> str:
    spread = row["half_width"]  # None with a single seed
    return f"{row[name]:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _plots(asked: Asked, rows: Sequence[Row], points: Sequence[Point]) -> list[Plot]:
    """The figure of what was measured, and one for each kind of curve."""
    from experiments.setup.expected_figures import draw_lines, draw_share

    shares = np.linspace(0, 7 / 8, 50).tolist()
    lines = {"mixture of labels": [overlay.mixture(share, F.classes) for share in shares]}
    first, bad_loss = overlay.fitted(points) if points else (None, asked.bad_loss)
    lines["quadratic"] = [bad_loss * share**2 for share in shares]
    plots = [draw_share(shares, lines, points, first)]
    for name, (title, caption, axis) in _curves(asked).items():
        own = [row for row in rows if row["kind"] == "curve" and row["of"] == name]
        losses = {row["run"].split(": ")[1]: row["loss"] for row in own}
        subtitle = f"constant rate, noise costs {asked.noise_loss:g} nats"
        subtitle += f", a bad optimum {asked.bad_loss:g}" * (name in ("replicas", "bad"))
        plots.append(draw_lines(name, title, subtitle, caption, own[0]["x"], losses, of=axis, log=name != "steps"))
    return plots


def _curves(asked: Asked) -> dict[str, tuple[str, str, str]]:
    """Kind of curve -> title, caption and axis of its figure."""
    k = asked.replicas
    return {
        "replicas": (
            "Averaging divides the noise; bias stays",
            "Computed. None or half of the K shards have the bad optimum.",
            "replicas, K",
        ),
        "bad": (
            "Bias grows with the square of the share of bad shards",
            "Computed. Sync is as plain averaging; one network is trained on all shards. The oracle, which leaves the "
            "bad shards out, is hidden by the best weights.",
            f"bad shards of {k}",
        ),
        "noise": (
            "Where noise differs, weights are its inverse",
            f"Computed, K = {k}. The gradients of {max(k // 4, 1)} shards have so many times the variance.",
            "noise of a quarter of the shards",
        ),
        "steps": (
            "H costs where shards differ in curvature",
            f"Computed, K = {k}, mean over ten random draws of shards: a shard's optimum costs 1 nat on average, and "
            "curvatures differ by a factor of e (one standard deviation).",
            "local steps, H",
        ),
    }


def _publish(asked: Asked, rows: Sequence[Row], points: Sequence[Point], folder: pathlib.Path) -> None:
    """Prints the tables and writes expected.md and the figures."""
    # matplotlib takes a second to import.
    from wavg_jax.reporting.document import bullets
    from wavg_jax.reporting.tables import markdown_table
    from wavg_jax.reporting.terminal import terminal_block

    tables, lines, plots = list(_tables(rows)), expectations.sentences(asked, rows), _plots(asked, rows, points)
    console = app.console(log_width=120)
    console.print(terminal_block("What to expect", tables, lines))
    parts = ["# What to expect", "A quadratic loss, in closed form.", bullets(lines), f"`{captions.command_line()}`"]
    parts += [f"## {plot.title}\n\n![{plot.title}]({plot.name}.png)\n\n{plot.caption}" for plot in plots]
    parts += [f"## {table.title}\n\n{table.note}\n\n{markdown_table(table)}" for table in tables]
    for plot in plots:
        write_atomically(folder / f"{plot.name}.png", plot.png)
    write_atomically(folder / "expected.md", ("\n\n".join(parts) + "\n").encode())
    console.print(f"wrote {folder / 'expected.md'}, rows.jsonl and {len(plots)} figures", soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
