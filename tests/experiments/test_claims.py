"""The numbers in README, BUILD_NOTES and the page of results about the comparison come from the recorded rows."""

import collections
import json
import pathlib

import numpy as np
import pytest
import scipy.stats

ROOT = pathlib.Path(__file__).parents[2]
RECORDED = ROOT / "experiments" / "results"
README, NOTES, RESULTS = (
    " ".join((ROOT / name).read_text().replace("\N{MINUS SIGN}", "-").split())
    for name in ("README.md", "BUILD_NOTES.md", "experiments/results/README.md")
)


def rows(folder):
    return [json.loads(line) for line in (RECORDED / folder / "rows.jsonl").read_text().splitlines()]


def interval(values):
    """Mean and both ends of the 95 % interval of paired differences."""
    values = np.asarray(values, np.float64)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


def p_value(values):
    """Of paired differences, that their mean is 0."""
    return float(scipy.stats.ttest_1samp(values, 0).pvalue)


def finals(folder, metric="test_accuracy"):
    """Arm -> % after the last round, by seed."""
    found = collections.defaultdict(dict)
    for row in rows(folder):
        if row["kind"] == "round":
            found[row["arm"]][row["seed"]] = 100 * row[metric]
    return {arm: np.array([own[seed] for seed in sorted(own)]) for arm, own in found.items()}


ARMS = ("sequential", "sync", "plain", "weighted")
TABLE = [
    ("IID", "test_accuracy", "fashion_iid", None),
    ("2 of 8 with random labels", "test_accuracy", "fashion_noisy2", "fashion_noisy2_softmax"),
    ("4 of 8 with random labels", "test_accuracy", "fashion_noisy4", "fashion_noisy4_softmax"),
    ("expected calibration error, 4 of 8", "test_ece", "fashion_noisy4", "fashion_noisy4_softmax"),
]


@pytest.mark.parametrize(("label", "metric", "folder", "softmax"), TABLE, ids=[row[0] for row in TABLE])
def test_the_table_of_what_to_expect_is_what_was_recorded(label, metric, folder, softmax):
    found = finals(folder, metric)
    values = [found[arm] for arm in ARMS] + ([finals(softmax, metric)["weighted"]] if softmax else [])
    said = " | ".join(f"{value.mean() + 1e-9:.1f} ± {value.std(ddof=1):.1f}" for value in values)
    assert f"| {label} | {said} |" in RESULTS


def test_what_is_said_of_the_guard_is_what_was_recorded():
    found = [finals(folder)["plain"] for folder in ("guard_off", "guard_on")]
    said = " | ".join(f"{value.mean():.1f} ± {value.std(ddof=1):.1f}" for value in found)
    assert f"| accuracy | {said} |" in RESULTS
    assert found[0].max() < found[1].min()
    counts = collections.Counter(row["seed"] for row in rows("guard_on") if row.get("guard", {}).get("rolled_back"))
    words = {1: "one", 2: "two", 3: "three", 4: "four"}
    assert f"`--guard=2` {words[min(counts.values())]} or {words[max(counts.values())]} rounds of each" in RESULTS
    assert len(counts) == 5


@pytest.mark.parametrize("noisy", [0, 2])
def test_the_table_of_the_first_command_is_what_was_recorded(noisy):
    recorded = rows("digits")
    of = {row["run"]: row["settings"]["noisy"] for row in recorded if row["kind"] == "run"}
    last = {row["run"]: row for row in recorded if row["kind"] == "round" and of[row["run"]] == noisy}
    for metric in ("test_accuracy", "test_ece"):
        found = {arm: np.array([100 * row[metric] for row in last.values() if row["arm"] == arm]) for arm in ARMS}
        cells = " | ".join(f"{value.mean():.1f} ± {value.std(ddof=1):.1f}" for value in found.values())
        mean, low, high = interval(found["weighted"] - found["plain"])
        shown = "" if low > 0 or high < 0 else ": not shown"
        name = "accuracy" if metric == "test_accuracy" else "calibration error"
        assert f"| {name} | {cells} | {mean:+.1f} ({low:+.1f} to {high:+.1f}){shown} |" in RESULTS
        assert [row["seed"] for row in last.values() if row["arm"] == "plain"] == [0, 1, 2, 3, 4]


