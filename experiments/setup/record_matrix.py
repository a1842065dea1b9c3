"""Records a matrix, one row per cell: a scenario, a weighting and a seed. `wavg_jax.reporting` reads the rows."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from absl import flags

import wavg_jax as wavg
from experiments.setup.captions import REFERENCE
from wavg_jax import data, tree
from wavg_jax.base import ResumeError, SettingsError, Stopped
from wavg_jax.devices import machine
from wavg_jax.storage.rows import Records
from wavg_jax.storage.schema import Row, cell_row, matrix_row
from wavg_jax.training import interrupt, progress

F = flags.FLAGS


class Cell(NamedTuple):
    """One scenario, weighting and seed, and the learning rate there."""

    scenario: str
    weighting: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.scenario}/{self.weighting}/{self.seed}"


def header(
    dataset: data.Dataset,
    task: wavg.Task,
    scenarios: Mapping[str, str],
    settings: Mapping[str, Any],
    *,
    recommend: bool = True,
    roles: Mapping[str, Any] | None = None,
    series: Mapping[str, Any] | None = None,
    apart: int = 0,
) -> Row:
    """The first row of a recording.

    Args:
      dataset: to train on.
      task: the network.
      scenarios: name -> title.
      settings: flag name -> value, of the flags that all cells share.
      recommend: whether the report should say which weighting can be recommended.
      roles: which weightings the share of the oracle's gap is told of; see `wavg_jax.storage.schema`.
      series: the quantity that the scenarios are values of, if they are; see there, too.
      apart: training samples that are neither trained on nor held out.
    """
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    return matrix_row(
        scenarios=scenarios,
        recommend=recommend,
        roles=roles,
        series=series,
        reference=REFERENCE,
        settings=settings,
        started=machine.now(),
        dataset=dataset.name,
        train_samples=len(dataset.train.y) - F.heldout - apart,
        heldout_samples=F.heldout,
        test_samples=len(dataset.test.y),
        parameters=tree.count(params),
        hardware=machine.hardware(),
        versions=machine.versions(),
    )


def begin(records: Records, header: Row) -> None:
    """Records the header or, on --resume, compares it with the recorded one.

    Raises:
      SettingsError: the folder holds rows, and --resume is not set.
      ResumeError: the rows are of other runs or settings.
    """
    if records.rows and not F.resume:
        raise SettingsError("the folder already holds rows; continue with --resume, or choose another --workdir")
    before = [row for row in records.rows if row["kind"] == "matrix"]
    if records.rows and not before:
        raise ResumeError("the folder holds rows of other runs, not of a matrix; choose another --workdir")
    for name, now in header["settings"].items():
        then = before[0]["settings"].get(name) if before else now
        if then != now:
            raise ResumeError(
                f"cannot resume the matrix: it started with --{name}={then}, now it is {now}; repeat the "
                "settings it started with, or choose another --workdir"
            )
    # The report tells where cells ran on another machine.
    if not before or any(before[-1][name] != header[name] for name in ("hardware", "versions")):
        records.append(header)


def fill(
    cells: Iterable[Cell],
    records: Records,
    rounds: Callable[[Cell], int],
    train: Callable[[Cell, Callable], list[Row]],
    rate_flag: Callable[[str], str],
) -> None:
    """Trains the cells that are not recorded yet, in order, with a progress bar over their rounds.

    Args:
      cells: all of them.
      records: the rows so far; each cell adds one.
      rounds: `cell -> number of rounds`.
      train: `(cell, advance) -> rows` of its run; it calls `advance(text)` after every round.
      rate_flag: `scenario -> name` of the flag with its learning rate.

    Raises:
      ResumeError: a cell was recorded at another rate.
      Stopped: SIGTERM or Ctrl-C came before the last cell; the current one was finished and recorded.
    """
    cells = list(cells)
    rates = {cell.scenario: cell.rate for cell in cells}
    done = {row["run"]: row for row in records.rows if row["kind"] == "cell"}
    for row in done.values():
        now = rates.get(row["scenario"], row["rate"])
        if row["rate"] != now:
            raise ResumeError(
                f"cannot resume the matrix: it started with --{rate_flag(row['scenario'])}={row['rate']:g}, "
                f"now it is {now:g}; repeat the rate it started with, or choose another --workdir"
            )
    todo = [cell for cell in cells if cell.name not in done]
    total, ahead = (sum(map(rounds, some)) for some in (cells, todo))
    with progress.bar(total, total - ahead) as advance, interrupt.stop_requests() as stopped:
        for cell in todo:
            if stopped():
                raise Stopped(
                    f"stopped before {cell.name}; continue with the same settings, the same --workdir and --resume"
                )
            records.append(cell_row(run=cell.name, **cell._asdict(), rows=train(cell, advance)))
