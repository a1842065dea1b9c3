"""What to expect: what the binary computes, lays over recordings and writes, and that the page says what came out."""

import json
import math
import pathlib
import re

import numpy as np
import pytest
import scipy.stats
from binary import invoke

from experiments import expected
from experiments.setup import overlay, quadratic, quadratic_runs
from wavg_jax.storage.rows import read_rows

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
PAGE = " ".join((ROOT / "docs" / "when.md").read_text().replace("\N{MINUS SIGN}", "-").split())
RECORDED = read_rows(RESULTS / "expected")
QUICK = ("--replicas=4", "--local_steps=5", "--rounds=3", "--steps=1,20")


def of(kind, rows=RECORDED):
    return {row["run"]: row for row in rows if row["kind"] == kind}


def test_tables_figures_and_rows_are_written_and_say_what_follows(tmp_path, capsys):
    arguments = (*QUICK, "--bad=1", "--bad_loss=3.2", "--noise_loss=0.4", "--heldout=30", f"--workdir={tmp_path / 'a'}")
    assert invoke(expected.main, *arguments) == 0
    said, written = " ".join(capsys.readouterr().out.split()), (tmp_path / "a" / "expected.md").read_text()
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"expected.md", "rows.jsonl", "share.png", "replicas.png", "bad.png", "noise.png", "steps.png"}
    rows = of("computed", read_rows(tmp_path / "a"))
    assert (rows["plain"]["bias"], rows["plain"]["noise"]) == pytest.approx((3.2 / 16, 0.1))
    # The resistors of the good and of the bad: 0.4 / 3, and 0.4 + 3.2.
    best = 1 / (3 / 0.4 + 1 / 3.6)
    assert rows["best weights"]["bias"] + rows["best weights"]["noise"] == pytest.approx(best)
    gain = 0.3 - best
    for words in (said, written):
        assert "takes 0.3 nats of noise off the loss of one network" in words
        assert "1 of 4 bad shards cost plain averaging and sync 0.2 nats" in words
        assert f"The best weights take {gain:.3g} nats off" in words
        assert "30 held-out samples costs 0.05 nats at most" in words
        assert f"pay from {math.ceil(1.5 / gain)} held-out samples on" in words
        assert "0.3000 (0.2000 + 0.1000)" in words
    assert "Simulated" not in written


def test_without_bad_shards_there_is_nothing_to_gain(tmp_path, capsys):
    assert invoke(expected.main, *QUICK, "--bad=0", f"--workdir={tmp_path}") == 0
    assert "there is nothing to gain by weights" in " ".join(capsys.readouterr().out.split())


def matrix(folder, losses, titles, **settings):
    """Records a matrix of test losses, {(scenario, weighting): by seed}."""
    folder.mkdir()
    empty = dict.fromkeys(("dataset", "train_samples", "heldout_samples", "test_samples", "parameters", "hardware"))
    first = {"kind": "matrix", "run": "matrix", "scenarios": titles, "versions": {}, **empty}
    rows = [first | {"settings": {"replicas": 4, "heldout": 500, "score_samples": None} | settings}]
    final = {"test_accuracy": 0.5, "test_macro_f1": 0.5, "test_ece": 0.1, "weights": [0.25] * 4}
    for (scenario, weighting), own in losses.items():
        for seed, loss in enumerate(own):
            cell = {"kind": "cell", "run": f"{scenario}/{weighting}/{seed}", "scenario": scenario, "seed": seed}
            rows.append(cell | {"weighting": weighting, "rate": 0.1, "seconds": 1.0, "test_loss": loss} | final)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


TITLES = {"iid": "IID", "noisy1": "1 of 4 noisy", "noisy2": "2 of 4 noisy", "sized": "sizes 1:16"}
LOSSES = {
    ("iid", "plain"): (0.40, 0.42),
    ("iid", "learned"): (0.41, 0.43),
    ("noisy1", "plain"): (0.60, 0.64),
    ("noisy1", "learned"): (0.40, 0.42),
    ("noisy2", "plain"): (1.2, 1.2),
    ("noisy2", "learned"): (0.5, 0.5),
    ("noisy2", "softmax_loss"): (0.4, 0.4),
    ("sized", "plain"): (0.4, 0.4),
    ("sized", "learned"): (0.4, 0.4),
}