def test_the_short_run_of_cifar10_is_what_was_recorded():
    recorded = [row for row in rows("cifar10_94_short") if row["kind"] == "round"]
    heads = [row for row in rows("cifar10_94_short") if row["kind"] == "run"]
    assert {row["train_samples"] for row in heads} == {49_000}
    assert {round(row["samples_per_round"] * 4 / 49_000, 1) for row in heads} == {1.3}
    assert {row["parameters"] for row in heads} == {126_520}
    assert "126,520 parameters" in RESULTS
    for number in range(1, 5):
        cells = " | ".join(
            f"{100 * row['test_accuracy']:.1f}"
            for arm in ARMS
            for row in recorded
            if (row["arm"], row["round"]) == (arm, number)
        )
        assert f"| {number} | {cells} |" in RESULTS


def test_what_is_said_of_kills_is_what_was_recorded():
    record = json.loads((RECORDED / "torture" / "torture.json").read_text())
    kills = f"{record['survived']:,} of {record['tried']:,}"
    reliability = " ".join((ROOT / "docs" / "reliability.md").read_text().split())
    assert not record["lost"]
    assert f"[{kills}](../experiments/results/torture/torture.md) kills survived" in reliability
    assert f"[{kills} kills](torture/torture.md) survived | {record['seconds'] / 60:.0f} min |" in RESULTS
    assert f"[{kills} kills](experiments/results/torture/torture.md)" in README


def test_what_is_said_of_memory_is_what_was_recorded():
    cases = {row["case"]: row for row in rows("benchmarks_avx512/footprint") if row["kind"] == "case"}
    late = cases.pop("no_checkpoints_between")["ratio"]
    ratios = [row["ratio"] for row in cases.values()]
    assert len(ratios) == 11
    assert f"{min(ratios):.2f} to {max(ratios):.2f} / {late:.2f} |" in RESULTS
    assert f"**Memory is foretold** within {100 * max(abs(x - 1) for x in ratios):.0f} %" in RESULTS
    assert max(abs(x - 1) for x in ratios) < 0.15


def test_what_is_said_of_mutants_is_what_was_recorded():
    record = json.loads((RECORDED / "mutants" / "mutants.json").read_text())
    first, since = record["at_first"], record["since"]
    share = f"{100 * first['killed'] / first['of']:.1f} %"
    reliability = " ".join((ROOT / "docs" / "reliability.md").read_text().split())
    assert f"Of {first['of']} small changes" in reliability
    assert f"the tests found [{first['killed']} ({share})](../experiments/results/mutants/mutants.md)" in reliability
    assert f"({100 * first['low']:.1f} to {100 * first['high']:.1f} %)" in reliability
    assert f"and {since['killed']} with those written or named since" in reliability
    assert f"[{first['killed']} of {first['of']}](mutants/mutants.md)" in RESULTS
    assert f"{len(record['mutants'])} changes in {record['seconds'] / 60:.0f} min" in NOTES


LANGUAGE = ("sequential", "sync", "plain", "weighted", "diloco", "weighted_diloco")


def bits_per_byte(noisy):
    """Arm of the language model -> bits per byte of the test split after the last round, by seed."""
    recorded = rows("language")
    of = {row["run"]: row["settings"]["noisy"] for row in recorded if row["kind"] == "run"}
    last = {row["run"]: row for row in recorded if row["kind"] == "round" and of[row["run"]] == noisy}
    found = {
        arm: {row["seed"]: row["test_bits_per_byte"] for row in last.values() if row["arm"] == arm} for arm in LANGUAGE
    }
    assert all(sorted(own) == [0, 1, 2] for own in found.values())
    return {arm: np.array([own[seed] for seed in (0, 1, 2)]) for arm, own in found.items()}


@pytest.mark.parametrize(("noisy", "label"), [(0, "clean"), (2, "2 of 8 with shuffled bytes")])
def test_the_table_of_a_language_model_is_what_was_recorded(noisy, label):
    found = bits_per_byte(noisy)
    cells = " | ".join(f"{found[arm].mean():.2f} ± {found[arm].std(ddof=1):.2f}" for arm in LANGUAGE)
    assert f"| {label} | {cells} |" in RESULTS


