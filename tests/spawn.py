"""Several real processes over loopback, each a Python of its own."""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from wavg_jax.devices.sockets import free_port

ROOT = pathlib.Path(__file__).parent.parent

JOIN = """
import os, sys, warnings
import jax
warnings.simplefilter("error")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
from tests.quick import use_plain_loops
use_plain_loops()
from wavg_jax.devices import processes
ADDRESS, P, INDEX, ARGUMENTS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
processes.initialize(ADDRESS, P, INDEX, heartbeat=HEARTBEAT)
"""
"""Joins the processes; to be followed by what they do."""


def joined(script, heartbeat=30):
    """A script whose processes are joined; it finds P, INDEX and ARGUMENTS."""
    return JOIN.replace("HEARTBEAT", str(heartbeat)) + script


def spawn(count, script, *arguments, devices=1, timeout=60, environment=()):
    """Runs a script in several processes: `python -c script HOST:PORT count index *arguments`.

    Args:
      count: P, how many; 1 gives the script's first argument too.
      script: Python source, such as `joined` makes, or one script for each process.
      arguments: further arguments of all.
      devices: CPU devices in each.
      timeout: seconds for all together; past it all are killed and the test fails.
      environment: further variables of all.

    Returns:
      A `subprocess.CompletedProcess` for each, with text in stdout and stderr.
    """
    address = f"127.0.0.1:{free_port()}"
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
    scripts = [script] * count if isinstance(script, str) else script
    commands = [
        [sys.executable, "-c", source, address, str(count), str(index), *map(str, arguments)]
        for index, source in enumerate(scripts)
    ]
    running, files, late = [], [], False
    end = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        for command in commands:
            files.append([stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)])
            out, err = files[-1]
            running.append(
                subprocess.Popen(
                    command, cwd=ROOT, env={**os.environ, **own, **dict(environment)}, stdout=out, stderr=err
                )
            )
            stack.callback(_end, running[-1])
        for process in running:
            try:
                process.wait(max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                late = True
        for process in running:
            _end(process)
        texts = [[_content(file) for file in both] for both in files]
    done = [
        subprocess.CompletedProcess(command, process.returncode, *text)
        for command, process, text in zip(commands, running, texts, strict=True)
    ]
    assert not late, f"not all processes ended within {timeout} seconds: {[(d.returncode, d.stderr) for d in done]}"
    return done


def _end(process):
    process.kill()
    process.wait()


def _content(file):
    file.seek(0)
    return file.read().decode(errors="replace")
