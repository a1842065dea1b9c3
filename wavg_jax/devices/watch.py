"""Each process watches the others: a process that dies, freezes or fails ends all, each with one clear line.

Process 0 has a connection to each of the others, over which both sides say every few seconds that they are alive. The
system closes the connections of a process that dies, so the others know at once; a machine that is lost, or a process
that is frozen, is silent.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import jax

from wavg_jax.base import SettingsError
from wavg_jax.devices.sockets import Channel, Message, background, connect, listen, parts, receive_hellos

EXIT_CODE = 3
"""Exit code of a process that ends because another one died, froze or failed."""
GRACE = 5.0
"""Seconds in which a process may fail by itself, with its own error, after another one has failed."""
LAST = 600.0
"""Seconds for which a process that has ended waits for the others, which may still write a report."""
MISSED = 30.0
"""Seconds for which a process may wait where all must come, after another one has ended."""
_FAREWELL = 10.0
"""Seconds in which all processes leave JAX's coordination service after one has failed."""
_SLICES = 10
"""Silent parts of the time after which a process counts as frozen. Counted rather than timed: when all processes were
suspended together, as in a laptop's sleep, none of them has missed more than one."""


def name(index: int, hosts: Sequence[str]) -> str:
    """How messages call a process: process 1 of 4 (on node2)."""
    return f"process {index} of {len(hosts)} (on {hosts[index]})"


class Watch:
    """Watches the other processes, in the background, from `start` to `leave`."""

    def __init__(self, index: int, hosts: Sequence[str], channels: dict[int, Channel], heartbeat: float):
        """Args:
        index: of this process.
        hosts: the machine of each process.
        channels: process -> connection: all others in process 0, process 0 in the others.
        heartbeat: seconds of silence after which a process counts as frozen.
        """
        self._index, self._hosts, self._channels, self._heartbeat = index, hosts, channels, heartbeat
        self._ended: set[int] = set()
        self._failures: set[int] = set()
        self._parted: set[int] = set()
        self._leaving = threading.Event()
        self._over = threading.Lock()
        self._failed = -1e9
        self._exit = ""
        self._meetings: dict[object, float] = {}

    def start(self) -> None:
        """Starts to watch."""
        for peer in self._channels:
            background(self._listen, peer)
        background(self._beat)

    def announce(self, error: str) -> None:
        """Tells the others that this process fails, and why in one line."""
        self._stay_if_over()
        self._failed = time.monotonic()
        self._send({"failed": self._index, "error": error})

    def wait_for_death(self) -> None:
        """Waits as long as it can take to learn that another process is gone, which ends this one."""
        time.sleep(self._heartbeat)

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """All processes must come to this block: while one is in it, none may have ended."""
        self._exit = ""  # it was caught
        key = object()
        self._meetings[key] = time.monotonic()
        try:
            yield
        finally:
            del self._meetings[key]

    def exits(self, how: str) -> None:
        """Notes that this process has begun to exit with an error; `leave` announces it."""
        self._exit = how

    def leave(self) -> None:
        """Ends in order: waits until every process has come here, then stops watching."""
        self._stay_if_over()
        if self._exit:
            self.announce(self._exit)
        self._leaving.set()
        self._send({"ended": self._index})
        end = time.monotonic() + LAST
        while len(self._ended) < len(self._hosts) - 1 and time.monotonic() < end:
            time.sleep(0.01)
        if len(self._ended) < len(self._hosts) - 1:
            self.announce(f"it ended {LAST:g} seconds ago, before the others")
        jax.distributed.shutdown()  # waits for all
        self._part()
        self._over.acquire(blocking=False)  # nothing ends this process any more
        for channel in self._channels.values():
            channel.close()

    def _stay_if_over(self) -> None:
        """Keeps the main thread silent while the watch ends the process: what it meets now is only the consequence."""
        if self._over.locked():
            threading.Event().wait()

    def _part(self) -> None:
        self._send({"bye": self._index})
        end = time.monotonic() + _FAREWELL
        # Process 0 last, since the connections of all others lead through it.
        while self._index == 0 and len(self._parted) < len(self._channels) and time.monotonic() < end:
            time.sleep(0.01)

    def _send(self, message: Message, but: int | None = None) -> None:
        for peer, channel in self._channels.items():
            if peer != but:
                channel.send(message)

    def _beat(self) -> None:
        while True:
            self._send({"alive": self._index})
            time.sleep(self._heartbeat / 4)

    def _listen(self, peer: int) -> None:
        silent = 0
        while silent < _SLICES:
            try:
                message = self._channels[peer].receive(self._heartbeat / _SLICES)
            except TimeoutError:
                silent += 1
                continue
            except ValueError:
                message = None
            if message is None or "bye" in message:
                self._parted.add(peer)
                if message is None:
                    self._gone(peer, "is gone")
                return
            silent = 0
            self._heard(peer, message)
        self._gone(peer, f"has been silent for {self._heartbeat:g} seconds")

    def _heard(self, peer: int, message: Message) -> None:
        if "alive" in message:
            return
        if "ended" in message:
            self._ended.add(message["ended"])
            if message["ended"] not in self._failures:
                background(self._other_ended, message["ended"])
        if self._index == 0:
            self._send(message, but=peer)
        if "gone" in message:
            self._gone(message["gone"], message["how"])
        if "failed" in message:
            self._failures.add(message["failed"])
            background(self._other_failed, message["failed"], message["error"])

    def _gone(self, peer: int, how: str) -> None:
        self._send({"gone": peer, "how": how}, but=peer)
        self._end(f"{name(peer, self._hosts)} {how}: this one, process {self._index}, ends too; {_AGAIN}")

    def _other_failed(self, peer: int, error: str) -> None:
        time.sleep(GRACE)
        if self._leaving.is_set() or time.monotonic() - self._failed < 2 * GRACE:
            return  # this process ends by itself, mostly with the same error
        self._end(f"{name(peer, self._hosts)} failed: {error}; this one, process {self._index}, ends too", part=True)

    def _other_ended(self, peer: int) -> None:
        """Once another process has ended, ends this one where it waits for that one, and else says where it stands."""
        who, ended, stood = f"{name(peer, self._hosts)} has ended", time.monotonic(), ("", time.monotonic())
        while not self._leaving.is_set():
            time.sleep(MISSED / 30)
            at, now = _position(), time.monotonic()
            if any(now - max(begun, ended) > MISSED for begun in list(self._meetings.values())):
                self._end(f"{who}, for which this one, process {self._index}, waits: it ends too; {_SAME}", part=True)
            if at != stood[0]:
                stood = (at, now)
            # In a program of the user's own a collective looks like any other work.
            if now - stood[1] > MISSED:
                stood = (at, float("inf"))  # says so once
                where = f"this one, process {self._index}, has been at {at} for {MISSED:g} seconds"
                print(
                    f"{who}; {where}: if it waits there for that one, it does so in vain", file=sys.stderr, flush=True
                )

    def _end(self, line: str, part: bool = False) -> None:
        """Ends the process at once, whatever its main thread waits for."""
        if not self._over.acquire(blocking=False):
            return
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            print(line, file=sys.stderr, flush=True)
        if part:  # the process that failed waits for this one at its end
            self._send({"ended": self._index})
            leaving = background(_leave_service)
            leaving.join(_FAREWELL)
            self._part()
        os._exit(EXIT_CODE)