def test_what_is_said_of_language_models_was_recorded():
    clean, bad = bits_per_byte(0), bits_per_byte(2)
    mean, low, high = interval(clean["plain"] - clean["sync"])
    assert f"plain averaging ends {mean:.2f} bits per byte ({low:.2f} to {high:.2f}) above sync" in RESULTS
    assert f"ends {mean:.2f} bits per byte above synchronous training" in README
    mean, low, high = interval(bad["plain"] - bad["weighted"])
    share = (bad["plain"] - bad["weighted"]).mean() / (bad["plain"] - clean["plain"]).mean()
    assert f"weights take {mean:.2f} ({low:.2f} to {high:.2f}) off plain averaging's, {100 * share:.0f} % of" in RESULTS
    mean, low, high = interval(clean["weighted"] - clean["plain"])
    assert f"they cost {mean:.2f} ({low:+.2f} to {high:+.2f}) on clean shards" in RESULTS


def test_the_table_of_what_scoring_costs_is_what_was_recorded():
    shares = {
        (row["weighting"], row["score_samples"], row["local_steps"]): 100 * row["share"]
        for row in rows("scoring_cost")
        if row["kind"] == "share"
    }
    names = {
        "accuracy": '`proportional("accuracy")`',
        "learned": "`learned()`",
        "learned_online": "`learned(carry=True, steps=1)`",
        "best_of": "`best_of` of five",
    }
    text = RESULTS.replace("**", "")
    for key, name in names.items():
        cells = [f"{shares[key, samples, steps]:.0f}" for samples in (256, 5000) for steps in (10, 50, 200)]
        assert f"| {name} | {' | '.join(cells)} |" in text
    assert f"{shares['learned_online', 256, 50]:.0f} % of a round at H=50" in RESULTS
    assert f"{shares['learned_online', 256, 200]:.0f} % at H=200" in RESULTS


def test_what_is_said_of_the_cost_of_the_pool_was_measured():
    found = {
        (row["weighting"], row["local_steps"]): row
        for row in rows("scoring_cost_256")
        if row.get("score_samples") == 256
    }
    pool, search, scoring = (100 * found[name, 50]["share"] for name in ("opinion_pool", "learned", "accuracy"))
    said = (
        f"`opinion_pool()` takes {pool:.0f} % of a round at H = 50, `learned()` {search:.0f} %; scoring all replicas is"
    )
    assert f"{said} {scoring:.0f} % of it" in README
    for name in ("opinion_pool", "learned"):
        low, high = found[name, 200]["share_quartiles"]
        assert low < 0 < high


@pytest.fixture(scope="module")
def gaps():
    """Of the matrix that scores 1,000 samples a round."""
    return read_gaps("scenarios", "scenarios_online")


@pytest.fixture(scope="module")
def few():
    """Of the matrix that scores 256."""
    return read_gaps("scenarios_256")


def read_gaps(*folders):
    """`(scenario, weighting, other) -> interval` of the points of test accuracy between them, and the weightings."""
    cells = collections.defaultdict(dict)
    for row in [row for folder in folders for row in rows(folder)]:
        if row["kind"] == "cell":
            cells[row["scenario"], row["weighting"]][row["seed"]] = 100 * row["test_accuracy"]

    def differences(scenario, weighting, other="plain"):
        a, b = cells[scenario, weighting], cells[scenario, other]
        return [a[seed] - b[seed] for seed in sorted(a)]

    def gap(*which):
        return interval(differences(*which))

    gap.differences = differences
    gap.mean = lambda scenario, weighting: np.mean(list(cells[scenario, weighting].values()))
    gap.scenarios = list(dict.fromkeys(scenario for scenario, _ in cells))
    gap.weightings = list(dict.fromkeys(weighting for _, weighting in cells if weighting != "learned_online"))
    return gap


SKEWED = {"dirichlet01", "dirichlet03"}


def harmed(gaps, weighting):
    return {scenario for scenario in gaps.scenarios if gaps(scenario, weighting)[2] < 0}


def test_the_pool_is_nowhere_shown_to_do_harm_and_many_rules_are(gaps, few):
    assert "It is the only weighting that is in no scenario shown to do harm" in RESULTS
    assert harmed(few, "opinion_pool") == harmed(gaps, "learned") == harmed(gaps, "learned_online") == set()
    assert sum(bool(harmed(few, weighting) & SKEWED) for weighting in few.weightings) >= 3
    assert sum(bool(harmed(gaps, weighting) & SKEWED) for weighting in gaps.weightings) >= 6


