"""A report of recorded runs: tables for the terminal, `report.md`, and a `report.html` that needs no other file.

Everything is made from the rows alone, so a report can be built again at any time, byte for byte.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Group

from wavg_jax.reporting import headline, plots, summary
from wavg_jax.reporting.canvas import Plot
from wavg_jax.reporting.findings import answer, caveats, findings
from wavg_jax.reporting.page import contents, page
from wavg_jax.reporting.summary import Row, Summary
from wavg_jax.reporting.tables import Table, escape, markdown_table, tables
from wavg_jax.reporting.terminal import terminal
from wavg_jax.storage import rows as records

QUESTION = "Did weighting help?"
BEWARE = "What to beware of"
CLOCKS = {
    "measured": "wall time on this hardware, in which all replicas share what devices there are; compilation and the "
    "test split are on no clock",
    "computed": "the critical path, computed from parts measured on this hardware: what one device for each replica "
    "would take for the same rounds; the network between them is not in it",
}


def terminal_table(one: Summary) -> Group:
    """The tables and findings of a scenario, for `rich.print`."""
    return terminal(_heading(one), tables(one), findings(one))


def terminal_report(summaries: Sequence[Summary]) -> list[Group]:
    """The tables of every scenario, for `rich.print`, and at the end, where a terminal's reader looks, the answer."""
    conclusion, *numbers = answer(summaries)
    return [
        *map(terminal_table, summaries),
        terminal(BEWARE, (), caveats(summaries)),
        terminal(f"{QUESTION} {conclusion}", (), numbers),
    ]


def markdown(summaries: Sequence[Summary], first: Plot, drawn: Sequence[Sequence[Plot]]) -> str:
    """The report as Markdown; images are named `plots/NAME.png`.

    Args:
      summaries: one for each scenario.
      first: the plot that stands at the top.
      drawn: the plots of each scenario.
    """
    conclusion, *numbers = answer(summaries)
    head = [
        "# Report of training with replicas",
        escape(dated([run.header for one in summaries for run in one.runs])),
        f"## {QUESTION}",
        f"**{escape(conclusion)}**",
        image(first),
        escape(first.caption),
        *(["\n".join(f"- {escape(line)}" for line in numbers)] if numbers else []),
    ]
    parts = ["## What is compared", _definitions(summaries), f"### {BEWARE}"]
    parts += ["\n".join(f"- {escape(line)}" for line in caveats(summaries))]
    for name, one, own in zip(summary.names(summaries), summaries, drawn, strict=True):
        parts += [f"## {escape(name[0].upper() + name[1:])}", escape(f"{_heading(one)}.")]
        parts += ["\n".join(f"- {escape(line)}" for line in findings(one))]
        for table in tables(one):
            parts += [f"### {escape(table.title)}", markdown_table(table), escape(table.note)]
        for plot in own:
            parts += [f"### {escape(plot.title)}", image(plot), escape(plot.caption)]
        parts += ["### Setup", markdown_table(_setup(one), numbers=False), *_flag_lists(one)]
    parts += AGAIN
    return document(head, parts)


def document(head: Sequence[str], parts: Sequence[str]) -> str:
    """The text of a report: what comes first, then what else there is, then that."""
    return "\n\n".join([*head, "## Contents", contents(parts), *parts]) + "\n"


AGAIN = (
    "## Build it again",
    "From the recorded rows alone, where each DIR holds a `rows.jsonl`:",
    "```\npython -m experiments.report DIR...\n```",
)


def image(plot: Plot) -> str:
    """A plot in Markdown."""
    return f"![{escape(plot.title)}](plots/{plot.name}.png)"


def dated(headers: Sequence[Row]) -> str:
    """When what is reported was made, as far as the rows say."""
    days = sorted({str(header["started"])[:10] for header in headers if header.get("started")})
    if not days:
        return "When the runs were made is not recorded."
    span = f"on {days[0]}" if len(days) == 1 else f"from {days[0]} to {days[-1]}"
    rest = "" if all(header.get("started") for header in headers) else "; of some it is not recorded"
    return f"The runs were started {span} (UTC){rest}."


def _definitions(summaries: Sequence[Summary]) -> str:
    """What the arms and the clocks are, in a line each."""
    found = {arm.name for one in summaries for arm in one.arms}
    terms = {name: meaning for name, meaning in summary.KNOWN_ARMS.items() if name in found} | CLOCKS
    lines = [f"- **{name}**: {escape(meaning)}." for name, meaning in terms.items()]
    intro = "All arms see the same number of training samples in a round. Arms first, then the two clocks:"
    return "\n".join([intro, "", *lines])


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
    first = headline.draw(summaries)
    every, text = [first, *(plot for own in drawn for plot in own)], markdown(summaries, first, drawn)
    return write_files(folder, _heading(summaries[0]), text, every)


def write_files(folder: pathlib.Path, title: str, text: str, drawn: Sequence[Plot]) -> list[pathlib.Path]:
    """Writes a report in Markdown as it is, as a page, and its plots; returns the files."""
    files = {folder / "plots" / f"{plot.name}.png": plot.png for plot in drawn}
    files[folder / "report.md"] = text.encode()
    files[folder / "report.html"] = page(title, text, drawn).encode()
    for path, content in files.items():
        records.write_atomically(path, content)
    return list(files)
