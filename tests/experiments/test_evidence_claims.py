"""The tables of the evidence, in README and on the page of results, are what was recorded."""

import collections
import functools
import json
import pathlib

import numpy as np
import pytest
import scipy.stats
from absl import flags
from absl.testing import flagsaver

import wavg_jax as wavg
from experiments import evidence
from experiments.setup import app
from experiments.setup.evidence_arms import make

ROOT = pathlib.Path(__file__).parents[2]
RECORDED = ROOT / "experiments" / "results" / "evidence"
MINUS = "\N{MINUS SIGN}"
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "experiments/results/README.md"))


@functools.cache
def rows(folder):
    return [json.loads(line) for line in (RECORDED / folder / "rows.jsonl").read_text().splitlines()]


@functools.cache
def cells(folder):
    """(scenario, name) -> seed -> row."""
    found = collections.defaultdict(dict)
    for row in rows(folder):
        if row["kind"] == "cell":
            found[row["scenario"], row["weighting"]][row["seed"]] = row
    return dict(found)


def mean_sd(folder, scenario, name, metric="test_accuracy", scale=100, digits=1):
    if (scenario, name) not in cells(folder):
        return "not recorded"
    values = scale * np.array([row[metric] for row in cells(folder)[scenario, name].values()], np.float64)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def minus(folder, scenario, a, b, metric="test_accuracy", scale=100, digits=1):
    """Mean of a - b with its 95 % interval, paired by seed."""
    ours, theirs = cells(folder)[scenario, a], cells(folder)[scenario, b]
    d = scale * np.array([ours[seed][metric] - theirs[seed][metric] for seed in ours if seed in theirs], np.float64)
    half = scipy.stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    mean, low, high = (f"{x:+z.{digits}f}".replace("-", MINUS) for x in (d.mean(), d.mean() - half, d.mean() + half))
    return f"{mean} ({low} to {high})"


NAMES = {
    "opinion_pool": "`opinion_pool()`",
    "learned": "`learned()`",
    "softmax_loss": "softmax of the loss",
    "softmax_train_loss": "softmax of the training loss",
    "accuracy": "by accuracy",
    "grawa": "GRAWA",
    "edit": "EDiT's penalty",
    "geometric_median": "geometric median",
    "trimmed_mean": "trimmed mean",
    "multi_krum": "multi-Krum",
    "greedy_soup": "greedy soup",
    "oracle_sequential": "oracle, sequential",
    "sequential+heldout": "sequential, also on held-out samples",
    "sync+heldout": "sync, also on held-out samples",
    "sequential+finetuned": "sequential, then fine-tuned on the held-out samples",
    "coordinate_median": "median of each coordinate",
    "post_local": "post-local SGD: H = 1, then 16",
    "qsr": "QSR: H from 2 up",
    "diloco": "DiLoCo: H = 50, Nesterov 0.7, 0.9",
    "edit128": "EDiT: H = 128, Nesterov 0.8, 0.85",
    "grawa32": "GRAWA: H = 32, pull 0.5",
    "papa": "PAPA: H = 10, pull 0.01",
    "lsgd": "LSGD: H = 10, pull 0.1",
}
"""Name of a row -> how the tables call it."""
ARMS = ("sequential", "sync", "plain", "opinion_pool", "learned", "softmax_loss", "accuracy", "grawa", "edit")
ARMS += ("geometric_median", "trimmed_mean", "multi_krum", "greedy_soup")
CONTROLS = ("oracle", "oracle_sequential", "sequential+heldout", "sync+heldout")
DATA = ("iid", "noisy2", "noisy4", "labels50", "shifted", "features", "duplicated", "stale", "foreign")
FAULTS = ("dirichlet01", "sized", "fast1", "flipped1", "slow4")
READINGS = {
    "": "as trained",
    "temperature": "calibrated",
    "selection": "the round with the least held-out loss",
    "swa": "SWA",
    "ema": "EMA",
    "finetuned": "fine-tuned on the held-out samples",
    "ensemble": "ensemble of its replicas",
}


