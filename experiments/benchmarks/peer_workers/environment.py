"""The peers' virtual environments, one for each, made on first use, without this library."""

import pathlib
import subprocess
import sys
from importlib import metadata
from typing import NamedTuple

from experiments.benchmarks.peer_workers.lines import WorkerFailed, first_line


class Environment(NamedTuple):
    """A virtual environment.

    Attributes:
      name: of its folder.
      requirements: as pip takes them; `{jax}` stands for the version of JAX that runs here.
    """

    name: str
    requirements: tuple[str, ...]


# Pinned to the versions of the recorded numbers. Which build of PyTorch pip takes is up to its settings.
_TORCH = ("torch==2.13.0", "numpy=={numpy}")
TORCH = Environment("torch", _TORCH)
# FedJAX and Keras get the JAX that runs here, so that only the algorithm's code differs.
FEDJAX = Environment(
    "fedjax", ("fedjax==0.0.17", "jax=={jax}", "jaxlib=={jaxlib}", "flax=={flax}", "optax=={optax}", "numpy=={numpy}")
)
KERAS = Environment("keras", ("keras==3.15.1", "jax=={jax}", "jaxlib=={jaxlib}", *_TORCH))
FLOWER = Environment("flower", ("flwr[simulation]==1.42.0", "ray==2.55.1", *_TORCH))
TORCHFT = Environment("torchft", ("torchft==0.2.0", *_TORCH))
# The release of this name is empty: its documentation installs it from the repository.
_GYM = "https://github.com/exo-explore/gym"
EXOGYM = Environment("exogym", (f"exogym @ git+{_GYM}@9fa323c26364f4437ffd23517da5d65946003963", *_TORCH))


def python(folder: pathlib.Path, environment: Environment) -> str:
    """Installs the requirements into the environment, and returns its interpreter.

    Args:
      folder: of all environments; made if missing.
      environment: which one.

    Raises:
      WorkerFailed: they cannot be installed; the message says why.
    """
    place = folder / environment.name
    interpreter = place / "bin" / "python"
    if not interpreter.exists():
        _run("venv", sys.executable, "-m", "venv", str(place))
    running = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    wanted = [requirement.format(**running) for requirement in environment.requirements]
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
