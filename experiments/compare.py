"""The comparison: one network trained sequentially, synchronously, with plain and with weighted averaging.

All arms start from the same initial parameters and see the same number of training samples. Every arm runs for every
seed in every scenario; by default there are two: clean shards, and random labels on half of them.

  python -m experiments.compare
  python -m experiments.compare --noisy=0,1,2,3 --seeds=0,1,2,3,4
  python -m experiments.compare --flagfile=experiments/presets/fashion_noisy2.flags

Writes rows.jsonl, report.md, report.html, plots and checkpoints to --workdir.
"""

import itertools
from collections.abc import Sequence

from absl import flags

from experiments.setup import app, arms, problem, shared_flags
from experiments.setup.conditions import Condition, read_conditions, title
from experiments.setup.shared_flags import ARMS, COMPARED, DILOCO
from experiments.setup.views import read_views
from wavg_jax.base import Stopped
from wavg_jax.storage.rows import check_writable
from wavg_jax.training import progress

flags.DEFINE_list("arms", list(COMPARED), f"Which arms to run, of {', '.join(ARMS)}.")
F = flags.FLAGS

READS = shared_flags.NAMES - {"steps", "tuning_seeds"}
for _name in READS:
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Runs every arm in every scenario for every seed, and writes the report."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    seeds, conditions = shared_flags.read_seeds(), read_conditions()
    names, views = shared_flags.names("arms", ARMS), read_views()
    workdir = arms.choose_workdir("compare")
    check_writable(workdir)
    done = arms.rounds_done(workdir)
    total = len(names) * len(conditions) * len(seeds) * F.rounds
    with app.reported(workdir), progress.bar(total, done) as advance:
        progress.doing("loading data")
        dataset = problem.load(texts=True)
        task = problem.make_task(dataset)
        chosen = arms.make_arms(names, conditions[0])
        arms.check_heldout({arm.name: arm.averager for arm in chosen})
        first = problem.make_data(dataset, seeds[0], conditions[0].noisy)
        for arm in chosen:  # fails before the first run if an arm cannot work
            arms.check_arm(arm, task, first)
        app.console().print(_plan(names, conditions, len(seeds)))
        path_of = arms.critical_path(chosen, task, first)  # it depends on shapes alone, equal under all conditions
        stopped = False
        for condition, seed in itertools.product(conditions, seeds):
            sharded = problem.make_data(dataset, seed, condition.noisy)
            # The first has the same name as without the others, so that a resumed run can add conditions.
            suffix = "" if condition == conditions[0] else f"-noisy{condition.noisy}"
            for arm in chosen:  # arms alternate, so that a slow spell of the machine hits all
                name = f"{arm.name}{suffix}-seed{seed}"
                if stopped:
                    raise Stopped(
                        f"stopped before {name!r}; continue with the same settings, --workdir={workdir} and --resume"
                    )
                stopped = arms.run_arm(
                    arms.at_rates(arm, condition),
                    task,
                    sharded,
                    condition,
                    seed,
                    advance,
                    workdir=workdir,
                    name=name,
                    path=path_of(arm.name),
                    views=views,
                ).stopped


def _plan(names: Sequence[str], conditions: Sequence[Condition], seeds: int) -> str:
    """The plan of the runs, in a sentence."""
    shown = ", ".join(f"{name} ({F.weighting})" if DILOCO.get(name, name) == "weighted" else name for name in names)
    with_what = ", then with ".join(title(condition.noisy) for condition in conditions)
    replicas, over = (f"{n} {word}{'s' * (n > 1)}" for n, word in ((F.replicas, "replica"), (seeds, "seed")))
    return f"{F.dataset}, {replicas}: {shown}, {over}, with {with_what} (set by --noisy)"


if __name__ == "__main__":
    app.run(main)
