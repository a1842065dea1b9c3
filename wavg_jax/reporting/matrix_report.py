"""The report on a scenario matrix: the heat map, tables, and which weighting can be recommended, from rows alone."""

import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Group

from wavg_jax.reporting.canvas import Plot
from wavg_jax.reporting.document import Caller, assemble, bullets, dated, image_link, write_files
from wavg_jax.reporting.findings import by_chance
from wavg_jax.reporting.heatmap import NONE, draw_matrix
from wavg_jax.reporting.matrix import AIMED, MARGIN, Entry, Matrix, Verdict
from wavg_jax.reporting.page import html_fragment
from wavg_jax.reporting.recovery_report import draw_recovery, left_tables, recovery_tables
from wavg_jax.reporting.series import draw_series, series_of
from wavg_jax.reporting.statistic import Floats, Statistic
from wavg_jax.reporting.tables import TextTable, escape, markdown_table
from wavg_jax.reporting.terminal import terminal_block
from wavg_jax.reporting.wording import distinct, in_words, interval, mean_sd, name_value_pairs, seeds, signed
from wavg_jax.storage.schema import Row

POINT = f"{100 * MARGIN:g} point"


class MatrixReport(NamedTuple):
    """The report on a matrix; a notebook shows its sentences and tables, and so does `rich.print`.

    Attributes:
      matrix: the statistics.
      caller: what the rows do not say.
    """

    matrix: Matrix
    caller: Caller = Caller()

    def figures(self) -> tuple[Plot, ...]:
        """Draws the heat map, what is recovered where an oracle is recorded, and lines where scenarios are values of a
        quantity; a notebook shows them."""
        shares = (draw_recovery(self.matrix),) if any(one.shares for one in self.matrix.recovered.values()) else ()
        series = series_of(self.matrix.headers)
        recorded = series is not None and sum(scenario in self.matrix.titles for scenario in series.at) > 1
        lines = (draw_series(self.matrix, series),) if series is not None and recorded else ()
        return (*shares, *lines, draw_matrix(self.matrix))

    def write(self, folder: str | pathlib.Path) -> list[pathlib.Path]:
        """Writes `report.md`, `report.html` and `plots/matrix.png`, each file whole or not at all.

        Args:
          folder: made if it is missing.

        Returns:
          The files written.

        Raises:
          WorkdirError: the folder cannot be written.
        """
        drawn = self.figures()
        return write_files(folder, _heading(self.matrix), self.markdown(*drawn), drawn)

    def markdown(self, *drawn: Plot) -> str:
        """The report as Markdown; `plots/NAME.png` names the plot NAME."""
        matrix = self.matrix
        head = [*_head(matrix, escape(dated(matrix.headers)))]
        for plot in drawn:
            head += [f"## {plot.title}", image_link(plot), escape(plot.caption)]
        parts = [*_tables(matrix), "## Setup", markdown_table(_setup(matrix), numbers=False)]
        parts += ["Settings that all cells share:", self.caller.settings(matrix.headers[0]["settings"])]
        return assemble(head, parts, self.caller)

    def __rich__(self) -> Group:
        return Group(terminal_block(_heading(self.matrix), matrix_tables(self.matrix), matrix_sentences(self.matrix)))

    def _repr_html_(self) -> str:
        return html_fragment("\n\n".join([*_head(self.matrix), *_tables(self.matrix)]))


def _head(matrix: Matrix, *below: str) -> list[str]:
    return [f"# {escape(_heading(matrix))}", *below, bullets(matrix_sentences(matrix))]


def _tables(matrix: Matrix) -> list[str]:
    return [
        part
        for table in matrix_tables(matrix) + _wide(matrix)
        for part in (f"## {escape(table.title)}", markdown_table(table), escape(table.note))
    ]


def _heading(matrix: Matrix) -> str:
    sizes = f"{len(matrix.weightings)} weightings in {len(matrix.titles)} scenarios"
    return f"{sizes}: {matrix.headers[0]['dataset']}, {matrix.repeated}"


