"""Tunes the learning rate of each arm: a grid, over seeds that are not reported, judged on the held-out split.

  python -m experiments.tune --flagfile=experiments/presets/fashion.flags

The test split is not touched. Prints the held-out accuracy of every rate and the flags of the best, for a preset.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags
from rich.table import Table

from experiments import app, arms
from experiments import flags as shared_flags
from experiments.flags import ARMS, numbers
from wavg_jax import data, progress, trainer
from wavg_jax.base import Diverged, SettingsError, Task
from wavg_jax.records import Row

flags.DEFINE_list("tune", list(ARMS), f"Which arms to tune, of {', '.join(ARMS)}.")
flags.DEFINE_list("rates", "0.01,0.02,0.05,0.1,0.2,0.5", "The learning rates to try.")
flags.DEFINE_list("tuning_seeds", "1000,1001", "Seeds to tune on; keep them apart from those you report.")
F = flags.FLAGS

READS = shared_flags.NAMES - {"seeds", "steps", "workdir", "resume", "checkpoint_every"}
for _name in READS:
    flags.declare_key_flag(_name)


def accuracy(
    name: str, rate: float, task: Task, spaces: dict[int, data.ShardedData], on_round: Callable[[Row], None]
) -> float:
    """Mean held-out accuracy over the tuning seeds after the last round of one arm at one rate; NaN if one diverges."""
    F[f"lr_{name}"].value = rate
    (arm,) = arms.make_arms((name,))
    try:
        finals = [arms.run_arm(arm, task, own, seed, None, None, on_round).rows[-1] for seed, own in spaces.items()]
    except Diverged:
        return math.nan
    return float(np.mean([row["test_accuracy"] for row in finals]))


def main(argv: Sequence[str]) -> None:
    """Tries every rate for every arm and prints what came out."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    rates, seeds = numbers("rates", float), numbers("tuning_seeds", int, least=0)
    names = arms.chosen("tune")
    if F.heldout < 1:
        raise SettingsError("--heldout=0: rates are judged on held-out samples, so hold some out")
    with progress.bar(len(names) * len(rates) * len(seeds) * F.rounds) as advance:
        progress.doing("loading data")
        dataset = arms.load()
        task = arms.make_task(dataset)
        spaces = {seed: arms.make_data(dataset, seed) for seed in seeds}
        # What a run calls its test split is here the held-out one.
        spaces = {seed: sharded._replace(test=sharded.heldout) for seed, sharded in spaces.items()}
        found = {
            name: [accuracy(name, rate, task, spaces, lambda row: advance(trainer.caption(row))) for rate in rates]
            for name in names
        }
    table = Table("arm", *(f"{rate:g}" for rate in rates), title=f"held-out accuracy (%) over {len(seeds)} seeds")
    for name, values in found.items():
        table.add_row(name, *("diverged" if math.isnan(value) else f"{100 * value:.2f}" for value in values))
    console = app.console()
    console.print(table)
    for name, values in found.items():
        if np.isnan(values).all():
            raise SettingsError(f"--rates={','.join(F.rates)}: {name} diverges at every rate; try lower ones")
        best = rates[int(np.nanargmax(values))]
        edge = " (at the edge of the rates tried: try more)" if best in (min(rates), max(rates)) else ""
        console.print(f"--lr_{name}={best:g}{edge}", soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
