"""What compare and tune run by default: which scenarios, at which rates, on how many samples, judged on which split."""

import json
import pathlib
import types

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from binary import invoke

import wavg_jax as wavg
from experiments import compare, reductions, scenarios, scoring_cost, train, tune
from experiments.setup import app, arms, conditions
from experiments.setup.shared_flags import COMPARED
from wavg_jax import data
from wavg_jax.training import progress

RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"


class Planned:
    """Takes the place of `wavg.fit` and trains nothing: keeps what each run was to be."""

    def __init__(self):
        self.runs = []

    def __call__(self, task, sharded, averager, *, local_steps, rounds, batch_size, progress, store, **options):
        steps = getattr(local_steps, "longest", local_steps)
        samples = len(sharded.shards) * steps * batch_size
        run = store._asdict() | options | {"sharded": sharded, "averager": averager, "samples": samples}
        self.runs.append(types.SimpleNamespace(**run))
        row = {"run": store.name, "test_accuracy": 0.5, "train_loss": 1.0}
        for _ in range(rounds):
            progress(store.name)
        return types.SimpleNamespace(rows=[row], stopped=False)

    def of(self, noisy):
        return [run for run in self.runs if len(run.sharded.noisy) == noisy]


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """The runs that a binary would do, and how far the bar came."""
    fit, bar = Planned(), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wavg, "fit", fit)
    monkeypatch.setattr(arms, "critical_path", lambda *_: lambda name: None)
    monkeypatch.setattr(app, "publish", lambda rows, folder: None)
    monkeypatch.setattr(app, "read_rows", lambda folder: [])

    def watched(total, *more, show=progress.bar):
        bar.append(total)
        return show(total, *more)

    monkeypatch.setattr(progress, "bar", watched)
    fit.bar = bar
    return fit


def test_compare_runs_clean_shards_and_half_of_them_noisy_with_the_recommended_weighting(planned, capfd):
    assert invoke(compare.main) == 0
    assert len(planned.runs) == 2 * 5 * 4
    assert planned.bar == [2 * 5 * 4 * 20]
    assert [run.sharded.noisy for run in planned.runs] == [()] * 20 + [(0, 1)] * 20
    assert {run.settings["weighting"] for run in planned.runs} == {"opinion_pool"}
    assert [run.settings["noisy"] for run in planned.runs] == [0] * 20 + [2] * 20  # as a binary of one scenario says it
    names = [run.name for run in planned.runs]
    assert len(set(names)) == len(names)
    said = " ".join(capfd.readouterr().out.split())  # before the first of them, since random labels are no small thing
    assert "weighted (opinion_pool), 5 seeds, with clean shards, then with 2 of 4 shards with random labels" in said
    assert names[:4] == ["sequential-seed0", "sync-seed0", "plain-seed0", "weighted-seed0"]
    assert names[20:22] == ["sequential-noisy2-seed0", "sync-noisy2-seed0"]


def test_the_plan_is_folded_at_words_and_counts_in_plain_words(planned, capfd):
    assert invoke(compare.main) == 0
    said = capfd.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert "(set by --noisy)" in " ".join(said.split())
    assert invoke(compare.main, "--replicas=1", "--batch_size=8", "--seeds=0", "--noisy=0", "--byzantine=0") == 0
    assert "digits, 1 replica: " in (said := " ".join(capfd.readouterr().out.split()))
    assert ", 1 seed, " in said


def test_all_arms_of_a_scenario_see_the_same_number_of_samples_in_a_round(planned):
    assert invoke(compare.main, "--replicas=3", "--local_steps=5", "--batch_size=7", "--seeds=4", "--noisy=1") == 0
    assert [run.name for run in planned.runs] == [f"{arm}-seed4" for arm in COMPARED]
    assert [run.samples for run in planned.runs] == [3 * 5 * 7] * 4
    pooled = [len(run.sharded.shards) for run in planned.runs]
    assert pooled == [1, 1, 3, 3]
    everything = [np.sort(np.concatenate(run.sharded.shards)) for run in planned.runs]
    assert all(np.array_equal(own, everything[0]) for own in everything)


def test_an_arm_has_a_rate_for_each_scenario_and_where_they_agree_one_optimizer(planned):
    assert invoke(compare.main, "--noisy=3,0,1", "--lr_sync=0.3,0.2,0.1", "--lr_plain=0.7", "--seeds=0") == 0
    for noisy, sequential, sync in ((3, 0.025, 0.3), (0, 0.4, 0.2), (1, 0.025, 0.1)):
        for run in planned.of(noisy):
            rates = [run.settings[f"lr_{arm}"] for arm in COMPARED]
            assert rates == [sequential, sync, 0.7, 0.4]
    made = {(run.facts["arm"], run.inner, run.averager) for run in planned.runs}  # where equal, programs are shared
    assert [sum(name == arm for name, *_ in made) for arm in COMPARED] == [2, 3, 1, 1]
    assert len({(run.facts["arm"], tuple(map(len, run.sharded.shards))) for run in planned.runs}) == 4


def test_the_first_scenario_has_the_names_that_it_has_alone(planned):
    assert invoke(compare.main, "--noisy=2", "--arms=plain", "--seeds=0") == 0
    assert invoke(compare.main, "--noisy=2,0", "--arms=plain", "--seeds=0") == 0
    assert [run.name for run in planned.runs] == ["plain-seed0", "plain-seed0", "plain-noisy0-seed0"]


