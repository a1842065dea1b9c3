"""Recording a matrix: one row per cell, a scenario, weighting and seed; `wavg_jax.reporting.matrix` reads them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from absl import flags

import wavg_jax as wavg
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
) -> Row:
    """The first row of a recording.

    Args:
      dataset: what is trained on.
      task: the network.
      scenarios: name -> title.
      settings: values of the flags that all cells share, by name.
      recommend: whether the report should say which weighting can be recommended.
    """
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    return matrix_row(
        scenarios=scenarios,
        recommend=recommend,
        reference="plain",
        settings=settings,
        started=machine.now(),
        dataset=dataset.name,
        train_samples=len(dataset.train.y) - F.heldout,
        heldout_samples=F.heldout,
        test_samples=len(dataset.test.y),
        parameters=tree.count(params),
        hardware=machine.hardware(),
        versions=machine.versions(),
    )


def begin(records: Records, header: Row) -> None:
    """Records the header, or, going on, compares it with that of what is recorded.

    Raises:
      SettingsError: something is recorded already, and it is not to be gone on with.
      ResumeError: it cannot be gone on with.
    """
    if records.rows and not F.resume:
        raise SettingsError("the folder already holds rows; go on with --resume, or choose another --workdir")
    before = [row for row in records.rows if row["kind"] == "matrix"]
    if records.rows and not before:
        raise ResumeError("the folder holds rows of other runs, not of a matrix; choose another --workdir")
    for name, now in header["settings"].items():
        then = before[0]["settings"].get(name) if before else now
        if then != now:
            raise ResumeError(
                f"cannot go on with the matrix: it was started with --{name}={then}, now it is {now}; repeat the "
                "settings it was started with, or choose another --workdir"
            )
    # Where it is gone on with on another machine, the report should say so.
    if not before or any(before[-1][name] != header[name] for name in ("hardware", "versions")):
        records.append(header)


def fill(
    cells: Iterable[Cell],
    records: Records,
    rounds: Callable[[Cell], int],
    train: Callable[[Cell, Callable], list[Row]],
    rate_flag: Callable[[str], str],
) -> None:
    """Trains the cells that are not recorded yet, in their order, with a progress bar over their rounds.

    Args:
      cells: all of them.
      records: where they are recorded.
      rounds: of a cell.
      train: `(cell, advance) -> rows` of its run; `advance(text)` is to be called after every round.
      rate_flag: of a scenario, the name of the flag that is its learning rate.

    Raises:
      ResumeError: a cell is recorded at another rate.
      Stopped: SIGTERM or Ctrl-C came before the last cell; the cell was finished and recorded.
    """
    cells = list(cells)
    rates = {cell.scenario: cell.rate for cell in cells}
    done = {row["run"]: row for row in records.rows if row["kind"] == "cell"}
    for row in done.values():
        now = rates.get(row["scenario"], row["rate"])
        if row["rate"] != now:
            raise ResumeError(
                f"cannot go on with the matrix: it was started with --{rate_flag(row['scenario'])}={row['rate']:g}, "
                f"now it is {now:g}; give the rate it was started with, or choose another --workdir"
            )
    todo = [cell for cell in cells if cell.name not in done]
    total, ahead = (sum(map(rounds, some)) for some in (cells, todo))
    with progress.bar(total, total - ahead) as advance, interrupt.stop_requests() as stopped:
        for cell in todo:
            if stopped():
                raise Stopped(
                    f"stopped before {cell.name}; go on with the same settings, the same --workdir and --resume"
                )
            records.append(cell_row(run=cell.name, **cell._asdict(), rows=train(cell, advance)))
