"""The scenario matrix: every weighting in every scenario, over several seeds.

  python -m experiments.scenarios --flagfile=experiments/presets/fashion_scenarios.flags --data_dir=DIR --workdir=runs/a
  python -m experiments.scenarios --flagfile=... --data_dir=DIR --workdir=runs/a --resume
  python -m experiments.scenarios --flagfile=... --data_dir=DIR --tune_rates=0.005,0.01,0.02,0.05

Writes one row per cell to rows.jsonl in --workdir, and a report on all of them; --resume continues an interrupted run.
Several processes may split the work by --weightings, --scenarios or --seeds, each with its own --workdir; then
`python -m experiments.report runs/a runs/b --out=runs/matrix` reports on them together.

A row may correct the local steps, too: --weightings=plain,plain+fedprox,plain+scaffold. The name that plain+fedprox is
recorded under holds --prox_mu, so that several may stand in one report.

With --tune_rates it records nothing: it trains plain averaging at these learning rates, on other seeds (1000 higher),
judges it on the held-out split, and prints the best rate of every scenario as a flag.
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
from experiments.setup import app, arms, problem, record_matrix, shared_flags
from experiments.setup.choices import DRIFTS, SCALES
from experiments.setup.optimizers import make_inner
from experiments.setup.record_matrix import Cell
from experiments.setup.scenario import SCENARIOS, Scenario, choose, deal
from experiments.setup.shared_flags import numbers
from experiments.setup.weightings import WEIGHTINGS
from wavg_jax import data
from wavg_jax.base import Diverged, SettingsError, WavgWarning
from wavg_jax.storage.rows import check_writable, open_records, read_rows
from wavg_jax.storage.schema import Row
from wavg_jax.training import progress
from wavg_jax.training.recipe import make_recipe

flags.DEFINE_list("scenarios", list(SCENARIOS), f"Which scenarios, of {', '.join(SCENARIOS)}.")
CORRECTED = {f"{w}+{d}": (w, d) for w in ("plain", "learned") for d in DRIFTS if d != "none"}
"""Name -> weighting, and correction of the local steps."""
ROWS = {name: (name, "none") for name in WEIGHTINGS} | CORRECTED

flags.DEFINE_list("weightings", list(WEIGHTINGS), f"Which weightings, of {', '.join(ROWS)}.")
flags.DEFINE_list("tune_rates", [], "Learning rates to try; records nothing.")
for _scenario in SCENARIOS:
    flags.DEFINE_float(f"lr_{_scenario}", 0.02, f"Learning rate of every weighting in the scenario {_scenario}.")
F = flags.FLAGS

SETTINGS = (
    *(*shared_flags.DATA, *shared_flags.NETWORK),
    *("replicas", "local_steps", "rounds", "batch_size", "inner", "opt_state_at_sync", "stats_at_sync"),
    *("score_samples", "score_every", *shared_flags.WEIGHTING),
)
"""Flags that must agree among all cells."""
READS = (*SETTINGS, "prox_mu", "seeds", "data_dir", "devices", "replica_map", "workdir", "resume")
for _name in READS:
    flags.declare_key_flag(_name)
SEEDS_APART = 1000
"""Added to the seeds when tuning, so that no reported seed chooses a rate."""


class Scheme(NamedTuple):
    """A row of the matrix: how replicas are averaged, and which correction of the local steps they take."""

    averager: wavg.Averager
    drift: str = "none"


class Study(NamedTuple):
    """What all cells share; `scenarios` maps names to scenarios."""

    dataset: data.Dataset
    task: wavg.Task
    scenarios: dict[str, Scenario]

    def shard(self, scenario: str, seed: int) -> data.ShardedData:
        """The data of a scenario and seed, equal for every weighting."""
        one, scale = self.scenarios[scenario], SCALES[F.scale]
        return deal(one, self.dataset, heldout=F.heldout, seed=seed, augment=problem.augmentation(), scale=scale)


def main(argv: Sequence[str]) -> None:
    """Trains every cell that is not recorded yet and writes the report, or tunes the rates."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    seeds = shared_flags.read_seeds()
    chosen, weightings = choose("scenarios", SCENARIOS, F.replicas), shared_flags.names("weightings", ROWS)
    rates = {name: _rate(name) for name in chosen}
    dataset = problem.load()
    schemes = _schemes(weightings)
    arms.check_heldout({name: scheme.averager for name, scheme in schemes.items()})
    study = Study(dataset, problem.make_task(dataset), chosen)
    _check(study)
    if F.tune_rates:
        _tune(study, seeds)
        return
    workdir = arms.choose_workdir("scenarios")
    check_writable(workdir)
    titles = {name: make(F.replicas).title for name, make in SCENARIOS.items()}
    header = record_matrix.header(dataset, study.task, titles, {name: F[name].value for name in SETTINGS})

    def train(cell: Cell, advance: Callable[[str], None]) -> list[Row]:
        return _train(study, cell, study.shard(cell.scenario, cell.seed), schemes[cell.weighting], advance)

    # The seeds innermost, so that they share compiled programs.
    every = [Cell(s, w, seed, rates[s]) for w in schemes for s in study.scenarios for seed in seeds]
    with open_records(workdir) as records:
        record_matrix.begin(records, header)
        record_matrix.fill(every, records, lambda cell: F.rounds, train, lambda scenario: f"lr_{scenario}")
    app.publish(read_rows(workdir), workdir)