def matrix_sentences(matrix: Matrix) -> list[str]:
    """What the matrix says, in sentences."""
    reference = matrix.reference
    lines = [_recommendation(matrix)] if matrix.recommend else []
    lines += [_strict(matrix)]
    if matrix.lacking:
        lines.append(f"{matrix.lacking} cells of the matrix are not recorded; the rest is judged without them.")
    n = len(matrix.seeds)
    if n <= 2:
        shown = f"{seeds(n)} {'is' if n == 1 else 'are'}"
        lines.append(f"{shown} too few seeds to show a difference: what is not marked may still differ.")
    others = [name for name in matrix.weightings if name != reference]
    compared = sum(not entry.versus.too_few for (_, name), entry in matrix.entries.items() if name in others)
    lines += by_chance(compared, reference)
    lines += [
        "The best of many means is a little too high by chance, so the gaps to it are a little too large.",
        f"Every weighting ran in every scenario at the rate and weight decay that were best for it {_tuned(matrix)}on "
        "other seeds and samples."
        if matrix.roles
        else f"All weightings of a scenario ran at one learning rate. If that rate was tuned for {reference}, it "
        f"flatters {reference}: a weighting that tolerates higher rates gets no credit for it.",
        "The seed also decides the shards, so seeds differ most where shards do; hence differences are paired by seed.",
    ]
    return lines


def _tuned(matrix: Matrix) -> str:
    """Where the weightings were tuned, if not each in the scenario itself."""
    name = matrix.headers[0]["settings"].get("tuned_in")
    return f"in {matrix.titles.get(name, name)}, " if name else ""


def _recommendation(matrix: Matrix) -> str:
    reference = matrix.reference
    if matrix.recommended:
        return (
            f"Recommended: {in_words(matrix.recommended)}, never behind {reference} by more than its standard "
            f"deviation over seeds, nor behind the best weighting of a scenario by more than {POINT}."
        )
    judged = [name for name in matrix.weightings if not matrix.verdicts[name].missing]
    if not judged:
        return "No weighting is recorded in every scenario with two seeds or more yet: none can be recommended."
    nearest = min(judged, key=lambda name: matrix.verdicts[name].shortfall)
    verdict = matrix.verdicts[nearest]
    where = matrix.titles[verdict.shortfall_in]
    return (
        f"None can be recommended: each is somewhere behind {reference} by more than its standard deviation over "
        f"seeds, or behind the best weighting by more than {POINT}. The nearest is {nearest}, which misses that by "
        f"{100 * verdict.shortfall:.2f} points in the scenario {where}."
    )


def _strict(matrix: Matrix) -> str:
    never = [name for name, verdict in matrix.verdicts.items() if not (verdict.worse or verdict.missing)]
    never = [name for name in matrix.weightings if name in never and name != matrix.reference]
    return f"Shown to be worse than {matrix.reference} in no scenario (95 % interval below 0): {in_words(never)}."


def matrix_tables(matrix: Matrix) -> list[TextTable]:
    """The tables that fit a terminal: what is recovered, scenarios, and the verdict on every weighting."""
    return [*recovery_tables(matrix), _scenarios(matrix), _verdicts(matrix)]


def _scenarios(matrix: Matrix) -> TextTable:
    rows = []
    for scenario, title in matrix.titles.items():
        best = matrix.best[scenario]
        base, top = matrix.entries.get((scenario, matrix.reference)), matrix.entries[scenario, best]
        shown = NONE if base is None else mean_sd(base.accuracy, 100, 2)
        rate = " to ".join(
            f"{rate:g}" for rate in dict.fromkeys((matrix.rates[scenario][0], matrix.rates[scenario][-1]))
        )
        rows.append((title, rate, shown, best, mean_sd(top.accuracy, 100, 2), _interval(top.versus)))
    note = "Test accuracy, mean ± standard deviation over seeds; the difference is in points, with its 95 % interval."
    heads = ("scenario", "rate", f"{matrix.reference} (%)", "best", "its accuracy (%)", f"minus {matrix.reference}")
    return TextTable("The scenarios", note, heads, (tuple(rows),))


def _interval(d: Statistic) -> str:
    if not d.n:
        return NONE
    shown = signed(100 * d.mean, 2)
    return f"{shown} (too few seeds)" if d.too_few else f"{shown} ({interval(d)})"


