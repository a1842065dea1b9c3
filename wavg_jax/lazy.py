"""Names that a package imports at first use, so that importing the package stays quick.

The module's `__getattr__` of PEP 562, as in SciPy and scikit-image. For type checkers and editors the package imports
the same names under `typing.TYPE_CHECKING`.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the `__getattr__` and the `__dir__` of a package.

    Args:
      package: its name.
      homes: {public name: the module of the package that defines it}.

    >>> load, names = attach("wavg_jax.models", {"regressor": "task"})
    >>> load("regressor").__module__, names()
    ('wavg_jax.models.task', ['regressor'])
    >>> load("CNN")
    Traceback (most recent call last):
        ...
    AttributeError: module 'wavg_jax.models' has no attribute 'CNN'
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)  # Python asks `__getattr__` only for what it does not find
        return value

    return load, lambda: sorted(homes)
