"""The harness of the benchmarks: cases timed in turn, ratios of paired times, rows, and the table.

Every benchmark writes rows.jsonl and report.md to --workdir. The first row has kind "benchmark": run (the benchmark's
name), settings, hardware, versions, environment (variables that speed depends on). A row of kind "case" follows for
each case; the benchmark's docstring lists its entries. The last row has kind "load": `load.between`. Times are in
seconds, sizes in bytes. A ratio is a list: the median of the ratios of paired times, and their first and third
quartiles.
"""

import datetime
import pathlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from rich.table import Table

from experiments.benchmarks import load
from experiments.setup import app, shared_flags
from wavg_jax.base import SettingsError, TrainState
from wavg_jax.data import ShardedData
from wavg_jax.devices import machine
from wavg_jax.storage.rows import Records, check_writable, write_atomically
from wavg_jax.storage.schema import Row
from wavg_jax.training.batches import make_work, put_shared
from wavg_jax.training.programs import compiled, programs_of
from wavg_jax.training.recipe import Recipe

flags.DEFINE_integer("repeats", 9, "Turns; the median counts.", lower_bound=1)
F = flags.FLAGS

Case = Callable[[], float]
"""Does the measured work once and returns its seconds."""
NOT_MEASURED = "not measured"


def timed(function: Callable, *arguments: Any) -> Case:
    """Makes a case of a function of JAX arrays; the clock stops when its results are ready."""

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - start

    return run


def in_place(function: Callable, state: Any, *arguments: Any) -> Case:
    """Makes a case of a program that takes its last result as first argument, which it may donate.

    Args:
      function: `(state, *arguments) -> state`.
      state: the first argument; nobody else may use it.
      arguments: the others, the same in every call.
    """

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state = jax.block_until_ready(function(state, *arguments))
        return time.perf_counter() - start

    return run


def round_runner(recipe: Recipe, data: ShardedData, local_steps: int, batch_size: int, rounds: int = 1) -> Case:
    """Makes a case of a recipe's next `rounds`, with their batches on the device, and compiles it."""
    shared = put_shared(recipe, data)
    work = make_work(recipe, data, seed=0, first_step=0, longest=local_steps, batch_size=batch_size)
    program = programs_of(recipe, len(data.shards))
    state = program.init(jax.random.key(0))
    step = compiled(program.run, state, work, shared).call

    def run(state: TrainState) -> TrainState:
        for _ in range(rounds):
            state = step(state, work, shared)[0]
        return state

    return in_place(run, state)


def alternate(
    cases: Mapping[str, Case], repeats: int, advance: Callable[[str], None] = lambda text: None
) -> dict[str, np.ndarray]:
    """Calls all cases in turn, repeatedly, so that a slow spell of the machine hits all of them.

    Args:
      cases: name -> case.
      repeats: calls of each that count, after a first one that does not.
      advance: called with a case's name after each of its calls.

    Returns:
      name -> seconds [repeats]; entries of one index were measured in one turn.

    >>> calls = []
    >>> cases = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in ("a", "b")}
    >>> alternate(cases, 2)["b"].tolist(), "".join(calls)
    ([4.0, 6.0], 'ababab')
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name, case in cases.items():
            seconds[name].append(case())
            advance(name)
    return {name: np.array(found[1:]) for name, found in seconds.items()}


class Ratio(NamedTuple):
    """The median of ratios, and their first and third quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if abs(self.median) < 10 else 1
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def shown(figure: Sequence[float]) -> str:
    """A row's ratio, as reports show it."""
    return str(Ratio(*figure))


def ratio(above: np.ndarray, below: np.ndarray, scale: float = 1.0) -> Ratio:
    """The ratios `scale * above / below` of times [repeats] measured in turn, pair by pair.

    >>> import numpy as np
    >>> str(ratio(np.array([2.0, 4.0, 9.0]), np.array([1.0, 2.0, 3.0])))
    '2.00 (2.00 to 2.50)'
    """
    median, low, high = np.quantile(scale * np.asarray(above) / np.asarray(below), [0.5, 0.25, 0.75])
    return Ratio(float(median), float(low), float(high))


