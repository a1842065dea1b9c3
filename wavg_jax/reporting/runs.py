"""Recorded rows -> runs: one arm trained from one seed, with its rounds as arrays.

Two clocks are kept apart: *measured* wall time on the machine at hand, and the *critical path*, computed as the time
that K devices would take, each working on one replica.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wavg_jax.base import DataError
from wavg_jax.devices.network import Link, from_entry
from wavg_jax.reporting.statistic import Floats, Statistic, as_float
from wavg_jax.reporting.wording import distinct
from wavg_jax.storage.sanity import check_numbers, check_rounds
from wavg_jax.storage.schema import PATIENCE, Row, lost_at_the_end

IDENTITY = (
    *("dataset", "noisy_shards", "parameters", "train_samples", "samples_per_round", "target_accuracy"),
    "rounds",
)
"""Fields of a run row that, with its settings, must agree within a scenario."""
SHOWN = (
    *("run", "arm", "seed", "classes", "heldout_samples", "test_samples", "shard_sizes", "local_steps", "batch_size"),
    *("replicas", "hardware", "versions", "settings"),
)
"""Further fields that every run row must have."""
TEST = "test_"
"""Prefix of the metrics of the test split in a round row."""


class RecordedRun(NamedTuple):
    """One arm trained from one seed: its run row, and its R round rows as arrays; see `wavg_jax.storage.schema`.

    Attributes:
      header: the run row.
      rounds, samples, seconds, elapsed, effective: [R] each.
      quality: every metric of the test split, by name without `test_` [R]; nan in rounds that diverged or were not
        evaluated.
      weights, alive: [R, K].
      evaluated: rounds that were evaluated on the test split [R].
      diverged: rounds in which the network's outputs were not finite, and the lost rounds that ended the run [R].
      gave_up: the run ended because its last rounds were lost.
      stopped_early: a callback ended the run before its last planned round.
      confusion: counts of the last round, true class by row [C, C]; None if there are none.
      sample: what a language model wrote: {prompt, text, temperature}; None if nothing.
      scores: every signal that the weighting needed [R, K], nan in rounds that were not scored.
      diagnosis: `leave_one_out` [R, K], `gain` and `gain_error` [R], likewise; `{}` if no logits were kept.
      workers: what each worker of an elastic run did, in every round; of other runs, `()` each.
      peak_memory: bytes of a device that its process held at most; nan if the rows do not say.
    """

    header: Row
    rounds: Floats
    samples: Floats
    seconds: Floats
    elapsed: Floats
    effective: Floats
    quality: Mapping[str, Floats]
    weights: Floats
    alive: NDArray[np.bool_]
    evaluated: NDArray[np.bool_]
    diverged: NDArray[np.bool_]
    gave_up: bool
    stopped_early: bool
    confusion: Floats | None
    sample: Row | None
    scores: Mapping[str, Floats]
    diagnosis: Mapping[str, Floats]
    workers: Sequence[Sequence[Row]]
    peak_memory: float

    @property
    def arm(self) -> str:
        return str(self.header["arm"])

    @property
    def seed(self) -> int:
        return int(self.header["seed"])

    @property
    def replicas(self) -> int:
        return int(self.header["replicas"])

    @property
    def complete(self) -> bool:
        """Whether all planned rounds are recorded, or the run ended by itself before."""
        return int(self.rounds[-1]) >= int(self.header["rounds"]) or self.gave_up or self.stopped_early

    @property
    def last(self) -> int:
        """Index of the last evaluated round; of the last round if none was evaluated."""
        found = np.flatnonzero(self.evaluated)
        return int(found[-1]) if found.size else len(self.rounds) - 1

    @property
    def memory(self) -> tuple[float, float] | None:
        """Bytes of a device that the run was to take, and that there are; None if the rows do not say."""
        found = self.header.get("memory")
        return None if found is None else (as_float(found["predicted"]), as_float(found["limit"]))

    @property
    def failed(self) -> bool:
        """Whether the run diverged and so has no final quality."""
        return bool(self.diverged[self.last])

    def final(self, metric: str) -> float:
        """A metric of the test split at the last evaluated round; nan if the run diverged."""
        return float(self.quality[metric][self.last])

    @property
    def critical_round(self) -> float:
        """Seconds of one round on the critical path; nan if not measured."""
        return as_float((self.header["critical_path"] or {}).get("round"))

    @property
    def link(self) -> Link | None:
        """The link that the critical path assumes; None for no network."""
        return from_entry((self.header["critical_path"] or {}).get("link"))

    @property
    def critical(self) -> Floats:
        """Computed seconds on the critical path so far [R]."""
        return self.rounds * self.critical_round

    def at_target(self, values: Floats) -> float:
        """The entry of `values` [R] at the first round that reaches the target accuracy; nan if none does."""
        if "accuracy" not in self.quality:
            return float("nan")
        reached = np.flatnonzero(self.quality["accuracy"] >= as_float(self.header["target_accuracy"]))
        return float(values[reached[0]]) if reached.size else float("nan")

    def metrics(self) -> dict[str, float]:
        """Everything that arms are compared by: the final quality, and each of `COSTS`."""
        return {metric: self.final(metric) for metric in self.quality} | {name: of(self) for name, of in COSTS.items()}


COSTS: Mapping[str, Callable[[RecordedRun], float]] = {
    "rounds_to_target": lambda run: run.at_target(run.rounds),
    "samples_to_target": lambda run: run.at_target(run.samples),
    "measured_to_target": lambda run: run.at_target(run.elapsed),
    "critical_to_target": lambda run: run.at_target(run.critical),
    "compile_seconds": lambda run: as_float(run.header["compile_seconds"]),
    "seconds_per_round": lambda run: Statistic.of(run.seconds).mean,
    "critical_round": lambda run: run.critical_round,
    "bytes_per_round": lambda run: as_float(run.header["bytes_per_round"]),
}
"""What a run took, by name."""


def links_in_words(runs: Sequence[RecordedRun]) -> str:
    """The links that the runs' critical paths assume, to follow "with one device for each replica"."""
    found = distinct(run.link for run in runs if run.header["critical_path"])
    words = distinct("no network" if link is None else f"a link of {link}" for link in found)
    return f"and {' or '.join(words) or 'no network'} between them"


