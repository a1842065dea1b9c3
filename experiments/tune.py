"""Tunes the learning rate of each arm: a grid, on seeds of its own, judged on the held-out split.

  python -m experiments.tune --flagfile=experiments/presets/fashion.flags

It never touches the test split. Prints the held-out accuracy, or bits per byte of a text, of every rate in every
scenario (--noisy), and the flags of the best rates, ready for a preset.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags
from rich.table import Table

from experiments.setup import app, arms, problem, shared_flags
from experiments.setup.conditions import Condition, read_conditions, title
from experiments.setup.shared_flags import ARMS, COMPARED, numbers
from wavg_jax import data
from wavg_jax.base import Diverged, SettingsError, Task
from wavg_jax.reporting.measures import Measure, judged_by
from wavg_jax.reporting.statistic import Statistic
from wavg_jax.training import progress

flags.DEFINE_list("tune", list(COMPARED), f"Which arms to tune, of {', '.join(ARMS)}.")
flags.DEFINE_list("rates", "0.01,0.02,0.05,0.1,0.2,0.5", "The learning rates to try.")
F = flags.FLAGS

_UNREAD = {"seeds", "steps", "workdir", "resume", "checkpoint_every", "log_to", *shared_flags.LINK}
READS = shared_flags.NAMES - _UNREAD
for _name in READS:
    flags.declare_key_flag(_name)

Found = dict[tuple[int, float], Statistic]
"""(noisy shards, rate) -> what the network is judged by, on held-out samples, over the tuning seeds."""


def spaces(dataset: data.Dataset, noisy: int, seeds: Sequence[int]) -> dict[int, data.ShardedData]:
    """The data to try every rate on under one condition, by seed."""
    made = {seed: problem.make_data(dataset, seed, noisy) for seed in seeds}
    # The run's test split is the held-out one here.
    return {seed: sharded._replace(test=sharded.heldout) for seed, sharded in made.items()}


def main(argv: Sequence[str]) -> None:
    """Tries every rate for every arm in every scenario, and prints how good they are."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    rates, seeds = numbers("rates", float), numbers("tuning_seeds", int, least=0)
    conditions = read_conditions()
    chosen = arms.make_arms(shared_flags.names("tune", ARMS), conditions[0])
    if F.heldout < 1:
        raise SettingsError("--heldout=0: rates are judged on held-out samples, so hold some out")
    tried = [condition._replace(rates=dict.fromkeys(ARMS, rate)) for rate in rates for condition in conditions]
    found: dict[str, Found] = {arm.name: {} for arm in chosen}
    with progress.bar(len(chosen) * len(tried) * len(seeds) * F.rounds) as advance:
        progress.doing("loading data")
        dataset = problem.load(texts=True)
        task = problem.make_task(dataset)
        measure = judged_by(_metrics(dataset))
        everything = {condition.noisy: spaces(dataset, condition.noisy, seeds) for condition in conditions}
        for arm, condition in itertools.product(chosen, tried):
            finals = [
                _final(arms.at_rates(arm, condition), task, sharded, condition, seed, advance, measure)
                for seed, sharded in everything[condition.noisy].items()
            ]
            found[arm.name][condition.noisy, condition.rates[arm.name]] = _over_seeds(finals)
    _show(found, rates, len(seeds), measure)


def _metrics(dataset: data.Dataset) -> tuple[str, ...]:
    """The metrics to judge a network on this data set by."""
    return ("loss", "accuracy", *(() if dataset.bytes_per_token is None else ("bits_per_byte",)))


def _final(
    arm: arms.Arm,
    task: Task,
    sharded: data.ShardedData,
    condition: Condition,
    seed: int,
    advance: Callable[[str], None],
    measure: Measure,
) -> float:
    """What the network is judged by, on held-out samples after the last round; NaN if the run diverges."""
    try:
        run = arms.run_arm(arm, task, sharded, condition, seed, advance)
    except Diverged:
        return math.nan
    return float(run.rows[-1][f"test_{measure.metric}"])


def _over_seeds(finals: Sequence[float]) -> Statistic:
    """A rate at which any seed diverges is out, however well the others do."""
    return Statistic.of([] if any(map(math.isnan, finals)) else finals)


def _show(found: dict[str, Found], rates: tuple[float, ...], seeds: int, measure: Measure) -> None:
    console = app.console()
    conditions = tuple(dict.fromkeys(noisy for own in found.values() for noisy, _ in own))
    for noisy in conditions:
        table = Table("rate", *found, title=f"{title(noisy)}: held-out {measure.title} over {seeds} seeds")
        for rate in rates:
            values = [own[noisy, rate] for own in found.values()]
            table.add_row(f"{rate:g}", *(_shown(value, measure) for value in values))
        console.print(table)
    for name, own in found.items():
        means = {noisy: [own[noisy, rate].mean for rate in rates] for noisy in conditions}
        if any(np.isnan(values).all() for values in means.values()):
            raise SettingsError(f"--rates={','.join(F.rates)}: {name} diverges at every rate; try lower ones")
        best_of = np.nanargmax if measure.higher else np.nanargmin
        best = [rates[int(best_of(values))] for values in means.values()]
        edge = " (at the edge of the rates tried: try more)" if {min(rates), max(rates)} & set(best) else ""
        console.print(f"--lr_{name}={','.join(f'{rate:g}' for rate in best)}{edge}", soft_wrap=True)


def _shown(value: Statistic, measure: Measure) -> str:
    """Mean and, of two seeds or more, standard deviation."""
    if not value.n:
        return "diverged"
    scale, digits = measure.scale, measure.decimals
    return f"{scale * value.mean:.{digits}f}" + (f" ± {scale * value.sd:.{digits}f}" if value.n > 1 else "")


if __name__ == "__main__":
    app.run(main)
