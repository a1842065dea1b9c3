"""Runs several processes on this machine as one: their output, signals and exit codes, and no orphans."""

import contextlib
import fcntl
import os
import pathlib
import pty
import selectors
import signal
import socket
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import BinaryIO, NamedTuple

from wavg_jax.base import WavgError
from wavg_jax.devices import machine

GRACE = 10.0
"""Seconds that the other processes have to end in order once one has failed."""
_POLL = 0.05
"""Seconds between two looks at the processes."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = 128 + signal.SIGTERM
"""Exit code of a process that a SIGTERM of its own ended in order. Those that train with it stop by themselves."""
_EMULATED = "xla_force_host_platform_device_count"


class Ended(NamedTuple):
    """How processes ended.

    Attributes:
      code: 0, or the exit code of the process that failed first: 128 + the signal's number if a signal ended it. After
        a second signal, 128 + its number.
      signal: the number of the signal that was forwarded to them; None if none was.
    """

    code: int
    signal: int | None


class Command(NamedTuple):
    """A process to start.

    Attributes:
      arguments: the program and its arguments.
      variables: added to the environment, in place of those of the same name.
    """

    arguments: Sequence[str]
    variables: Mapping[str, str] = {}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def share(processes: int) -> dict[str, str]:
    """The environment variables that give each of several processes its share of the cores.

    XLA takes as many threads as `NPROC` says, and JAX as many CPU devices. The processes are not bound to cores. A
    number of emulated devices in XLA_FLAGS is meant for one process, so it goes.
    """
    cores = str(max(machine.cores() // processes, 1))
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if _EMULATED not in flag]
    return {"NPROC": cores, "JAX_NUM_CPU_DEVICES": cores, "XLA_FLAGS": " ".join(kept)}


def launch(
    commands: Sequence[Command],
    *,
    log_dir: pathlib.Path | None = None,
    grace: float = GRACE,
    show: bool = True,
    watch: Callable[[], int | None] = lambda: None,
) -> Ended:
    """Runs processes until all have ended, and leaves none behind.

    Process 0 writes to our terminal as if it ran alone; every line of process i > 0 gets the prefix `[i] `, and only
    whole lines are shown. Standard
    input is empty. SIGINT, SIGTERM and SIGHUP are forwarded to all; a second one kills them. When a process fails, the
    others get SIGTERM and, `grace` seconds later, SIGKILL. After a forwarded signal they get no SIGTERM on top, since
    our binaries take a second signal as an order to end at once; nor after a process that stopped in order (`STOPPED`),
    which takes the others along. When we are killed, they get SIGTERM, and SIGKILL `grace` seconds later.

    Args:
      commands: one for each process; process i runs the i-th in a process group of its own.
      log_dir: folder for the output of each process, as process-i.log; made if missing.
      grace: seconds between SIGTERM and SIGKILL.
      show: whether to show the output too.
      watch: called many times a second; a signal's number that it returns is sent to all, each number once.

    Raises:
      WavgError: a program cannot be started, or a log cannot be written.
    """
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(_asked())
        group = _Group(stack, log_dir, grace, show)
        stack.callback(group.kill)
        try:
            for command in commands:
                group.start(command)
        except OSError as error:
            raise WavgError(f"cannot start process {len(group.running)}: {error}") from error
        code = group.wait(asked, watch)
        return Ended(code, asked[0] if asked else None)


@contextlib.contextmanager
def _asked() -> Iterator[list[int]]:
    """Collects the numbers of the forwarded signals instead of acting on them, where Python allows handlers."""
    numbers: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    before = {}
    try:
        with contextlib.suppress(ValueError):  # not in the main thread, which gets the signals then
            for number in _FORWARDED:
                before[number] = signal.signal(number, remember)
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stream(NamedTuple):
    """What a process writes.

    Attributes:
      prefix: of every line shown; None shows everything as it comes.
      shown: file descriptor to show it on; None shows nothing.
      log: gets it unchanged; None logs nothing.
      rest: the bytes of a line that has not ended yet.
    """

    prefix: bytes | None
    shown: int | None
    log: BinaryIO | None
    rest: bytearray

    def take(self, data: bytes) -> None:
        if self.log is not None:
            self.log.write(data)
        if self.prefix is not None:
            self.rest.extend(data)
            whole = self.rest.rfind(b"\n") + 1
            data = b"".join(self.prefix + line for line in bytes(self.rest[:whole]).splitlines(keepends=True))
            del self.rest[:whole]
        while self.shown is not None and data:
            data = data[os.write(self.shown, data) :]

    def end(self) -> None:
        """Shows a last line that has no end."""
        if self.rest:
            self._replace(log=None).take(b"\n")


_GUARD = """
import os, signal, sys, time
groups = [int(line) for line in sys.stdin]  # until whoever writes is gone
for number in (signal.SIGTERM, signal.SIGKILL):
    for group in groups:
        try:
            os.killpg(group, number)
        except OSError:
            pass
    time.sleep(float(sys.argv[1]))
