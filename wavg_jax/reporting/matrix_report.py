"""The report of a scenario matrix: the heat map, tables, and which weighting can be recommended, from rows alone."""

import math
import pathlib
from collections.abc import Callable, Sequence

from rich.console import Group

from wavg_jax.reporting import heatmap, summary
from wavg_jax.reporting.canvas import Plot
from wavg_jax.reporting.findings import by_chance
from wavg_jax.reporting.heatmap import NONE
from wavg_jax.reporting.matrix import MARGIN, Entry, Matrix, Verdict, tabulate
from wavg_jax.reporting.report import AGAIN, dated, document, flag, image, pairs, write_files
from wavg_jax.reporting.statistic import Statistic, interval, number, seeds, signed
from wavg_jax.reporting.summary import REFERENCE, Row
from wavg_jax.reporting.tables import Table, escape, markdown_table
from wavg_jax.reporting.terminal import terminal

POINT = f"{100 * MARGIN:g} point"


def findings(matrix: Matrix) -> list[str]:
    """What the matrix says, in sentences."""
    lines = [_recommendation(matrix)] if matrix.recommend else []
    lines += [_strict(matrix)]
    if matrix.lacking:
        lines.append(f"{matrix.lacking} cells of the matrix are not recorded; what is judged is judged without them.")
    n = len(matrix.seeds)
    if n <= 2:
        shown = f"{seeds(n)} {'is' if n == 1 else 'are'}"
        lines.append(f"{shown} too few seeds to show a difference: what is not marked may still differ.")
    compared = sum(not entry.versus.too_few and w != REFERENCE for (_, w), entry in matrix.entries.items())
    lines += by_chance(compared)
    lines += [
        "The best of many means is a little too high by chance, so the gaps to it are a little too large.",
        f"All weightings of a scenario ran at one learning rate. Where it is the one that is best for {REFERENCE} "
        f"averaging, as in the presets, that flatters {REFERENCE}: a weighting that tolerates higher rates gets no "
        "credit for it.",
        "The seed decides the shards too, so seeds differ most where shards do; that is why differences are paired.",
    ]
    return lines


def _recommendation(matrix: Matrix) -> str:
    asked = (
        f"in every scenario not below {REFERENCE} averaging by more than its standard deviation over seeds, and within "
        f"{POINT} of the best weighting of that scenario"
    )
    if matrix.recommended:
        return f"To be recommended, since {asked}: {summary.text(matrix.recommended)}."
    judged = [name for name in matrix.weightings if not matrix.verdicts[name].missing]
    if not judged:
        return "No weighting is recorded in every scenario yet, with two seeds or more: none can be recommended."
    nearest = min(judged, key=lambda name: matrix.verdicts[name].shortfall)
    verdict = matrix.verdicts[nearest]
    where = matrix.titles[verdict.shortfall_in]
    return (
        f"No weighting is {asked}. The nearest is {nearest}, which misses that by {100 * verdict.shortfall:.2f} points "
        f"in the scenario {where}."
    )


def _strict(matrix: Matrix) -> str:
    never = [name for name, verdict in matrix.verdicts.items() if not (verdict.worse or verdict.missing)]
    never = [name for name in matrix.weightings if name in never and name != REFERENCE]
    return f"In no scenario shown to be worse than {REFERENCE} (95 % interval below 0): {summary.text(never)}."


def tables(matrix: Matrix) -> list[Table]:
    """The tables that fit a terminal: scenarios, and the verdict on every weighting."""
    return [_scenarios(matrix), _verdicts(matrix)]


def _scenarios(matrix: Matrix) -> Table:
    rows = []
    for scenario, title in matrix.titles.items():
        best = matrix.best[scenario]
        plain, top = matrix.entries.get((scenario, REFERENCE)), matrix.entries[scenario, best]
        shown = NONE if plain is None else number(100, 2)(plain.accuracy, "")
        rate = f"{matrix.rates[scenario]:g}"
        rows.append((title, rate, shown, best, number(100, 2)(top.accuracy, ""), _interval(top.versus)))
    note = "Test accuracy, mean ± standard deviation over seeds; the difference is in points, with its 95 % interval."
    heads = ("scenario", "rate", f"{REFERENCE} (%)", "best", "its accuracy (%)", f"minus {REFERENCE}")
    return Table("The scenarios", note, heads, (tuple(rows),))


def _interval(d: Statistic) -> str:
    if not d.n:
        return NONE
    shown = signed(100 * d.mean, 2)
    return f"{shown} (too few seeds)" if d.too_few else f"{shown} ({interval(d)})"


def _verdicts(matrix: Matrix) -> Table:
    rows = [_verdict(matrix, name, matrix.verdicts[name]) for name in matrix.weightings]
    asked = f"Recommended: none below, no gap over {POINT}; else by how many points it misses that. "
    asked = asked if matrix.recommend else ""
    note = (
        f"Of {len(matrix.titles)} scenarios. Worse: the paired 95 % interval of the difference from {REFERENCE} lies "
        f"below 0. Below: by more than the standard deviation of {REFERENCE} over seeds. Gap: to the best weighting of "
        f"the scenario, where that is largest. {asked}Round: median time over that of {REFERENCE}, mean over "
        "scenarios, indicative only if other work ran beside."
    )
    heads = ("weighting", "worse", "below", "gap", "in", *(("recommended",) if matrix.recommend else ()), "round")
    return Table("The weightings", note, heads, (tuple(rows),), spare=("round",))


