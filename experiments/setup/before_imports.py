"""What a binary does before its imports, which take seconds: it checks that the extra `experiments` is installed, says
that it starts, and takes over Ctrl-C.

Until `experiments.setup.app` runs, Ctrl-C ends the process with one line. From then on the first Ctrl-C raises
KeyboardInterrupt or asks to finish the round; the main thread acts on it once it no longer waits for XLA. A second
Ctrl-C ends the process from a thread that never waits for XLA.
"""

import importlib.util
import os
import signal
import sys
import threading
import time

from experiments.setup import captions

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""

_GRACE = 1.0
"""Seconds that the main thread has to end in order after a second Ctrl-C."""


_NEEDED = {
    "absl": "absl-py",
    "filelock": "filelock",
    "markdown_it": "markdown-it-py",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "scipy": "scipy",
}
"""The packages of the extra that every binary needs, by the modules they install."""


def is_worker() -> bool:
    """Whether this process is a peer of `experiments.benchmarks.peers`, which runs in an environment of its own."""
    return any(".peer_workers." in argument for argument in sys.orig_argv)


def begin() -> None:
    """Does all of it, once; in a worker of another system nothing."""
    if not is_worker() and signal.getsignal(signal.SIGINT) is not leave:
        check_installed()
        take_over()


def check_installed() -> None:
    """Ends the process with one line and exit code 2 if a package that every binary needs is missing."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        what = "'wavg-jax[experiments]'" if captions.INSTALLED else '-e ".[experiments]"'
        print(
            f"error: the binaries need {', '.join(missing)}, not installed: python -m pip install {what}",
            file=sys.stderr,
        )
        raise SystemExit(2)


def interrupted() -> None:
    """Prints "interrupted" once, on a line of its own, and shows the cursor that a progress bar hides."""
    if not _told.is_set():
        _told.set()
        # The interrupted code may hold the lock of sys.stderr.
        os.write(2, (b"\x1b[?25h\r\x1b[K" if os.isatty(2) else b"") + b"interrupted\n")


def leave(*_: object) -> None:
    """Ends the process at once; files survive a kill."""
    interrupted()
    os._exit(INTERRUPTED)


_told = threading.Event()


def _watch(signals: int) -> None:
    """Reads the numbers of signals as they arrive, and ends the process after a second Ctrl-C."""
    asked = 0
    while numbers := os.read(signals, 64):
        asked += numbers.count(signal.SIGINT)
        if asked > 1:
            time.sleep(_GRACE)
            leave()


def take_over() -> None:
    """Handles Ctrl-C from now on, and prints "starting", which a longer line overwrites."""
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, leave)
    threading.Thread(target=_watch, args=(signals,), daemon=True, name="interrupts").start()
    if sys.stderr.isatty():
        print("starting", end="\r", file=sys.stderr, flush=True)
