"""The binaries: `python -m experiments.NAME`."""

import sys

if sys.argv[:1] == ["-m"]:  # so it is while Python looks for the module that it is to run: one of ours
    from experiments.setup import before_imports

    if not before_imports.is_worker():  # a worker runs in an environment of its own
        before_imports.check_installed()
    before_imports.take_over()