def _verdict(matrix: Matrix, name: str, verdict: Verdict) -> tuple[str, ...]:
    if verdict.missing:
        said = f"{len(verdict.missing)} missing"
    else:
        said = "yes" if verdict.recommended else f"misses by {100 * verdict.shortfall:.2f}"
    times = [
        matrix.entries[s, name].metrics["seconds"].mean / matrix.entries[s, REFERENCE].metrics["seconds"].mean
        for s in matrix.titles
        if (s, name) in matrix.entries and (s, REFERENCE) in matrix.entries
    ]
    return (
        name,
        str(len(verdict.worse)),
        str(len(verdict.below)),
        NONE if math.isnan(verdict.gap) else f"{100 * verdict.gap:.2f}",
        matrix.titles.get(verdict.gap_in, NONE),
        *((said,) if matrix.recommend else ()),
        f"{sum(times) / len(times):.2f}" if times else NONE,
    )


def _by_scenario(matrix: Matrix, title: str, note: str, show: Callable[[Entry], str]) -> Table:
    """A table of weightings by scenarios."""

    def cell(scenario: str, weighting: str) -> str:
        entry = matrix.entries.get((scenario, weighting))
        if entry is None:
            return NONE
        part = f" ({entry.accuracy.n} of {len(matrix.seeds)})" if entry.accuracy.n < len(matrix.seeds) else ""
        return show(entry) + part

    rows = [(name, *(cell(scenario, name) for scenario in matrix.titles)) for name in matrix.weightings]
    return Table(title, note, ("weighting", *matrix.titles.values()), (tuple(rows),))


def _wide(matrix: Matrix) -> list[Table]:
    spread = "Mean ± standard deviation over seeds."

    def shown(metric: str, scale: float, decimals: int) -> Callable[[Entry], str]:
        return lambda entry: _finite(number(scale, decimals), entry.metrics[metric])

    return [
        _by_scenario(matrix, "Test accuracy (%)", spread, shown("test_accuracy", 100, 2)),
        _by_scenario(matrix, "Test loss", f"{spread} Mean cross-entropy in nats.", shown("test_loss", 1, 3)),
        _by_scenario(
            matrix, "Calibration", f"{spread} Expected calibration error in %; 0 is perfect.", shown("test_ece", 100, 2)
        ),
        _by_scenario(
            matrix,
            "Weights",
            "Lightest and heaviest mean weight of a replica over rounds and seeds, times K: 1 is an equal share.",
            lambda entry: f"{_times_k(entry).min():.2f} to {_times_k(entry).max():.2f}",
        ),
    ]


def _times_k(entry: Entry) -> summary.Floats:
    return len(entry.weights) * entry.weights


def _finite(show: Callable[[Statistic, str], str], value: Statistic) -> str:
    return show(value, "") if value.n else "not finite"


def _setup(matrix: Matrix) -> Table:
    h = matrix.headers[0]
    s = h["settings"]
    rows = [
        ("data set", str(h["dataset"])),
        ("splits", f"train {h['train_samples']:,}, held-out {h['heldout_samples']:,}, test {h['test_samples']:,}"),
        ("network", f"{h['parameters']:,} parameters"),
        ("replicas", str(s.get("replicas"))),
        _length(s),
        ("seeds", summary.text(matrix.seeds)),
        *(("hardware", pairs(found)) for found in summary.distinct(header["hardware"] for header in matrix.headers)),
        *(("versions", pairs(found)) for found in summary.distinct(header["versions"] for header in matrix.headers)),
    ]
    return Table("Setup", "", ("setting", "value"), (tuple(rows),))


def _length(settings: Row) -> tuple[str, str]:
    """How long the cells train: recordings over H share the local steps, the others the rounds too."""
    batch = f"with batch size {settings.get('batch_size')}"
    if "total_steps" in settings:
        return "local steps", f"{settings['total_steps']:,} {batch}"
    return "rounds", f"{settings.get('rounds')} of {settings.get('local_steps')} local steps {batch}"


def markdown(matrix: Matrix, drawn: Sequence[Plot]) -> str:
    """The report as Markdown; images are named `plots/NAME.png`."""
    settings = matrix.headers[0]["settings"]
    flags = [f"--{name}={flag(value)}" for name, value in settings.items() if value is not None]
    head = [f"# {escape(_heading(matrix))}", escape(dated(matrix.headers))]
    head += ["\n".join(f"- {escape(line)}" for line in findings(matrix))]
    for plot in drawn:
        head += [f"## {plot.title}", image(plot), escape(plot.caption)]
    parts = []
    for table in tables(matrix) + _wide(matrix):
        parts += [f"## {escape(table.title)}", markdown_table(table), escape(table.note)]
    parts += ["## Setup", markdown_table(_setup(matrix), numbers=False), "Flags that all cells share:"]
    parts += ["```\n" + "\n".join(flags) + "\n```", *AGAIN]
    return document(head, parts)


def _heading(matrix: Matrix) -> str:
    sizes = f"{len(matrix.weightings)} weightings in {len(matrix.titles)} scenarios"
    return f"{sizes}: {matrix.headers[0]['dataset']}, {seeds(len(matrix.seeds))}"


def write(folder: pathlib.Path, rows: Sequence[Row]) -> tuple[list[Group], list[pathlib.Path]]:
    """Writes `report.md`, `report.html` and `plots/matrix.png` into a folder, each as a whole or not at all.

    Args:
      folder: made if it is missing.
      rows: the rows of a matrix; see `wavg_jax.reporting.matrix.tabulate`.

    Returns:
      What a terminal shows, and the files written.

    Raises:
      DataError: the rows are not those of one matrix.
      WorkdirError: the folder cannot be written.
    """
    matrix = tabulate(rows)
    drawn = [heatmap.draw(matrix)]
    files = write_files(folder, _heading(matrix), markdown(matrix, drawn), drawn)
    return [terminal(_heading(matrix), tables(matrix), findings(matrix))], files
