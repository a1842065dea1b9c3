"""Optional packages, which come with an extra such as `wavg-jax[run]`."""

import importlib
from typing import Any

from wavg_jax.base import MissingExtra


def need(name: str, *, extra: str, why: str) -> Any:
    """Imports and returns a module of an optional package.

    Args:
      name: the module, such as "filelock" or "orbax.checkpoint".
      extra: the extra of wavg-jax that installs it.
      why: what needs it, as the user knows it, such as "workdir=".

    Raises:
      MissingExtra: it is not installed; the message is the command that installs it.

    >>> need("filelocks", extra="run", why="workdir=")
    Traceback (most recent call last):
        ...
    wavg_jax.base.MissingExtra: workdir= needs filelocks, which is not installed: pip install 'wavg-jax[run]'
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not f"{name}.".startswith(f"{missing}."):
            raise  # the package is there, and broken
        raise MissingExtra(f"{why} needs {missing}, which is not installed: pip install 'wavg-jax[{extra}]'") from None