def accuracies(folder, names, scenarios):
    """Lines of a table: test accuracy in % of each name in each scenario."""

    def shown(scenario, name):  # series are recorded without what the main recording has
        return mean_sd(folder if (scenario, name) in cells(folder) else "main", scenario, name)

    return [f"| {NAMES.get(name, name)} | {' | '.join(shown(s, name) for s in scenarios)} |" for name in names]


def left(scenarios, metric, scale, digits):
    """Lines of a table: the pool's gain over every reading of every other arm."""
    lines = []
    for arm in ("sequential", "sync", "plain"):
        for reading, words in READINGS.items():
            name = f"{arm}+{reading}" if reading else arm
            if ("iid", name) in cells("main"):
                found = (minus("main", s, "opinion_pool", name, metric, scale, digits) for s in scenarios)
                lines.append(f"| {arm}, {words} | " + " | ".join(found) + " |")
        if ("iid", f"{arm}+heldout") in cells("main"):
            found = (minus("main", s, "opinion_pool", f"{arm}+heldout", metric, scale, digits) for s in scenarios)
            lines.append(f"| {arm}, trained on the held-out samples too | " + " | ".join(found) + " |")
    return lines


SETS = {
    "breast": ("breast_cancer, MLP, K = 4", ("iid", "noisy2"), 0.95),
    "digits": ("digits, MLP, K = 4", ("iid", "noisy2"), 0.85),
    "mnist": ("MNIST, MLP, K = 8", ("iid", "noisy4"), 0.95),
    "k2": ("Fashion-MNIST, MLP, K = 2", ("iid", "labels100"), 0.84),
    "k4": ("Fashion-MNIST, MLP, K = 4", ("iid", "labels100"), 0.84),
    "main": ("Fashion-MNIST, MLP, K = 8", ("iid", "noisy4"), 0.84),
    "k16": ("Fashion-MNIST, MLP, K = 16", ("iid", "labels100"), 0.84),
}
"""Folder -> how the table calls it, its clean and its noisy scenario, and the target on held-out samples."""


def samples_to(folder, scenario, name, target):
    """Thousands of samples until the held-out accuracy is at the target, median over seeds; "never" if it is not."""
    settings = next(row for row in rows(folder) if row["kind"] == "matrix")["settings"]
    a_round = settings["replicas"] * settings["local_steps"] * settings["batch_size"]
    reached = []
    for row in cells(folder)[scenario, name].values():
        over = np.flatnonzero(np.array(row["heldout_accuracy"]) >= target)
        reached.append((over[0] + 1) * a_round / 1000 if len(over) else np.inf)
    median = np.median(reached)
    return f"{median:.1f}" if np.isfinite(median) else "never"


def of_sets():
    lines = []
    for folder, (title, scenarios, target) in SETS.items():
        for scenario, shards in zip(scenarios, ("clean", "half noisy"), strict=True):
            for name in ("sequential", "sync", "plain", "opinion_pool"):
                found = (
                    mean_sd(folder, scenario, name),
                    mean_sd(folder, scenario, name, "test_macro_f1"),
                    mean_sd(folder, scenario, name, "test_loss", 1, 2),
                    mean_sd(folder, scenario, name, "test_ece"),
                    f"{samples_to(folder, scenario, name, target)} to {100 * target:.0f} %",
                )
                lines.append(f"| {title} | {shards} | {NAMES.get(name, name)} | " + " | ".join(found) + " |")
    return lines


def of_steps():
    """Lines: test accuracy against H."""
    found = {1: "h1", 20: "h20", 50: "main", 200: "h200", 500: "h500", 1000: "h1000"}
    sizes = (784 * 128 + 128 + 128 * 10 + 10) * 4 * 2 / 1e6
    return [
        f"| {h:,} | {1000 // h * sizes:,.1f} | "
        + " | ".join(mean_sd(folder, s, name) for s in ("iid", "noisy4") for name in ("plain", "opinion_pool"))
        + " |"
        for h, folder in found.items()
    ]


