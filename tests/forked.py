"""Binaries as processes of their own, forked by a server that has imported what takes long and made no devices."""

import atexit
import contextlib
import multiprocessing
import os
import pathlib
import resource
import runpy
import signal
import sys
import urllib.error
import urllib.request

import jax
import scipy.stats  # noqa: F401 - what reports and checkpoints import late
from matplotlib.backends import backend_agg  # noqa: F401
from orbax.checkpoint import v1 as _orbax  # noqa: F401

from experiments.setup import app  # noqa: F401
from wavg_jax import reporting  # noqa: F401

_CONTEXT = multiprocessing.get_context("forkserver")
_MEMORY = 12 * 2**30
"""Bytes of address space, so that no case takes the machine's memory."""


def prepare():
    """Names what the server imports; it starts with the first process, and looks for it beside this file."""
    paths = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    _CONTEXT.set_forkserver_preload([__name__])


def run(name, arguments, folder, limit):
    """Runs `python -m experiments.NAME` in a folder.

    Returns:
      The exit code, None if it has not ended within `limit` seconds; what it wrote to its output and to its errors.
    """
    process = _CONTEXT.Process(target=_child, args=(name, arguments, str(folder)), daemon=False)
    process.start()
    process.join(limit)
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started itself
    process.join()
    texts = [folder / name for name in ("out.txt", "err.txt")]
    return code, *(path.read_text(errors="replace") if path.exists() else "" for path in texts)


def _child(name, arguments, folder):
    os.setsid()
    os.chdir(folder)
    for shown, file in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), shown)
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "WANDB_MODE": "offline", "HOME": folder}
    jax.config.update("jax_platforms", "cpu")  # imported before that was set
    jax.config.update("jax_num_cpu_devices", 1)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    urllib.request.urlopen = _offline
    sys.argv = [f"{name}.py", *arguments]
    try:
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        with contextlib.suppress(SystemExit):
            atexit._run_exitfuncs()  # as Python does at its end; multiprocessing does not


def _offline(*_, **__):
    raise urllib.error.URLError("no network")