class BenchmarkTable(NamedTuple):
    """A table of a benchmark's report.

    Attributes:
      title: heading of the report.
      text: a paragraph that explains the figures.
      columns: names of the first columns; the figures' columns, CPU and GPU, follow.
      lines: per case the entries of the first columns, then its figure, which goes to the column of the device that
        measured it.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    lines: Sequence[Sequence[str]]


class Recording(NamedTuple):
    """A benchmark's rows and the folder they go to.

    Attributes:
      name: of the benchmark.
      records: its rows.
      folder: of rows and report.
      command: that measures now; in a folder that was begun before, not that of the first row.
      began: the load before the measurement.
    """

    name: str
    records: Records
    folder: pathlib.Path
    command: str
    began: load.Moment

    def case(self, **entries: Any) -> None:
        """Adds the row of a case."""
        self.records.append({"kind": "case", "run": self.name, **entries})

    def cases(self) -> list[Row]:
        """The rows of the cases so far."""
        return [row for row in self.records.rows if row["kind"] == "case"]

    def loaded(self) -> list[str]:
        """Adds the row of the load since the beginning, and returns the lines that a report says of it."""
        row = {"kind": "load", "run": self.name, **load.between(self.began, load.now())}
        self.records.append(row)
        return load.lines(row)

    def publish(self, *tables: BenchmarkTable) -> None:
        """Writes the report and prints its tables and the load."""
        head = self.records.rows[0]
        path = self.folder / "report.md"
        console = app.console(log_width=180)
        loaded = self.loaded()
        write_atomically(path, markdown(head, tables, loaded).encode())
        for table in tables:
            shown = Table(title=table.title, caption=table.text)
            for column in _columns(table):
                shown.add_column(column)
            for line in table.lines:
                shown.add_row(*_cells(line, head["hardware"]))
            console.print(shown)
        for line in loaded:
            console.print(line.strip("*"), soft_wrap=True)
        console.print(f"wrote {path}", soft_wrap=True)


def begin(name: str, reads: Collection[str], *, again: bool = False, **facts: Any) -> Recording:
    """Checks the flags, opens --workdir (by default a new folder under runs/), and writes the first row.

    Args:
      name: of the benchmark.
      reads: the flags that it reads, except --workdir.
      again: whether to go on in a folder that holds rows of this benchmark; it gets another first row only if hardware
        or versions are others now, so that its cases should keep their `Recording.command`.
      facts: further entries of the first row.

    Raises:
      SettingsError: the command line gives a shared flag that the benchmark does not read, or the folder holds rows.
      WorkdirError: the folder cannot be written.
    """
    refuse_unused(reads)
    began = load.now()
    folder = pathlib.Path(F.workdir or pathlib.Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    check_writable(folder)
    records = Records(folder)
    if records.rows and not (again and records.rows[0]["run"] == name):
        raise SettingsError("the folder already holds rows; choose another --workdir")
    settings = {flag: F[flag].value for flag in _given(reads)}
    where = {name: getattr(machine, name)() for name in ("hardware", "versions", "environment")}
    command = _command(name, reads)
    first = {"kind": "benchmark", "run": name, "command": command, "settings": settings, **where}
    before = [row for row in records.rows if row["kind"] == "benchmark"]
    if not before or any(before[-1][part] != where[part] for part in ("hardware", "versions")):
        records.append(first | facts)
    return Recording(name, records, folder, command, began)


def refuse_unused(reads: Collection[str]) -> None:
    """Raises SettingsError if the command line gives a shared flag that is not in `reads`."""
    shared_flags.refuse_unused({*reads, "workdir"})
    modules = F.flags_by_module_dict().items()
    own = {flag.name for module, defined in modules if module.startswith(__package__) for flag in defined}
    for flag in sorted(own.difference(reads)):
        if F[flag].present:
            raise SettingsError(f"--{flag} has no effect here; leave it out, --help lists the flags that have one")


def _given(reads: Collection[str]) -> list[str]:
    """Names of the flags that a measurement depends on: `reads` but the folder of data, and what `setup.app` sets."""
    return sorted({*reads, "matmul_precision"} - {"data_dir"})


def _command(name: str, reads: Collection[str]) -> str:
    """The command that repeats the measurement in another folder."""
    given = [F[flag].serialize() for flag in _given(reads) if F[flag].present]
    return " ".join([f"python -m experiments.benchmarks.{name}", *given])


def _columns(table: BenchmarkTable) -> tuple[str, ...]:
    return (*table.columns, "CPU", "GPU")


def _cells(line: Sequence[str], hardware: Mapping[str, Any]) -> tuple[str, ...]:
    *cells, figure = line
    figures = (figure, NOT_MEASURED) if hardware["device"] == "cpu" else (NOT_MEASURED, figure)
    return (*cells, *figures)


def markdown(head: Row, tables: Sequence[BenchmarkTable], loaded: Sequence[str]) -> str:
    """The report: its command, machine, versions and load, and the tables.

    Args:
      head: the first row.
      tables: what was measured.
      loaded: of `load.lines`.
    """
    lines = [f"# {tables[0].title}", "", f"    {head['command']}", "", host(head)]
    for line in loaded:
        lines += ["", line]
    for number, table in enumerate(tables):
        columns = _columns(table)
        lines += ["", f"## {table.title}", ""] if number else [""]
        lines += [table.text, "", f"| {' | '.join(columns)} |", "|---" * len(table.columns) + "|--:|--:|"]
        lines += [f"| {' | '.join(_cells(line, head['hardware']))} |" for line in table.lines]
    return "\n".join(lines) + "\n"


def host(head: Row) -> str:
    """What a report says of the machine: processor, instruction set, cores, devices, versions and variables."""
    hardware = head["hardware"]
    parts = [
        f"{hardware['processor']}, {hardware['isa']}, {hardware['cores']} cores",
        f"{hardware['count']} {hardware['device']} devices ({hardware['kind']})",
        ", ".join(f"{name} {version}" for name, version in head["versions"].items()),
        *(f"{name}={value}" for name, value in head["environment"].items()),
    ]
    return f"{'; '.join(parts)}."