def test_tune_judges_on_the_held_out_split_in_every_scenario_on_seeds_of_its_own(planned):
    assert invoke(tune.main, "--tune=plain,sync", "--rates=0.1,0.4", "--tuning_seeds=1007,1008") == 0
    assert len(planned.runs) == planned.bar[0] / 20 == 2 * 2 * 2 * 2
    assert len(planned.of(0)) == len(planned.of(2)) == 8
    test = data.digits().test
    for run in planned.runs:
        assert run.seed in (1007, 1008)
        assert run.workdir is None
        assert len(run.sharded.test.y) == 200 != len(test.y)
        np.testing.assert_array_equal(run.sharded.test.x, run.sharded.heldout.x)
        np.testing.assert_array_equal(run.sharded.test.y, run.sharded.heldout.y)
        trained = {image.tobytes() for image in run.sharded.train.x[np.concatenate(run.sharded.shards)]}
        assert not trained & {image.tobytes() for image in run.sharded.test.x}


def test_tune_prints_the_best_rates_of_every_scenario_as_one_flag(planned, capfd, monkeypatch):
    def fit(task, sharded, averager, *, store, **options):
        best = 0.1 if sharded.noisy else 0.2
        return types.SimpleNamespace(rows=[{"test_accuracy": 1 - abs(store.settings["lr_plain"] - best)}])

    monkeypatch.setattr(wavg, "fit", fit)
    assert invoke(tune.main, "--tune=plain", "--rates=0.05,0.1,0.2,0.4", "--tuning_seeds=7") == 0
    said = capfd.readouterr().out
    assert "--lr_plain=0.2,0.1\n" in said
    assert "nan" not in said  # one seed has no spread
    assert "2 of 4 shards with random labels" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80


BAD = [
    (compare, ["--noisy=0,5"], "from 0 to 4"),
    (compare, ["--noisy=2,2"], "each once"),
    (compare, ["--noisy=some"], "--noisy=some"),
    (compare, ["--lr_plain=0.1,0.2,0.3"], "each of the 2 scenarios"),
    (compare, ["--lr_plain=0.1,inf"], "--lr_plain=0.1,inf"),
    (compare, ["--lr_plain=0.1,0.2", "--noisy=0"], "give one rate for the one scenario"),
    (compare, ["--noisy=1.5"], "non-negative whole numbers"),
    (train, ["--noisy=0,2"], "give one number"),
    (train, ["--lr_sync=0.1,0.2"], "--lr_sync=0.1,0.2"),
    (reductions, ["--noisy=0,2"], "give one number"),
    (scoring_cost, ["--noisy=0,2"], "give one number"),
    (tune, ["--noisy=-1"], "--noisy=-1"),
]


@pytest.mark.parametrize(("binary", "arguments", "says"), BAD, ids=[" ".join(case[1]) for case in BAD])
def test_bad_scenarios_are_one_clear_line_and_exit_code_2(binary, arguments, says, planned, capfd):
    assert invoke(binary.main, *arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not planned.runs


def test_where_there_is_one_scenario_shards_are_clean_by_default(planned):
    assert invoke(train.main) == 0
    (run,) = planned.runs
    assert (run.name, run.sharded.noisy, run.settings["noisy"]) == ("weighted-seed0", (), 0)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_few_replicas_leave_scenarios_that_differ(replicas):
    with flagsaver.flagsaver():
        app.parse(["binary", f"--replicas={replicas}"])
        assert [condition.noisy for condition in conditions.read_conditions()] == sorted({0, replicas // 2})


MADE_BY = {
    "cifar10": train,
    "digits": compare,
    "language": compare,
    "fashion": compare,
    "guard": compare,
    "smoke": train,
    "reductions": reductions,
    "scenarios": scenarios,
    "scoring": scoring_cost,
}
"""First word of a folder of results -> its binary."""
GONE = {"outer_lr", "outer_momentum", "chance"}
"""Flags whose values have no effect here and were numbers once, or are known with the data."""


@pytest.mark.parametrize("folder", [path.parent for path in sorted(RESULTS.glob("*/run.flags"))], ids=lambda p: p.name)
def test_the_flags_of_a_recorded_result_still_mean_what_was_recorded(folder):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    every = [row["settings"] for row in map(json.loads, lines) if "settings" in row]
    with flagsaver.flagsaver():
        app.parse(["binary", f"--flagfile={folder / 'run.flags'}"])
        compared = MADE_BY[folder.name.split("_")[0]] is compare
        meant = conditions.read_conditions() if compared else (conditions.read_condition(),)
        known = every[0].keys() & set(flags.FLAGS) - GONE
        now = [conditions.settings_of(known, condition) for condition in meant]
    recorded = [{name: settings[name] for name in now[0]} for settings in every]
    assert all(settings in now for settings in recorded)
    assert all(settings in recorded for settings in now)


@pytest.mark.parametrize(
    "arguments", [["--workdir=file/run"], ["--seeds=4294967296"], ["--seeds=1,1"], ["--heldout=0"]], ids=" ".join
)
def test_compare_finds_what_cannot_work_before_it_times_anything(arguments, planned, capfd, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(arms, "critical_path", lambda *_: pytest.fail("timed"))
    assert invoke(compare.main, *arguments) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
