"""The packages of the wheel: the library, and the binaries of experiments/ under a name that no other project has.

All else is in pyproject.toml, which can look for packages, or rename one, but not both.
"""

from setuptools import find_packages, setup

BINARIES = find_packages("experiments", exclude=["benchmarks.peer_workers"])  # those run in environments of their own

setup(
    packages=[*find_packages(include=["wavg_jax*"]), "wavg_commands", *(f"wavg_commands.{name}" for name in BINARIES)]
)
