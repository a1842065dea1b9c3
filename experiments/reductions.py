"""What averaging costs diverged replicas, and what fixes it: norm-preserving blends, BatchNorm re-estimation.

  python -m experiments.reductions --flagfile=experiments/presets/fashion_reductions.flags --data_dir=DIR
  python -m experiments.reductions --flagfile=experiments/presets/digits_batchnorm.flags

Every H of --steps trains for --total_steps local steps in all: the larger H, the fewer the rounds and the further the
replicas diverge. Each cell ends with a blend and an evaluation on the test split. Writes rows and report to --workdir,
as experiments.scenarios does; --resume continues.
"""

from collections.abc import Callable, Sequence

from absl import flags

import wavg_jax as wavg
from experiments.setup import app, arms, problem, record_matrix, shared_flags
from experiments.setup.conditions import read_condition, settings_of
from experiments.setup.optimizers import make_inner
from experiments.setup.record_matrix import Cell
from experiments.setup.shared_flags import numbers
from wavg_jax.averaging import reduce
from wavg_jax.base import SettingsError
from wavg_jax.rounds import policy
from wavg_jax.storage.rows import check_writable, open_records, read_rows
from wavg_jax.storage.schema import Row

flags.DEFINE_integer("total_steps", 1000, "Local steps per replica in total, a multiple of every H.", lower_bound=1)
F = flags.FLAGS

SETTINGS = (
    *(*shared_flags.DATA, *shared_flags.SHARDS, *shared_flags.NETWORK),
    *("replicas", "total_steps", "batch_size", "inner", "opt_state_at_sync"),
)
"""Flags that must agree among all cells."""
READS = (*SETTINGS, "lr_plain", "steps", "seeds", "data_dir", "devices", "replica_map", "workdir", "resume")
for _name in READS:
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Trains every cell that is not recorded yet and writes the report."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    steps, seeds, condition = numbers("steps", int), shared_flags.read_seeds(), read_condition()
    for h in steps:
        if F.total_steps % h:
            raise SettingsError(f"--total_steps={F.total_steps} is not a multiple of H={h} (--steps)")
    rate = condition.rates["plain"]
    dataset = problem.load()
    task = problem.make_task(dataset)
    inner = make_inner(F.inner, rate)
    variants = _variants()
    workdir = arms.choose_workdir("reductions")
    check_writable(workdir)
    lengths = {f"H={h}": h for h in steps}
    settings = settings_of(SETTINGS, condition)
    header = record_matrix.header(dataset, task, {name: name for name in lengths}, settings, recommend=False)

    def rounds(cell: Cell) -> int:
        return F.total_steps // lengths[cell.scenario]

    def train(cell: Cell, advance: Callable[[str], None]) -> list[Row]:
        averager, stats = variants[cell.weighting]
        return wavg.fit(
            task,
            problem.make_data(dataset, cell.seed, condition.noisy),
            inner=inner,
            local_steps=lengths[cell.scenario],
            rounds=rounds(cell),
            batch_size=F.batch_size,
            seed=cell.seed,
            averager=averager,
            scoring=wavg.Scoring(test_every=rounds(cell)),
            at_sync=wavg.AtSync(arms.POLICIES[F.opt_state_at_sync], stats),
            layout=wavg.Layout(F.devices, F.replica_map),
            progress=lambda text: advance(cell.name),
        ).rows

    every = [Cell(h, name, seed, rate) for h in lengths for name in variants for seed in seeds]
    with open_records(workdir) as records:
        record_matrix.begin(records, header)
        record_matrix.fill(every, records, rounds, train, lambda scenario: "lr_plain")
    app.publish(read_rows(workdir), workdir)


def _variants() -> dict[str, tuple[wavg.Averager, policy.Policy]]:
    """Name -> averager and policy for statistics; re-estimation only for networks with BatchNorm."""
    mean = wavg.averager(wavg.uniform())
    preserving = wavg.averager(wavg.uniform(), reduce=reduce.norm_preserving)
    variants: dict[str, tuple[wavg.Averager, policy.Policy]]
    variants = {"plain": (mean, policy.average), "norm_preserving": (preserving, policy.average)}
    if F.model == "cnn" and F.batch_norm:
        again = policy.reestimate()
        variants["reestimated"] = (mean, again)
        variants["norm_preserving_reestimated"] = (preserving, again)
    return variants


if __name__ == "__main__":
    app.run(main)