def _schemes(names: Sequence[str]) -> dict[str, Scheme]:
    """The rows of the matrix by the names that they are recorded under: a proximal term's holds its weight."""
    schemes = {}
    for name in names:
        weighting, drift = ROWS[name]
        arms.make_drift(drift, 1.0)  # its errors
        label = f"{name}({F.prox_mu:g})" if drift == "fedprox" else name
        schemes[label] = Scheme(wavg.averager(**WEIGHTINGS[weighting](F)), drift)
    return schemes


def _rate(scenario: str) -> float:
    rate = float(F[f"lr_{scenario}"].value or 0)
    if not 0 < rate < math.inf:
        raise SettingsError(f"--lr_{scenario} is {rate}; give a finite learning rate above 0")
    return rate


def _check(study: Study) -> None:
    """Raises if a scenario cannot work, before anything trains or is written."""
    for name in study.scenarios:
        sharded = study.shard(name, 0)
        data.round_indices(sharded.shards, seed=0, first_step=0, local_steps=F.local_steps, batch_size=F.batch_size)
        plain = wavg.averager(wavg.uniform())
        make_recipe(study.task, sharded, plain, make_inner(F.inner, 1.0), layout=wavg.Layout(F.devices))


def _train(
    study: Study, cell: Cell, sharded: data.ShardedData, scheme: Scheme, advance: Callable[[str], None]
) -> list[Row]:
    """Trains one cell and returns its rows; only the last has test metrics.

    Divergence is a result too: it raises a warning, and the last finite parameters count.
    """
    run = functools.partial(
        wavg.fit,
        study.task,
        sharded,
        scheme.averager,
        inner=make_inner(F.inner, cell.rate),
        local_steps=F.local_steps,
        rounds=F.rounds,
        batch_size=F.batch_size,
        seed=cell.seed,
        scoring=wavg.Scoring(samples=F.score_samples, test_every=F.rounds, every=F.score_every),
        at_sync=wavg.AtSync(
            arms.POLICIES[F.opt_state_at_sync],
            arms.POLICIES[F.stats_at_sync],
            drift=arms.make_drift(scheme.drift, cell.rate),
        ),
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
    rates, plain = numbers("tune_rates", float), Scheme(wavg.averager(wavg.uniform()))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in study.scenarios}
    with progress.bar(len(found) * len(rates) * len(seeds) * F.rounds) as advance:
        for scenario in found:
            spaces = {seed + SEEDS_APART: study.shard(scenario, seed + SEEDS_APART) for seed in seeds}
            # The run's test split is the held-out one here.
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
