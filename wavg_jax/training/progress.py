"""A progress bar with the time left, in a terminal or a notebook; none in a pipe or a log, or without rich.

`doing` shows on the open bar what happens before the first round, such as compiling.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

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
    columns = (
        # On a narrow line the text is cut; no markup, since it may hold brackets.
        rich.TextColumn("{task.description}", markup=False, table_column=elastic),
        rich.BarColumn(bar_width=10),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
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
