"""Runs a binary: one clear line and exit code 2 for bad input, no traceback."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from wavg_jax.base import SettingsError, Stopped, WavgError


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags and calls `main` with what is left of the command line.

    Exit codes: 0 done; 2 bad input (an unknown flag, a value that cannot work, data or a folder that cannot be used);
    143 stopped by SIGTERM or Ctrl-C after a whole round, with a checkpoint.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv[1:])
        except WavgError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise SystemExit(143) from None

    app.run(guarded, flags_parser=_parse)


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises SettingsError if the command line holds anything but flags, such as a flag without its `--`."""
    if argv:
        raise SettingsError(f"{argv[0]!r} is not a flag; every setting is given as --name=value, see --help")
