"""The scenario matrix: every weighting in every scenario, over several seeds.

  python -m experiments.scenarios --flagfile=experiments/presets/fashion_scenarios.flags --data_dir=DIR --workdir=runs/a
  python -m experiments.scenarios --flagfile=... --data_dir=DIR --workdir=runs/a --resume
  python -m experiments.scenarios --flagfile=... --data_dir=DIR --tune_rates=0.005,0.01,0.02,0.05

Leaves one row per cell in rows.jsonl and the report of all of them in --workdir; an interrupted run goes on with
--resume.
Several processes may each run a part (--weightings, --scenarios or --seeds), each in a --workdir of its own; then
`python -m experiments.report runs/a runs/b --out=runs/matrix` reports on them together.

With --tune_rates nothing is recorded: plain averaging is trained at these learning rates, on other seeds (1000 more),
and judged on the held-out split; the best rate of every scenario is printed as flags.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags
from rich.table import Table

import wavg_jax as wavg
from experiments.setup import app, arms, cells
from experiments.setup import flags as shared_flags
from experiments.setup.cells import Cell
from experiments.setup.flags import numbers
from experiments.setup.options import SCALES
from experiments.setup.schemes import SCHEMES
from wavg_jax import data
from wavg_jax.base import Diverged, SettingsError, WavgWarning
from wavg_jax.data.shards import Shards
from wavg_jax.rounds.faults import Faults, simulate
from wavg_jax.storage.rows import check_writable, open_records, read_rows
from wavg_jax.storage.schema import Row
from wavg_jax.training import progress
from wavg_jax.training.recipe import make_recipe

Partition = Callable[[data.Split, int], Shards]


class Scenario(NamedTuple):
    """What is wrong with the replicas or their data.

    Attributes:
      title: for a reader.
      partition: `(training split, seed) -> shards`.
      noisy: shards with random labels.
      faults: of the replicas.
    """

    title: str
    partition: Partition
    noisy: tuple[int, ...] = ()
    faults: Faults | None = None


def _iid(k: int) -> Partition:
    return lambda split, seed: data.iid(len(split.y), k, seed)


def _dirichlet(k: int, alpha: float) -> Partition:
    return lambda split, seed: data.dirichlet(split.y, k, alpha, seed)


def _sized(k: int) -> Partition:
    return lambda split, seed: data.sized(len(split.y), tuple(np.geomspace(1, 16, k)), seed)


SCENARIOS: dict[str, Callable[[int], Scenario]] = {
    "iid": lambda k: Scenario("IID", _iid(k)),
    "sized": lambda k: Scenario("sizes 1:16", _sized(k)),
    "dirichlet03": lambda k: Scenario("Dirichlet 0.3", _dirichlet(k, 0.3)),
    "dirichlet01": lambda k: Scenario("Dirichlet 0.1", _dirichlet(k, 0.1)),
    "noisy2": lambda k: Scenario(f"2 of {k} noisy", _iid(k), noisy=(0, 1)),
    "noisy4": lambda k: Scenario(f"4 of {k} noisy", _iid(k), noisy=(0, 1, 2, 3)),
    "fast1": lambda k: Scenario(
        f"1 of {k} at 10\N{MULTIPLICATION SIGN} rate", _iid(k), faults=simulate(k, rate={0: 10})
    ),
    "flipped1": lambda k: Scenario(f"1 of {k} flipped", _iid(k), faults=simulate(k, sent={0: -1})),
    "slow4": lambda k: Scenario(
        f"{k // 2} of {k} at 1/4 steps", _iid(k), faults=simulate(k, speed=dict.fromkeys(range(k // 2), 0.25))
    ),
}
"""Name -> function of K, the number of replicas."""

flags.DEFINE_list("scenarios", list(SCENARIOS), f"Which scenarios, of {', '.join(SCENARIOS)}.")
flags.DEFINE_list("weightings", list(SCHEMES), f"Which weightings, of {', '.join(SCHEMES)}.")
flags.DEFINE_list("tune_rates", [], "Record nothing, but tune the learning rates: those to try.")
for _scenario in SCENARIOS:
    flags.DEFINE_float(f"lr_{_scenario}", 0.02, f"Learning rate of every weighting in the scenario {_scenario}.")
F = flags.FLAGS

SETTINGS = (
    *(*shared_flags.DATA, *shared_flags.NETWORK),
    *("replicas", "local_steps", "rounds", "batch_size", "inner", "opt_state_at_sync", "stats_at_sync"),
    *("score_samples", *shared_flags.SCHEME),
)
"""Flags that all cells of a matrix share."""
READS = (*SETTINGS, "seeds", "data_dir", "devices", "replica_map", "workdir", "resume")
for _name in READS:
    flags.declare_key_flag(_name)
SEEDS_APART = 1000
"""What is added to the seeds for tuning, so that no rate is chosen on a seed that is reported."""


class Study(NamedTuple):
    """What all cells are made of; `scenarios` by name."""

    dataset: data.Dataset
    task: wavg.Task
    scenarios: dict[str, Scenario]

    def shard(self, scenario: str, seed: int) -> data.ShardedData:
        """The data of a scenario and seed, the same for every weighting."""
        one = self.scenarios[scenario]
        augment = data.crop_flip if F.augment else None
        return data.shard(
            self.dataset,
            one.partition,
            heldout=F.heldout,
            seed=seed,
            noisy=one.noisy,
            augment=augment,
            scale=SCALES[F.scale],
        )


def main(argv: Sequence[str]) -> None:
    """Trains every cell that is not recorded yet and writes the report, or tunes the rates."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    seeds = shared_flags.read_seeds()
    names, weightings = _chosen("scenarios", tuple(SCENARIOS)), _chosen("weightings", tuple(SCHEMES))
    rates = {name: _rate(name) for name in names}
    dataset = arms.load()
    averagers = {name: wavg.averager(**SCHEMES[name](F)) for name in weightings}
    arms.check_heldout(averagers)
    study = Study(dataset, arms.make_task(dataset), {name: SCENARIOS[name](F.replicas) for name in names})
    _check(study)
    if F.tune_rates:
        _tune(study, seeds)
        return
    workdir = arms.choose_workdir("scenarios")
    check_writable(workdir)
    titles = {name: make(F.replicas).title for name, make in SCENARIOS.items()}
    header = cells.header(dataset, study.task, titles, {name: F[name].value for name in SETTINGS})

    def train(cell: Cell, advance: Callable[[str], None]) -> list[Row]:
        return _train(study, cell, study.shard(cell.scenario, cell.seed), averagers[cell.weighting], advance)

    # The seeds innermost, so that they share compiled programs.
    every = [Cell(s, w, seed, rates[s]) for w in averagers for s in study.scenarios for seed in seeds]
    with open_records(workdir) as records:
        cells.begin(records, header)
        cells.fill(every, records, lambda cell: F.rounds, train, lambda scenario: f"lr_{scenario}")
    app.publish(read_rows(workdir), workdir)


