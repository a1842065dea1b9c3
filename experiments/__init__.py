"""The binaries: `python -m experiments.NAME`."""

import sys

if sys.argv[:1] == ["-m"]:  # so it is while Python looks for the module that it is to run: one of ours
    from experiments.setup import starting

    if not starting.is_worker():  # a worker runs in an environment of its own
        starting.check_installed()
    starting.take_over()