def of_constant():
    """Lines: test accuracy at constant rates."""
    lines = []
    for name in ("sequential", "sync", "plain", "opinion_pool"):
        found = [mean_sd("constant", s, name + reading) for s in ("iid", "noisy4") for reading in ("", "+swa", "+ema")]
        lines.append(f"| {NAMES.get(name, name)} | " + " | ".join(found) + " |")
    return lines


def test_what_is_said_of_constant_rates_was_recorded():
    text = " ".join(RESULTS.split())
    raw = minus("constant", "noisy4", "opinion_pool", "sequential")
    averaged = minus("constant", "noisy4", "opinion_pool+swa", "sequential+swa")
    assert f"{raw} points over one network become {averaged}" in text


def of_methods():
    names = ("plain", "opinion_pool", "post_local", "qsr", "diloco", "edit128", "grawa32", "papa", "lsgd")
    return accuracies("methods", names, ("iid", "noisy4"))


def of_liars():
    names = ("plain", "opinion_pool", "multi_krum", "geometric_median")
    return accuracies("liars", names, ("flipped3", "reversed3", "idle3"))


AIMED = ("relabelled3", "backdoor3", "faint3", "boosted3", "hidden3")
ATTACKS = ("iid", "flipped3", "scaled3", "random3", "alie3", "alie3far", *AIMED)
JUDGES = ("opinion_pool", "softmax_loss")
BLIND = ("plain", "softmax_train_loss", "multi_krum", "geometric_median", "trimmed_mean")


def of_attacks():
    return accuracies("attacks", (*BLIND, *JUDGES, "oracle"), ATTACKS)


def of_aims():
    """Lines: how often attackers get what they want, in %."""
    return [
        f"| {NAMES.get(name, name)} | "
        + " | ".join(mean_sd("attacks", scenario, name, "attack_success") for scenario in AIMED)
        + " |"
        for name in (*BLIND, *JUDGES, "oracle")
    ]


LEFT = ("iid", "noisy2", "noisy4", "shifted")
SERIES = {
    "bad": (("sequential", "plain", "opinion_pool", "softmax_loss", "oracle"), [f"noisy{n}" for n in range(1, 8)]),
    "labels": (
        ("sequential", "plain", "opinion_pool", "softmax_loss", "oracle"),
        ["labels10", "labels30", "labels50", "labels70", "labels90", "noisy4"],
    ),
    "heldout": (
        ("opinion_pool", "learned", "softmax_loss"),
        ["heldout32", "heldout64", "heldout128", "heldout256", "noisy4", "heldout5000"],
    ),
    "wrong": (("opinion_pool", "learned", "softmax_loss"), ["wrong10", "wrong20", "wrong50", "skewed"]),
}
"""Folder -> rows and scenarios of its table."""
TABLES = {
    "bad shards": lambda: accuracies("main", (*ARMS, *CONTROLS), DATA),
    "partitions and faults": lambda: accuracies("main", ARMS, FAULTS),
    "what is left in accuracy": lambda: left(LEFT, "test_accuracy", 100, 1),
    "what is left in loss": lambda: left(LEFT, "test_loss", 1, 2),
    "data sets": of_sets,
    "H": of_steps,
    "constant": of_constant,
    "methods": of_methods,
    "liars": of_liars,
    "attacks": of_attacks,
    "what attackers want": of_aims,
    **{name: (lambda name=name: accuracies(name, *SERIES[name])) for name in SERIES},
}


HEADLINE = ("sequential", "sync", "plain", "accuracy", "softmax_loss", "opinion_pool", "oracle", "sequential+finetuned")


def headline():
    """Lines of README's table."""
    return accuracies("main", HEADLINE, LEFT)


GAINS = {
    "iid": "IID",
    "noisy2": "2 of 8 with random labels",
    "noisy4": "4 of 8 with random labels",
    "dirichlet01": "label skew, Dirichlet 0.1",
    "fast1": "one of 8 at 10 times the rate",
    "duplicated": "4 of 8 with duplicates",
    "foreign": "4 of 8 with samples of MNIST",
}


