"""A progress bar with the time left."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def bar(total: int, done: int = 0, unit: str = "rounds") -> Iterator[Callable[[str], None]]:
    """Shows a bar on the terminal while the block runs; yields `advance(text)`, to be called after each.

    Args:
      total: rounds in all.
      done: rounds that an earlier part of the run has done.
      unit: what is counted, if not rounds.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"{unit},"),
        TimeElapsedColumn(),
        TextColumn("so far,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    console = Console()
    # In a pipe or a log there is nothing to move, and an error should stand alone.
    with Progress(*columns, console=console, disable=not (console.is_terminal or console.is_jupyter)) as progress:
        task = progress.add_task("starting", total=total, completed=min(done, total))

        def advance(text: str) -> None:
            progress.update(task, advance=1, description=text)

        yield advance