def test_recordings_are_laid_over_what_is_computed(tmp_path, capsys):
    folder = matrix(tmp_path / "mine", LOSSES, TITLES, score_samples=100)
    arguments = (*QUICK, f"--measured={folder}", "--classes=5", f"--workdir={tmp_path / 'a'}")
    assert invoke(expected.main, *arguments) == 0
    rows = of("measured", read_rows(tmp_path / "a"))
    assert list(rows) == ["mine/IID/learned", "mine/1 of 4 noisy/learned", "mine/2 of 4 noisy/learned"]
    clean, first, second = rows.values()
    assert (clean["share"], first["share"], second["share"]) == (0, 0.25, 0.5)
    assert clean["gain"] == pytest.approx(-0.01)
    assert first["gain"] == pytest.approx(0.21)
    assert first["half_width"] == pytest.approx(0.01 * scipy.stats.t.ppf(0.975, 1))
    assert [row["fitted"] for row in rows.values()] == [False, True, False]
    assert (first["quadratic"], second["quadratic"]) == pytest.approx((0.21, 0.84))
    assert second["mixture"] == pytest.approx(-math.log(0.5 + 0.5 / 5))
    assert second["cost"] == pytest.approx(3 / 200)
    written = (tmp_path / "a" / "expected.md").read_text()
    assert "| mine | 1 of 4 noisy | learned | 100 | 0.210 ± 0.127 | 0.210 (fitted) | 0.223 | 0.0150 |" in written
    capsys.readouterr()


FAULTY = {
    "labels40": ("2 of 4 with 40 % random labels", 0.2, 0.0, 300),
    "heldout32": ("32 held out", 0.5, 0.0, 32),
    "heldout5000": ("5,000 held out", 0.5, 0.0, 300),
    "wrong20": ("20 % wrong", 0.5, 0.2, 300),
}


def test_wrong_labels_and_held_out_samples_are_read_from_titles(tmp_path):
    losses = {(name, w): (loss, loss) for name in FAULTY for w, loss in (("plain", 0.9), ("opinion_pool", 0.5))}
    folder = matrix(
        tmp_path / "a", losses, {name: one[0] for name, one in FAULTY.items()}, heldout=900, score_samples=300
    )
    points = overlay.read_points([folder])
    assert [(p.scenario, p.share, p.wrong, p.samples) for p in points] == list(FAULTY.values())
    # Weights that follow samples of which 20 % are wrong regain what is worse than that.
    assert points[-1].predicted(lambda share: 4 * share**2) == pytest.approx(1 - 0.16)
    assert overlay.fitted(points)[1] == pytest.approx(0.4 / 0.04)


def test_all_held_out_samples_count_where_a_round_scores_them_all(tmp_path):
    (point,) = overlay.read_points([matrix(tmp_path / "a", {k: LOSSES[k] for k in list(LOSSES)[:2]}, TITLES)])
    assert point.samples == 500


def test_cases_are_trained_and_recorded_one_after_the_other(tmp_path, monkeypatch, capsys):
    cases = [quadratic_runs.cases((16,))[i] for i in (0, -1)]
    short = [case._replace(local_steps=2, rounds=4) for case in cases]
    monkeypatch.setattr(quadratic_runs, "cases", lambda: short)
    assert invoke(expected.main, *QUICK, "--simulate", "--seeds=3", f"--workdir={tmp_path}") == 0
    first, second = of("simulated", read_rows(tmp_path)).values()
    assert (first["run"], first["cost"], first["seeds"]) == (short[0].name, 0, 1)
    assert first["half_width"] is None
    assert second["cost"] == quadratic.cost_of_learning(8, 16)
    assert first["simulated"] == pytest.approx(quadratic_runs.simulated(short[0], [3])[0])
    assert "Simulated, fitted weights" in capsys.readouterr().out


