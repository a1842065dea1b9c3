"""Trains one arm in workers that come and go, on Ray: on this machine, or on a cluster.

  python -m experiments.elastic --workers=4
  python -m experiments.elastic --workers=8 --replicas=8 --min_replicas=4 --deadline=quantile
  RAY_AUTH_MODE=token python -m experiments.elastic --address=HOST:PORT --workers=16 --replicas=16

A round blends whoever came back in time. Writes rows.jsonl, report.md, report.html, plots, with a lane for every
worker, and checkpoints to --workdir.
"""

import functools
from collections.abc import Sequence

from absl import flags

from experiments.setup import app, shared_flags
from experiments.train import train
from wavg_jax import elastic
from wavg_jax.base import SettingsError

_DEFAULTS = elastic.Workers()
_DEADLINES = {
    "median_mad": elastic.median_mad(),
    "quantile": elastic.quantile(),
    "all": elastic.wait_for_all,
}
flags.DEFINE_integer("workers", 4, "How many workers; each trains a part of the replicas.", lower_bound=1)
flags.DEFINE_string("address", None, "HOST:PORT of a Ray cluster, or auto; by default workers of this machine.")
flags.DEFINE_string(
    "deadline",
    "median_mad",
    f"How long a round waits: {', '.join(_DEADLINES)}, or a number of seconds; see wavg_jax.elastic.deadlines.",
)
flags.DEFINE_integer("min_replicas", 1, "Fewest replicas that a round blends; else it waits longer.", lower_bound=1)
flags.DEFINE_bool("count_late", False, "Count a result that comes after its round, less the later it is.")
flags.DEFINE_integer("audit", 0, "Replicas a round whose scores another worker checks.", lower_bound=0)
flags.DEFINE_bool("fill", False, "Let slower workers take fewer local steps, as many as fit.")
flags.DEFINE_float(
    "patience", _DEFAULTS.patience, "Seconds that a round waits for --min_replicas before the run ends.", lower_bound=0
)
F = flags.FLAGS

ELASTIC_ARMS = ("plain", "accumulate", "weighted", *shared_flags.DILOCO)
READS = shared_flags.NAMES - {
    *("seeds", "steps", "tuning_seeds", "devices", "wire", "fragments", "feed"),
    *shared_flags.LINK,
}
for _name in (*READS, "arm", "seed"):
    flags.declare_key_flag(_name)


def check_arm() -> None:
    """Raises SettingsError if the arm has one replica, which only one worker could train."""
    if F.arm not in ELASTIC_ARMS:
        raise SettingsError(f"--arm={F.arm}: elastic runs have {' or '.join(ELASTIC_ARMS)}, whose replicas are many")


def read_workers() -> elastic.Workers:
    """The workers that the flags ask for."""
    return elastic.Workers(
        F.workers,
        F.address,
        _read_deadline(F.deadline),
        F.min_replicas,
        elastic.polynomial() if F.count_late else None,
        F.audit,
        F.fill,
        patience=F.patience,
    )


def _read_deadline(text: str) -> elastic.Deadline:
    if text in _DEADLINES:
        return _DEADLINES[text]
    try:
        seconds = float(text)
    except ValueError:
        raise SettingsError(
            f"--deadline={text!r}: give {', '.join(_DEADLINES)}, or a number of seconds, such as 2.5"
        ) from None
    return elastic.fixed(seconds)


def main(argv: Sequence[str]) -> None:
    """Runs one arm and writes its report."""
    app.refuse_arguments(argv)
    shared_flags.refuse_unused(READS)
    check_arm()
    train("elastic", functools.partial(elastic.fit, workers=read_workers()))


if __name__ == "__main__":
    app.run(main)
