"""Recorded rows -> statistics over seeds: what a report says, as numbers.

A run is one arm trained from one seed. Two clocks are kept apart: *measured* wall time on the machine at hand,
and the *critical path*, which is computed: the time that K devices would take, each working on one replica.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wavg_jax.base import DataError
from wavg_jax.reporting.shares import Weights, weights_over
from wavg_jax.reporting.statistic import Floats, Statistic, as_float, statistic
from wavg_jax.storage.rows import PATIENCE, check_rounds, lost_at_the_end

Row = Mapping[str, Any]

KNOWN_ARMS = {
    "sequential": "one network, small batches one after another, on all shards together; no data parallelism",
    "sync": "one network on all shards together, with a batch K times as large: what averaging gradients at every "
    "step does",
    "plain": "K replicas, each trained on its own shard; after every round they are blended with equal weights",
    "weighted": "K replicas, each trained on its own shard; after every round they are blended with weights that "
    "depend on how good each replica is",
}
"""What the arms of the comparison are, in their order."""
REFERENCE = "plain"
RATE = "lr_"
"""What the name of a setting begins with that is the inner learning rate of the arm named next."""
SHOWN = (  # fields of a run row that only the reader needs
    *("run", "arm", "seed", "classes", "heldout_samples", "test_samples", "shard_sizes", "local_steps"),
    *("batch_size", "samples_per_round", "hardware", "versions"),
)
# Settings that may differ within a scenario: which run it is, and where files lie.
BOOKKEEPING = frozenset({"arm", "arms", "seed", "seeds", "workdir", "data_dir", "out", "resume", "flagfile"})


class Run(NamedTuple):
    """One arm trained from one seed: its run row, and its R round rows as arrays [R]; see `wavg_jax.storage.rows`.

    `weights` and `alive` are [R, K]; `confusion` are counts [C, C] of the last round, true class by row. `gave_up`: the
    run ended since nothing came of its last rounds, see `storage.rows`. `diverged` marks those rounds, and those
    after which the network's outputs were not finite: what is left has no quality, so `accuracy` and the other
    measures of it are nan there.
    """

    header: Row
    rounds: Floats
    samples: Floats
    seconds: Floats
    elapsed: Floats
    accuracy: Floats
    loss: Floats
    macro_f1: Floats
    ece: Floats
    weights: Floats
    alive: NDArray[np.bool_]
    effective: Floats
    diverged: NDArray[np.bool_]
    gave_up: bool
    confusion: Floats | None

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
        return int(self.rounds[-1]) >= int(self.header["rounds"])

    @property
    def critical_round(self) -> float:
        """Seconds of one round on the critical path; nan when not measured."""
        return as_float((self.header["critical_path"] or {}).get("round"))

    @property
    def critical(self) -> Floats:
        """Computed seconds on the critical path so far [R]."""
        return self.rounds * self.critical_round

    def at_target(self, values: Floats) -> float:
        """The entry of `values` [R] at the first round that meets the target accuracy; nan when none does."""
        reached = np.flatnonzero(self.accuracy >= as_float(self.header["target_accuracy"]))
        return float(values[reached[0]]) if reached.size else float("nan")


# What is compared, for each run. Everything else (means, spreads, paired differences) follows from these.
METRICS: Mapping[str, Callable[[Run], float]] = {
    "accuracy": lambda run: float(run.accuracy[-1]),
    "loss": lambda run: float(run.loss[-1]),
    "macro_f1": lambda run: float(run.macro_f1[-1]),
    "ece": lambda run: float(run.ece[-1]),
    "rounds_to_target": lambda run: run.at_target(run.rounds),
    "samples_to_target": lambda run: run.at_target(run.samples),
    "measured_to_target": lambda run: run.at_target(run.elapsed),
    "critical_to_target": lambda run: run.at_target(run.critical),
    "compile_seconds": lambda run: as_float(run.header["compile_seconds"]),
    "seconds_per_round": lambda run: statistic(run.seconds).mean,
    "critical_round": lambda run: run.critical_round,
    "bytes_per_round": lambda run: as_float(run.header["bytes_per_round"]),
}


class Arm(NamedTuple):
    """All seeds of one arm.

    Attributes:
      runs: by seed.
      metrics: each of `METRICS` over the seeds.
      differences: this arm minus the reference, seed by seed, for the seeds that both have; empty for the
        reference itself or where there is none.
      pairs: seeds that this arm and the reference have.
      weights: None for an arm of one replica.
    """

    name: str
    runs: tuple[Run, ...]
    metrics: Mapping[str, Statistic]
    differences: Mapping[str, Statistic]
    pairs: tuple[int, ...]
    weights: Weights | None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)


class Summary(NamedTuple):
    """One scenario: arms that were trained under the same settings.

    Attributes:
      label: what sets this scenario apart from others, besides data set and noisy shards; "" if nothing does.
      arms: sequential, sync, plain, weighted, then others by name.
      settings: flags that all runs share, by name.
      varying: flags that differ between runs, with their values.
      empty: names of runs without a single recorded round, which are left out.
    """

    label: str
    arms: tuple[Arm, ...]
    settings: Mapping[str, Any]
    varying: Mapping[str, tuple[Any, ...]]
    empty: tuple[str, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for arm in self.arms for run in arm.runs)

    @property
    def header(self) -> Row:
        """The run row of an arm with the most replicas: what all arms share, and K."""
        return max(self.runs, key=lambda run: run.replicas).header

    @property
    def target(self) -> float:
        """The target accuracy, a fraction; nan when none was set."""
        return as_float(self.header["target_accuracy"])

    @property
    def scenario(self) -> str:
        """What sets its shards apart from equal, clean ones, in a few words."""
        noisy, k, partition = self.header["noisy_shards"], self.header["replicas"], self.settings.get("partition")
        kind = "shards" if partition in (None, "iid") else f"{partition} shards"
        if not noisy:
            return f"clean {kind}"
        return f"{len(noisy)} of {k} {kind} with random labels" if k > 1 else f"{len(noisy)} {kind} with random labels"

    @property
    def focus(self) -> Arm:
        """The arm that is drawn in detail: weighted, or else the last of those with the most replicas."""
        return max(reversed(self.arms), key=lambda arm: (arm.name == "weighted", arm.runs[0].replicas))


def text(value: Any) -> str:
    """A setting as a reader writes it: `[0, 1]` is "0, 1", an empty list and None are "none"."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    """The different ones among values that may not be hashable, in order of appearance."""
    result: list[Any] = []
    for value in values:
        if value not in result:
            result.append(value)
    return tuple(result)


def names(summaries: Sequence[Summary]) -> tuple[str, ...]:
    """What tells the scenarios of one report apart: their shards, then the data set, then their labels."""
    found = [one.scenario for one in summaries]
    if len(distinct(one.header["dataset"] for one in summaries)) > 1:
        found = [f"{one.header['dataset']}, {name}" for one, name in zip(summaries, found, strict=True)]
    twice = {name for name in found if found.count(name) > 1}
    return tuple(f"{name} ({one.label})" if name in twice else name for one, name in zip(summaries, found, strict=True))


def summarise(rows: Sequence[Row]) -> tuple[Summary, ...]:
    """One summary for each set of settings, in order of appearance, so that none are mixed.

    Runs belong together when data set, noisy shards, target and all flags agree, apart from `BOOKKEEPING`.

    Args:
      rows: run and round rows in the order of recording; of several folders, one folder after the other.

    Raises:
      DataError: a row lacks a field, no round is recorded, or an arm and seed occur twice.
    """
    groups: dict[str, list[Run]] = {}
    identities: list[dict[str, Any]] = []
    for run in _runs(rows):
        identity = _identity(run.header)
        key = json.dumps(identity, sort_keys=True, default=str)
        if key not in groups:
            identities.append(identity)
        groups.setdefault(key, []).append(run)
    return tuple(
        _summary(runs, _label(identity, identities)) for identity, runs in zip(identities, groups.values(), strict=True)
    )


def _identity(header: Row) -> dict[str, Any]:
    fields = ["dataset", "noisy_shards", "parameters", "train_samples", "samples_per_round", "target_accuracy"]
    return _flags(header) | {name: header[name] for name in [*fields, "rounds"]}


def _flags(header: Row) -> dict[str, Any]:
    return {name: value for name, value in header["settings"].items() if name not in BOOKKEEPING}


def _label(identity: Row, identities: Sequence[Row]) -> str:
    names = sorted({name for other in identities for name in other})
    names = [name for name in names if len(distinct(other.get(name) for other in identities)) > 1]
    rates = [f"{name.removeprefix(RATE)} {text(identity.get(name))}" for name in names if name.startswith(RATE)]
    # What the data set and the shards are is said without a label.
    named = [name for name in names if name not in ("dataset", "noisy_shards", "noisy") and not name.startswith(RATE)]
    parts = [f"{name} = {text(identity.get(name))}" for name in named]
    parts += [f"learning rates: {', '.join(rates)}"] * bool(rates)
    return "; ".join(parts[:4] + [f"and {len(parts) - 4} more settings"] * (len(parts) > 4))


def _runs(rows: Sequence[Row]) -> list[Run]:
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
        raise DataError("the rows hold no run; train first, then report on the folder that training wrote")
    return [_run(header, rounds) for header, rounds in zip(headers, members, strict=True)]


def _run(header: Row, rounds: Sequence[Row]) -> Run:
    rounds = sorted(rounds, key=lambda row: row.get("round", 0))

    def column(field: str) -> Floats:
        # None, which stands for a non-finite number, becomes nan here.
        return np.array([row[field] for row in rounds], np.float64)

    try:
        if rounds:
            check_rounds(str(header["run"]), rounds, rounds[-1]["round"], header["replicas"])
        # A round that was not evaluated has no accuracy either.
        diverged = np.isfinite(column("test_accuracy")) & ~np.isfinite(column("test_loss"))
        last_lost = lost_at_the_end([dict(row) for row in rounds])
        gave_up = last_lost >= PATIENCE or (last_lost > 0 and rounds[-1]["round"] >= header["rounds"])
        diverged[len(rounds) - last_lost * gave_up :] = True
        last = rounds[-1].get("confusion") if rounds else None
        run = Run(
            header=header,
            rounds=column("round"),
            samples=column("samples"),
            seconds=column("seconds"),
            elapsed=column("elapsed"),
            accuracy=np.where(diverged, np.nan, column("test_accuracy")),
            loss=np.where(diverged, np.nan, column("test_loss")),
            macro_f1=np.where(diverged, np.nan, column("test_macro_f1")),
            ece=np.where(diverged, np.nan, column("test_ece")),
            weights=column("weights"),
            alive=np.array([row["alive"] for row in rounds], np.bool_),
            effective=column("effective_replicas"),
            diverged=diverged,
            gave_up=gave_up,
            confusion=None if last is None or diverged[-1] else np.array(last, np.float64),
        )
        _check(run)
    except KeyError as e:
        raise DataError(f"a row of run {header.get('run')!r} lacks the field {e}") from e
    except DataError:
        raise
    except (TypeError, ValueError, AttributeError) as e:
        raise DataError(f"the rows of run {header.get('run')!r} do not fit together: {e}") from e
    return run


def _check(run: Run) -> None:
    # Reads what is read later, so that a missing or odd field is found here, by name.
    _identity(run.header)
    for field in SHOWN:
        run.header[field]
    if not len(run.rounds):
        return
    for metric in METRICS.values():
        metric(run)


def _summary(runs: Sequence[Run], label: str) -> Summary:
    by_arm: dict[str, dict[int, Run]] = {}
    for run in runs:
        seeds = by_arm.setdefault(run.arm, {})
        if run.seed in seeds:
            raise DataError(f"arm {run.arm!r} with seed {run.seed} occurs twice with equal settings; give each once")
        seeds[run.seed] = run
    started = {name: [s[k] for k in sorted(s) if len(s[k].rounds)] for name, s in by_arm.items()}
    started = {name: started[name] for name in sorted(started, key=_arm_order) if started[name]}
    if not started:
        raise DataError("no round is recorded yet; report when at least one round is done")
    names = sorted({name for run in runs for name in _flags(run.header)})
    flags = {name: distinct(_flags(run.header).get(name) for run in runs) for name in names}
    return Summary(
        label=label,
        arms=tuple(_arm(name, own, started.get(REFERENCE, [])) for name, own in started.items()),
        settings={name: values[0] for name, values in flags.items() if len(values) == 1},
        varying={name: values for name, values in flags.items() if len(values) > 1},
        empty=tuple(str(run.header["run"]) for run in runs if not len(run.rounds)),
    )


def _arm_order(name: str) -> tuple[int, str]:
    return ([*KNOWN_ARMS, name].index(name), name)


def _arm(name: str, runs: Sequence[Run], reference: Sequence[Run]) -> Arm:
    if len({run.replicas for run in runs}) > 1:
        raise DataError(f"runs of arm {name!r} differ in their number of replicas; report on them apart")
    base = {run.seed: run for run in reference}
    pairs = [(run, base[run.seed]) for run in runs if run.seed in base]
    compared = METRICS if reference and name != REFERENCE else {}
    return Arm(
        name=name,
        runs=tuple(runs),
        metrics={key: statistic([value(run) for run in runs]) for key, value in METRICS.items()},
        differences={key: statistic([value(a) - value(b) for a, b in pairs]) for key, value in compared.items()},
        pairs=tuple(a.seed for a, _ in pairs),
        weights=_weights(runs) if runs[0].replicas > 1 else None,
    )


def _weights(runs: Sequence[Run]) -> Weights:
    return weights_over(
        np.concatenate([run.weights for run in runs]),
        np.concatenate([run.alive for run in runs]),
        np.concatenate([run.effective for run in runs]),
    )
