"""Records the time, the hardware and the versions behind a measurement."""

import contextlib
import datetime
import functools
import json
import os
import pathlib
import platform
import re
import subprocess
from importlib import metadata

import jax

_CPUINFO = pathlib.Path("/proc/cpuinfo")


def hardware() -> dict[str, str | int]:
    """The devices that JAX uses, and the host's processor.

    Two machines whose processors have one name may differ in `isa`, and so may two runs on one machine.
    """
    device = jax.devices()[0]
    return {
        "device": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
        "processor": _said("model name") or platform.processor() or platform.machine(),
        "isa": isa(),
        "cores": cores(),
        # On a GPU, the versions of its driver and libraries; on a CPU just "cpu".
        "platform_version": " ".join(device.client.platform_version.split()),
    }


# XLA's names of the levels, each of which includes those before it, and a flag of Linux that tells it.
_LEVELS = {
    "SSE4_2": "sse4_2",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX": "amx_tile",
    "AMX_FP16": "amx_fp16",
}


def isa() -> str:
    """The highest instruction set that XLA may use on this host's processor: "AVX2", or "unknown" off x86 and Linux.

    With a cap in XLA_FLAGS: "AVX2 (xla_cpu_max_isa; the processor has AVX512_BF16)".
    """
    flags, levels = _said("flags").split(), list(_LEVELS)
    has = next((level for level in reversed(levels) if _LEVELS[level] in flags), "unknown")
    # The last one counts, as in XLA.
    given = re.findall(r"(?:^|\s)--xla_cpu_max_isa=(\S+)", os.environ.get("XLA_FLAGS", ""))
    cap = given[-1].upper() if given else ""
    if has not in levels or cap not in levels or levels.index(cap) >= levels.index(has):
        return has
    return f"{cap} (xla_cpu_max_isa; the processor has {has})"


def _said(key: str) -> str:
    """What Linux says of the first processor under this name, or ""."""
    with contextlib.suppress(OSError):
        for line in _CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def now() -> str:
    """The time in UTC, ISO 8601 to the second: "2026-01-31T12:00:00Z"."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of memory that this process may use: the host's, or its control group's if that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # versions 2 and 1
        file = pathlib.Path("/sys/fs/cgroup") / name
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(file.read_text()))
    return min(limits)


def environment() -> dict[str, str]:
    """The environment variables that affect speed, if they are set."""
    return {name: os.environ[name] for name in ("XLA_FLAGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS") if name in os.environ}


_NAME = "wavg-jax"
_PACKAGE = pathlib.Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that numbers depend on, and of this package, with its commit."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: _installed(name) or "not installed" for name in packages}
    return {"python": platform.python_version()} | found | {_NAME: build()}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def release() -> str:
    """The version of this package: 0.1.0."""
    return _installed(_NAME) or "0+unknown"  # a source tree that is not installed


@functools.cache
def build() -> str:
    """The version of this package and, if known, its commit: 0.1.0+g1a2b3c4, or 0.1.0+g1a2b3c4.dirty."""
    commit = _checked_out(_PACKAGE) or _installed_from(_PACKAGE)
    return f"{release()}+g{commit}" if commit else release()


def _checked_out(package: pathlib.Path) -> str | None:
    """The commit of the checkout that holds the package, if that is a checkout of this project."""
    root = package.parent
    project = root / "pyproject.toml"
    # The package may lie in another project's repository, as a copy or inside an environment.
    if not (root / ".git").exists() or not project.exists() or f'name = "{_NAME}"' not in project.read_text():
        return None
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=7", "--dirty=.dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or a repository that git does not trust
        return subprocess.run(command, env=own, capture_output=True, text=True, check=True, timeout=2).stdout.strip()
    return None


def _installed_from(package: pathlib.Path) -> str | None:
    """The commit that pip installed the package from, if it came from a repository."""
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        installed = metadata.distribution(_NAME)
        if pathlib.Path(str(installed.locate_file(package.name))) == package:
            origin = json.loads(installed.read_text("direct_url.json") or "{}")
            return str(origin["vcs_info"]["commit_id"])[:7]
    return None
