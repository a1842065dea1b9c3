"""The report on an average of checkpoints: what each of them counts, and how good they and the average are."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Group

from wavg_jax.reporting.document import Caller, assemble, bullets, code_block, write_files
from wavg_jax.reporting.measures import in_order
from wavg_jax.reporting.page import html_fragment
from wavg_jax.reporting.tables import TextTable, escape, markdown_table
from wavg_jax.reporting.terminal import terminal_block
from wavg_jax.reporting.wording import TIMES, setting_value

TITLE = "Average of checkpoints"


class SoupReport(NamedTuple):
    """The report; a notebook shows it, and so does `rich.print`.

    Attributes:
      names: of the checkpoints, in their order.
      weights: [K], of each.
      scores: {signal: [K]}, what the weighting read.
      quality: {metric: [K + 1]} on the test split, of each checkpoint and of the average; `{}` if nothing was judged.
      facts: sentences on what was averaged.
      command: that made it; "" leaves it out.
    """

    names: Sequence[str]
    weights: np.ndarray
    scores: Mapping[str, np.ndarray]
    quality: Mapping[str, np.ndarray]
    facts: Sequence[str]
    command: str = ""

    def write(self, folder: str | pathlib.Path) -> list[pathlib.Path]:
        """Writes `report.md` and `report.html`, each file whole or not at all; returns the files.

        Raises:
          WorkdirError: the folder cannot be written.
        """
        return write_files(folder, TITLE, self._markdown(), ())

    def __rich__(self) -> Group:
        return terminal_block(TITLE, (self._table(),), self.facts)

    def _repr_html_(self) -> str:
        return html_fragment("\n\n".join([markdown_table(self._table()), bullets(self.facts)]))

    def _markdown(self) -> str:
        table = self._table()
        parts = ["## Weights", markdown_table(table), escape(table.note), "## What was averaged", bullets(self.facts)]
        if self.command:
            parts += ["## Command", code_block(self.command)]
        return assemble([f"# {TITLE}"], parts, Caller())

    def _table(self) -> TextTable:
        count = len(self.names)
        heads = ["checkpoint", "weight", f"weight {TIMES} {count}", *self.scores]
        rows = [[name, f"{self.weights[k]:.3f}", f"{count * self.weights[k]:.2f}"] for k, name in enumerate(self.names)]
        rows.append(["the average", "", ""])
        for values in self.scores.values():
            for row, value in zip(rows, [*values, None], strict=True):
                row.append("" if value is None else setting_value(float(f"{value:.4g}")))
        for measure in in_order(self.quality):
            heads.append(f"test {measure.title}")
            for row, value in zip(rows, self.quality[measure.metric], strict=True):
                row.append(f"{measure.scale * value:.4g}")
        note = "1 is an equal share." + (" The average is judged as it was written." if self.quality else "")
        tables = tuple(map(tuple, rows))
        return TextTable("Weights", note, tuple(heads), (tables[:-1], tables[-1:]))
