"""What the benchmarks share: cases that are timed in turn, ratios of paired times, rows, and the table.

Every benchmark leaves rows.jsonl and report.md in --workdir. The first row has kind "benchmark": run (the benchmark's
name), settings, hardware, versions, environment (settings outside that speed depends on). Then there is a row of kind
"case" for each case; its entries are in the
benchmark's docstring. Times are in seconds, sizes in bytes. A ratio is a list: the median of the ratios of paired
times, their first and their third quartile.
"""

import datetime
import pathlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from rich.table import Table as RichTable

from experiments.setup import app
from experiments.setup import flags as shared_flags
from wavg_jax.base import SettingsError
from wavg_jax.data import ShardedData
from wavg_jax.devices import machine
from wavg_jax.storage.rows import Records, check_writable, write_atomically
from wavg_jax.storage.schema import Row
from wavg_jax.training.batches import make_work, put_shared
from wavg_jax.training.programs import compiled, programs
from wavg_jax.training.recipe import Recipe

flags.DEFINE_integer("repeats", 9, "Turns, of which the median counts.", lower_bound=1)
F = flags.FLAGS

Case = Callable[[], float]
"""Does what is measured once, and returns its seconds."""
NOT_MEASURED = "not measured"


def timed(function: Callable, *arguments: Any) -> Case:
    """Makes a case of a function of JAX arrays: its clock stops when all that it returns is there."""

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - start

    return run


def in_place(function: Callable, state: Any, *arguments: Any) -> Case:
    """Makes a case of a program that is given its own result as its first argument, which it may donate.

    Args:
      function: `(state, *arguments) -> state`.
      state: the first, which is not to be used by anyone else.
      arguments: the others, the same in every call.
    """

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state = jax.block_until_ready(function(state, *arguments))
        return time.perf_counter() - start

    return run


def round_runner(recipe: Recipe, data: ShardedData, local_steps: int, batch_size: int) -> Case:
    """Makes a case of a recipe's next round, its batches being on the device already. Compiles it."""
    shared = put_shared(recipe, data)
    work = make_work(recipe, data, seed=0, first_step=0, longest=local_steps, batch_size=batch_size)
    program = programs(recipe, len(data.shards))
    state = program.init(jax.random.key(0))
    step = compiled(program.run, state, work, shared).call
    return in_place(lambda state: step(state, work, shared)[0], state)


def alternate(
    cases: Mapping[str, Case], repeats: int, advance: Callable[[str], None] = lambda text: None
) -> dict[str, np.ndarray]:
    """Calls all cases in turn, again and again, so that a machine that slows down slows them all.

    Args:
      cases: name -> case.
      repeats: calls of each that count; one more, the first, does not.
      advance: called with the name of a case after each of its calls.

    Returns:
      name -> seconds [repeats]; those with one index were measured one after the other.

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
    """The median of ratios, and their first and third quartile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if abs(self.median) < 10 else 1
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def shown(figure: Sequence[float]) -> str:
    """A ratio of a row, as in reports."""
    return str(Ratio(*figure))


def ratio(above: np.ndarray, below: np.ndarray, scale: float = 1.0) -> Ratio:
    """The ratios `scale * above / below` of times [repeats] that were measured in turn, pair by pair.

    >>> import numpy as np
    >>> str(ratio(np.array([2.0, 4.0, 9.0]), np.array([1.0, 2.0, 3.0])))
    '2.00 (2.00 to 2.50)'
    """
    median, low, high = np.quantile(scale * np.asarray(above) / np.asarray(below), [0.5, 0.25, 0.75])
    return Ratio(float(median), float(low), float(high))