BAD = {
    "--bad=4 --replicas=4": "--bad=4 of --replicas=4: leave one shard good",
    "--heldout=0": "--heldout=0: weights are fitted to held-out samples",
    "--seeds=1,2": "--seeds has no effect without --simulate",
    "--classes=3": "--classes has no effect without --measured",
    "--steps=0": "--steps=0: give positive whole numbers",
    "--lr_plain=1": "--lr_plain has no effect here",
    "--measured=nowhere": "no rows in nowhere",
    "--measured=skewed": "skewed: no scenario iid or noisyN with plain and opinion_pool or learned",
    "--measured=clean": "no recorded scenario has noisy shards",
    "--bad_loss=-1": "--bad_loss=-1",
    "--workdir=skewed": "the folder already holds rows; choose another --workdir",
    "5": "'5' is not a flag",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_written(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matrix(tmp_path / "skewed", {k: v for k, v in LOSSES.items() if k[0] == "sized"}, TITLES)
    matrix(tmp_path / "clean", {k: v for k, v in LOSSES.items() if k[0] == "iid"}, TITLES)
    assert invoke(expected.main, *arguments.split()) == 2
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith("error: ")
    assert BAD[arguments] in line
    assert said.out == ""
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "clean/rows.jsonl",
        "skewed/rows.jsonl",
    ]


MEASURED = ("scenarios_256", "scenarios", "evidence/bad", "evidence/labels")


def test_what_is_recorded_follows_from_the_code():
    asked = expected.Asked(**{name: RECORDED[0]["settings"][name] for name in expected.Asked._fields})
    points = overlay.read_points([RESULTS / name for name in MEASURED])
    made = expected.expectations
    again = [*made.computed_rows(asked), *made.curves(asked, RECORDED[0]["settings"]["steps"])]
    again += made.measured_rows(points, 10)
    for row in again:
        recorded = of(row["kind"])[row["run"]]
        for name, value in row.items():
            assert recorded[name] == (
                value if isinstance(value, str | bool) else pytest.approx(value, rel=1e-5, abs=1e-9)
            )
    assert sum(len(of(kind)) for kind in ("computed", "curve", "measured")) == len(again)


def test_the_page_says_how_the_simulation_came_out():
    rows = of("simulated").values()
    exact = [row for row in rows if not row["cost"]]
    within = sum(abs(row["simulated"] - row["computed"]) <= row["half_width"] for row in exact)
    assert f"of {len(exact)} cases with fixed weights that the library trained, {within} have the closed form" in PAGE
    learned = [row for row in rows if row["cost"]]
    below = sum(row["simulated"] + row["half_width"] < row["computed"] + row["cost"] for row in learned)
    assert below == len(learned)
    assert f"`learned()` lost less than its bound in all {below}." in PAGE
    noisy = (of("simulated")[f"{name}, 2 of 8 with ten times the noise"] for name in ("plain", "best weights"))
    assert "times the noise: {:.3f} nats become {:.3f}.".format(*(row["simulated"] for row in noisy)) in PAGE


def test_the_rule_of_thumb_is_computed():
    gains = [overlay.mixture(m / 8, 10) for m in (0, 1, 2, 4)]
    assert f"mixture of labels](#against-measured-runs) | {' | '.join(f'{gain:.2f}' for gain in gains)} |" in PAGE
    enough = [math.ceil(quadratic.samples_to_gain(8, gain)) for gain in gains[1:]]
    assert f"from which weights pay | never | {' | '.join(map(str, enough))} |" in PAGE
    assert f"(n = 256: {quadratic.cost_of_learning(8, 256):.3f})" in PAGE


def test_the_table_of_arms_was_recorded():
    rows = of("computed")
    names = ("sequential", "sync", "plain", "best weights", "oracle")
    constant = " | ".join(f"{rows[name]['bias'] + rows[name]['noise']:.3f}" for name in names)
    decayed = " | ".join(f"{sum(rows[name]['decaying']):.3f}" for name in names)
    assert f"| constant | {constant} | | decayed to zero | {decayed} |" in PAGE


def test_what_the_page_says_of_noise_was_recorded():
    found = {
        name: np.mean(
            [row["test_loss"] for row in read_rows(RESULTS / "scenarios") if row["run"].startswith(f"iid/{name}/")]
        )
        for name in ("best_replica", "plain")
    }
    assert f"{found['best_replica']:.3f} for the best replica and {found['plain']:.3f} for the blend" in PAGE
    assert f"so {8 / 7 * (found['best_replica'] - found['plain']):.2f}." in PAGE


def test_the_share_of_the_bound_that_the_notes_name_was_recorded():
    rows = [of("simulated")[f"learned() on 32 samples, {bad} of 8 bad"] for bad in (0, 2)]
    shares = [f"{100 * (row['simulated'] - row['computed']) / row['cost']:.0f}" for row in rows]
    notes = " ".join((ROOT / "BUILD_NOTES.md").read_text().split())
    assert f"on 32 samples `learned()` lost {shares[0]} and {shares[1]} % of it" in notes
    four = of("measured")["scenarios_256/4 of 8 noisy/opinion_pool"]
    assert f"misses the second recorded point by {100 * (four['quadratic'] / four['gain'] - 1):.0f} %" in notes


def test_what_the_page_says_of_measured_runs_was_recorded():
    rows = of("measured")
    two, four = (rows[f"scenarios_256/{m} of 8 noisy/opinion_pool"] for m in (2, 4))
    assert two["fitted"]
    assert f"D = {two['gain'] / two['share'] ** 2:.1f} nats, comes from 2 of 8" in PAGE
    measured = [f"{row['gain']:.2f} ± {row['half_width']:.2f}" for row in (two, four)]
    assert f"for 4 of 8 it predicts a gain of {four['quadratic']:.2f} nats, and {measured[1]} was measured" in PAGE
    assert abs(four["quadratic"] - four["gain"]) > 3 * four["half_width"], "it fails"
    predicted = f"{two['mixture']:.2f} and {four['mixture']:.2f}"
    assert f"{predicted} are predicted, {measured[0]} and {measured[1]} measured" in PAGE
    seen = [row for name, row in rows.items() if row["share"] and name.startswith("scenarios")]
    assert len(seen) == 6
    assert all(abs(row["gain"] - row["mixture"]) <= row["half_width"] for row in seen)
    later = [rows[f"bad/{m} of 8 noisy/opinion_pool"] for m in (1, 3, 5, 6, 7)]
    predicted, measured = (", ".join(f"{row[name]:.2f}" for row in later) for name in ("mixture", "gain"))
    assert f"{predicted} are predicted, {measured} measured" in PAGE
    later += [row for name, row in rows.items() if name.startswith("labels/")]
    shares = sorted(row["gain"] / row["mixture"] for row in later)
    assert len(shares) == 9
    assert f"are {100 * shares[0]:.0f} to {100 * shares[-1]:.0f} % of it" in PAGE


def test_what_the_page_says_of_the_cost_of_fitting_was_recorded():
    rows = of("measured")
    few, many, pool = (
        rows[name] for name in ("scenarios_256/IID/learned", "scenarios/IID/learned", "scenarios_256/IID/opinion_pool")
    )
    lost = [f"{-row['gain']:.3f} ± {row['half_width']:.3f}" for row in (few, many)]
    assert f"`learned()` loses {lost[0]} nats to plain averaging on 256 samples and {lost[1]} on 1,000" in PAGE
    assert f"the bounds are {few['cost']:.3f} and {many['cost']:.4f}" in PAGE
    assert f"loses nothing that is ({abs(pool['gain']):.3f} ± {pool['half_width']:.3f})" in PAGE


def losses(folder, label):
    """The final test loss by `label` of a row and seed."""
    return {(row[label], row["seed"]): row["test_loss"] for row in read_rows(RESULTS / folder) if "test_loss" in row}


def test_what_the_page_says_against_the_model_was_recorded():
    gaps = []
    for folder in ("fashion_noisy2", "fashion_noisy4"):
        found = losses(folder, "arm")
        gaps.append(np.mean([found["sync", seed] - found["weighted", seed] for seed in range(5)]))
    assert f"{gaps[0]:.2f} and {gaps[1]:.2f} nats above the weighted arm with 2 and 4 bad shards" in PAGE
    plain = [row for row in read_rows(RESULTS / "reductions_fashion") if row.get("weighting") == "plain"]
    ten, most = (np.mean([row["test_loss"] for row in plain if row["scenario"] == h]) for h in ("H=10", "H=500"))
    assert f"from {ten:.3f} to {most:.3f} at equal samples" in PAGE
    assert re.search(r"experiments\.expected --replicas=8 --bad=2 --bad_loss=4 --noise_loss=0\.08 --heldout=256", PAGE)