def read_runs(rows: Sequence[Row]) -> list[RecordedRun]:
    """Puts rows together run by run, in order of appearance.

    Args:
      rows: run and round rows in the order of recording; of several folders, one folder after the other.

    Raises:
      DataError: a row lacks a field or holds an absurd number, rounds are missing, or there is no run.
    """
    check_numbers(rows)
    # Names are unique within a folder only, so a round belongs to the latest run row of its name.
    headers: list[Row] = []
    members: list[list[Row]] = []
    latest: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        kind, name = row.get("kind"), str(row.get("run"))
        if kind == "run":
            latest[name] = len(headers)
            headers.append(row)
            members.append([])
        elif kind == "round":
            if name not in latest:
                raise DataError(f"row {number} is a round of run {name!r}, which has no run row before it")
            members[latest[name]].append(row)
    if not headers:
        raise DataError("the rows hold no run; train first, then report on the rows of that run")
    return [_checked_run(header, rounds) for header, rounds in zip(headers, members, strict=True)]


def _checked_run(header: Row, rounds: Sequence[Row]) -> RecordedRun:
    try:
        rounds = sorted(rounds, key=lambda row: row["round"])
        for field in (*IDENTITY, *SHOWN):
            header[field]
        if rounds:
            check_rounds(str(header["run"]), rounds, rounds[-1]["round"], header["replicas"])
        run = _run(header, rounds)
        # Reads what is read later, so that a missing or odd field is found here, by name.
        int(header["seed"]), int(header["replicas"])
        len(header["shard_sizes"]), len(header["noisy_shards"] or ()), run.memory
        for name in ("settings", "hardware", "versions"):
            header[name].items()
        if rounds:
            run.metrics(), links_in_words([run])
    except KeyError as e:
        raise DataError(f"a row of run {header.get('run')!r} lacks the field {e}") from e
    except DataError:
        raise
    except (TypeError, ValueError, AttributeError) as e:
        raise DataError(f"the rows of run {header.get('run')!r} do not fit together: {e}") from e
    return run


def _run(header: Row, rounds: Sequence[Row]) -> RecordedRun:
    def column(field: str) -> Floats:
        # None, which stands for a non-finite number, becomes nan.
        return np.array([row[field] for row in rounds], np.float64)

    fields = dict.fromkeys(["test_loss", *(field for row in rounds for field in row if field.startswith(TEST))])
    values = {field.removeprefix(TEST): column(field) for field in fields}
    finite = np.isfinite(list(values.values()))
    # No loss in a round that has another metric, or in the last one, which is always evaluated: it is not finite.
    planned = column("round") >= header["rounds"]
    diverged = ~np.isfinite(values["loss"]) & (finite.any(axis=0) | planned)
    last_lost = lost_at_the_end([dict(row) for row in rounds])
    gave_up = last_lost >= PATIENCE or bool(last_lost and planned[-1])
    diverged[len(rounds) - last_lost * gave_up :] = True
    last = rounds[-1] if rounds else {}
    confusion = last.get("confusion")
    return RecordedRun(
        header=header,
        rounds=column("round"),
        samples=column("samples"),
        seconds=column("seconds"),
        elapsed=column("elapsed"),
        effective=column("effective_replicas"),
        quality={metric: np.where(diverged, np.nan, value) for metric, value in values.items()},
        weights=column("weights"),
        alive=np.array([row["alive"] for row in rounds], np.bool_),
        evaluated=finite.any(axis=0) | diverged,
        diverged=diverged,
        gave_up=gave_up,
        stopped_early=bool(last.get("stopped_early")),
        confusion=None if confusion is None or diverged[-1] else np.array(confusion, np.float64),
        sample=last.get("sample"),
        scores=_tables_of(rounds, "scores"),
        diagnosis=_tables_of(rounds, "diagnosis"),
        workers=[row.get("workers", ()) for row in rounds],
        peak_memory=as_float(last.get("peak_memory")),
    )


def _tables_of(rounds: Sequence[Row], field: str) -> dict[str, Floats]:
    """The entries of a field that is a dict, as arrays [R, ...]: those that every round has."""
    tables = [row.get(field, {}) for row in rounds]
    names = [name for name in tables[0] if all(name in one for one in tables)] if tables else []
    return {name: np.array([one[name] for one in tables], np.float64) for name in names}
