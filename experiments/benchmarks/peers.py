"""This library against its peers: the same rounds of local SGD with plain averaging.

PyTorch, torch.func, torchft, EXO Gym, Flower, FedJAX, Keras and plain flax.

  python -m experiments.benchmarks.peers
  python -m experiments.benchmarks.peers --peer_networks=mlp:50 --systems=torch_loop,flax_sync --repeats=3

Every system trains the same network from the same parameters on the same data: K replicas, H steps, batches of B,
SGD with momentum; or one model with K times the batch, for as many samples. Each system is a process; they take turns,
so that only one computes at a time, and ratios compare times of one turn. After the first round a system's parameters
must agree with ours. A system that does other work, fails or cannot be installed is not measured, and the table says
why. The first use makes the peers' virtual environments in --peers_venv, one for each of them.

Each case's row: network, system, replicas, local_steps, batch_size, measured, reason (why not), difference (see
`cases.difference`), seconds (of every turn that counts), samples_per_second (median), ratio (our speed to its: above 1
we are ahead), idle (largest share of a core that its processes used between its turns), notes (of versions,
devices and threads).
"""

import contextlib
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments.benchmarks.harness import NOT_MEASURED, BenchmarkTable, alternate, begin, ratio, shown
from experiments.benchmarks.peer_workers import cases, environment
from experiments.benchmarks.peer_workers.lines import Arrays, Job, Worker, WorkerFailed
from experiments.setup import app
from experiments.setup.shared_flags import names
from wavg_jax.base import SettingsError
from wavg_jax.storage.schema import Row
from wavg_jax.training import progress


class System(NamedTuple):
    """A system under comparison.

    Attributes:
      title: in the table.
      worker: the module of its process.
      system: its name in that module.
      requires: its environment; None runs it in this one.
      like: the system of ours that does the same work.
      networks: the networks to measure it on.
    """

    title: str
    worker: str
    system: str
    requires: environment.Environment | None = None
    like: str = "ours"
    networks: tuple[str, ...] = tuple(cases.NETWORKS)


OURS, CEILING = "ours", "ours_one_model"
TORCH, KERAS = environment.TORCH, environment.KERAS
SYSTEMS = {
    OURS: System("wavg_jax, rounds", "ours_worker", "rounds"),
    CEILING: System("wavg_jax, one model with K times the batch", "ours_worker", "one_model", like=CEILING),
    "torch_loop": System("PyTorch loop", "torch_worker", "loop", TORCH),
    "torch_channels_last": System(
        "PyTorch loop, channels_last", "torch_worker", "channels_last", TORCH, networks=("cnn", "resnet20")
    ),
    "torch_loader": System("PyTorch loop, DataLoader", "torch_worker", "loader", TORCH),
    "torch_vmap": System("torch.func.vmap", "torch_worker", "vmap", TORCH),
    "torchft": System("torchft LocalSGD, gloo", "torchft_worker", "local_sgd", environment.TORCHFT),
    "exogym": System("EXO Gym FedAvg, gloo", "exogym_worker", "fedavg", environment.EXOGYM),
    "flower": System("Flower FedAvg, simulated with Ray", "flower_worker", "fedavg", environment.FLOWER),
    "fedjax": System("FedJAX FedAvg", "fedjax_worker", "fedavg", environment.FEDJAX),
    "keras_loop": System("Keras fit on JAX, one replica after the other", "keras_worker", "loop", KERAS),
    "keras_fit": System("Keras fit on JAX, one model with K times the batch", "keras_worker", "fit", KERAS, CEILING),
    "keras_torch": System(
        "Keras fit on PyTorch, one model with K times the batch", "keras_worker", "torch_fit", KERAS, CEILING
    ),
    "flax_loop": System("flax, one replica after the other", "flax_worker", "loop"),
    "flax_sync": System("flax sync, one model with K times the batch", "flax_worker", "sync", like=CEILING),
}
NETWORKS = [f"{name}:{network.steps}" for name, network in cases.NETWORKS.items()]
RATE, MOMENTUM = 0.01, 0.9
TOLERANCE = 0.05
"""Of `cases.difference`: rounding stays far below it, a wrong gradient far above."""

flags.DEFINE_list("peer_networks", NETWORKS, "Networks, each with its local steps H: network:H.")
flags.DEFINE_list("systems", list(SYSTEMS), f"Which systems, of {', '.join(SYSTEMS)}; ours are always included.")
flags.DEFINE_string(
    "peers_venv",
    f"~/.cache/wavg_jax/peers-py{sys.version_info.major}.{sys.version_info.minor}",
    "Folder of the peers' virtual environments, each made if missing.",
)
F = flags.FLAGS

