"""Runs -> statistics over seeds, scenario by scenario: what a report says, as numbers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from wavg_jax.base import DataError
from wavg_jax.reporting.measures import Measure, in_order, judged_by
from wavg_jax.reporting.runs import IDENTITY, RecordedRun, read_runs
from wavg_jax.reporting.shares import Shares
from wavg_jax.reporting.statistic import Statistic, as_float
from wavg_jax.reporting.trust import Trust
from wavg_jax.reporting.wording import distinct, in_words
from wavg_jax.storage.schema import Row

RATE = "lr_"
"""Prefix of a setting that holds the inner learning rate of the arm named after it."""
UNIFORM = "uniform"
"""What a run row says in `weighting` if its replicas are blended with equal weights."""
OWN = frozenset({"arm", "seed"})
"""Settings that may differ within a scenario."""


class ArmSummary(NamedTuple):
    """All seeds of one arm.

    Attributes:
      runs: by seed.
      metrics: final quality and costs over the seeds, see `RecordedRun.metrics`.
      differences: this arm minus the reference, paired by seed; empty for the reference itself, or without one.
      pairs: this arm's and the reference's run of every seed that both have.
      shares: how the replicas were weighted; None for an arm of one replica.
      trust: whom scores and weights trusted; None if no logits were kept.
    """

    name: str
    runs: tuple[RecordedRun, ...]
    metrics: Mapping[str, Statistic]
    differences: Mapping[str, Statistic]
    pairs: tuple[tuple[RecordedRun, RecordedRun], ...]
    shares: Shares | None
    trust: Trust | None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def weighted(self) -> bool:
        """Whether its replicas may have weights that differ."""
        return self.shares is not None and self.runs[0].header.get("weighting") != "uniform"

    @property
    def same_hardware(self) -> bool:
        """Whether this arm and the reference ran on the same hardware, so that computed times can be compared."""
        return _agree(self.pairs, "hardware")

    @property
    def same_devices(self) -> bool:
        """Whether they also ran on as many devices, so that measured times can be compared."""
        return self.same_hardware and _agree(self.pairs, "devices")


def _agree(pairs: Sequence[tuple[RecordedRun, RecordedRun]], field: str) -> bool:
    return len(distinct(run.header.get(field) for pair in pairs for run in pair)) <= 1


class Summary(NamedTuple):
    """One scenario: arms that were trained under the same settings.

    Attributes:
      label: what sets this scenario apart from others, besides data set and noisy shards; "" if nothing does.
      arms: in order of appearance.
      reference: name of the arm that others are compared with; "" if there is none.
      measures: metrics of the test split that all runs have.
      settings: settings that all runs share, by name.
      varying: settings that differ between runs, with their values.
      empty: names of runs without a recorded round, which are left out.
    """

    label: str
    arms: tuple[ArmSummary, ...]
    reference: str
    measures: tuple[Measure, ...]
    settings: Mapping[str, Any]
    varying: Mapping[str, tuple[Any, ...]]
    empty: tuple[str, ...]

    @property
    def runs(self) -> tuple[RecordedRun, ...]:
        return tuple(run for arm in self.arms for run in arm.runs)

    @property
    def header(self) -> Row:
        """The run row of an arm with the most replicas: what all arms share, and K."""
        return max(self.runs, key=lambda run: run.replicas).header

    @property
    def measure(self) -> Measure:
        """What the arms are judged by."""
        return judged_by([measure.metric for measure in self.measures])

    @property
    def target(self) -> float:
        """The target accuracy, a fraction; nan if none was set or accuracy was not measured."""
        return as_float(self.header["target_accuracy"] if self.measure.metric == "accuracy" else None)

    @property
    def scenario(self) -> str:
        """What sets its shards apart from equal, clean ones, in a few words."""
        noisy, k, partition = self.header["noisy_shards"], self.header["replicas"], self.settings.get("partition")
        kind = "shards" if partition in (None, "iid") else f"{partition} shards"
        if not noisy:
            return f"clean {kind}"
        noise = self.header.get("noise", "random labels")
        return f"{len(noisy)} of {k} {kind} with {noise}" if k > 1 else f"{len(noisy)} {kind} with {noise}"

    @property
    def focus(self) -> ArmSummary:
        """The arm that is drawn in detail: the first with weights that differ, of those with the most replicas; without
        one the last, but the reference only for want of another."""
        most = max(arm.runs[0].replicas for arm in self.arms)
        several = [arm for arm in self.arms if arm.runs[0].replicas == most and arm.name != self.reference]
        weighted = [arm for arm in several if arm.weighted]
        return weighted[0] if weighted else several[-1] if several else self.arms[0]

    @property
    def comparable(self) -> bool:
        """Whether its focus has several replicas and can be compared with the reference."""
        return bool(self.focus.differences) and self.focus.shares is not None


def scenario_names(summaries: Sequence[Summary]) -> tuple[str, ...]:
    """What tells the scenarios of one report apart: their shards, then the data set, then their labels."""
    found = [one.scenario for one in summaries]
    if len(distinct(one.header["dataset"] for one in summaries)) > 1:
        found = [f"{one.header['dataset']}, {name}" for one, name in zip(summaries, found, strict=True)]
    twice = {name for name in found if found.count(name) > 1}
    return tuple(f"{name} ({one.label})" if name in twice else name for one, name in zip(summaries, found, strict=True))


def summarise_scenarios(rows: Sequence[Row], reference: str | None = None) -> tuple[Summary, ...]:
    """One summary for each set of settings, in order of appearance, so that none are mixed.

    Runs belong together if data set, noisy shards, target and all settings but `OWN` agree.

    Args:
      rows: run and round rows in the order of recording; of several folders, one folder after the other.
      reference: the arm that others are compared with; by default the first arm of several replicas whose run rows
        say `weighting: "uniform"`.

    Raises:
      DataError: a row lacks a field, no round is recorded, or an arm and seed occur twice.
    """
    groups: dict[str, list[RecordedRun]] = {}
    identities: list[dict[str, Any]] = []
    for run in read_runs(rows):
        identity = _settings(run.header) | {name: run.header[name] for name in IDENTITY}
        key = json.dumps(identity, sort_keys=True, default=str)
        if key not in groups:
            identities.append(identity)
        groups.setdefault(key, []).append(run)
    return tuple(
        _summary(runs, _label(identity, identities), reference)
        for identity, runs in zip(identities, groups.values(), strict=True)
    )


def _settings(header: Row) -> dict[str, Any]:
    return {name: value for name, value in header["settings"].items() if name not in OWN}


def _label(identity: Row, identities: Sequence[Row]) -> str:
    names = sorted({name for other in identities for name in other})
    names = [name for name in names if len(distinct(other.get(name) for other in identities)) > 1]
    rates = [f"{name.removeprefix(RATE)} {in_words(identity.get(name))}" for name in names if name.startswith(RATE)]
    # Data set and shards are told without a label.
    named = [name for name in names if name not in ("dataset", "noisy_shards", "noisy") and not name.startswith(RATE)]
    parts = [f"{name} = {in_words(identity.get(name))}" for name in named]
    parts += [f"learning rates: {', '.join(rates)}"] * bool(rates)
    return "; ".join(parts[:4] + [f"and {len(parts) - 4} more settings"] * (len(parts) > 4))


def _summary(runs: Sequence[RecordedRun], label: str, reference: str | None) -> Summary:
    by_arm: dict[str, dict[int, RecordedRun]] = {}
    for run in runs:
        seeds = by_arm.setdefault(run.arm, {})
        if run.seed in seeds:
            raise DataError(f"arm {run.arm!r} with seed {run.seed} occurs twice with equal settings; give each once")
        seeds[run.seed] = run
    started = {name: [own[seed] for seed in sorted(own) if len(own[seed].rounds)] for name, own in by_arm.items()}
    started = {name: own for name, own in started.items() if own}
    if not started:
        raise DataError("no round is recorded yet; report when at least one round is done")
    base = _reference(started) if reference is None else reference if reference in started else ""
    every = [run for own in started.values() for run in own]
    metrics = [metric for metric in every[0].quality if all(metric in run.quality for run in every)]
    names = sorted({name for run in runs for name in _settings(run.header)})
    settings = {name: distinct(_settings(run.header).get(name) for run in runs) for name in names}
    return Summary(
        label=label,
        arms=tuple(_arm(name, own, [] if name == base else started.get(base, [])) for name, own in started.items()),
        reference=base,
        measures=in_order(metrics),
        settings={name: values[0] for name, values in settings.items() if len(values) == 1},
        varying={name: values for name, values in settings.items() if len(values) > 1},
        empty=tuple(str(run.header["run"]) for run in runs if not len(run.rounds)),
    )


def _reference(arms: Mapping[str, Sequence[RecordedRun]]) -> str:
    return next(
        (name for name, (run, *_) in arms.items() if run.replicas > 1 and run.header.get("weighting") == UNIFORM), ""
    )


def _arm(name: str, runs: Sequence[RecordedRun], reference: Sequence[RecordedRun]) -> ArmSummary:
    if len({run.replicas for run in runs}) > 1:
        raise DataError(f"runs of arm {name!r} differ in their number of replicas; report on them apart")
    base = {run.seed: run for run in reference}
    pairs = tuple((run, base[run.seed]) for run in runs if run.seed in base)
    found = {run.seed: run.metrics() for run in runs}
    keys = set.intersection(*map(set, found.values()))
    other = {run.seed: run.metrics() for run in reference}
    compared = keys.intersection(*other.values()) if reference else set()
    return ArmSummary(
        name=name,
        runs=tuple(runs),
        metrics={key: Statistic.of([own[key] for own in found.values()]) for key in keys},
        differences={
            key: Statistic.of([found[a.seed][key] - other[a.seed][key] for a, _ in pairs]) for key in compared
        },
        pairs=pairs,
        shares=_shares(runs) if runs[0].replicas > 1 else None,
        trust=Trust.over(runs) if runs[0].replicas > 1 else None,
    )


def _shares(runs: Sequence[RecordedRun]) -> Shares:
    return Shares.over(
        np.concatenate([run.weights for run in runs]),
        np.concatenate([run.alive for run in runs]),
        np.concatenate([run.effective for run in runs]),
    )
