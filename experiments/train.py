"""Trains one arm alone, for one seed.

  python -m experiments.train --arm=weighted
  python -m experiments.train --arm=plain --dataset=cifar10 --model=cnn --data_dir=DIR

Writes rows.jsonl, report.md, report.html, plots and checkpoints to --workdir, and with --profile a trace.
"""

from collections.abc import Callable, Sequence

from absl import flags

import wavg_jax as wavg
from experiments.setup import app, arms, problem, shared_flags
from experiments.setup.conditions import read_condition
from experiments.setup.views import read_views
from wavg_jax.devices import processes
from wavg_jax.storage.tensors import save_safetensors
from wavg_jax.training import live, progress

flags.DEFINE_enum("arm", "weighted", list(shared_flags.ARMS), "Which arm to run; see experiments.compare.")
flags.DEFINE_string("export", None, "Also write the final network to this .safetensors file; see experiments.soup.")
flags.DEFINE_string("start_from", None, "Start from a checkpoint: FILE.safetensors or WORKDIR/checkpoints/RUN/ROUND.")
flags.DEFINE_integer("seed", 0, "Seed of data split, initial parameters and sample order.", lower_bound=0)
flags.DEFINE_integer(
    "profile", None, "Trace this round to profile/ in --workdir, for https://ui.perfetto.dev.", lower_bound=1
)
F = flags.FLAGS

READS = shared_flags.NAMES - {"seeds", "steps", "tuning_seeds", *shared_flags.LINK}
for _name in READS:
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Runs one arm and writes its report."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    train("train")


def train(binary: str, fit: Callable[..., wavg.Result] | None = None) -> None:
    """Runs the arm of the flags, by default with `wavg.fit`, and reports it in a folder named after the binary."""
    condition, views = read_condition(), read_views()
    workdir = arms.choose_workdir(binary)
    if F.profile is not None:
        views.append(live.profile(F.profile, workdir / "profile"))
    with app.reported(workdir), progress.bar(F.rounds, arms.rounds_done(workdir)) as advance:
        progress.doing("loading data")
        dataset = problem.load(texts=True)
        task = problem.make_task(dataset)
        if F.start_from is not None:
            task = wavg.start_from(task, F.start_from)
        (arm,) = arms.make_arms((F.arm,), condition)
        sharded = problem.make_data(dataset, F.seed, condition.noisy)
        result = arms.run_arm(arm, task, sharded, condition, F.seed, advance, workdir=workdir, views=views, fit=fit)
    if F.export is not None and processes.first():
        save_safetensors(F.export, result.params, result.mutable)
        app.console().print(f"wrote {F.export}", soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
