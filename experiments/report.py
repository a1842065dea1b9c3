"""Rebuilds the report of recorded runs from their rows.

  python -m experiments.report runs/iid
  python -m experiments.report runs/iid runs/noisy --out=runs/both

Each RUN is a folder with a rows.jsonl. Runs of different settings get a section each. Writes report.md, report.html
and plots to --out.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments.setup import app
from wavg_jax.base import SettingsError
from wavg_jax.storage.rows import read_rows

flags.DEFINE_string("out", None, "Folder for the report; by default the first RUN.")
F = flags.FLAGS


def main(argv: Sequence[str]) -> None:
    """Reads the rows of every RUN, shows the tables and writes the report."""
    if not argv:
        raise SettingsError("no RUN given; name one or more folders with a rows.jsonl, such as runs/iid")
    runs = [pathlib.Path(arg) for arg in argv]
    rows = [row for run in runs for row in read_rows(run)]
    first = runs[0] if runs[0].is_dir() else runs[0].parent
    app.publish(rows, first if F.out is None else pathlib.Path(F.out))


if __name__ == "__main__":
    app.run(main)
