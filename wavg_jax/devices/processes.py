"""Several processes, such as one per machine: how they start, speak to one another, and end together.

Each process runs the same program over its own devices; `jax.distributed` joins them, NCCL (GPU) or gloo (CPU) moves
the arrays. All of them must call `initialize`, `broadcast`, `gather`, `barrier`, `decided`, `agree`
and `first_error`, in the same order.
"""

import atexit
import contextlib
import functools
import os
import pickle
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import clusters, xla_bridge  # no public way to ask where the processes are, or whether devices are made
from jax.experimental import multihost_utils

from wavg_jax.arguments import Rule, as_whole, check, number
from wavg_jax.base import Diverged, SettingsError, Stopped, WavgError
from wavg_jax.devices import sockets, watch

EXIT_CODE = watch.EXIT_CODE
"""Exit code of a process that ends because another one died, froze or failed."""
TIMEOUT = 60.0
"""Seconds in which all processes must have started."""
HEARTBEAT = 30.0
"""Seconds of silence after which a process counts as frozen, or its machine as lost. One that dies is known at once."""

_ADDRESS = Rule(
    lambda value: isinstance(value, str) and bool(re.fullmatch(r".+:\d{1,5}", value)),
    "HOST:PORT of process 0, such as 10.0.0.1:1234",
)
_watch: watch.Watch | None = None
Value = TypeVar("Value")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = TIMEOUT,
    heartbeat: float = HEARTBEAT,
) -> None:
    """Joins this process to the others; call it before anything that makes JAX's devices.

    Needs no arguments under SLURM, Open MPI and Kubernetes (indexed jobs), where `jax.distributed` finds them. Does
    nothing if there is one process alone. Then tries the collectives once; `fit` does in the size of its own exchange.

    From here on all processes end together: when one dies, freezes or fails (see `guarded`), each of the others says so
    in one line on stderr and exits with `EXIT_CODE`. When one dies, that takes less than a second; when it freezes or
    its machine is lost, `heartbeat` seconds; when it fails or calls `sys.exit` with an error,
    `wavg_jax.devices.watch.GRACE` seconds more than it takes. When one ends without an error while another waits for it
    (see `meeting`), that takes `wavg_jax.devices.watch.MISSED` seconds; in a program of your own, where we cannot tell
    what the other one does, it then says where it stands.

    Args:
      coordinator_address: HOST:PORT, an address of process 0 that all can reach, and a port that is free there.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds in which all must have started.
      heartbeat: seconds of silence after which a process counts as frozen.

    Raises:
      SettingsError: arguments are missing or do not fit together, JAX has made its devices already, or a process did
        not come in time; names it.
      WavgError: the collectives return wrong values.
    """
    global _watch
    check("timeout", timeout, number(above=0))
    check("heartbeat", heartbeat, number(least=1))
    address, of, which, devices = _found(coordinator_address, num_processes, process_id, int(timeout))
    if of is None or of == 1 or jax.distributed.is_initialized():
        return
    assert address is not None
    assert which is not None
    if xla_bridge.backends_are_initialized():
        raise SettingsError("JAX has made its devices already; start the processes (initialize) before anything else")
    # JAX speaks to its service on loopback only, where no proxy can help; see `sockets`.
    os.environ.setdefault("no_grpc_proxy", "127.0.0.1")
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    if which == 0:
        port = sockets.free_port()
        hosts, channels = watch.receive_all(address, of, port, timeout)
    else:
        hosts, channels = watch.join(address, which, of, timeout)
        port = sockets.relay(*sockets.parts(address))
    _watch = watch.Watch(which, hosts, channels, heartbeat)
    _watch.start()
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        of,
        which,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(timeout), 1),
        coordinator_bind_address=f"127.0.0.1:{port}",
        heartbeat_timeout_seconds=int(max(_JAX_HEARTBEAT, 10 * heartbeat)),  # ours must come first: JAX aborts
    )
    atexit.register(_watch.leave)
    sys.excepthook = functools.partial(_announce_uncaught, sys.excepthook)
    sys.exit = functools.partial(_exit_noted, sys.exit)  # type: ignore[assignment]
    with guarded(), _quiet():
        _check_exchanges()


