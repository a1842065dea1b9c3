"""A report of recorded runs: tables for the terminal, `report.md`, and a `report.html` that needs no other file.

Everything is made from the rows alone, so a report can be built again at any time, byte for byte.
"""

import base64
import html as html_escape
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text
from markdown_it import MarkdownIt

from wavg_jax import plots, records, summary
from wavg_jax.findings import findings
from wavg_jax.plots import Plot
from wavg_jax.summary import REFERENCE, Arm, Row, Statistic, Summary

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


class Column(NamedTuple):
    """A column of statistics: its heading with the unit, the metric, and how a statistic reads in it."""

    title: str
    metric: str
    show: Callable[[Statistic, str], str]


class Table(NamedTuple):
    """A table as text: first the arms, then their differences from the reference.

    Attributes:
      title: heading.
      note: how to read it.
      columns: headings; the first column holds names.
      sections: rows of cells, in groups.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    sections: tuple[tuple[tuple[str, ...], ...], ...]


def number(scale: float = 1.0, decimals: int | None = None, *, exact: bool = False) -> Callable[[Statistic, str], str]:
    """Shows `mean ± sd`, with three significant digits unless `decimals` says otherwise.

    `exact` leaves out the spread of what is counted, or taken once for all seeds, and so has none.

    >>> number(scale=100, decimals=2)(Statistic(0.8412, 0.0031, 3), "")
    '84.12 ± 0.31'
    >>> number()(Statistic(0.0123, float("nan"), 1), "+")
    '+0.0123 ± n/a'
    """

    def show(value: Statistic, sign: str) -> str:
        mean, sd = scale * value.mean, scale * value.sd
        size = max(abs(mean), 0.0 if math.isnan(sd) else sd)
        places = decimals
        if places is None:
            places = min(max(2 - math.floor(math.log10(size)), 0), 6) if size > 0 else 0
        shown = f"{mean:{sign}z,.{places}f}"
        if sd > 0:
            return f"{shown} ± {sd:,.{places}f}"
        return shown if exact else f"{shown} ± n/a" if math.isnan(sd) else f"{shown} ± 0"

    return show


QUALITY = (
    Column("accuracy (%)", "accuracy", number(100, 2)),
    Column("loss", "loss", number(decimals=4)),
    Column("macro-F1 (%)", "macro_f1", number(100, 2)),
    Column("ECE (%)", "ece", number(100, 2)),
)
TARGET = (
    Column("samples", "samples_to_target", number(decimals=0)),
    Column("measured (s)", "measured_to_target", number()),
    Column("computed (s)", "critical_to_target", number()),
)
COST = (
    Column("compiling (s)", "compile_seconds", number(exact=True)),
    Column("round, measured (s)", "seconds_per_round", number()),
    Column("round, computed (s)", "critical_round", number(exact=True)),
    Column("sent (MB/round)", "bytes_per_round", number(1e-6, exact=True)),
)


def tables(one: Summary) -> list[Table]:
    """The tables of a scenario, as text."""
    target = f"{100 * one.target:.4g} %" if math.isfinite(one.target) else "the target (none was set)"
    spread = "Mean ± sample standard deviation over seeds."
    if any(arm.differences for arm in one.arms):
        spread += f" Below: differences from {REFERENCE}, paired by seed, over the seeds that both have."
    result = [
        Table(
            "Final quality on the test split",
            f"{spread} ECE: expected calibration error.",
            ("arm", "seeds", *(column.title for column in QUALITY)),
            _sections(one, QUALITY, "accuracy", reached=False),
        ),
        Table(
            f"To {target} test accuracy",
            "Up to the first round that reaches it; means over the seeds that do. Measured: wall time on this "
            "hardware, compilation apart. Computed, not measured: the critical path that one device per replica "
            f"would take, that is rounds to target {TIMES} the measured time of one replica's local phase, scoring and "
            "blend; the network between devices is not in it.",
            ("arm", "reached by", *(column.title for column in TARGET)),
            _sections(one, TARGET, "rounds_to_target", reached=True),
        ),
        Table(
            "Cost",
            "Compiling is measured, and in no other column. A round: on the measured and on the computed clock, as "
            "above. What is taken once for all seeds has no spread. Sent: by all replicas together, and received.",
            ("arm", "seeds", *(column.title for column in COST)),
            _sections(one, COST, "seconds_per_round", reached=False),
        ),
    ]
    weighted = [_weights_row(arm) for arm in one.arms if arm.weights is not None]
    if weighted:
        note = (
            "Effective number of replicas: 1 / sum of squared weights, K when all count the same. Lightest and "
            f"heaviest: mean weight of a replica over its rounds and seeds {TIMES} K, so 1 is an equal share."
        )
        heads = ("arm", "K", "effective, mean", "effective, lowest", "lightest", "heaviest")
        result.append(Table("Weights", note, heads, (tuple(weighted),)))
    return result


def _sections(
    one: Summary, columns: Sequence[Column], counted: str, *, reached: bool
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    arms, differences = [], []
    for arm in one.arms:
        seeds, count = len(arm.runs), arm.metrics[counted].n
        # An arm that never gets there differs from one whose clock was not measured.
        missing = ("not reached" if math.isfinite(one.target) else "no target") if reached and not count else None
        cells = [missing or _cell(column, arm.metrics, count if reached else seeds) for column in columns]
        arms.append((arm.name, f"{count} of {seeds}" if reached else str(seeds), *cells))
        pairs = arm.differences[counted].n if arm.differences else 0
        if pairs:
            cells = [_cell(column, arm.differences, pairs, "+") for column in columns]
            differences.append((f"{arm.name} {MINUS} {REFERENCE}", str(pairs), *cells))
    return tuple(tuple(section) for section in (arms, differences) if section)


def _cell(column: Column, metrics: Mapping[str, Statistic], expected: int, sign: str = "") -> str:
    value = metrics[column.metric]
    if value.n == 0:
        return "not finite" if column in QUALITY else "not measured"
    return column.show(value, sign) + (f" ({value.n} of {expected})" if value.n < expected else "")


def _weights_row(arm: Arm) -> tuple[str, ...]:
    assert arm.weights is not None
    w, k = arm.weights, len(arm.weights.mean)
    order = np.argsort(w.mean)[: max(np.isfinite(w.mean).sum(), 1)]  # a replica that was never alive sorts last
    ends = [f"{k * w.mean[i]:.2f} (replica {i})" for i in (order[0], order[-1])]
    return (arm.name, str(k), f"{w.effective_mean:.2f}", f"{w.effective_min:.2f}", *ends)


def terminal_table(one: Summary) -> rich.console.Group:
    """The tables and findings of a scenario, for `rich.print`; they fit 100 columns."""
    return terminal(_heading(one), tables(one), findings(one))


def terminal(heading: str, shown_tables: Sequence[Table], lines: Sequence[str]) -> rich.console.Group:
    """Tables under a heading, then sentences, for `rich.print`."""
    parts: list[rich.console.RenderableType] = [rich.text.Text(f"\n{heading}", style="bold")]
    for table in shown_tables:
        shown = rich.table.Table(box=rich.box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
        for index, title in enumerate(table.columns):
            shown.add_column(title, justify="right" if index else "left", no_wrap=not index)
        for section in table.sections:
            for row in section:
                shown.add_row(*map(rich.text.Text, row))
            shown.add_section()
        parts += [rich.text.Text(f"\n{table.title}\n", style="bold"), shown, rich.text.Text(table.note, style="dim")]
    bullets = rich.table.Table.grid(padding=(0, 1))
    for line in lines:
        bullets.add_row("-", rich.text.Text(line))
    return rich.console.Group(*parts, "", bullets)


def markdown(summaries: Sequence[Summary], drawn: Sequence[Sequence[Plot]]) -> str:
    """The report as Markdown; images are named `plots/NAME.png`.

    Args:
      summaries: one for each scenario.
      drawn: the plots of each scenario.
    """
    several = f"The runs were made under {len(summaries)} different settings; each has its own section."
    parts = ["# Report of training with replicas", *([several] if len(summaries) > 1 else [])]
    for one, own in zip(summaries, drawn, strict=True):
        parts += [f"## {escape(_heading(one))}", "\n".join(f"- {escape(line)}" for line in findings(one))]
        for table in tables(one):
            parts += [f"### {escape(table.title)}", markdown_table(table), escape(table.note)]
        for plot in own:
            parts += [f"### {plot.title}", f"![{plot.title}](plots/{plot.name}.png)", escape(plot.caption)]
        parts += ["### Setup", markdown_table(_setup(one)), *_flag_lists(one)]
    parts += [
        "## Build it again",
        "From the recorded rows alone, where each DIR holds a `rows.jsonl`:",
        "```\npython -m experiments.report DIR...\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _heading(one: Summary) -> str:
    noisy, k = one.header["noisy_shards"], one.header["replicas"]
    head = f"{one.header['dataset']}, {k} replica{'s' if k > 1 else ''}"
    head += f", noisy shards {summary.text(noisy)}" if noisy else ", no noisy shards"
    return f"{head} ({one.label})" if one.label else head


def _setup(one: Summary) -> Table:
    h = one.header
    sizes = h["shard_sizes"]
    shards = f"{len(sizes)} of {min(sizes):,} to {max(sizes):,} samples" if sizes else "none"
    weighting = [f"{arm.name}: {summary.text(arm.runs[0].header.get('weighting'))}" for arm in one.arms]
    seeds = [f"{arm.name}: {summary.text(arm.seeds)}" for arm in one.arms]
    rows = [
        ("data set", f"{h['dataset']}, {h['classes']} classes"),
        ("splits", f"train {h['train_samples']:,}, held-out {h['heldout_samples']:,}, test {h['test_samples']:,}"),
        ("shards", f"{shards}; noisy: {summary.text(h['noisy_shards'])}"),
        ("network", f"{h['parameters']:,} parameters"),
        ("rounds", f"{h['rounds']} of {h['local_steps']} local steps with batch size {h['batch_size']}"),
        ("samples", f"{h['samples_per_round']:,} a round"),
        ("target accuracy", f"{100 * one.target:.4g} %" if math.isfinite(one.target) else "none"),
        ("weighting", "; ".join(weighting)),
        ("seeds", "; ".join(seeds)),
        *(("hardware", pairs(hardware)) for hardware in summary.distinct(r.header["hardware"] for r in one.runs)),
        *(("versions", pairs(versions)) for versions in summary.distinct(r.header["versions"] for r in one.runs)),
    ]
    return Table("Setup", "", ("setting", f"value (local steps, batch and shards: of arm {h['arm']})"), (tuple(rows),))


def _flag_lists(one: Summary) -> list[str]:
    parts = []
    if one.settings:
        lines = [f"--{name}={flag(value)}" for name, value in one.settings.items() if value is not None]
        parts += ["Flags that all runs share, besides rounds and seeds above:", "```\n" + "\n".join(lines) + "\n```"]
    if one.varying:
        lines = [f"--{n}: " + " | ".join(flag(value) for value in values) for n, values in one.varying.items()]
        parts += ["Flags that differ between the runs:", "```\n" + "\n".join(lines) + "\n```"]
    return parts


def flag(value: Any) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def pairs(mapping: Row) -> str:
    """Names and values as a reader reads them."""
    return ", ".join(f"{name} {value}" for name, value in mapping.items() if value is not None)


def escape(text: str) -> str:
    """Text as it stands, where Markdown would see markup."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))


