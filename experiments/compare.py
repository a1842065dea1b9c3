"""The comparison: one network trained sequentially, synchronously, with plain and with weighted averaging.

All arms start from the same initial parameters and see the same number of training samples, over several seeds.

  python -m experiments.compare
  python -m experiments.compare --flagfile=experiments/presets/fashion_noisy2.flags

Leaves rows.jsonl, report.md, report.html, plots and checkpoints in --workdir.
"""

from collections.abc import Sequence

from absl import flags

from experiments import app, arms
from experiments import flags as shared_flags
from experiments.flags import ARMS
from wavg_jax import progress, trainer
from wavg_jax.records import read_rows

flags.DEFINE_list("arms", list(ARMS), f"Which arms to run, of {', '.join(ARMS)}.")
F = flags.FLAGS

READS = shared_flags.NAMES - {"steps"}
for _name in READS:
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Runs every arm for every seed and writes the report."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    seeds = shared_flags.read_seeds()
    dataset = arms.load()
    task = arms.make_task(dataset)
    chosen = arms.make_arms(arms.chosen("arms"))
    first = arms.make_data(dataset, seeds[0])
    for arm in chosen:  # so that what cannot work is found before the first of them runs
        arms.make_recipe(arm, task, first)
    workdir = arms.choose_workdir("compare")
    done = arms.rounds_done(workdir)
    with progress.bar(len(chosen) * len(seeds) * F.rounds, done) as advance:
        paths = arms.critical_path(chosen, task, first)
        for seed in seeds:  # the arms alternate, so that a machine that slows down slows them all
            sharded = arms.make_data(dataset, seed)
            for arm in chosen:
                arms.run_arm(
                    arm, task, sharded, seed, workdir, paths[arm.name], lambda row: advance(trainer.caption(row))
                )
    app.publish(read_rows(workdir), workdir)


if __name__ == "__main__":
    app.run(main)
