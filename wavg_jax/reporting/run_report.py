"""The report on recorded runs: for a terminal, a notebook or a folder, made from the rows alone."""

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Group
from rich.text import Text

from wavg_jax.reporting.canvas import Plot
from wavg_jax.reporting.document import Caller, assemble, bullets, code_block, dated, image_link, write_files
from wavg_jax.reporting.findings import answer, caveats, scenario_sentences
from wavg_jax.reporting.headline import draw_headline
from wavg_jax.reporting.page import html_fragment
from wavg_jax.reporting.plots import arm_places, draw_scenario
from wavg_jax.reporting.runs import links_in_words
from wavg_jax.reporting.summary import UNIFORM, ArmSummary, Summary, scenario_names
from wavg_jax.reporting.tables import TextTable, comparison_tables, escape, markdown_table
from wavg_jax.reporting.terminal import terminal_block
from wavg_jax.reporting.wording import capitalised, distinct, in_words, name_value_pairs

QUESTION = "Did weighting help?"
BEWARE = "What to beware of"
WRITTEN = "What the networks write"
CLOCKS = {
    "measured": "wall time on this hardware, whose devices all replicas share; neither clock counts compilation or "
    "evaluation on the test split",
    "computed": "the critical path, from parts measured on this hardware: the time of the same rounds with one device "
    "for each replica {links}",
}


class RunReport(NamedTuple):
    """The report on recorded runs; a notebook shows its answer, sentences and tables, and so does `rich.print`.

    Attributes:
      summaries: the statistics, scenario by scenario.
      caller: what the rows do not say.
    """

    summaries: tuple[Summary, ...]
    caller: Caller = Caller()

    def figures(self) -> tuple[Plot, ...]:
        """Draws the headline, then the figures of each scenario; a notebook shows each of them."""
        first, by_scenario = self._draw()
        return (first, *(plot for own in by_scenario for plot in own))

    def write(self, folder: str | pathlib.Path) -> list[pathlib.Path]:
        """Writes `report.md`, `report.html` and `plots/*.png`, each file whole or not at all.

        Args:
          folder: made if it is missing.

        Returns:
          The files written.

        Raises:
          WorkdirError: the folder cannot be written.
        """
        first, by_scenario = self._draw()
        plots = [first, *(plot for own in by_scenario for plot in own)]
        return write_files(folder, _heading(self.summaries[0]), self._markdown(first, by_scenario), plots)

    def __rich__(self) -> Group:
        # The answer comes last, where a terminal's reader looks.
        conclusion, *numbers = answer(self.summaries)
        return Group(
            *(terminal_block(_heading(one), comparison_tables(one), scenario_sentences(one)) for one in self.summaries),
            *(Text(f"\n{title}\n{text}") for one in self.summaries for title, text in _samples(one)),
            terminal_block(BEWARE, (), caveats(self.summaries)),
            terminal_block(f"{QUESTION} {conclusion}", (), numbers),
        )

    def _repr_html_(self) -> str:
        parts = self._answer()
        for name, one in zip(scenario_names(self.summaries), self.summaries, strict=True):
            parts += [*_section(name, one), *_tables(one)]
        return html_fragment("\n\n".join([*parts, f"## {BEWARE}", bullets(caveats(self.summaries))]))

    def _draw(self) -> tuple[Plot, list[tuple[Plot, ...]]]:
        places = arm_places(self.summaries)
        drawn = [draw_scenario(one, places) for one in self.summaries]
        if len(drawn) > 1:
            drawn = [
                tuple(plot._replace(name=f"{number}-{plot.name}") for plot in own)
                for number, own in enumerate(drawn, 1)
            ]
        return draw_headline(self.summaries, places), drawn

    def _answer(self, *below: str) -> list[str]:
        """The question, the answer in one sentence, what stands below that, and the numbers."""
        conclusion, *numbers = answer(self.summaries)
        return [f"## {QUESTION}", f"**{escape(conclusion)}**", *below, *([bullets(numbers)] if numbers else [])]

    def _markdown(self, first: Plot, by_scenario: Sequence[Sequence[Plot]]) -> str:
        headers = [run.header for one in self.summaries for run in one.runs]
        head = ["# Report of training with replicas", escape(dated(headers))]
        head += self._answer(image_link(first), escape(first.caption))
        parts = ["## What is compared", self._definitions(), f"### {BEWARE}", bullets(caveats(self.summaries))]
        for name, one, own in zip(scenario_names(self.summaries), self.summaries, by_scenario, strict=True):
            parts += [*_section(name, one), *_tables(one)]
            for plot in own:
                parts += [f"### {escape(plot.title)}", image_link(plot), escape(plot.caption)]
            parts += ["### Setup", markdown_table(_setup(one), numbers=False), *self._settings(one)]
        return assemble(head, parts, self.caller)

    def _definitions(self) -> str:
        """What the arms and the clocks are, in a line each."""
        arms: dict[str, list[str]] = {}
        for arm in (arm for one in self.summaries for arm in one.arms):
            arms.setdefault(arm.name, []).append(self.caller.meanings.get(arm.name) or _meaning(arm))
        links = links_in_words([run for one in self.summaries for run in one.runs])
        terms = {name: "; or ".join(distinct(found)) for name, found in arms.items()}
        terms |= {name: meaning.format(links=links) for name, meaning in CLOCKS.items()}
        lines = [f"- **{escape(name)}**: {escape(meaning)}." for name, meaning in terms.items()]
        intro = "All arms see the same number of training samples in a round. The arms, then the two clocks:"
        return "\n".join([intro, "", *lines])

    def _settings(self, one: Summary) -> list[str]:
        parts = []
        if one.settings:
            parts += [
                "Settings that all runs share, besides rounds and seeds above:",
                self.caller.settings(one.settings),
            ]
        if one.varying:
            lines = [self.caller.setting(name, *values) for name, values in one.varying.items()]
            parts += ["Settings that differ between the runs:", code_block(*lines)]
        return parts


