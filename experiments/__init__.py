"""The binaries: `python -m experiments.NAME`; installed, they are the package `wavg_commands`: `wavg NAME`."""

import sys

# The binaries import one another as `experiments`, also where they are installed and no such folder is near.
sys.modules.setdefault("experiments", sys.modules[__name__])

if sys.argv[:1] == ["-m"]:  # so it is while Python looks for the module that it is to run: one of ours
    from experiments.setup import before_imports

    before_imports.begin()