"""


def _guard(stack: contextlib.ExitStack, grace: float) -> BinaryIO:
    """Starts a process that ends the groups whose numbers it is told, a line each, once we are killed.

    It ends with the stack. The system closes our pipe to it, whatever ends us.
    """
    theirs, ours = os.pipe()
    told = stack.enter_context(os.fdopen(ours, "wb", buffering=0))
    command = (sys.executable, "-I", "-S", "-c", _GUARD, str(grace))
    nowhere = subprocess.DEVNULL
    guard = subprocess.Popen(command, stdin=theirs, stdout=nowhere, stderr=nowhere, start_new_session=True)
    os.close(theirs)
    stack.callback(guard.wait)
    stack.callback(guard.kill)
    return told


class _Group:
    """The processes, from the first one's start to the last one's end."""

    def __init__(self, stack: contextlib.ExitStack, log_dir: pathlib.Path | None, grace: float, show: bool):
        self.stack, self.log_dir, self.grace, self.show = stack, log_dir, grace, show
        self.running: list[subprocess.Popen] = []
        self.selector = stack.enter_context(selectors.DefaultSelector())
        self.code = 0
        self.guard = _guard(stack, grace)

    def start(self, command: Command) -> None:
        number, log = len(self.running), None
        if self.log_dir is not None:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            log = self.stack.enter_context((self.log_dir / f"process-{number}.log").open("wb", buffering=0))
        outputs = [self._output(number, shown, log) for shown in (1, 2)]
        try:
            process = subprocess.Popen(
                command.arguments,
                env=os.environ | command.variables,
                stdin=subprocess.DEVNULL,
                stdout=outputs[0],
                stderr=outputs[1],
                process_group=0,  # or Ctrl-C would reach it twice: from the terminal and from us
            )
        finally:
            for output in outputs:
                if output is not None:
                    os.close(output)
        self.running.append(process)
        self.guard.write(f"{process.pid}\n".encode())

    def _output(self, number: int, shown: int, log: BinaryIO | None) -> int | None:
        """A file descriptor for a process to write to, where we read it; None for our own, a terminal."""
        prefix: bytes | None = f"[{number}] ".encode() if number else b""
        if number == 0 and self.show and os.isatty(shown):  # a progress bar wants a terminal
            if log is None:
                return None
            prefix = None
            ours, theirs = pty.openpty()
            tty.setraw(theirs)
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, fcntl.ioctl(shown, termios.TIOCGWINSZ, bytes(8)))
        else:
            ours, theirs = os.pipe()
        self.stack.callback(os.close, ours)
        stream = _Stream(prefix, shown if self.show else None, log, bytearray())
        self.selector.register(ours, selectors.EVENT_READ, stream)
        return theirs

    def signal(self, number: int) -> None:
        """Sends a signal to all groups; those of ended processes may have children left."""
        for process in self.running:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies
                os.killpg(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.running:
            process.wait()

    def wait(self, asked: list[int], watch: Callable[[], int | None]) -> int:
        """Forwards signals and output until all have ended; returns the exit code."""
        sent, deadline, left = set[int](), float("inf"), dict(enumerate(self.running))
        while left:
            self.read(_POLL)
            for number, process in list(left.items()):
                if process.poll() is None:
                    continue
                del left[number]
                if process.returncode and not self.code:
                    self.fail(number, process.returncode, quiet=bool(sent) or process.returncode == STOPPED)
                    deadline = time.monotonic() + self.grace
            if len(asked) > 1:
                self.code, deadline = 128 + asked[1], 0.0
            for wanted in (*asked[:1], watch()):
                if wanted is not None and wanted not in sent:
                    sent.add(wanted)
                    self.signal(wanted)
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
        self.signal(signal.SIGKILL)  # what the processes left behind
        while self.selector.get_map() and self.read(_POLL):
            pass
        for key in list(self.selector.get_map().values()):
            key.data.end()
        return self.code

    def fail(self, number: int, returncode: int, *, quiet: bool) -> None:
        """Notes the first failure and, unless the others end anyway, says so and ends them."""
        self.code = returncode if returncode > 0 else 128 - returncode
        if quiet:
            return
        how = f"exit code {returncode}" if returncode > 0 else signal.Signals(-returncode).name
        if len(self.running) > 1 and self.show:
            print(f"error: process {number} ended with {how}; ending the others", file=sys.stderr, flush=True)
        self.signal(signal.SIGTERM)

    def read(self, seconds: float) -> bool:
        """Passes on what has arrived within some seconds; returns whether anything has."""
        arrived = self.selector.select(seconds)
        for key, _ in arrived:
            try:
                data = os.read(key.fd, 65536)
            except OSError:  # so Linux says that nobody has the other side of a terminal any more
                data = b""
            if data:
                key.data.take(data)
            else:
                self.selector.unregister(key.fd)
                key.data.end()
        return bool(arrived)