def _section(name: str, one: Summary) -> list[str]:
    return [f"## {escape(capitalised(name))}", escape(f"{_heading(one)}."), bullets(scenario_sentences(one))]


def _tables(one: Summary) -> list[str]:
    parts = [
        part
        for table in comparison_tables(one)
        for part in (f"### {escape(table.title)}", markdown_table(table), escape(table.note))
    ]
    written = [
        part for title, text in _samples(one) for part in (escape(title), code_block(text.replace("```", "'''")))
    ]
    return [*parts, *([f"### {WRITTEN}", *written] if written else [])]


def _samples(one: Summary) -> list[tuple[str, str]]:
    """What the language model of each arm's first seed wrote, under a line that says so."""
    found = [(arm.name, run, run.sample) for arm in one.arms for run in arm.runs[:1] if run.sample]
    return [
        (
            f"{name}, seed {run.seed}, at temperature {sample['temperature']:g}, from the test split's "
            f"{sample['prompt']!r} on:",
            sample["text"],
        )
        for name, run, sample in found
    ]


def _meaning(arm: ArmSummary) -> str:
    """What an arm is, by its run row."""
    header = arm.runs[0].header
    steps = f"{header['local_steps']} steps a round with batch size {header['batch_size']}"
    if arm.runs[0].replicas == 1:
        return f"one network, {steps}"
    weighting = header.get("weighting")
    by = "" if weighting is None else f" with {'equal weights' if weighting == UNIFORM else f'weights by {weighting}'}"
    return f"{arm.runs[0].replicas} replicas, {steps}, blended{by} after every round"


def _heading(one: Summary) -> str:
    noisy, k = one.header["noisy_shards"], one.header["replicas"]
    head = f"{one.header['dataset']}, {k} replica{'s' if k > 1 else ''}"
    head += f", noisy shards {in_words(noisy)}" if noisy else ", no noisy shards"
    return f"{head} ({one.label})" if one.label else head


def _setup(one: Summary) -> TextTable:
    h = one.header
    sizes = h["shard_sizes"]
    shards = f"{len(sizes)} of {min(sizes):,} to {max(sizes):,} samples" if sizes else "none"
    weighting = [f"{arm.name}: {in_words(arm.runs[0].header.get('weighting'))}" for arm in one.arms]
    seeds = [f"{arm.name}: {in_words(arm.seeds)}" for arm in one.arms]
    target = [("target accuracy", f"{100 * one.target:.4g} %" if math.isfinite(one.target) else "none")]
    rows = [
        ("data set", str(h["dataset"]) + ("" if h["classes"] is None else f", {h['classes']} classes")),
        ("splits", f"train {h['train_samples']:,}, held-out {h['heldout_samples']:,}, test {h['test_samples']:,}"),
        ("shards", f"{shards}; noisy: {in_words(h['noisy_shards'])}"),
        ("network", f"{h['parameters']:,} parameters"),
        ("rounds", f"{h['rounds']} of {h['local_steps']} local steps with batch size {h['batch_size']}"),
        ("samples", f"{h['samples_per_round']:,} a round"),
        *(target if one.measure.metric == "accuracy" else []),
        ("weighting", "; ".join(weighting)),
        ("seeds", "; ".join(seeds)),
        *_memory(one),
        *(("hardware", name_value_pairs(found)) for found in distinct(run.header["hardware"] for run in one.runs)),
        *(("versions", name_value_pairs(found)) for found in distinct(run.header["versions"] for run in one.runs)),
    ]
    heads = ("setting", f"value (local steps, batch size and shards of arm {h['arm']})")
    return TextTable("Setup", "", heads, (tuple(rows),))


def _memory(one: Summary) -> list[tuple[str, str]]:
    """What a device's memory was said to come to, and came to, at most over the runs; nothing where rows do not say."""
    foreseen = [run.memory for run in one.runs if run.memory is not None]
    if not foreseen:
        return []
    predicted, limit = max(foreseen)
    held = max((run.peak_memory for run in one.runs if run.peak_memory > 0), default=None)
    text = f"{predicted / 1e9:.2f} GB a device predicted" + (f", {held / 1e9:.2f} GB held" if held else "")
    return [("memory", f"{text}, of {limit / 1e9:.2f} GB; at most, with what the process held before")]
