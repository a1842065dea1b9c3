"""Names the hardware and the versions that a number was measured with."""

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


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
