"""Trains one arm alone, for one seed.

  python -m experiments.train --arm=weighted
  python -m experiments.train --arm=plain --dataset=cifar10 --model=cnn --data_dir=DIR

Writes rows.jsonl, report.md, report.html, plots and checkpoints to --workdir, and with --profile a trace.
"""

from collections.abc import Sequence

from absl import flags

from experiments.setup import app, arms, problem, shared_flags
from experiments.setup.conditions import read_condition
from experiments.setup.views import read_views
from wavg_jax.training import live, progress

flags.DEFINE_enum("arm", "weighted", list(shared_flags.ARMS), "Which arm to run; see experiments.compare.")
flags.DEFINE_integer("seed", 0, "Seed of data split, initial parameters and sample order.", lower_bound=0)
flags.DEFINE_integer(
    "profile", None, "Trace this round to profile/ in --workdir, for https://ui.perfetto.dev.", lower_bound=1
)
F = flags.FLAGS

READS = shared_flags.NAMES - {"seeds", "steps", *shared_flags.LINK}
for _name in READS:
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Runs one arm and writes its report."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    condition, views = read_condition(), read_views()
    workdir = arms.choose_workdir("train")
    if F.profile is not None:
        views.append(live.profile(F.profile, workdir / "profile"))
    with app.reported(workdir), progress.bar(F.rounds, arms.rounds_done(workdir)) as advance:
        progress.doing("loading data")
        dataset = problem.load(texts=True)
        task = problem.make_task(dataset)
        (arm,) = arms.make_arms((F.arm,), condition)
        sharded = problem.make_data(dataset, F.seed, condition.noisy)
        arms.run_arm(arm, task, sharded, condition, F.seed, advance, workdir=workdir, views=views)


if __name__ == "__main__":
    app.run(main)
