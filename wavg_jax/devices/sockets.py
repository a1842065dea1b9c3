"""The port of process 0: lines of JSON between the processes, and the connections of JAX's coordination service.

JAX aborts a process with a C++ stack trace as soon as the connection to its coordination service breaks. So each
process connects JAX to a port of its own, whose bytes go through the port of process 0 to the service. When process 0
is gone, that connection only falls silent, and `wavg_jax.devices.watch` can end the process with one clear line.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, Any]

_HELLO = 10.0
"""Seconds in which a connection must say what it is; a stranger's is closed."""
_RETRY = 0.1
"""Seconds between two attempts to connect."""
_LONGEST = 2**16
"""Bytes in a line."""


class Channel:
    """One connection that carries lines of JSON both ways."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.rest = b""  # read, but not yet part of a whole line
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Sends a line, as long as somebody is there to read it."""
        with contextlib.suppress(OSError), self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def receive(self, seconds: float) -> Message | None:
        """The next line; None at the end.

        Raises:
          TimeoutError: nothing was said for so many seconds.
          ValueError: what was said is no line of JSON.
        """
        self.socket.settimeout(seconds)
        while b"\n" not in self.rest:
            try:
                more = self.socket.recv(4096)
            except TimeoutError:
                raise
            except OSError:
                more = b""
            if not more:
                return None
            self.rest += more
            if len(self.rest) > _LONGEST:
                raise ValueError("no line")
        line, _, self.rest = self.rest.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("no message")
        return message


def background(run: Callable[..., Any], *arguments: Any) -> threading.Thread:
    """Starts a thread that does not keep the process alive."""
    thread = threading.Thread(target=run, args=arguments, daemon=True)
    thread.start()
    return thread


def listen(host: str, port: int) -> socket.socket:
    """Listens at a port; the host "" is every address of the machine."""
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server((host, port), backlog=1024)


def parts(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    >>> parts("[::1]:1234")
    ('::1', 1234)
    """
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with listen("127.0.0.1", 0) as server:
        return int(server.getsockname()[1])


def connect(host: str, port: int, seconds: float) -> socket.socket:
    """Connects, and tries again until so many seconds have passed.

    Raises:
      OSError: nobody answers.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(end - time.monotonic(), _RETRY))
        except OSError:
            if time.monotonic() + _RETRY > end:
                raise
            time.sleep(_RETRY)


def _accepted(server: socket.socket) -> Iterator[socket.socket]:
    with contextlib.suppress(OSError):  # closed
        while True:
            yield server.accept()[0]


def receive_hellos(server: socket.socket, service: int, arrived: Callable[[Channel, Message], None]) -> None:
    """Accepts connections to the port of process 0, in the background.

    Args:
      server: listens at the port.
      service: the port of JAX's coordination service on this machine.
      arrived: called with a process's connection and its hello, one at a time.
    """
    lock = threading.Lock()

    def greet(connection: socket.socket) -> None:
        channel = Channel(connection)
        try:
            hello = channel.receive(_HELLO) or {}
        except (ValueError, TimeoutError):
            hello = {}
        if not {"watch": {"index", "of", "host"}, "service": set()}.get(hello.get("wants", ""), {""}) <= hello.keys():
            connection.close()
        elif hello["wants"] == "watch":
            with lock:
                arrived(channel, hello)
        else:
            with contextlib.suppress(OSError):
                there = connect("127.0.0.1", service, _HELLO)
                there.sendall(channel.rest)
                _join(connection, there, hold=False)

    def accept() -> None:
        for connection in _accepted(server):
            background(greet, connection)

    background(accept)


def relay(host: str, port: int) -> int:
    """Opens a port on this machine whose connections lead to JAX's coordination service beside process 0.

    Once there, a connection that process 0 drops stays open on this side, silent.
    """
    server = listen("127.0.0.1", 0)

    def lead(connection: socket.socket) -> None:
        try:
            there = connect(host, port, _HELLO)
        except OSError:
            connection.close()
            return
        Channel(there).send({"wants": "service"})
        _join(connection, there, hold=True)

    def accept() -> None:
        for connection in _accepted(server):
            background(lead, connection)

    background(accept)
    return int(server.getsockname()[1])


def _join(here: socket.socket, there: socket.socket, *, hold: bool) -> None:
    """Copies bytes both ways until both are done; with `hold`, the end of `there` does not end `here`."""
    for end in (here, there):
        end.settimeout(None)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    back = background(_copy, there, here, hold)
    _copy(here, there, False)
    back.join()
    here.close()
    there.close()


def _copy(source: socket.socket, target: socket.socket, hold: bool) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    if not hold:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
