"""Evidence: arms and their controls in every scenario, each tuned with equal effort, over several seeds.

  python -m experiments.evidence --flagfile=experiments/presets/fashion_evidence.flags --data_dir=DIR --workdir=runs/a
  python -m experiments.evidence --flagfile=... --data_dir=DIR --workdir=runs/a --resume

Climbs to the learning rate and weight decay of every arm in every scenario on seeds and samples of their own, trains
the arm at these for every seed, reads the test split once, and writes a row for the training and for each of its
controls: calibrated, averaged over rounds, fine-tuned on the held-out samples, the ensemble of its replicas. The report
has the share of the oracle's gap that each recovers. experiments/results/README.md has the protocol.

Several processes may split the work by --evidence_scenarios, --evidence_arms or --seeds, each with its own --workdir;
then `python -m experiments.report runs/a runs/b --out=runs/both` reports on them together.
"""

from collections.abc import Sequence

from absl import flags

from experiments.setup import app, arms, evidence_arms, problem, record_matrix, shared_flags
from experiments.setup.campaign import Campaign
from experiments.setup.evidence_arms import EVIDENCE, PUBLISHED
from experiments.setup.readings import READINGS
from experiments.setup.scenario import SOUND, choose, every, series_of
from experiments.setup.shared_flags import numbers
from wavg_jax.base import SettingsError
from wavg_jax.storage.rows import check_writable, open_records, read_rows

flags.DEFINE_list(
    "evidence_scenarios", ["iid", "noisy2", "noisy4"], "Which scenarios; see experiments/setup/scenario.py."
)
flags.DEFINE_list(
    "evidence_arms", ["sequential", "sync", "plain", "opinion_pool", "oracle"], "Which arms; weightings are arms."
)
flags.DEFINE_list("controlled", ["sequential", "sync", "plain", "opinion_pool"], "Arms that controls are read of.")
flags.DEFINE_list("readings", list(READINGS), f"Which controls, of {', '.join(READINGS)}.")
flags.DEFINE_integer("tuning_samples", 5000, "Training samples set apart to tune on.", lower_bound=1)
flags.DEFINE_enum(
    "tuned_by", "", ["", *READINGS], "The reading whose accuracy tunes an arm; by default the training's own."
)
flags.DEFINE_enum("tuned_in", "", ["", *every("")], "The scenario that arms are tuned in; by default each in its own.")
F = flags.FLAGS

SETTINGS = (
    *(*shared_flags.DATA, *shared_flags.NETWORK),
    *("replicas", "local_steps", "rounds", "batch_size", "warmup", "decay"),
    *("score_samples", "score_every", *shared_flags.WEIGHTING),
    *("tuning_seeds", "tuning_samples", "tuned_by", "tuned_in"),
)
"""Flags that must agree among all cells."""
READS = (*SETTINGS, "seeds", "data_dir", "devices", "replica_map", "workdir", "resume")
for _name in READS:
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Tunes and trains every cell that is not recorded yet, and writes the report."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    seeds, tuning = shared_flags.read_seeds(), numbers("tuning_seeds", int, least=0)
    if set(seeds) & set(tuning):
        raise SettingsError(
            f"--tuning_seeds={','.join(F.tuning_seeds)}: keep them apart from --seeds, which are reported"
        )
    if F.heldout < 1:
        raise SettingsError("--heldout=0: rounds and temperatures are chosen on held-out samples, so hold some out")
    for flag, allowed in (("readings", READINGS), ("controlled", EVIDENCE)):
        if F[flag].value:  # none is a choice, too
            shared_flags.names(flag, allowed)
    chosen = evidence_arms.make(shared_flags.names("evidence_arms", EVIDENCE))
    made = every(F.data_dir)
    scenarios = choose("evidence_scenarios", made, F.replicas, good=int(any(arm.good for arm in chosen)))
    dataset = problem.load()
    arms.check_heldout({arm.name: arm.averager for arm in chosen})
    task = problem.make_task(dataset)
    others = {name: made[name](F.replicas) for name in (SOUND, F.tuned_in) if name}
    campaign = Campaign(dataset, task, others | scenarios, tuning)
    campaign.check_tuning(chosen)
    workdir = arms.choose_workdir("evidence")
    check_writable(workdir)
    header = record_matrix.header(
        dataset,
        task,
        {name: one.title for name, one in scenarios.items()},
        {name: F[name].value for name in SETTINGS},
        recommend=False,
        roles={
            "oracle": "oracle",
            "ours": "opinion_pool",
            "published": [arm.name for arm in chosen if arm.name in PUBLISHED],
        },
        series=series_of(scenarios),
        apart=F.tuning_samples,
    )
    with open_records(workdir) as records:
        record_matrix.begin(records, header)
        campaign.fill(records, scenarios, chosen, seeds)
    app.publish(read_rows(workdir), workdir)


if __name__ == "__main__":
    app.run(main)
