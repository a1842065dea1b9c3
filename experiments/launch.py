"""Runs a binary in several processes of this machine, which train together.

  python -m experiments.launch --processes=2 -- train --arm=weighted
  python -m experiments.launch --processes=4 --log_dir=logs -- -m experiments.compare --workdir=runs/a

Starts Python once for each process with what stands after --, the name of a binary or arguments of Python, and adds
--coordinator_address, --num_processes and --process_id. Process 0 shows its progress; the lines of process 2, say,
begin with [2]. Each process gets its share of the cores. Ctrl-C and SIGTERM go to all processes, a second one kills
them. If one fails, the others are ended, and its exit code is the launcher's.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import wavg
from experiments.setup import app, shared_flags
from experiments.setup.processes import GRACE, Command, free_port, launch, share
from wavg_jax.base import SettingsError

flags.DEFINE_integer("processes", 2, "Number of processes.", lower_bound=1)
flags.DEFINE_float("grace", GRACE, "Seconds that the others have to end once a process has failed.", lower_bound=0)
F = flags.FLAGS

READS = ("processes", "grace", "log_dir")  # absl defines the last one
for _name in READS:
    flags.declare_key_flag(_name)


def commands(rest: Sequence[str], processes: int, address: str) -> list[Command]:
    """The processes of a run.

    Args:
      rest: the name of a binary, or arguments of Python: a module or script; and its flags.
      processes: how many.
      address: host:port on which process 0 meets the others.
    """
    told = [f"--coordinator_address={address}", f"--num_processes={processes}"]
    variables = share(processes)
    if rest[0] in wavg.NAMES:
        rest = ("-m", wavg.MODULE, *rest)
    return [Command((sys.executable, *rest, *told, f"--process_id={number}"), variables) for number in range(processes)]


def main(argv: Sequence[str]) -> None:
    """Starts the processes, waits for them, and ends with their exit code."""
    shared_flags.refuse_unused(())
    if not argv:
        raise SettingsError("nothing to run; give it after --, such as: -- train --arm=weighted")
    log_dir = pathlib.Path(F.log_dir) if F.log_dir else None
    every = commands(argv, F.processes, f"127.0.0.1:{free_port()}")
    raise SystemExit(launch(every, log_dir=log_dir, grace=F.grace).code)


if __name__ == "__main__":
    app.run(main)
