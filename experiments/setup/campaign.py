"""Tunes and trains the arms of the evidence, cell by cell, and records them."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

import wavg_jax as wavg
from experiments.setup.choices import SCALES
from experiments.setup.climb import START, Setting, climb
from experiments.setup.evidence_arms import Arm
from experiments.setup.problem import augmentation, classes_of
from experiments.setup.readings import FINETUNING_RATES, READINGS, Reader, split_off
from experiments.setup.scenario import SOUND, Scenario, deal
from experiments.setup.trial import Trained, train
from wavg_jax import data
from wavg_jax.base import SettingsError, Stopped, Task
from wavg_jax.data.arrays import Split
from wavg_jax.reporting.statistic import as_float
from wavg_jax.storage.rows import Records
from wavg_jax.storage.schema import Row, cell_row
from wavg_jax.training import interrupt, progress

F = flags.FLAGS
_TIE = 1e-5
"""What a nat of loss counts in tuning beside accuracy, which small splits measure so coarsely that settings tie."""


class Tuned(NamedTuple):
    """What tuning settled for an arm in a scenario.

    Attributes:
      setting: rate and weight decay.
      accuracy: on the tuning split, mean over the tuning seeds.
      finetuning: rate of fine-tuning on the held-out samples; 0 where that is not read.
    """

    setting: Setting
    accuracy: float
    finetuning: float


class Campaign:
    """The data set, the network and the scenarios, and what is known of them so far."""

    def __init__(
        self, dataset: data.Dataset, task: Task, scenarios: Mapping[str, Scenario], tuning_seeds: Sequence[int]
    ):
        self._dataset, self._task, self._scenarios, self._tuning_seeds = dataset, task, scenarios, tuning_seeds
        self._tuned: dict[tuple[str, str], Tuned] = {}
        self._deal = functools.lru_cache(maxsize=4)(self._dealt)
        self._reader = Reader(task, data.make_prepare(dataset, SCALES[F.scale]))

    def check_tuning(self, arms: Sequence[Arm]) -> None:
        """Raises SettingsError if an arm lacks the reading that tunes it."""
        for arm in arms:
            has = [reading for reading in READINGS if self._reader.has(reading, several=not arm.pooled)]
            if F.tuned_by and F.tuned_by not in has:
                raise SettingsError(
                    f"--tuned_by={F.tuned_by}: {arm.name} has no such reading, but {', '.join(has)}; tune by one of "
                    "these, or leave the arm out (--evidence_arms)"
                )

    def fill(
        self, records: Records, scenarios: Mapping[str, Scenario], arms: Sequence[Arm], seeds: Sequence[int]
    ) -> None:
        """Records a row for every scenario, arm, seed and reading that is not recorded yet.

        Raises:
          Stopped: SIGTERM or Ctrl-C came; the current training was finished and recorded.
        """
        done = {row["run"] for row in records.rows if row["kind"] == "cell"}
        todo = [
            (name, arm, seed)
            for name in scenarios
            for arm in arms
            for seed in seeds
            if not {f"{name}/{label}/{seed}" for label in self._labels(arm)} <= done
        ]
        kept: dict[tuple[str, str, int], list[Row]] = {}
        total = len(scenarios) * len(arms) * len(seeds)
        with progress.bar(total, total - len(todo)) as advance, interrupt.stop_requests() as stopped:
            for scenario, arm, seed in todo:
                if stopped():
                    raise Stopped(
                        f"stopped before {scenario}/{arm.name}; continue with the same --workdir and --resume"
                    )
                where, who = self._same(scenario, arm)
                if (where, who.name, seed) not in kept:
                    tuned = self._settle(*self._same(F.tuned_in or where, who), records)
                    kept[where, who.name, seed] = self._rows(where, who, seed, tuned)
                for row in kept[where, who.name, seed][: None if self._controlled(arm) else 1]:
                    row = _renamed(row, scenario, arm.name, who.name)
                    if row["run"] not in done:
                        records.append(row)
                advance(f"{scenario}/{arm.name}/{seed}")

    def _same(self, scenario: str, arm: Arm) -> tuple[str, Arm]:
        """The scenario and arm that a cell repeats: on samples that nothing spoils, partitions and faults of replicas
        do not matter to one network, nor to an oracle, which is then the arm itself."""
        if self._scenarios[scenario].bad or not (arm.pooled or arm.good):
            return scenario, arm
        name = "plain" if arm.name == "oracle" else arm.name.removeprefix("oracle_")
        return SOUND, arm._replace(name=name, good=False)

    def _dealt(self, scenario: str, seed: int) -> tuple[data.ShardedData, Split]:
        """The data of a scenario, and the samples to tune on."""
        one = self._scenarios[scenario]
        heldout = one.heldout or F.heldout
        augment = augmentation()
        sharded = deal(
            one, self._dataset, heldout=heldout + F.tuning_samples, seed=seed, augment=augment, scale=SCALES[F.scale]
        )
        sharded, tuning = split_off(sharded, heldout)
        if one.misjudged:
            rng = np.random.default_rng([seed, 5])
            sharded = sharded._replace(heldout=one.misjudged(sharded.heldout, classes_of(self._dataset), rng))
        return sharded, tuning

    def _train(self, scenario: str, arm: Arm, seed: int, setting: Setting) -> Trained:
        one, (sharded, _) = self._scenarios[scenario], self._deal(scenario, seed)
        replica_map = "map" if F.replica_map == "auto" else F.replica_map
        samples = F.score_samples and min(F.score_samples, len(sharded.heldout.y))
        return train(
            self._task,
            arm.samples(sharded, one, seed),
            arm.averager,
            arm.budget(),
            setting,
            seed=seed,
            scoring=wavg.Scoring(samples=samples, every=F.score_every),
            layout=wavg.Layout(1 if arm.pooled else F.devices, replica_map),
            faults=None if arm.pooled or arm.good else one.faults,
        )

    def _settle(self, scenario: str, arm: Arm, records: Records) -> Tuned:
        """The best setting of an arm in a scenario: the recorded one, or what climbing finds, which is recorded."""
        if (scenario, arm.name) in self._tuned:
            return self._tuned[scenario, arm.name]
        run, trained = f"{scenario}/{arm.name}", dict[tuple[Setting, int], Trained]()
        known = next((row for row in records.rows if row["kind"] == "tuned" and row["run"] == run), None)
        if known is None:
            best, accuracy = self._climbed(scenario, arm, records, trained)
            records.append({"kind": "tuned", "run": run, **best._asdict(), "accuracy": accuracy})
        else:
            best, accuracy = Setting(known["rate"], known["decay"]), known["accuracy"]
        reads = self._controlled(arm) and "finetuned" in F.readings
        finetuning = self._finetuning(scenario, arm, best, trained) if reads else 0.0
        self._tuned[scenario, arm.name] = Tuned(best, accuracy, finetuning)
        return self._tuned[scenario, arm.name]

    def _climbed(
        self, scenario: str, arm: Arm, records: Records, trained: dict[tuple[Setting, int], Trained]
    ) -> tuple[Setting, float]:
        """Climbs to the best setting, and says how accurate it is; settings tried before are read from the records.

        `trained` gets the trainings.
        """
        run = f"{scenario}/{arm.name}"
        tried = {
            (row["rate"], row["decay"], row["seed"]): (as_float(row["accuracy"]), as_float(row["loss"]))
            for row in records.rows
            if row["kind"] == "tuning" and row["run"] == run
        }

        def of(seed: int, setting: Setting) -> tuple[float, float]:
            key = (*setting, seed)
            if key not in tried:
                done = self._train(scenario, arm, seed, setting)
                lost = math.nan, math.nan
                found = lost if done.diverged else self._on_tuning(scenario, seed, done, F.tuned_by, 0.0)
                # Of a run that may be fine-tuned, no more than that needs: paths over thousands of rounds are large.
                trained[setting, seed] = done._replace(path=done.path[-1:])
                tried[key] = accuracy, loss = round(found[0], 6), round(found[1], 6)
                row = {"seed": seed, "accuracy": accuracy, "loss": loss}
                records.append({"kind": "tuning", "run": run, **setting._asdict(), **row})
            return tried[key]

        def means(setting: Setting) -> tuple[float, float]:
            accuracy, loss = np.mean([of(seed, setting) for seed in self._tuning_seeds], axis=0)
            return float(accuracy), float(loss)

        def value(setting: Setting) -> float:
            accuracy, loss = means(setting)
            return accuracy - _TIE * loss

        best = climb(value, _start(records, arm.name))
        return best, round(means(best)[0], 6)

    def _finetuning(
        self, scenario: str, arm: Arm, best: Setting, trained: Mapping[tuple[Setting, int], Trained]
    ) -> float:
        """The rate of fine-tuning that the tuning split likes best."""
        runs = {
            seed: trained.get((best, seed)) or self._train(scenario, arm, seed, best) for seed in self._tuning_seeds
        }
        means = [
            np.mean([self._on_tuning(scenario, seed, run, "finetuned", rate)[0] for seed, run in runs.items()])
            for rate in FINETUNING_RATES
        ]
        return FINETUNING_RATES[int(np.argmax(means))]

    def _on_tuning(
        self, scenario: str, seed: int, trained: Trained, reading: str, finetuning: float
    ) -> tuple[float, float]:
        """Accuracy and loss of a reading on the tuning split."""
        sharded, tuning = self._deal(scenario, seed)
        found = self._reader.read(trained, sharded.heldout, tuning.x, [reading], seed=seed, finetuning=finetuning)
        quality = self._reader.quality(found[reading], tuning.y)
        return quality["test_accuracy"], quality["test_loss"]

    def _controlled(self, arm: Arm) -> bool:
        return arm.name in F.controlled

    def _labels(self, arm: Arm) -> list[str]:
        """The names of an arm's rows in a cell: its own, and those of its readings."""
        return [f"{arm.name}+{reading}" if reading else arm.name for reading in self._wanted(arm)]

    def _wanted(self, arm: Arm) -> list[str]:
        """The readings of an arm, the first of which is the training itself."""
        asked = F.readings if self._controlled(arm) else ()
        return ["", *(reading for reading in asked if self._reader.has(reading, several=not arm.pooled))]

    def _rows(self, scenario: str, arm: Arm, seed: int, tuned: Tuned) -> list[Row]:
        """Trains a cell, and judges it and its readings on the test split, once."""
        sharded, _ = self._deal(scenario, seed)
        trained = self._train(scenario, arm, seed, tuned.setting)
        wanted = self._wanted(arm)
        test, aim = sharded.test, self._scenarios[scenario].wanted
        aimed = Split(test.x[:0], test.y[:0]) if aim is None else aim(test)
        x = np.concatenate([test.x, aimed.x])
        found = self._reader.read(trained, sharded.heldout, x, wanted, seed=seed, finetuning=tuned.finetuning)
        rows = []
        for reading, logits in found.items():
            name = f"{arm.name}+{reading}" if reading else arm.name
            last = trained.rows[-1] | self._reader.quality(logits[: len(test.y)], test.y)
            row = cell_row(
                run=f"{scenario}/{name}/{seed}",
                scenario=scenario,
                weighting=name,
                seed=seed,
                rate=tuned.setting.rate,
                rows=[*trained.rows[:-1], last],
            )
            row |= {"decay": tuned.setting.decay, "tuned_accuracy": tuned.accuracy}
            hits = logits[len(test.y) :].argmax(axis=1) == aimed.y
            rows.append(row if aim is None else row | {"attack_success": round(float(hits.mean()), 6)})
        rows[0]["heldout_accuracy"] = trained.right.round(5)
        return rows


def _start(records: Records, arm: str) -> Setting:
    """Where to start climbing: at what was best for the arm in the scenario before."""
    cells = (row for row in reversed(records.rows) if row["kind"] == "cell" and row["weighting"] == arm)
    row = next(cells, None)
    return START if row is None else Setting(row["rate"], row["decay"])


def _renamed(row: Row, scenario: str, arm: str, was: str) -> Row:
    """The row of a training under the name of a cell that repeats it."""
    name = arm + row["weighting"].removeprefix(was)
    return row | {"run": f"{scenario}/{name}/{row['seed']}", "scenario": scenario, "weighting": name}
