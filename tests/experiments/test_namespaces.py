"""Namespaces: what crosses them is counted, and nothing stays behind, whatever ends the process."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import terminal

from experiments.benchmarks import namespaces
from experiments.setup import processes
from experiments.setup.processes import Command, launch
from wavg_jax.base import WavgError

REASON = namespaces.unavailable()
real = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SENDS = """
import socket, sys, time
while True:
    try:
        to = socket.create_connection((sys.argv[1], 7000))
        break
    except ConnectionRefusedError:  # the other side is still starting
        time.sleep(0.05)
with to:
    to.sendall(bytes(10**6))
    to.shutdown(socket.SHUT_WR)
    assert to.recv(2) == b"ok"
"""
TAKES = """
import socket, sys
assert socket.gethostbyname(socket.gethostname()) == sys.argv[1]  # as gloo finds it
with socket.create_server((sys.argv[1], 7000)) as server:
    connection, _ = server.accept()
    left = 10**6
    while left:
        left -= len(connection.recv(left))
    connection.sendall(b"ok")
"""
HOLDS = """
import signal, subprocess, sys, time
from experiments.benchmarks import namespaces
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job of a shell's background ignores
with namespaces.network(1, "100mbit") as (node,):
    child = subprocess.Popen(node.command("sleep", "300"), stdout=subprocess.DEVNULL)
    print(node.name, child.pid, flush=True)
    time.sleep(300)
"""


def traces(owner):
    """Namespaces and files of a process's nodes."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    kept = [path.name for path in pathlib.Path("/etc/netns").glob("*")]
    return [name for name in (*listed, *kept) if name.startswith(f"{namespaces.PREFIX}-{owner}-")]


def interfaces():
    return sorted(name for _, name in socket.if_nameindex())


def python(node, text, *arguments):
    return Command(node.command(sys.executable, "-c", text, *arguments))


@real
@pytest.mark.parametrize("rate", ["200mbit", None])
def test_bytes_between_nodes_are_counted_on_both_and_leave_no_trace(rate):
    before = interfaces()
    with namespaces.network(2, rate) as (one, two):
        assert interfaces() == before
        counted = [node.traffic() for node in (one, two)]
        assert launch([python(one, TAKES, one.address), python(two, SENDS, one.address)]).code == 0
        (_, received), (sent, _) = (node.traffic() - then for node, then in zip((one, two), counted, strict=True))
    assert 1e6 < sent < 1.15e6
    assert 1e6 < received < 1.15e6
    assert traces(os.getpid()) == []
    assert interfaces() == before


@real
def test_both_ends_of_a_link_are_shaped_and_the_bridge_is_out_of_the_host():
    with namespaces.network(2, "100mbit") as nodes:
        hub = nodes[0].name.removesuffix("0") + "hub"
        for name, ends in ((hub, 2), (nodes[0].name, 1), (nodes[1].name, 1)):
            shown = subprocess.run(["tc", "-n", name, "qdisc"], capture_output=True, text=True, check=True).stdout
            assert shown.count("tbf") == shown.count("rate 100Mbit") == ends
        assert "bridge" not in interfaces()
    with namespaces.network(1, None) as (node,):
        assert "tbf" not in subprocess.run(["tc", "-n", node.name, "qdisc"], capture_output=True, text=True).stdout


@real
def test_an_exception_leaves_no_trace():
    def fail():
        with namespaces.network(1, "100mbit"):
            assert len(traces(os.getpid())) == 3  # the node, its files and the hub
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert traces(os.getpid()) == []


@real
def test_a_bad_rate_is_one_line_and_leaves_no_trace():
    with pytest.raises(WavgError, match='"quick"') as raised, namespaces.network(1, "quick"):
        pass
    assert "\n" not in str(raised.value)
    assert traces(os.getpid()) == []


@real
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_no_trace_once_the_next_one_has_started(number):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS], cwd=terminal.ROOT, env=terminal.ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    name, child = holder.stdout.readline().split()
    assert name in traces(holder.pid)
    namespaces.remove_leftovers()  # of others only
    assert name in traces(holder.pid)
    holder.send_signal(number)
    holder.communicate(timeout=20)
    assert holder.returncode != 0
    if number == signal.SIGKILL:
        assert name in traces(holder.pid)
        with namespaces.network(1, None):
            assert traces(holder.pid) == []
    assert traces(holder.pid) == []
    stat = pathlib.Path(f"/proc/{child}/stat")
    assert any(not stat.exists() or ") Z " in stat.read_text() or time.sleep(0.1) for _ in range(50))


PSUM = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, number = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, number)
mesh = jax.sharding.Mesh(np.array(jax.devices()), "nodes")
mine = np.full((1, 10**6), number + 1, np.float32)
x = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("nodes")), mine)
specs = {"in_specs": PartitionSpec("nodes"), "out_specs": PartitionSpec()}
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "nodes"), mesh=mesh, **specs))(x)
assert np.all(np.asarray(total.addressable_data(0)) == 3)
"""


@real
@pytest.mark.slow
def test_an_all_reduce_of_jax_crosses_the_nodes():
    with namespaces.network(2, "1gbit") as nodes:
        variables = processes.share(2)
        address = f"{nodes[0].address}:7001"
        every = [python(node, PSUM, address, str(i))._replace(variables=variables) for i, node in enumerate(nodes)]
        assert launch(every).code == 0
        for node in nodes:
            sent, received = node.traffic()
            assert 4e6 < sent < 4.5e6  # a ring of two sends every float once
            assert 4e6 < received < 4.5e6


def test_without_root_linux_or_the_programs_the_reason_is_one_line(monkeypatch):
    monkeypatch.setattr(namespaces.sys, "platform", "linux")
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(namespaces.shutil, "which", lambda name: f"/sbin/{name}")
    assert namespaces.unavailable() == "network namespaces need root"
    monkeypatch.setattr(namespaces.shutil, "which", lambda name: None)
    assert namespaces.unavailable() == "network namespaces need ip and tc, of the package iproute2"
    monkeypatch.setattr(namespaces.sys, "platform", "darwin")
    assert namespaces.unavailable() == "network namespaces need Linux"


def test_a_root_that_may_not_make_namespaces_is_told_what_failed(monkeypatch):
    def refuse(*command):
        raise WavgError(f"{command[0]}: Operation not permitted")

    monkeypatch.setattr(namespaces, "_run", refuse)
    monkeypatch.setattr(namespaces.sys, "platform", "linux")
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces.shutil, "which", lambda name: f"/sbin/{name}")
    assert namespaces.unavailable() == "network namespaces do not work here: ip: Operation not permitted"
