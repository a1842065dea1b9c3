"""What a run needs of its recorded rows to go on, and what of them must agree with how it is started again."""

from collections.abc import Sequence
from typing import Any

from wavg_jax.base import DataError, ResumeError
from wavg_jax.storage.sanity import check_rounds
from wavg_jax.storage.schema import Row, plain

FIXED = (
    *("seed", "dataset", "train_samples", "replicas", "shard_sizes", "noisy_shards"),
    *("local_steps", "batch_size", "parameters", "score_samples", "faults"),
)
"""Entries of a run's first row, beside `settings`, that must not change when the run resumes."""
READ = (*FIXED, "settings", "data_crc", "classes", "heldout_samples", "test_samples", "rounds", "checkpoint_every")
"""Entries of a run's first row, beside `replica_map`, that resuming needs."""
ROUND = ("round", "local_steps", "samples", "elapsed", "train_loss")
"""Entries of a round's row that resuming needs."""


def check_first(first: Row) -> None:
    """Raises ResumeError unless this is a run's first row, with every entry that resuming needs."""
    if first["kind"] != "run":
        raise ResumeError(f"cannot resume {first['run']!r}: its first row is missing; restore it from a copy")
    for name in (*READ, "replica_map"):
        if name not in first:
            raise ResumeError(
                f"cannot resume {first['run']!r}: its first row lacks {name!r}, so an earlier version wrote it; start "
                "over in another workdir="
            )


def check_kept(run: str, rounds: Sequence[Row], done: int) -> None:
    """Raises DataError unless the rounds that a resumed run keeps, 1 to `done`, are there and hold what it needs."""
    if lacking := [name for row in rounds for name in ROUND if name not in row]:
        raise DataError(f"a row of {run!r} lacks {lacking[0]!r}; restore it from a copy")
    check_rounds(run, rounds, done)


def other_versions(before: Row, first: Row) -> str:
    """What a run is resumed with that it was not started with, in words: packages, and the instructions of the CPU; ""
    if nothing. Older rows may say less.

    >>> other_versions({"versions": {"jax": "0.9", "flax": "1"}}, {"versions": {"jax": "0.10", "flax": "1"}})
    'jax 0.9, now 0.10'
    """
    then, now = ({**(row.get("versions") or {}), "instructions": _isa(row)} for row in (before, plain(first)))
    differing = [name for name in now if then.get(name) and now[name] and name != "python" and then[name] != now[name]]
    return "; ".join(f"{name} {then[name]}, now {now[name]}" for name in differing)


def _isa(row: Row) -> Any:
    hardware = row.get("hardware")
    return hardware.get("isa") if isinstance(hardware, dict) else None


def check_settings(before: Row, first: Row) -> None:
    """Compares the first row of a recorded run with the first row of the run that resumes it.

    Raises:
      ResumeError: they differ; names the first difference.
    """
    check_first(before)
    first = plain(first)
    # The data first, since settings such as `chance` follow from them. How they are split and spoilt is a setting.
    then, now = (
        {
            "dataset": row["dataset"],
            "classes": row["classes"],
            "training samples": row["train_samples"] + row["heldout_samples"],
            "test samples": row["test_samples"],
        }
        for row in (before, first)
    )
    for name, value in then.items():
        if value != now[name]:
            raise ResumeError(
                f"cannot resume {before['run']!r}: the data are not what it was started with ({name}: {value}, now "
                f"{now[name]}); give the same data (dataset=, data_dir=), or choose another workdir="
            )
    # Then the settings, which the user can repeat.
    then, now = ({key: row[key] for key in FIXED} | row["settings"] for row in (before, first))
    for name in sorted({*now, *then}):
        if now.get(name) != then.get(name):
            raise ResumeError(
                f"cannot resume {before['run']!r}: it was started with {name}={then.get(name)!r}, "
                f"now it is {now.get(name)!r}; repeat the settings it was started with, or choose another workdir=, to "
                "which start_from takes the blend"
            )
    if before["data_crc"] != first["data_crc"]:
        raise ResumeError(
            f"cannot resume {before['run']!r}: inputs, labels, splits or shards are not what it was started with; "
            "give the same data, or choose another workdir="
        )
