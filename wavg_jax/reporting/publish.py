"""The ways into this room: one call from rows to what can be shown, one to a report in a folder."""

import pathlib
from collections.abc import Sequence
from typing import Any

from wavg_jax.reporting.document import Caller
from wavg_jax.reporting.matrix import is_matrix, tabulate
from wavg_jax.reporting.matrix_report import MatrixReport
from wavg_jax.reporting.run_report import RunReport
from wavg_jax.reporting.summary import summarise_scenarios
from wavg_jax.storage.schema import Row


def summarise(
    rows: Sequence[Row], *, reference: str | None = None, caller: Caller | None = None
) -> RunReport | MatrixReport:
    """Summarises recorded rows over seeds: a report that a notebook or a terminal shows, and a folder keeps.

    Args:
      rows: the rows of runs, such as `fit(...).rows`, or of a scenario matrix; of several runs or folders one after the
        other.
      reference: the arm (or weighting) that others are compared with. By default the first arm of several replicas
        whose run row says `weighting: "uniform"`; of a matrix, the one that its first row names.
      caller: what the rows do not say.

    Raises:
      DataError: the rows are incomplete or do not fit together.
    """
    caller = caller or Caller()
    if is_matrix(rows):
        return MatrixReport(tabulate(rows, reference), caller)
    return RunReport(summarise_scenarios(rows, reference), caller)


def write_report(folder: str | pathlib.Path, rows: Sequence[Row], **options: Any) -> list[pathlib.Path]:
    """Writes the report on recorded rows: `report.md`, `report.html` and `plots/*.png`.

    Args:
      folder: made if it is missing.
      rows: see `summarise`, like the options.

    Returns:
      The files written.

    Raises:
      DataError: the rows are incomplete or do not fit together.
      WorkdirError: the folder cannot be written.
    """
    return summarise(rows, **options).write(folder)