_JAX_HEARTBEAT = 100


def _found(
    address: str | None, of: int | None, which: int | None, timeout: int
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Address, number and index of the processes, as given or as the cluster says; its number is None if neither."""
    if address is not None:
        check("coordinator_address", address, _ADDRESS)
    of = None if of is None else as_whole("num_processes", of, 1)
    which = None if which is None else as_whole("process_id", which, 0)
    devices: Sequence[int] | None = None
    if None in (address, of, which):
        address, of, which, devices = _detected(address, of, which, timeout)
    given = {"coordinator_address": address, "num_processes": of, "process_id": which}
    lacking = [f"{name}=" for name, value in given.items() if value is None]
    if 0 < len(lacking) < len(given):
        there = " and ".join(f"{name}=" for name, value in given.items() if value is not None)
        raise SettingsError(
            f"several processes need {' and '.join(lacking)} beside {there}; give all three, or none where SLURM, "
            "Open MPI or Kubernetes starts the processes"
        )
    if of is not None and which is not None and which >= of:
        raise SettingsError(f"process_id={which} with num_processes={of}: it must be from 0 to {of - 1}")
    return address, of, which, devices


def _detected(
    address: str | None, of: int | None, which: int | None, timeout: int
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """As `_found`, with what the cluster says where nothing is given."""
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ:
        return address, of, which, None  # one pod by itself
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = clusters.ClusterEnv.auto_detect_unset_distributed_params(address, of, which, None, None, timeout)
        except (RuntimeError, OSError) as error:
            raise SettingsError(f"the cluster does not say which processes there are: {_line(error)}") from error
    if said:  # a package that asks the cluster is not installed
        raise SettingsError(" ".join(str(said[0].message).split()))
    return found


def _check_exchanges() -> None:
    """Raises WavgError unless what processes and devices send one another arrives as it was sent."""
    devices = tuple(jax.devices())
    from wavg_jax.devices.trial import try_collectives  # reports import this module, and compute nothing

    try_collectives(devices, max(_CHECKED // len(devices), 1), _CHECKED)
    if not np.array_equal(gather(np.int64(index())), np.arange(count())) or broadcast(index()) != 0:
        raise WavgError("values sent between processes arrive changed: use another version of jaxlib")


_CHECKED = 2**20
"""Numbers in a gather of all devices, and in a sum: 4 MB, however many there are."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps gloo's "Rank 0 is connected to 1 peer ranks" off stdout, where it is written without asking."""
    sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        try:
            before = os.dup(1)
        except OSError:  # closed
            yield
            return
        stack.callback(os.close, before)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        stack.callback(os.dup2, before, 1)
        yield


def count() -> int:
    """P, the number of processes."""
    return jax.process_count() if jax.distributed.is_initialized() else 1  # asking JAX alone would make its devices


def index() -> int:
    """Which process this is, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def first() -> bool:
    """Whether this is process 0, which alone writes rows, reports and progress."""
    return index() == 0


def broadcast(value: Value) -> Value:
    """Returns process 0's value in all processes: any tree that pickle takes, arrays as NumPy's, bit for bit.

    With one process, the value itself.
    """
    if count() == 1:
        return value
    content = pickle.dumps(jax.tree.map(_on_host, value)) if first() else b""
    size = int(_sent(np.asarray([len(content)], np.int64))[0])
    # Padded to a power of 2, since each length compiles.
    padded = np.zeros(1 << (size - 1).bit_length(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return pickle.loads(_sent(padded)[:size].tobytes())


def _on_host(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def _sent(values: np.ndarray) -> np.ndarray:
    """As bytes: JAX would make 64 bits 32, and the sum with others' zeros would make -0.0 0.0."""
    with meeting(), jax.numpy_dtype_promotion("standard"):
        return np.asarray(multihost_utils.broadcast_one_to_all(values.view(np.uint8))).view(values.dtype)


def gather(array: Any) -> np.ndarray:
    """Returns every process's array, stacked [P, ...], in all of them, bit for bit.

    Args:
      array: of the same shape and dtype everywhere; not spread over processes.
    """
    mine = np.ascontiguousarray(jax.device_get(array))
    shape, mine = np.shape(array), mine.reshape(-1)
    if count() == 1:
        return mine.reshape(1, *shape)
    with meeting(), jax.numpy_dtype_promotion("standard"):
        rows = np.asarray(multihost_utils.process_allgather(mine.view(np.uint8)))
    return rows.view(mine.dtype).reshape(count(), *shape)


def barrier(name: str) -> None:
    """Waits until all processes have come to the barrier of this name."""
    if count() > 1:
        with meeting():
            multihost_utils.sync_global_devices(name)


def decided(decide: Callable[[], Value]) -> Value:
    """Calls a function in process 0 alone, and returns its value, or raises its error, in all processes.

    For what is decided, read or written once, so that no process waits for one that has given up.

    Args:
      decide: without collectives; its value, and errors that are `WavgError`, must be what pickle takes.
    """
    if count() == 1:
        return decide()
    value, failed = None, None
    if first():
        try:
            value = decide()
        except WavgError as error:
            failed = error
    sent, theirs = broadcast((value, failed))
    if theirs is not None:
        raise failed or theirs  # process 0's own, with its cause
    return sent  # type: ignore[return-value]


_DIFFERS = "was given {name}={mine!r}, process 0 {name}={zero!r}; give all processes the same settings"


def agree(mine: Mapping[str, Any], differs: str = _DIFFERS) -> None:
    """Checks that all processes were given the same, before they rely on it.

    Args:
      mine: name -> value, of types that pickle takes.
      differs: what to say of a process that was given something else, with {name}, {mine} and {zero}.

    Raises:
      SettingsError: one was given something else than process 0; the same error in all processes.
    """
    zero = broadcast(dict(mine))
    wrong = [name for name in sorted({*mine, *zero}) if mine.get(name) != zero.get(name)]
    said = [differs.format(name=name, mine=mine.get(name), zero=zero.get(name)) for name in wrong[:1]]
    if error := first_error("".join(f"process {index()} {line}" for line in said)):
        raise SettingsError(error)


def first_error(error: str) -> str:
    """Returns the first of the processes' errors, each one line or "" for none, in all processes."""
    line = np.frombuffer(error.encode()[:_LINE].ljust(_LINE, b"\0"), np.uint8)
    said = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in gather(line)]
    return next(filter(None, said), "")