def _chosen(flag: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(F[flag].value or ())
    if not names or set(names) - set(known) or len(set(names)) < len(names):
        raise SettingsError(f"--{flag}={','.join(names)}: choose from {', '.join(known)}, each once")
    return names


def _rate(scenario: str) -> float:
    rate = float(F[f"lr_{scenario}"].value or 0)
    if not 0 < rate < math.inf:
        raise SettingsError(f"--lr_{scenario} is {rate}; give a finite learning rate above 0")
    return rate


def _check(study: Study) -> None:
    """Finds what cannot work before anything is trained or written."""
    for name in study.scenarios:
        sharded = study.shard(name, 0)
        data.round_indices(sharded.shards, seed=0, first_step=0, local_steps=F.local_steps, batch_size=F.batch_size)
        plain = wavg.averager(wavg.uniform())
        make_recipe(study.task, sharded, plain, arms.make_inner(F.inner, 1.0), layout=wavg.Layout(F.devices))


def _train(
    study: Study, cell: Cell, sharded: data.ShardedData, averager: wavg.Averager, advance: Callable[[str], None]
) -> list[Row]:
    """Trains one cell; returns its rows, of which the last alone has test metrics.

    A cell that diverges is warned of, and is judged by its last good parameters: that it does is a result.
    """
    run = functools.partial(
        wavg.fit,
        study.task,
        sharded,
        averager,
        inner=arms.make_inner(F.inner, cell.rate),
        local_steps=F.local_steps,
        rounds=F.rounds,
        batch_size=F.batch_size,
        seed=cell.seed,
        scoring=wavg.Scoring(samples=F.score_samples, test_every=F.rounds),
        at_sync=wavg.AtSync(arms.POLICIES[F.opt_state_at_sync], arms.POLICIES[F.stats_at_sync]),
        layout=wavg.Layout(F.devices, F.replica_map),
        faults=study.scenarios[cell.scenario].faults,
        progress=lambda text: advance(f"{cell.name} at {cell.rate:g}"),
    )
    try:
        return run().rows
    except Diverged as error:
        warnings.warn(f"{cell.name} at {cell.rate:g}: {error}", WavgWarning, stacklevel=2)
        return error.result.rows


def _tune(study: Study, seeds: tuple[int, ...]) -> None:
    """Trains plain averaging at every rate in every scenario, and prints what the held-out split says."""
    if F.heldout < 1:
        raise SettingsError("--heldout=0: rates are judged on held-out samples, so hold some out")
    rates, plain = numbers("tune_rates", float), wavg.averager(wavg.uniform())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in study.scenarios}
    with progress.bar(len(found) * len(rates) * len(seeds) * F.rounds) as advance:
        for scenario in found:
            spaces = {seed + SEEDS_APART: study.shard(scenario, seed + SEEDS_APART) for seed in seeds}
            # What a run calls its test split is here the held-out one.
            spaces = {seed: sharded._replace(test=sharded.heldout) for seed, sharded in spaces.items()}
            for rate in rates:
                cells = {Cell(scenario, "plain", seed, rate): sharded for seed, sharded in spaces.items()}
                finals = [_train(study, cell, sharded, plain, advance)[-1] for cell, sharded in cells.items()]
                pairs = [(row["test_accuracy"], row["test_loss"]) for row in finals]
                mean = np.mean(np.array(pairs, np.float64), axis=0)
                found[scenario].append((float(mean[0]), float(mean[1])))
    _show(found, rates, len(seeds))


def _show(found: dict[str, list[tuple[float, float]]], rates: tuple[float, ...], seeds: int) -> None:
    title = f"held-out accuracy (%) and loss of plain averaging over {seeds} seeds"
    table = Table("scenario", *(f"{rate:g}" for rate in rates), title=title)
    for name, values in found.items():
        table.add_row(name, *(f"{100 * accuracy:.2f}  {loss:.3f}" for accuracy, loss in values))
    console = app.console()
    console.print(table)
    for name, values in found.items():
        best = rates[int(np.argmax([accuracy for accuracy, _ in values]))]
        edge = " (at the edge of the rates tried: try more)" if best in (min(rates), max(rates)) else ""
        console.print(f"--lr_{name}={best:g}{edge}", soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
