"""A binary in a process of its own, in a terminal of 80 columns."""

import fcntl
import os
import pathlib
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TERM": "xterm"}
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(*arguments, interrupt_at=(), timeout=120):
    """Runs `python -m arguments` in a terminal.

    Args:
      arguments: of Python, after -m.
      interrupt_at: texts; after each of them has been shown, in turn, Ctrl-C is sent, or at once if it is empty.
      timeout: seconds for the whole.

    Returns:
      (exit code, what was shown, without the terminal's escape sequences)
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown, seen, waiting, end = "", 0, list(interrupt_at), time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    shown += _ESCAPES.sub("", os.read(ours, 65536).decode(errors="replace"))
                except OSError:  # so Linux says that the other side is closed
                    break
            if waiting and (at := shown.find(waiting[0], seen)) >= 0:
                seen = at + len(waiting.pop(0))
                process.send_signal(signal.SIGINT)
        return process.wait(timeout=10), shown
    finally:
        process.kill()
        process.wait()
        os.close(ours)
