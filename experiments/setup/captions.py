"""What rows do not tell a report: what the arms of the comparison do, and the command that rebuilds it; and how the
binaries are called where they run."""

import pathlib
import sys

import experiments

INSTALLED = experiments.__name__ != "experiments"
"""Whether the binaries run as the console command `wavg`, without the repository."""


def command(name: str) -> str:
    """How to call a binary: `python -m experiments.compare`, or `wavg compare`."""
    return f"wavg {name}" if INSTALLED else f"python -m experiments.{name}"


def command_line() -> str:
    """The command that runs, without the folders of one machine."""
    own = [argument for argument in sys.argv[1:] if not argument.startswith(("--data_dir=", "--workdir="))]
    return " ".join([f"python -m experiments.{pathlib.Path(sys.argv[0]).stem}", *own])


ARMS = {
    "sequential": "one network, small batches one after another, on all shards together; no data parallelism",
    "sync": "one network on all shards together, with a batch K times as large: what averaging gradients at every "
    "step does",
    "accumulate": "gradients averaged over K workers and H steps before one update: large batches, as many bytes as "
    "plain sends",
    "plain": "K replicas, each trained on its own shard and blended with equal weights after every round",
    "weighted": "K replicas, each trained on its own shard and blended after every round with weights that depend on "
    "how good each replica is",
    "diloco": "as plain, but Nesterov's momentum takes an outer step with the change of the average (DiLoCo)",
    "weighted_diloco": "as weighted, with DiLoCo's outer step",
}
REBUILD = f"{command('report')} DIR..."
REFERENCE = "plain"
"""The weighting that a matrix compares the others with."""