def gains():
    """Lines of README's other table: points above plain averaging."""
    lines = []
    for scenario, words in GAINS.items():
        found = [minus("main", scenario, name, "plain") for name in ("opinion_pool", "learned", "softmax_loss")]
        plain = mean_sd("main", scenario, "plain").split(" ")[0]
        lines.append(f"| {words} | {plain} | " + " | ".join(found) + " |")
    return lines


def shown_worse(name):
    """Scenarios in which a row is shown to be worse than plain averaging."""
    found = []
    for scenario in (*DATA, *FAULTS):
        ours, plain = cells("main")[scenario, name], cells("main")[scenario, "plain"]
        d = np.array([ours[seed]["test_accuracy"] - plain[seed]["test_accuracy"] for seed in ours])
        half = scipy.stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
        found += [scenario] * bool(d.mean() + half < 0)
    return found


RULES = tuple(name for name in ARMS if name not in ("sequential", "sync"))
ROBUST = ("multi_krum", "trimmed_mean", "geometric_median")


def score(folder, scenario, name):
    return 100 * np.mean([row["test_accuracy"] for row in cells(folder)[scenario, name].values()])


def mean(scenario, name):
    return score("main", scenario, name)


def test_what_readme_says_of_fixed_rules_is_what_was_recorded():
    text = " ".join(README.split())
    behind = [max(mean(s, n) for n in RULES) - mean(s, "opinion_pool") for s in (*DATA, *FAULTS)]
    assert f"within {max(behind):.2f} points of the best rule" in text
    lost = [mean("dirichlet01", "plain") - mean("dirichlet01", name) for name in ("softmax_loss", *ROBUST)]
    assert f"loses {lost[0]:.1f} points under label skew" in text
    assert f"where robust rules lose {min(lost[1:]):.0f} to {max(lost[1:]):.0f}" in text
    for name in RULES:
        assert (shown_worse(name) == []) == (name in ("opinion_pool", "learned", "accuracy", "plain"))
    said = "Nowhere shown to be worse than plain averaging are `opinion_pool`, `learned` and weights by accuracy"
    assert said in text


def test_what_readme_says_of_doubtful_held_out_samples_is_what_was_recorded():
    text = " ".join(README.split())

    where = (("heldout", "heldout32"), ("wrong", "wrong10"), ("wrong", "wrong20"))
    ahead = [score(*one, "learned") - score(*one, "opinion_pool") for one in where]
    assert "`learned()` is {:.1f}, {:.1f} and {:.1f} points ahead of `opinion_pool()`".format(*ahead) in text
    plain = mean("noisy4", "plain")
    assert max(abs(plain - score("wrong", "wrong50", name)) for name in ("learned", "opinion_pool")) < 0.5
    assert f"a softmax of the loss is {plain - score('wrong', 'wrong50', 'softmax_loss'):.0f} below it" in text


def spread(differences):
    """The smallest and the largest, as the sentences write them."""
    return f"{min(differences):.1f} to {max(differences):.1f}"


def test_what_a_sceptic_would_sign_of_bad_shards_was_recorded():
    text = " ".join(RESULTS.split())
    ours = "opinion_pool"
    better = [mean(s, "sequential") - mean(s, ours) for s in DATA[1:] if s not in ("noisy4", "shifted")]
    assert f"is still {spread(better)} points better" in text
    faults = [mean("iid", "plain") - mean(s, "plain") for s in ("fast1", "flipped1", "slow4")]
    assert f"cost plain averaging {spread(faults)} points" in text
    one, seven = (score("bad", s, ours) - score("bad", s, "plain") for s in ("noisy1", "noisy7"))
    assert f"from {one:.1f} points with one shard of 8 to {seven:.0f} with seven" in text
    ahead = [score("bad", f"noisy{n}", "sequential") - score("bad", f"noisy{n}", ours) for n in (1, 3, 5, 6, 7)]
    assert ahead[0] > 1
    assert abs(ahead[1]) < 0.1
    assert max(ahead[2:]) < -1


def lost(scenario, name):
    """Points of test accuracy below the same without attackers."""
    return score("attacks", scenario, "oracle") - score("attacks", scenario, name)