def markdown_table(table: Table) -> str:
    """A table as Markdown."""
    align = "|:--" * 2 if table.title == "Setup" else "|:--" + "|--:" * (len(table.columns) - 1)
    lines = ["| " + " | ".join(map(escape, table.columns)) + " |", align + "|"]
    for index, section in enumerate(table.sections):
        for name, *cells in section:
            first = f"*{escape(name)}*" if index else escape(name)
            lines.append(f"| {first} | " + " | ".join(map(escape, cells)) + " |")
    return "\n".join(lines)


STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --rule: #d5d5d5; --soft: #f4f4f2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #17181a; --rule: #3c3f43; --soft: #222427; }
}
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
  max-width: 900px; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 3rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule); }
h3 { margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--rule); white-space: nowrap; font-size: 15px; }
th { border-bottom-width: 2px; }
td:nth-child(2):last-child { white-space: normal; }
img { max-width: 100%; background: #ffffff; }
pre { background: var(--soft); padding: .7rem 1rem; overflow-x: auto; font-size: 14px; }
"""


def html(summaries: Sequence[Summary], drawn: Sequence[Sequence[Plot]]) -> str:
    """The same report as one HTML page with its images and style inside: no script, no link to anything.

    Args:
      summaries: one for each scenario.
      drawn: the plots of each scenario.
    """
    return page(_heading(summaries[0]), markdown(summaries, drawn), [plot for own in drawn for plot in own])


def page(title: str, text: str, drawn: Sequence[Plot]) -> str:
    """Markdown as one HTML page, in which the images that it names `plots/NAME.png` are embedded.

    Args:
      title: of the page.
      text: Markdown.
      drawn: the images.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for plot in drawn:
        image = base64.b64encode(plot.png).decode()
        body = body.replace(f'src="plots/{plot.name}.png"', f'src="data:image/png;base64,{image}"')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html_escape.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def write(folder: pathlib.Path, rows: Sequence[Row]) -> list[pathlib.Path]:
    """Writes `report.md`, `report.html` and `plots/*.png` into a folder, each as a whole or not at all.

    Args:
      folder: made if it is missing.
      rows: the rows of any number of runs, in the order in which they were recorded.

    Returns:
      The files written.

    Raises:
      DataError: the rows are incomplete or do not fit together.
      WorkdirError: the folder cannot be written.
    """
    summaries = summary.summarise(rows)
    drawn = [plots.draw(one) for one in summaries]
    if len(summaries) > 1:
        drawn = [
            tuple(plot._replace(name=f"{index}-{plot.name}") for plot in own) for index, own in enumerate(drawn, 1)
        ]
    files = {folder / "plots" / f"{plot.name}.png": plot.png for own in drawn for plot in own}
    files[folder / "report.md"] = markdown(summaries, drawn).encode()
    files[folder / "report.html"] = html(summaries, drawn).encode()
    for path, content in files.items():
        records.write_atomically(path, content)
    return list(files)
