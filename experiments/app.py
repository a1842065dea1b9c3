"""What the binaries share: one clear line and exit code 2 for bad input, and the report at the end."""

import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from rich.console import Console

from wavg_jax import matrix, matrix_report, report
from wavg_jax.base import SettingsError, Stopped, WavgError
from wavg_jax.records import Row
from wavg_jax.summary import summarise

Main = Callable[[Sequence[str]], None]


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags and returns what else is on the command line; an unknown flag or value ends with exit code 2."""
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def call(main: Main, argv: Sequence[str]) -> None:
    """Calls `main` with what is left of the command line, and turns its errors into one line and an exit code."""
    try:
        main(argv[1:])
    except WavgError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(143) from None


def run(main: Main) -> None:
    """Runs a binary.

    Exit codes: 0 done; 2 bad input (an unknown flag, a value that cannot work, data or a folder that cannot be used);
    143 stopped by SIGTERM or Ctrl-C after a whole round, with a checkpoint.
    """
    logging.set_verbosity(logging.WARNING)  # TFDS and Orbax tell at INFO what only their developers need
    app.run(lambda argv: call(main, argv), flags_parser=parse)


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises SettingsError if the command line holds anything but flags, such as a flag without its `--`."""
    if argv:
        raise SettingsError(f"{argv[0]!r} is not a flag; every setting is given as --name=value, see --help")


def publish(rows: Sequence[Row], folder: pathlib.Path) -> None:
    """Shows the tables of recorded rows, and writes their report to a folder."""
    console = Console(width=None if sys.stdout.isatty() else 100)  # in a log, rich would fold at 80
    if matrix.recorded(rows):
        shown, files = matrix_report.write(folder, rows)
    else:
        shown, files = [report.terminal_table(one) for one in summarise(rows)], report.write(folder, rows)
    for part in shown:
        console.print(part)
    for path in files:
        console.print(f"wrote {path}", soft_wrap=True)
