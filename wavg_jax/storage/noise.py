"""Keeps off the terminal what Orbax says of its saves, and what a failed one leaves behind."""

import contextlib
import gc
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any


def let_go(error: BaseException) -> None:
    """Makes the leftovers of a failed save complain now, while `quiet` listens: futures in the error's frames that
    nobody will await, and the save's other writes, which have nowhere to report to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        time.sleep(_STRAY_WRITES)
        gc.collect()


_STRAY_WRITES = 0.2
"""Seconds to wait for the other writes of a failed save, which offer no handle to wait on."""


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Wraps a write by Orbax: on failure, lets go of the writes still under way."""
    try:
        yield
    except (OSError, ValueError) as error:
        let_go(error)
        raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the chatter of Orbax, and of the reads and writes it leaves behind, off the terminal.

    Orbax logs every save, and the traceback of every error it raises anyway. When one write of a save fails, each write
    still under way complains that its event loop is closed.
    """

    def not_of_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    logger = logging.getLogger("absl")
    logger.addFilter(not_of_orbax)
    before, sys.unraisablehook = sys.unraisablehook, hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        logger.removeFilter(not_of_orbax)