_LINE = 1024
"""Bytes of an error that other processes hear of."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Ends the other processes if the block raises in this one.

    The error is raised here as always. The others print it in one line and exit with `EXIT_CODE`, unless they fail by
    themselves within `wavg_jax.devices.watch.GRACE` seconds. `Diverged` and `Stopped` end no other process, since they
    come to all.
    """
    try:
        yield
    except BaseException as error:
        _announce(error)
        raise


def _announce(error: BaseException) -> None:
    if _watch is None or isinstance(error, Diverged | Stopped) or getattr(error, "_announced", False):
        return
    if _LOST.match(str(error)):
        _watch.wait_for_death()  # this error is the consequence: the connection to a process that is gone broke
    _watch.announce(f"{type(error).__name__}: {_line(error)}")
    with contextlib.suppress(AttributeError):
        error._announced = True  # type: ignore[attr-defined]


# XLA's errors of several types, which begin with a status; another library's connections may break too.
_LOST = re.compile("[A-Z_]+: .*(Gloo|NCCL|Connection (reset|closed))", re.DOTALL)


def _announce_uncaught(before: Any, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    _announce(error)
    before(kind, error, trace)


def _exit_noted(before: Callable[..., Any], code: Any = None) -> None:
    """`sys.exit`, which the others hear of, since `SystemExit` passes by `sys.excepthook`."""
    cause = sys.exception()
    known = isinstance(cause, Diverged | Stopped) or getattr(cause, "_announced", False)
    ends = threading.current_thread() is threading.main_thread()
    if _watch is not None and ends and code not in (None, 0) and not known:
        _watch.exits(f"sys.exit({code!r:.300})")
    before(code)


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """A block to which all processes come: while one waits in it after another has ended, it ends within
    `wavg_jax.devices.watch.MISSED` seconds, with one line."""
    with contextlib.nullcontext() if _watch is None else _watch.meeting():
        yield


def _line(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