def _position() -> str:
    """Where the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


_SAME = "all processes must make the same calls of wavg_jax"
_AGAIN = "start all again, with resume=True to go on from the last checkpoint"


def _leave_service() -> None:
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


def receive_all(address: str, hosts: int, service: int, timeout: float) -> tuple[list[str], dict[int, Channel]]:
    """Waits, in process 0, for the other processes.

    Args:
      address: HOST:PORT, whose port this process opens.
      hosts: number of processes.
      service: the port of JAX's coordination service on this machine.
      timeout: seconds.

    Returns:
      (each process's machine, process -> connection)

    Raises:
      SettingsError: a process did not come, or two do not agree with one another.
    """
    channels: dict[int, Channel] = {}
    came: list[Channel] = []
    names, wrong = {0: socket.gethostname()}, []
    changed = threading.Condition()

    def arrived(channel: Channel, hello: Message) -> None:
        index, of = hello["index"], hello["of"]
        with changed:
            if of != hosts:
                wrong.append(f"process {index} was given num_processes={of}, process 0 num_processes={hosts}")
            elif index in names:
                wrong.append(f"two processes were given process_id={index}; each needs its own, 0 to {hosts - 1}")
            names[index], channels[index] = hello["host"], channel
            came.append(channel)
            changed.notify_all()

    try:
        server = listen("", parts(address)[1])
    except OSError as error:
        raise SettingsError(
            f"process 0 cannot use the port of coordinator_address={address!r} ({os.strerror(error.errno or 0)}); "
            "choose another one"
        ) from error
    receive_hellos(server, service, arrived)
    with changed:
        changed.wait_for(lambda: wrong or len(names) == hosts, timeout)
    missing = [str(index) for index in range(hosts) if index not in names]
    if missing and not wrong:
        wrong.append(
            f"waited {timeout:g} seconds for process {', '.join(missing)} of {hosts}, which did not come to "
            f"coordinator_address={address!r}; start it, or wait longer (timeout=)"
        )
    with changed:
        for channel in came:
            channel.send({"refused": wrong[0]} if wrong else {"hosts": [names[index] for index in range(hosts)]})
    if wrong:
        server.close()
        for channel in came:
            channel.close()
        raise SettingsError(wrong[0])
    return [names[index] for index in range(hosts)], channels


def join(address: str, index: int, of: int, timeout: float) -> tuple[list[str], dict[int, Channel]]:
    """Comes, as one of the other processes, to process 0, and waits until all are there; returns as `receive_all`.

    Raises:
      SettingsError: process 0 does not answer, or refuses.
    """
    hello = {"wants": "watch", "index": index, "of": of, "host": socket.gethostname()}
    answer: Message = {}
    with contextlib.ExitStack() as stack:
        try:
            channel = Channel(connect(*parts(address), timeout))
            stack.callback(channel.close)
            channel.send(hello)
            why = "something else answers there"
            answer = channel.receive(timeout + 1) or {}  # process 0 may have begun to wait only now
        except ValueError:
            pass
        except OSError as error:
            why = error.strerror or str(error)
        if "hosts" in answer:
            stack.pop_all()
            return answer["hosts"], {0: channel}
    if "refused" in answer:
        raise SettingsError(answer["refused"])
    raise SettingsError(
        f"process {index} waited {timeout:g} seconds for process 0 at coordinator_address={address!r}, which does not "
        f"answer ({why}); start process 0 there, correct the address, or wait longer (timeout=)"
    )
