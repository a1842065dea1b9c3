"""Names the time, the hardware and the versions that a number was measured with."""

import contextlib
import datetime
import os
import pathlib
import platform
from importlib import metadata

import jax


def hardware() -> dict[str, str | int]:
    """The devices JAX uses and the processor they sit beside."""
    device = jax.devices()[0]
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        # For a GPU the versions of its driver and libraries; on a CPU just "cpu".
        "platform_version": " ".join(device.client.platform_version.split()),
    }


def now() -> str:
    """The time, UTC, as ISO 8601 to the second: "2026-01-31T12:00:00Z"."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def on_cpu() -> bool:
    """Whether programs run on the host's processor."""
    return jax.default_backend() == "cpu"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of memory that this process may use: the host's, or its control group's if that has less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # versions 2 and 1
        file = pathlib.Path("/sys/fs/cgroup") / name
        with contextlib.suppress(OSError, ValueError):  # none, or "max"
            limits.append(int(file.read_text()))
    return min(limits)


def environment() -> dict[str, str]:
    """The settings outside the program that speed depends on, where they are set."""
    return {name: os.environ[name] for name in ("XLA_FLAGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS") if name in os.environ}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "wavg-jax")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "not installed"
    return found