def wanted(scenario, name):
    return float(mean_sd("attacks", scenario, name, "attack_success").split()[0])


def test_what_a_sceptic_would_sign_of_attacks_was_recorded():
    text = " ".join(RESULTS.split())
    ours = "opinion_pool"
    assert (
        f"within {max(lost(s, ours) for s in ATTACKS if s != 'flipped3'):.1f} points of the same without attackers"
        in text
    )
    assert f"the flipped sign ({lost('flipped3', ours):.1f})" in text
    krum, trimmed, pool = (lost("alie3far", name) for name in ("multi_krum", "trimmed_mean", ours))
    assert f"costs multi-Krum {krum:.1f} points and the trimmed mean {trimmed:.1f}, the pool {pool:.1f}" in text
    assert f"at the paper's z no rule loses more than {max(lost('alie3', n) for n in (*BLIND, *JUDGES)):.1f}" in text
    fooled = ("plain", "geometric_median", ours)
    least = min(wanted(s, n) for n in fooled for s in ("backdoor3", "faint3", "hidden3"))
    assert f"it works on {least:.0f} to 100 % of the images" in text
    boosted = wanted("boosted3", ours), wanted("boosted3", "softmax_loss")
    assert "it shows in the scores: {:.0f} %, {:.0f} under a softmax of the loss".format(*boosted) in text
    assert f"stops it ({wanted('backdoor3', 'multi_krum'):.1f} %; {wanted('backdoor3', 'oracle'):.1f} without" in text
    assert f"it works on {wanted('hidden3', 'multi_krum'):.0f} % again" in text
    trimmed = [wanted(s, "trimmed_mean") for s in AIMED[1:]]
    assert f"The trimmed mean leaves {min(trimmed):.0f} to {max(trimmed):.0f} %" in text
    for scenario in ("alie3", "alie3far", "hidden3"):  # all three liars have all the weight that multi-Krum gives
        rows_of = cells("attacks")[scenario, "multi_krum"].values()
        assert np.mean([row["weights"][:3] for row in rows_of]) == pytest.approx(0.2, abs=0.001)
    assert min(wanted("hidden3", name) for name in (*BLIND, *JUDGES)) > 30


def test_rates_tuned_without_an_attack_are_as_good_as_those_tuned_with_it():
    names = ("plain", "opinion_pool", "multi_krum", "geometric_median")
    apart = [abs(score("liars", "flipped3", name) - score("attacks", "flipped3", name)) for name in names]
    assert f"means differ by at most {max(apart):.1f} points" in " ".join((ROOT / "BUILD_NOTES.md").read_text().split())


SHORT = {"plain": "plain", "opinion_pool": "`opinion_pool()`", "multi_krum": "`multi_krum(3, keep=5)`"}
SHORT |= {"geometric_median": "`geometric_median()`", "trimmed_mean": "`trimmed_mean(3)`"}


def test_the_table_of_the_page_on_bad_shards_is_what_was_recorded():
    page = (ROOT / "docs" / "bad_shards.md").read_text()
    for name, words in SHORT.items():
        honest = [mean_sd("attacks", s, name).split()[0] for s in ("scaled3", "flipped3", "alie3far")]
        aimed = [f"{mean_sd('attacks', s, name).split()[0]} ({wanted(s, name):.0f})" for s in ("backdoor3", "hidden3")]
        assert f"| {words} | {' | '.join(honest + aimed)} |" in page


