"""The peers' virtual environment, made on first use, without this library."""

import pathlib
import subprocess
import sys
from importlib import metadata

from experiments.benchmarks.peer_workers.lines import WorkerFailed, first_line

# Pinned to the versions of the recorded numbers.
TORCH = ("torch==2.13.0", "numpy=={numpy}")
# FedJAX gets the JAX that runs here, so that only the algorithm's code differs.
FEDJAX = ("fedjax==0.0.17", "jax=={jax}", "jaxlib=={jaxlib}", "flax=={flax}", "optax=={optax}", "numpy=={numpy}")


def python(folder: pathlib.Path, requirements: tuple[str, ...]) -> str:
    """Installs the requirements into the environment, and returns its interpreter.

    Args:
      folder: of the environment, made if missing.
      requirements: as pip takes them; `{jax}` stands for the version of JAX that runs here.

    Raises:
      WorkerFailed: they cannot be installed; the message says why.
    """
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        _run("venv", sys.executable, "-m", "venv", str(folder))
    running = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    wanted = [requirement.format(**running) for requirement in requirements]
    # Fast, and needs no network, if everything is installed.
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    _run(f"pip install {wanted[0]}", str(interpreter), "-m", "pip", "install", *quiet, *wanted)
    return str(interpreter)


def _run(what: str, *command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise WorkerFailed(first_line(f"{what}: {error}")) from error
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()] or said or ["failed"]
        raise WorkerFailed(first_line(f"{what}: {errors[-1]}"))