READS = ("peer_networks", "systems", "peers_venv", "replicas", "repeats")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)

ROOT = pathlib.Path(__file__).parents[2]
PAUSE = 0.05
"""Seconds between turns, for the threads of the last one to go to sleep."""

Commands = Mapping[str, Sequence[str] | WorkerFailed]
"""System -> command that starts its worker, or why it cannot start."""


class Found(NamedTuple):
    """The result of a system on a network.

    Attributes:
      reason: why it was not measured; None if it was.
      difference: from ours after the first round; None if it did not get there.
      seconds: of the turns.
      idle: largest share of a core used between turns.
      notes: of the worker.
    """

    reason: str | None
    difference: float | None
    seconds: np.ndarray
    idle: float
    notes: Mapping[str, Any]


def main(argv: Sequence[str]) -> None:
    """Measures every system on every network and writes the table."""
    app.refuse_arguments(argv)
    networks, chosen = _networks(), names("systems", SYSTEMS)
    systems = {name: system for name, system in SYSTEMS.items() if name in (OURS, CEILING, *chosen)}
    jax.config.update("jax_platforms", "cpu")  # this process only names the hardware
    recording = begin("peers", READS)
    started = commands(systems, pathlib.Path(F.peers_venv).expanduser())
    for network, steps in networks.items():
        these = {name: started[name] for name, system in systems.items() if network in system.networks}
        with (
            progress.bar(len(these) * (F.repeats + 2)) as advance,
            tempfile.TemporaryDirectory() as folder,
        ):
            job = Job("", folder, network, F.replicas, steps, cases.NETWORKS[network].batch, RATE, MOMENTUM)
            for row in rows(job, measure(job, these, F.repeats, advance)):
                recording.case(**row)
    recording.publish(table(recording.cases()))


def _networks() -> dict[str, int]:
    """--peer_networks: {network: H}.

    Raises:
      SettingsError: an entry is not `network:H`, or there is none.
    """
    found = {}
    for entry in F.peer_networks or ():
        name, _, steps = entry.partition(":")
        if name in cases.NETWORKS and steps.isdigit() and int(steps) > 0:
            found[name] = int(steps)
    if not found or len(found) < len(F.peer_networks):
        given = ",".join(F.peer_networks or ())
        raise SettingsError(f"--peer_networks={given}: give network:H, such as {','.join(NETWORKS)}, each once")
    return found


def commands(systems: Mapping[str, System], folder: pathlib.Path) -> Commands:
    """The commands that start the workers.

    Args:
      systems: by name.
      folder: of the peers' environments, each made if a system needs it.
    """
    pythons: dict[environment.Environment | None, str | WorkerFailed] = {None: sys.executable}
    found: dict[str, Sequence[str] | WorkerFailed] = {}
    for name, system in systems.items():
        if system.requires not in pythons:
            assert system.requires is not None
            try:
                pythons[system.requires] = environment.python(folder, system.requires)
            except WorkerFailed as failed:
                pythons[system.requires] = failed
        python = pythons[system.requires]
        module = f"experiments.benchmarks.peer_workers.{system.worker}"
        found[name] = python if isinstance(python, WorkerFailed) else (python, "-m", module)
    return found


def measure(
    job: Job, commands: Commands, repeats: int, advance: Callable[[str], None] = lambda text: None
) -> dict[str, Found]:
    """Runs all systems on a network in turn.

    Args:
      job: the work, except for the system; its folder takes the files for the workers.
      commands: of the systems, ours included; a system drops out when it cannot start, fails or does other work.
      repeats: turns that count.
      advance: called after every answer.

    Returns:
      The result of every system.
    """
    cases.write(job)
    with contextlib.ExitStack() as stack:
        runners: dict[str, _Runner] = {}
        for name, command in commands.items():
            runners[name] = _Runner(name, job)
            runners[name].prepare(command, stack, runners.get(SYSTEMS[name].like))
            advance(f"{job.network}: {name}")
        turns = {name: runner.turn for name, runner in runners.items()}
        seconds = alternate(turns, repeats, lambda name: advance(f"{job.network}: {name}"))
    return {name: runner.found._replace(seconds=seconds[name]) for name, runner in runners.items()}