def test_what_a_sceptic_would_sign_of_what_is_left_was_recorded():
    text = " ".join(RESULTS.split())

    def left(scenario, name, folder="main"):
        return minus(folder, scenario, "opinion_pool", name)

    kept = left("noisy4", "sequential").replace("+", "")
    assert f"{kept} are left beside one network" in text.replace(" points (", " (")
    assert f"({left('noisy4', 'sequential+heldout').split()[0].lstrip('+')} left)" in text
    loss = [minus("main", "noisy4", "opinion_pool", f"sequential{r}", "test_loss", 1, 2) for r in ("", "+temperature")]
    raw, calibrated = (one.split()[0].lstrip(MINUS) for one in loss)
    assert f"({raw} nats become {calibrated})" in text
    assert f"({left('shifted', 'sequential+finetuned').replace(' (', '; ')}" in text
    assert f"({left('noisy4', 'sequential+swa', 'constant').replace(' (', '; ')}" in text
    pairs = (("opinion_pool", "plain"), ("opinion_pool+swa", "plain+swa"))
    plain = [float(minus("constant", "noisy4", *pair).split()[0]) for pair in pairs]
    assert f"over plain averaging, {spread(plain)} points" in text
    methods = {name: score("methods", "iid", name) for name in ("qsr", "post_local", "diloco")}
    assert f"(QSR {methods['qsr']:.1f}, post-local SGD {methods['post_local']:.1f} %;" in text
    assert methods["diloco"] - mean("iid", "plain") == pytest.approx(0.5, abs=0.1)
    assert mean("noisy4", "opinion_pool") - score("methods", "noisy4", "qsr") < 0.5
    wrong = [score("wrong", s, "learned") - score("wrong", s, "opinion_pool") for s in ("wrong10", "wrong20")]
    assert "ends {:.1f} and {:.1f} points below `learned()`".format(*wrong) in text


def test_what_a_sceptic_would_sign_of_rounds_and_replicas_was_recorded():
    text = " ".join(RESULTS.split())
    cost = score("h1", "iid", "plain") - score("h1000", "iid", "plain")
    assert f"longer rounds cost plain averaging {cost:.1f} points" in text
    worth = {
        h: score(folder, "noisy4", "opinion_pool") - score(folder, "noisy4", "plain")
        for h, folder in {20: "h20", 50: "main", 200: "h200", 500: "h500", 1000: "h1000"}.items()
    }
    assert f"weights are worth {spread(worth.values())} points at every H" in text
    behind = [score(f, "iid", "sequential") - score(f, "iid", "plain") for f in ("k2", "k4", "main", "k16")]
    said = "({:.1f} points at K = 2, {:.1f} at 4, {:.1f} at 8, {:.1f} at 16)".format(*behind)
    assert said in text
    half = {"breast": "noisy2", "digits": "noisy2", "mnist": "noisy4", "main": "noisy4", "k2": "labels100"}
    gained = [score(f, s, "opinion_pool") - score(f, s, "plain") for f, s in half.items()]
    assert f"weights are worth {min(gained):.0f} to {max(gained):.0f} points with half of the shards noisy" in text


def test_what_is_said_of_how_often_methods_exchange_is_counted():
    with flagsaver.flagsaver():
        app.parse(["binary", f"--flagfile={RECORDED / 'methods' / 'run.flags'}"])
        counts = []
        for arm in make(("qsr", "post_local")):
            budget, given, rounds = arm.budget(), 0, 0
            while given < budget.steps:
                given += budget.schedule.steps(wavg.schedule.Past(rounds, given, ()))
                rounds += 1
            counts.append(rounds / flags.FLAGS.rounds)
    assert "they exchange {:.0f} and {:.0f} times as often".format(*counts) in " ".join(RESULTS.split())


@pytest.mark.parametrize("folder", [path.parent for path in sorted(RECORDED.glob("*/run.flags"))], ids=lambda p: p.name)
def test_the_flags_of_a_recording_are_those_that_were_recorded(folder):
    recorded = [row["settings"] for row in rows(folder.name) if row["kind"] == "matrix"]
    with flagsaver.flagsaver():
        app.parse(["binary", f"--flagfile={folder / 'run.flags'}"])
        now = {name: flags.FLAGS[name].value for name in evidence.SETTINGS if name != "chance"}  # known with the data
    for settings in recorded:
        assert {name: settings[name] for name in now if name in settings} == {n: now[n] for n in now if n in settings}


def test_the_gains_in_readme_are_what_was_recorded():
    for line in gains():
        assert line in README


def test_the_table_of_readme_is_what_was_recorded():
    for line in headline():
        assert line in README


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_evidence_is_what_was_recorded(name):
    for line in TABLES[name]():
        assert line in RESULTS