class Table(NamedTuple):
    """What a report shows.

    Attributes:
      title: heading of the report.
      text: what the figures are, in a paragraph.
      columns: names of the first columns; those of the figures, CPU and GPU, come after them.
      lines: for each case what is in the first columns, and at last its figure, which goes to the column of the device
        that it was measured on.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    lines: Sequence[Sequence[str]]


class Recording(NamedTuple):
    """The rows of a benchmark on their way to a folder."""

    name: str
    records: Records
    folder: pathlib.Path

    def case(self, **entries: Any) -> None:
        """Adds the row of a case."""
        self.records.append({"kind": "case", "run": self.name, **entries})

    def cases(self) -> list[Row]:
        """The rows of the cases so far."""
        return [row for row in self.records.rows if row["kind"] == "case"]

    def publish(self, *tables: Table) -> None:
        """Writes the report, and prints its tables."""
        head = self.records.rows[0]
        path = self.folder / "report.md"
        write_atomically(path, markdown(head, tables).encode())
        console = app.console(log_width=180)
        for table in tables:
            shown = RichTable(title=table.title, caption=table.text)
            for column in _columns(table):
                shown.add_column(column)
            for line in table.lines:
                shown.add_row(*_cells(line, head["hardware"]))
            console.print(shown)
        console.print(f"wrote {path}", soft_wrap=True)


def begin(name: str, reads: Collection[str], **facts: Any) -> Recording:
    """Checks the flags, opens --workdir (by default a new folder under runs/), and writes the first row.

    Args:
      name: of the benchmark.
      reads: the flags that it reads, --workdir apart.
      facts: further entries of the first row.

    Raises:
      SettingsError: a shared flag is given that the benchmark does not read, or the folder already holds rows.
      WorkdirError: the folder cannot be written.
    """
    refuse_unused(reads)
    folder = pathlib.Path(F.workdir or pathlib.Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    check_writable(folder)
    records = Records(folder)
    if records.rows:
        raise SettingsError("the folder already holds rows; choose another --workdir")
    settings = {flag: F[flag].value for flag in _given(reads)}
    where = {name: getattr(machine, name)() for name in ("hardware", "versions", "environment")}
    first = {"kind": "benchmark", "run": name, "command": _command(name, reads), "settings": settings, **where}
    records.append(first | facts)
    return Recording(name, records, folder)


def refuse_unused(reads: Collection[str]) -> None:
    """Raises SettingsError if a flag that several binaries share is given to one that does not read it."""
    shared_flags.refuse_unused({*reads, "workdir"})
    modules = F.flags_by_module_dict().items()
    own = {flag.name for module, defined in modules if module.startswith(__package__) for flag in defined}
    for flag in sorted(own.difference(reads)):
        if F[flag].present:
            raise SettingsError(f"--{flag} has no effect here; leave it out, --help lists the flags that have one")


def choices(flag: str, allowed: Collection[str]) -> tuple[str, ...]:
    """Reads a list flag whose entries are among `allowed`.

    Raises:
      SettingsError: one is not, or there is none.
    """
    names = tuple(F[flag].value or ())
    if not names or set(names) - set(allowed):
        raise SettingsError(f"--{flag}={','.join(names)}: choose from {', '.join(allowed)}")
    return names


def _given(reads: Collection[str]) -> list[str]:
    """Names of the flags that make a measurement what it is: those that are read, and what `setup.app` sets."""
    return sorted({*reads, "matmul_precision"})


def _command(name: str, reads: Collection[str]) -> str:
    """The command that measures the same again, in another folder."""
    given = [F[flag].serialize() for flag in _given(reads) if F[flag].present]
    return " ".join([f"python -m experiments.benchmarks.{name}", *given])


def _columns(table: Table) -> tuple[str, ...]:
    return (*table.columns, "CPU", "GPU")


def _cells(line: Sequence[str], hardware: Mapping[str, Any]) -> tuple[str, ...]:
    *cells, figure = line
    figures = (figure, NOT_MEASURED) if hardware["device"] == "cpu" else (NOT_MEASURED, figure)
    return (*cells, *figures)


def markdown(head: Row, tables: Sequence[Table]) -> str:
    hardware, versions = head["hardware"], head["versions"]
    lines = [
        f"# {tables[0].title}",
        "",
        f"    {head['command']}",
        "",
        f"{hardware['processor']}, {hardware['cores']} cores; {hardware['count']} {hardware['device']} devices "
        f"({hardware['kind']}); {', '.join(f'{name} {version}' for name, version in versions.items())}.",
    ]
    for number, table in enumerate(tables):
        columns = _columns(table)
        lines += ["", f"## {table.title}", ""] if number else [""]
        lines += [table.text, "", f"| {' | '.join(columns)} |", "|---" * len(table.columns) + "|--:|--:|"]
        lines += [f"| {' | '.join(_cells(line, hardware))} |" for line in table.lines]
    return "\n".join(lines) + "\n"
