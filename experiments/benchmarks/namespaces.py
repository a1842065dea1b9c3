"""Nodes on one machine: Linux network namespaces, joined by a bridge over links of a given rate.

Each node is a namespace with one interface, a veth pair to the bridge, which has a namespace of its own: nothing of the
host's network changes, and traffic stays inside. A token bucket (`tc`'s tbf) shapes both ends of the pair, so a node
sends at the rate and receives at the rate. Links have the host's latency: adding some takes netem, which many kernels
lack. Needs root, `ip` and `tc`.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

from wavg_jax.base import SettingsError, WavgError

PREFIX = "wavg"
INTERFACE = "eth0"
"""Of every node."""
_HOSTS = pathlib.Path("/etc/netns")
_OWNER = re.compile(rf"{PREFIX}-(\d+)-[0-9a-f]+-\w+")
_BURST, _QUEUE = "80kb", "50ms"
"""Of the token bucket: bytes that may pass at once, and how long a packet may wait before it is dropped. A burst takes
the kernel's largest packet, 64 KiB and the headers of its parts, whole: cut up, they halve 1 Gbit/s."""


class Traffic(NamedTuple):
    """Bytes that crossed a node's interface, with headers. The kernel counts those of up to 64 KiB of data once."""

    sent: int
    received: int

    def __sub__(self, before: "Traffic") -> "Traffic":
        return Traffic(self.sent - before.sent, self.received - before.received)


class Node(NamedTuple):
    """A namespace.

    Attributes:
      name: of the namespace.
      address: of its interface.
    """

    name: str
    address: str

    def command(self, *arguments: str) -> tuple[str, ...]:
        """The command that runs a program on the node. There the host's name stands for the node's address."""
        return ("ip", "netns", "exec", self.name, *arguments)

    def traffic(self) -> Traffic:
        """The bytes so far."""
        (link,) = json.loads(_run("ip", "-n", self.name, "-s", "-j", "link", "show", "dev", INTERFACE))
        return Traffic(link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"])


_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)bit")
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def bits(rate: str) -> float:
    """The bits a second of a rate as `tc` writes it.

    Raises:
      SettingsError: it is none.

    >>> bits("100mbit"), bits("2.5gbit")
    (100000000.0, 2500000000.0)
    """
    found = _RATE.fullmatch(rate)
    if found is None or not float(found[1]):
        raise SettingsError(f"{rate!r} is no rate; give one such as 100mbit or 1gbit")
    return float(found[1]) * _UNITS[found[2]]


def unavailable() -> str | None:
    """Why nodes cannot be made here, in one line; None if they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"network namespaces need {' and '.join(missing)}, of the package iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with network(1, "100mbit"):  # a container's root may not, and a kernel may lack the token bucket
            return None
    except (WavgError, OSError) as error:
        return f"network namespaces do not work here: {error}"


@contextlib.contextmanager
def network(nodes: int, rate: str | None) -> Iterator[tuple[Node, ...]]:
    """Makes nodes, and removes them with all that runs on them, also after Ctrl-C, SIGTERM or SIGHUP.

    First it removes what a killed process left behind.

    Args:
      nodes: how many, at most 250.
      rate: of each node's link, up and down each, as `tc` writes it: 100mbit; None for as fast as the kernel copies.

    Raises:
      WavgError: `ip` or `tc` fails.
    """
    remove_leftovers()
    run = f"{PREFIX}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    made = tuple(Node(f"{run}-{number}", f"10.77.0.{number + 1}") for number in range(nodes))
    with _unwound_by_signals():
        try:
            hub = f"{run}-hub"
            _run("ip", "netns", "add", hub)
            _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", hub, "link", "set", "bridge", "up")
            for number, node in enumerate(made):
                _attach(node, hub, f"port{number}", rate)
            yield made
        finally:
            with _deaf():
                _remove(name for name in _existing() if name.startswith(f"{run}-"))


def remove_leftovers() -> None:
    """Removes the nodes of processes that are gone, and what still runs on them."""
    names = _existing()
    _remove(name for name in names if (owner := _OWNER.fullmatch(name)) and not os.path.exists(f"/proc/{owner[1]}"))


def _attach(node: Node, hub: str, port: str, rate: str | None) -> None:
    """Makes a node, and joins it to the bridge."""
    hosts = _HOSTS / node.name / "hosts"
    hosts.parent.mkdir(parents=True)
    # Gloo asks for the address of the host's name.
    hosts.write_text(f"127.0.0.1 localhost\n{node.address} {socket.gethostname()}\n")
    _run("ip", "netns", "add", node.name)
    _run("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", node.name)
    for namespace, end in ((hub, port), (node.name, INTERFACE)):
        if rate is not None:
            shape = ("root", "tbf", "rate", rate, "burst", _BURST, "latency", _QUEUE)
            _run("tc", "-n", namespace, "qdisc", "add", "dev", end, *shape)
    _run("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")
    _run("ip", "-n", node.name, "address", "add", f"{node.address}/24", "dev", INTERFACE)
    for end in (INTERFACE, "lo"):
        _run("ip", "-n", node.name, "link", "set", end, "up")


def _existing() -> list[str]:
    """The names of all namespaces, and of those that only have their files left."""
    names = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]
    return [*names, *(path.name for path in _HOSTS.glob(f"{PREFIX}-*") if path.name not in names)]


def _remove(names: Iterator[str]) -> None:
    """Removes namespaces, what runs in them, and their files."""
    for name in names:
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        # The interface goes with the namespace, but that only with the last process in it.
        _ip("-n", name, "link", "delete", INTERFACE)
        _ip("netns", "delete", name)
        shutil.rmtree(_HOSTS / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # there are others' files
        _HOSTS.rmdir()


def _run(*command: str) -> str:
    """What a command prints.

    Raises:
      WavgError: it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise WavgError(f"{' '.join(command)}: {said}")
    return done.stdout


def _ip(*arguments: str) -> str:
    """What `ip` prints; nothing if it fails, as it does where the thing to remove is gone."""
    with contextlib.suppress(WavgError):
        return _run("ip", *arguments)
    return ""


@contextlib.contextmanager
def _handled(handler: object, *numbers: signal.Signals) -> Iterator[None]:
    """Handles signals in the main thread while the block runs; in others Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _unwound_by_signals() -> contextlib.AbstractContextManager[None]:
    """SIGTERM and SIGHUP raise SystemExit, as SIGINT raises KeyboardInterrupt, so that `finally` runs."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    return _handled(unwind, signal.SIGTERM, signal.SIGHUP)


def _deaf() -> contextlib.AbstractContextManager[None]:
    """Signals do not interrupt the cleaning, which takes milliseconds."""
    return _handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