def _verdicts(matrix: Matrix) -> TextTable:
    rows = [_verdict(matrix, name, matrix.verdicts[name]) for name in matrix.weightings]
    asked = f"Recommended: none below, no gap over {POINT}; otherwise the points by which it misses that. "
    asked, reference = asked if matrix.recommend else "", matrix.reference
    note = (
        f"Of {len(matrix.titles)} scenarios. Worse: the paired 95 % interval of the difference from {reference} lies "
        f"below 0. Below: by more than the standard deviation of {reference} over seeds. Gap: to the best weighting of "
        f"the scenario, where that is largest. {asked}Round: median time relative to {reference}, mean over scenarios; "
        "indicative only if the machine did other work."
    )
    heads = ("weighting", "worse", "below", "gap", "in", *(("recommended",) if matrix.recommend else ()), "round")
    return TextTable("The weightings", note, heads, (tuple(rows),), spare=("round",))


def _verdict(matrix: Matrix, name: str, verdict: Verdict) -> tuple[str, ...]:
    if verdict.missing:
        said = f"{len(verdict.missing)} missing"
    else:
        said = "yes" if verdict.recommended else f"misses by {100 * verdict.shortfall:.2f}"
    base = matrix.reference
    times = [
        matrix.entries[s, name].metrics["seconds"].mean / matrix.entries[s, base].metrics["seconds"].mean
        for s in matrix.titles
        if (s, name) in matrix.entries and (s, base) in matrix.entries
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


def _by_scenario(matrix: Matrix, title: str, note: str, show: Callable[[Entry], str]) -> TextTable:
    """A table of weightings by scenarios."""

    def cell(scenario: str, weighting: str) -> str:
        entry = matrix.entries.get((scenario, weighting))
        if entry is None:
            return NONE
        most = matrix.repeats(scenario)
        part = f" ({entry.accuracy.n} of {most})" if entry.accuracy.n < most else ""
        return show(entry) + part

    rows, controls = (
        tuple((name, *(cell(scenario, name) for scenario in matrix.titles)) for name in names)
        for names in (matrix.weightings, matrix.controls)
    )
    return TextTable(title, note, ("weighting", *matrix.titles.values()), (rows, controls) if controls else (rows,))


def _wide(matrix: Matrix) -> list[TextTable]:
    spread = "Mean ± standard deviation over seeds."

    def shown(metric: str, scale: float, decimals: int) -> Callable[[Entry], str]:
        return lambda entry: _finite(entry.metrics[metric], scale, decimals)

    aimed = _by_scenario(
        matrix,
        "Attack success (%)",
        f"{spread} Of the test samples that attackers aim at, those that get the label they want.",
        lambda entry: _finite(entry.metrics[AIMED], 100, 2) if AIMED in entry.metrics else NONE,
    )
    return [
        *left_tables(matrix),
        _by_scenario(matrix, "Test accuracy (%)", spread, shown("test_accuracy", 100, 2)),
        *([aimed] if any(AIMED in entry.metrics for entry in matrix.entries.values()) else []),
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


def _times_k(entry: Entry) -> Floats:
    return len(entry.weights) * entry.weights


def _finite(value: Statistic, scale: float, decimals: int) -> str:
    return mean_sd(value, scale, decimals) if value.n else "not finite"


def _setup(matrix: Matrix) -> TextTable:
    h = matrix.headers[0]
    s = h["settings"]
    rows = [
        ("data set", str(h["dataset"])),
        ("splits", f"train {h['train_samples']:,}, held-out {h['heldout_samples']:,}, test {h['test_samples']:,}"),
        ("network", f"{h['parameters']:,} parameters"),
        ("replicas", str(s.get("replicas"))),
        _length(s),
        ("seeds", in_words(matrix.seeds)),
        *(("hardware", name_value_pairs(found)) for found in distinct(header["hardware"] for header in matrix.headers)),
        *(("versions", name_value_pairs(found)) for found in distinct(header["versions"] for header in matrix.headers)),
    ]
    return TextTable("Setup", "", ("setting", "value"), (tuple(rows),))


def _length(settings: Row) -> tuple[str, str]:
    """How long the cells train: recordings over H share the number of local steps, others that of rounds too."""
    batch = f"with batch size {settings.get('batch_size')}"
    if "total_steps" in settings:
        return "local steps", f"{settings['total_steps']:,} {batch}"
    return "rounds", f"{settings.get('rounds')} of {settings.get('local_steps')} local steps {batch}"
