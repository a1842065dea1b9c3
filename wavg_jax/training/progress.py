"""A progress bar with the time left, in a terminal or a notebook; none in a pipe or a log, or without rich.

`doing` shows on the open bar what happens before the first round, such as compiling.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from rich.console import Console

Say = Callable[[str, int], None]
"""`(text, advance)`: shows a text, and moves the bar by `advance`."""

_open: list[Say] = []


@contextlib.contextmanager
def bar(total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Shows a bar while the block runs; yields `advance(text)`, to call after each round or measurement.

    Args:
      total: rounds in all.
      done: rounds done by an earlier part of the run.
    """
    with _shown(total, min(done, total)) as say:
        _open.append(say)
        try:
            yield lambda text: say(text, 1)
        finally:
            _open.pop()


def doing(text: str) -> None:
    """Shows on the innermost open bar what the program is doing; without a bar it does nothing."""
    if _open:
        _open[-1](f"{text} ...", 0)


_JUDGED = {
    "bits_per_byte": "{:.3f} bits per byte",
    "accuracy": "accuracy {:.1%}",
    "loss": "loss {:.3f}",
}
"""What a run is judged by on the test split, and how it is written; of several the first."""


def caption(row: Mapping[str, Any]) -> str:
    """One line about a round: the run, how good it is, over how many replicas the weights spread, and the speed so far.

    >>> row = {"run": "a", "test_accuracy": 0.8812, "weights": [0.25] * 4, "effective_replicas": 4.0}
    >>> caption(row | {"samples": 41234, "elapsed": 1.0})
    'a: accuracy 88.1 %, 4.0 effective, 41k samples/s'
    """
    known = {name: row.get(f"test_{name}") for name in _JUDGED}
    name = next((name for name, value in known.items() if value is not None), None)
    loss = row.get("train_loss")
    if name is not None:
        said = _JUDGED[name].format(known[name]).replace("%", " %")
    else:
        said = "no replica alive" if loss is None else f"training loss {loss:.3f}"
    if len(row["weights"]) > 1:
        said += f", {row['effective_replicas'] or 0:.1f} effective"
    return f"{row['run']}: {said}" + (
        f", {_short(row['samples'] / row['elapsed'])} samples/s" if row["elapsed"] else ""
    )


def _short(number: float) -> str:
    """Two digits or three.

    >>> _short(873.2), _short(4123.4), _short(41234.5), _short(2.5e6)
    ('873', '4.1k', '41k', '2.5M')
    """
    size = min(max(int(math.log10(max(number, 1)) // 3), 0), 3)
    scaled = number / 1000**size
    return f"{scaled:.{int(size > 0 and scaled < 9.95)}f}{' kMG'[size].strip()}"


def _shown(total: int, done: int) -> contextlib.AbstractContextManager[Say]:
    try:
        from rich.console import Console
    except ImportError:  # a bar is only decoration
        return _nowhere()
    if jax.process_index():  # one bar for all processes
        return _nowhere()
    console = Console(stderr=True)  # stdout may be piped
    if console.is_jupyter:
        return _cell(total, done)
    return _line(console, total, done) if console.is_terminal else _nowhere()


@contextlib.contextmanager
def _nowhere() -> Iterator[Say]:
    yield lambda text, advance: None


@contextlib.contextmanager
def _line(console: "Console", total: int, done: int) -> Iterator[Say]:
    """The last line of a terminal; warnings go above it."""
    from rich import progress as rich
    from rich.table import Column

    elastic = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    wide = console.width >= _WIDE
    columns = (
        # On a narrow line the text is cut; no markup, since it may hold brackets.
        rich.TextColumn("{task.description}", markup=False, table_column=elastic),
        *([rich.BarColumn(bar_width=10)] if wide else []),
        rich.MofNCompleteColumn(),
        *([rich.TimeElapsedColumn()] if wide else []),
        rich.TimeRemainingColumn(compact=True),
        rich.TextColumn("left"),
    )
    with rich.Progress(*columns, console=console, expand=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("starting ...", total=total, completed=done)

        def say(text: str, advance: int) -> None:
            progress.update(task, advance=advance, description=text)

        try:
            yield say
        except BaseException:
            progress.live.transient = True  # an error should stand alone
            raise


_WIDE = 100
"""Columns from which on there is room for a bar and the time passed beside the text."""
_PAUSE = 0.2
"""Seconds between two updates of a notebook's line, each of which is a message to its server."""


@contextlib.contextmanager
def _cell(total: int, done: int) -> Iterator[Say]:
    """One line of text in a notebook's output, replaced as it changes; needs no widgets."""
    from IPython.display import display

    begun, last = time.monotonic(), -_PAUSE
    count, shown = done, "starting ..."

    def line() -> dict[str, str]:
        passed = time.monotonic() - begun
        left = f"{_clock(passed / (count - done) * (total - count))} left" if count > done else "-:-- left"
        filled = 20 * count // max(total, 1)
        return {
            "text/plain": f"{shown}  [{'#' * filled}{'.' * (20 - filled)}] {count}/{total}  {_clock(passed)}  {left}"
        }

    handle = display(line(), raw=True, display_id=True)

    def say(text: str, advance: int) -> None:
        nonlocal last, count, shown
        count, shown = count + advance, text
        if time.monotonic() >= last + _PAUSE or count == total:
            last = time.monotonic()
            handle.update(line(), raw=True)

    yield say
    handle.update(line(), raw=True)


def _clock(seconds: float) -> str:
    """0:05, or 1:00:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