def test_the_pool_is_close_to_the_best_rule_of_each_scenario(few):
    behind = []
    for scenario in few.scenarios:
        best = max(few(scenario, weighting)[0] for weighting in few.weightings)
        behind.append(best - few(scenario, "opinion_pool")[0])
    assert f"beats it by {max(behind):.2f} points at most" in RESULTS


def test_plain_averaging_trails_sync_on_clean_shards_as_said():
    found = finals("fashion_iid")
    behind = f"{(found['sync'] - found['plain']).mean():.1f} points"
    assert f"ends {behind} below synchronous training" in README
    assert f"plain is {behind} behind sync" in NOTES


def test_what_is_said_of_learned_weights_is_what_was_recorded(gaps):
    found = {scenario: gaps(scenario, "learned") for scenario in gaps.scenarios}
    assert sorted(scenario for scenario, (mean, *_) in found.items() if mean < 0) == ["iid", "sized"]
    for page in (RESULTS, NOTES):
        for scenario in ("iid", "sized"):
            mean, low, high = found[scenario]
            assert f"{-mean:.2f}" in page
            assert f"({low:.2f} to {high:+.2f}" in page
        for scenario in ("noisy2", "noisy4", "dirichlet01", "dirichlet03"):
            mean, low, high = found[scenario]
            assert f"{mean:.1f} ({low:.1f} to {high:.1f}" in page
        mean, low, high = found["fast1"]
        assert f"{mean:.0f} ({low:.0f} to {high:.0f}" in page
    assert "({1:.2f} to {2:.2f})".format(*found["flipped1"]) in RESULTS
    shown = {scenario for scenario, (_, low, _) in found.items() if low > 0}
    assert shown == {"noisy2", "noisy4", "dirichlet01", "flipped1", "fast1"}
    # Nine tests are read: by Holm's rule the largest of the five smallest p-values counts nine minus four times.
    values = {scenario: p_value(gaps.differences(scenario, "learned")) for scenario in gaps.scenarios}
    held = sorted(values, key=values.get)
    assert held[4] == "flipped1"
    assert f"Holm: p = {5 * values['flipped1']:.2f}" in RESULTS
    assert all((9 - i) * values[scenario] < 0.05 for i, scenario in enumerate(held[:4]))
    behind = {}
    for scenario in gaps.scenarios:
        best = max(gaps.weightings, key=lambda weighting: gaps(scenario, weighting)[0])
        behind[scenario] = gaps(scenario, best, "learned") if best != "learned" else (0.0, 0.0, 0.0)
    assert max(behind, key=lambda scenario: behind[scenario][0]) == "dirichlet03"
    mean, low, high = behind["dirichlet03"]
    assert f"{mean:.3f} points at most (Dirichlet 0.3; {low:.2f} to {high:.2f})" in RESULTS
    assert f"{mean:.3f} points ({low:.2f} to {high:+.2f})" in NOTES


def test_what_is_said_of_the_cheap_mode_is_what_was_recorded(gaps):
    found = {scenario: gaps(scenario, "learned_online") for scenario in gaps.scenarios}
    below = sorted(-mean for mean, *_ in found.values() if mean < 0)
    assert f"in two, by {' and '.join(f'{mean:.2f}' for mean in below)} points" in RESULTS
    mean, low, high = found["dirichlet01"]
    assert low < 0
    assert f"({mean:.1f}, {low:.1f} to {high:.1f})" in RESULTS
    faults = ("noisy2", "noisy4", "fast1", "flipped1", "slow4")
    assert max(abs(gaps(scenario, "learned_online", "learned")[0]) for scenario in faults) < 0.11


def test_what_is_said_of_cases_drawn_at_random_is_what_was_recorded():
    kinds = json.loads((RECORDED / "fuzz" / "fuzz.json").read_text())["kinds"]
    total = collections.Counter()
    for counts in kinds.values():
        total.update(counts)
    ran, refused = total["ran"], total["refused"]
    assert total.total() == ran + refused >= 10_000
    assert max(sum(counts.values()) for counts in kinds.values()) < total.total() / 4
    said = f"Of {ran + refused:,} cases drawn at random, [{ran:,} ran and {refused:,} were refused]"
    assert said in " ".join((ROOT / "docs" / "reliability.md").read_text().split())
