"""The Ray cluster that workers run on: one of our own on this machine, or one that exists."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from wavg_jax.base import SettingsError
from wavg_jax.extras import need

_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's own switch: at 0 a cluster is this machine's alone and listens on the loopback interface, as it always does on
Windows and macOS."""

STARTS = 3
"""Times to try starting Ray: on a busy machine its own processes may miss one another."""


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Yields the module `ray`, connected to a cluster, and disconnects it again if it was not connected before.

    Some variables of Ray stay in the environment. Without an address a cluster of this machine is started, unless this
    process is connected to one. It listens on the loopback interface alone, has no dashboard, and ends with this
    process, also by kill -9. With an address, token authentication is asked for; see `wavg_jax.elastic`.

    Args:
      address: "HOST:PORT" of a cluster's head, "auto" for that of this machine; or None.

    Raises:
      MissingExtra: Ray is not installed.
      SettingsError: there is no cluster at the address, or it refuses us.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray hides the accelerators of the driver
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is not None:
        mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
        if mode != "token":
            raise SettingsError(f"RAY_AUTH_MODE={mode}: a cluster with an address must ask for a token; use token")
    elif "ray" not in sys.modules:  # Ray reads it when imported
        os.environ[_LOOPBACK] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray, about itself and about processes that it starts
        ray = need("ray", extra="ray", why="elastic.fit")
    if ray.is_initialized():
        yield ray
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _join(ray, address) if address is not None else _start(ray)
    try:
        with _hushed():
            yield ray
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.shutdown()


_QUIET = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}


def _start(ray: Any) -> None:
    for attempt in range(STARTS):
        try:
            ray.init(address="local", num_cpus=1, include_dashboard=False, **_QUIET)  # not that of RAY_ADDRESS
            break
        except Exception as error:
            ray.shutdown()
            if attempt == STARTS - 1:
                raise SettingsError(
                    f"Ray does not start on this machine: {_line(error)}; see its logs in /tmp/ray/session_latest/logs"
                ) from error
    if not ray.util.get_node_ip_address().startswith("127."):
        ray.shutdown()
        raise SettingsError(
            "the cluster of this machine would listen on its network: Ray was imported before elastic.fit could keep "
            f"it to the loopback interface; set {_LOOPBACK}=0 in the environment, or call ray.init yourself"
        )


def _join(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, **_QUIET)
    except Exception as error:
        raise SettingsError(
            f"address={address!r}: cannot join the cluster: {_line(error)}; start it with RAY_AUTH_MODE=token "
            "`ray start`, and give this machine its token (`ray get-auth-token` there)"
        ) from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keeps Ray from printing a paragraph for every worker that dies, which `log_to_driver` does not: rows and warnings
    of the run say it."""
    own = sys.modules.get("ray._private.worker")
    prints = getattr(own, "print_to_stdstream", None)
    if own is None or prints is None:  # another version of Ray, which may print
        yield
        return

    def hushed(data: Any, *arguments: Any, **named: Any) -> None:
        if data.get("pid") != "raylet":
            prints(data, *arguments, **named)

    vars(own)["print_to_stdstream"] = hushed
    try:
        yield
    finally:
        vars(own)["print_to_stdstream"] = prints


def _line(error: BaseException) -> str:
    """The first line of an error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