class _Runner:
    """A system's worker, until it fails, and its result."""

    def __init__(self, name: str, job: Job):
        self.name, self.job = name, job._replace(system=SYSTEMS[name].system)
        self.found = Found(None, None, np.array([]), 0.0, {})
        self.worker: Worker
        self.checked: Arrays | None = None

    def prepare(
        self, command: Sequence[str] | WorkerFailed, stack: contextlib.ExitStack, like: "_Runner | None"
    ) -> None:
        """Starts the worker, which ends with the stack, and compares its first round with that of `like`."""
        try:
            if isinstance(command, WorkerFailed):
                raise command
            log = pathlib.Path(self.job.folder) / f"{self.name}.log"
            variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
            variables.pop("JAX_NUM_CPU_DEVICES", None)  # each worker has the number that suits it
            self.worker = stack.enter_context(Worker(command, log, variables))
            self.found = self.found._replace(notes=self.worker.ask("job", **self.job._asdict())["notes"])
            self.worker.ask("check", file=self.name)
            self.checked = self.job.read(self.name)
            self._compare(like)
        except WorkerFailed as failed:
            self.found = self.found._replace(reason=str(failed))

    def _compare(self, like: "_Runner | None") -> None:
        if like is None or like.checked is None or self.checked is None:
            raise WorkerFailed("no first round of ours to compare with")
        difference = cases.difference(self.checked, like.checked, self.job.read("start"))
        self.found = self.found._replace(difference=difference)
        if not difference <= TOLERANCE:
            raise WorkerFailed(f"does other work than ours: difference {difference:.2g} after a round")

    def turn(self) -> float:
        """Does a round; NaN once the worker has failed."""
        if self.found.reason is not None:
            return float("nan")
        time.sleep(PAUSE)
        try:
            answer = self.worker.ask("go")
        except WorkerFailed as failed:
            self.found = self.found._replace(reason=str(failed))
            return float("nan")
        self.found = self.found._replace(idle=max(self.found.idle, answer["idle"]))
        return answer["seconds"]


def rows(job: Job, found: Mapping[str, Found]) -> list[Row]:
    """The rows of a network, one for each system: speeds, and the ratios of ours to theirs, turn by turn."""
    ours, samples = found[OURS], job.replicas * job.steps * job.batch
    made = []
    for name, one in found.items():
        measured = one.reason is None
        row = {
            "network": job.network,
            "system": name,
            "replicas": job.replicas,
            "local_steps": job.steps,
            "batch_size": job.batch,
            "measured": measured,
            "reason": one.reason,
            "difference": one.difference,
            "seconds": one.seconds,
            "samples_per_second": samples / float(np.median(one.seconds)) if measured else None,
            "ratio": ratio(one.seconds, ours.seconds) if measured and ours.reason is None else None,
            "idle": one.idle,
            "notes": one.notes,
        }
        made.append(row)
    return made


def table(recorded: Sequence[Row]) -> BenchmarkTable:
    """The table of recorded rows."""
    text = (
        "Thousand samples a second in rounds of K replicas, H local steps and plain averaging (or of one model with K "
        "times the batch), and how many times as fast wavg_jax's rounds are: median and quartiles of the ratios of "
        f"{max(len(row['seconds']) for row in recorded)} turns. Difference: of the parameters from ours after the "
        f"first round, relative to how far that round moved them. {_around(recorded)}"
    )
    columns = ("network", "K", "H", "B", "system", "difference", "thousand samples/s")
    lines = []
    for row in recorded:
        case = (row["network"], *(str(row[name]) for name in ("replicas", "local_steps", "batch_size")))
        title = SYSTEMS[row["system"]].title
        if row["measured"]:
            speed = f"{row['samples_per_second'] / 1000:.3g}"
            figure = shown(row["ratio"]) if row["ratio"] is not None else NOT_MEASURED
            lines.append((*case, title, f"{row['difference']:.1g}", speed, figure))
        else:
            lines.append((*case, title, "", "", f"{NOT_MEASURED} ({row['reason']})"))
    return BenchmarkTable("wavg_jax against its peers", text, columns, lines)


def _around(recorded: Sequence[Row]) -> str:
    """The versions of the systems, and which of them works most while others are measured."""
    versions = {name: said for row in recorded for name, said in row["notes"].get("versions", {}).items()}
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    busiest = max(recorded, key=lambda row: row["idle"])
    idle = (
        f"Between its turns a system used at most {busiest['idle']:.0%} of a core ({SYSTEMS[busiest['system']].title})"
    )
    return f"{idle}. Versions: {listed}." if versions else f"{idle}."


if __name__ == "__main__":
    app.run(main)
