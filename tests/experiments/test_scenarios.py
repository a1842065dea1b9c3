"""The binary of the scenario matrix: what it records, how it goes on after an interruption, and what it refuses."""

import json
import os
import pathlib
import signal

import pytest
from absl import flags
from absl.testing import flagsaver
from binary import invoke

import wavg_jax as wavg
from experiments import reductions, report, scenarios, scoring_cost
from experiments.setup import app, record_matrix
from experiments.setup.weightings import WEIGHTINGS
from wavg_jax import data
from wavg_jax.storage.rows import Records, read_rows
from wavg_jax.storage.schema import cell_row, plain

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ("--replicas=4", "--rounds=2", "--local_steps=4", "--hidden=8", "--devices=1")
FEW = (*SMALL, "--scenarios=iid,noisy2", "--weightings=plain,accuracy", "--seeds=0,1")


class Interrupted:
    """`wavg.fit`, which counts its calls and is asked to stop in the fourth."""

    def __init__(self):
        self.calls, self.fit = 0, wavg.fit

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.calls == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.fit(*arguments, **options)


def test_a_stop_in_the_last_cell_lets_the_matrix_end_and_one_before_does_not():
    last = {"kind": "round", "weights": [1.0], "effective_replicas": 1.0, "alive": [True], "seconds": 1.0}
    last |= dict.fromkeys(("test_accuracy", "test_loss", "test_macro_f1", "test_ece"), 0.5)

    def train(cell, advance):
        if cell.seed == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return [last]

    two, three = ([record_matrix.Cell("iid", "plain", seed, 0.1) for seed in range(n)] for n in (2, 3))
    recorded = Records(None)
    record_matrix.fill(two, recorded, lambda cell: 1, train, str)
    assert len(recorded.rows) == 2
    recorded = Records(None)
    with pytest.raises(wavg.Stopped, match="stopped before iid/plain/2"):
        record_matrix.fill(three, recorded, lambda cell: 1, train, str)
    assert len(recorded.rows) == 2


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A matrix of 2 weightings, 2 scenarios and 2 seeds, interrupted in its fourth cell and gone on with."""
    folder = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        fit = Interrupted()
        patch.setattr(wavg, "fit", fit)
        assert invoke(scenarios.main, *FEW, f"--workdir={folder}") == 143
        assert len(read_rows(folder)) == 1 + 4
        assert not (folder / "report.md").exists()
        assert invoke(scenarios.main, *FEW, f"--workdir={folder}", "--resume") == 0
        assert fit.calls == 8
        written = (folder / "rows.jsonl").read_bytes()
        assert invoke(scenarios.main, *FEW, f"--workdir={folder}", "--resume") == 0
        assert fit.calls == 8
        assert (folder / "rows.jsonl").read_bytes() == written
    return folder


def test_every_cell_is_one_compact_row_and_the_report_is_written(done):
    header, *cells = read_rows(done)
    assert header["recommend"]
    assert header["settings"]["chance"] == 0.1
    assert (header["kind"], header["dataset"], header["heldout_samples"]) == ("matrix", "digits", 200)
    assert header["settings"]["local_steps"] == 4
    assert header["scenarios"]["slow4"] == "2 of 4 at 1/4 steps"
    order = [f"{s}/{w}/{seed}" for w in ("plain", "accuracy") for s in ("iid", "noisy2") for seed in (0, 1)]
    assert [row["run"] for row in cells] == order
    for row in cells:
        assert row["alive_rounds"] == [2, 2, 2, 2]
        assert sum(row["weights"]) == pytest.approx(1, abs=1e-3)
        assert row["rate"] == 0.02
        assert 0 <= row["test_accuracy"] <= 1
    assert cells[0]["weights"] == [0.25] * 4
    assert {path.name for path in done.iterdir()} == {"rows.jsonl", "report.md", "report.html", "plots"}
    assert "2 weightings in 2 scenarios: digits, 2 seeds" in (done / "report.md").read_text()


def test_a_row_of_a_matrix_with_eight_replicas_stays_under_700_bytes():
    rounds = [
        {"kind": "round", "test_accuracy": 1 / 3, "test_loss": 2 / 3, "test_macro_f1": 1 / 7, "test_ece": 1 / 9}
        | {"weights": [0.123456789] * 8, "effective_replicas": 7.654321, "alive": [True] * 8, "seconds": 0.123456789}
    ] * 20
    cell = scenarios.Cell("dirichlet03", "accuracy_above_chance", 12345, 0.012345)
    row = cell_row(run=cell.name, **cell._asdict(), rows=rounds)
    assert len(json.dumps(plain(row))) < 700


def test_folders_are_reported_on_together(done, tmp_path):
    header, *cells = read_rows(done)
    more = Records(tmp_path / "more")
    more.append(header)
    for row in cells[:2]:
        more.append(row | {"weighting": "rank_loss", "run": row["run"].replace("plain", "rank_loss")})
    assert invoke(report.main, str(done), str(tmp_path / "more"), f"--out={tmp_path / 'both'}") == 0
    text = (tmp_path / "both" / "report.md").read_text()
    assert "3 weightings in 2 scenarios" in text
    assert "2 cells of the matrix are not recorded" in text


def test_rows_may_correct_the_local_steps(tmp_path):
    few = (*SMALL, "--scenarios=dirichlet01", "--seeds=0", "--inner=momentum", "--prox_mu=0.5", f"--workdir={tmp_path}")
    assert invoke(scenarios.main, *few, "--weightings=plain,plain+fedprox,plain+scaffold") == 0
    plain, near, controlled = read_rows(tmp_path)[1:]
    assert [row["weighting"] for row in (plain, near, controlled)] == ["plain", "plain+fedprox(0.5)", "plain+scaffold"]
    assert len({row["test_loss"] for row in (plain, near, controlled)}) == 3
    assert "plain+fedprox(0.5)" in (tmp_path / "report.md").read_text()


BAD = [
    (["--scenarios=iid,warm"], "--scenarios=iid,warm"),
    (["--weightings=accuracy,acuracy"], "--weightings=accuracy,acuracy"),
    (["--weightings=plain,plain"], "each once"),
    (["--weightings=plain+scaffold", "--inner=adam"], "--drift=scaffold reads gradients off the steps of SGD"),
    (["--seeds=0,0"], "--seeds"),
    (["--lr_noisy2=nan"], "--lr_noisy2"),
    (["--score_samples=0"], "score_samples"),
    (
        ["--replicas=3", "--scenarios=noisy4"],
        "--replicas=3: noisy4 spoils 4 shards; give at least --replicas=4, or leave it out (--scenarios)",
    ),
    (["--batch_size=1000"], "--batch_size"),
    (["--devices=64"], "--devices"),
    (["--tune_rates=x"], "--tune_rates"),
    (["--heldout=0"], "--heldout=0: accuracy would score"),
    (["--pull=1"], "--pull has no effect"),
    (["--noisy=1"], "--noisy has no effect"),
    (["--tune_rates=0.1", "--heldout=0"], "--heldout"),
    (["--workdir={done}"], "--resume"),
    (["--workdir={done}", "--resume", "--lr_noisy2=0.5"], "--lr_noisy2=0.02"),
    (["--workdir={done}", "--resume", "--hidden=16"], "--hidden=['8']"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_input_is_one_clear_line_exit_code_2_and_nothing_written(
    arguments, says, done, capfd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = (done / "rows.jsonl").read_bytes()
    assert invoke(scenarios.main, *FEW, *(argument.format(done=done) for argument in arguments)) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert says in lines[0]
    assert list(tmp_path.iterdir()) == []
    assert (done / "rows.jsonl").read_bytes() == before


def test_tuning_uses_other_seeds_and_the_held_out_split_and_writes_nothing(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seeds = []

    def watched(task, sharded, *arguments, fit=wavg.fit, **options):
        seeds.append(options["seed"])
        assert sharded.test.y is sharded.heldout.y
        return fit(task, sharded, *arguments, **options)

    monkeypatch.setattr(wavg, "fit", watched)
    assert invoke(scenarios.main, *SMALL, "--scenarios=iid", "--seeds=7", "--tune_rates=0.4") == 0
    assert seeds == [1007]
    assert "--lr_iid=0.4 (at the edge of the rates tried: try more)" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_scenarios_are_what_they_are_called():
    made = {name: make(8) for name, make in scenarios.SCENARIOS.items()}
    dataset = data.digits()
    sizes = [len(part) for part in made["sized"].partition(dataset.train, 0)]
    assert sizes[-1] / sizes[0] == pytest.approx(16, rel=0.1)
    assert sizes == sorted(sizes)
    assert (made["noisy2"].bad, made["noisy4"].bad) == ((0, 1), (0, 1, 2, 3))
    assert made["fast1"].faults.rate == (10.0, *[1.0] * 7)
    assert made["flipped1"].faults.sent == (-1.0, *[1.0] * 7)
    assert made["slow4"].faults.speed == (*[0.25] * 4, *[1.0] * 4)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_scheme_makes_an_averager(name):
    with flagsaver.flagsaver():
        app.parse(["binary", *SMALL, "--chance=0.1"])
        assert wavg.averager(**WEIGHTINGS[name](flags.FLAGS)).update


@pytest.mark.slow
def test_reductions_record_what_they_vary_and_recommend_nothing(tmp_path, capfd):
    few = ("--replicas=2", "--hidden=8", "--devices=1", "--steps=4", "--total_steps=4", "--seeds=0")
    assert invoke(reductions.main, *few, f"--workdir={tmp_path}") == 0
    header, *cells = read_rows(tmp_path)
    assert not header["recommend"]
    assert {row["weighting"] for row in cells} == {"plain", "norm_preserving"}
    text = (tmp_path / "report.md").read_text()
    assert "| local steps | 4 with batch size 16 |" in text
    assert "ecommend" not in text.split("![")[0] + text.split("## The scenarios")[1]
    capfd.readouterr()
    assert invoke(reductions.main, *few, f"--workdir={tmp_path}", "--resume", "--lr_plain=0.5") == 2
    assert "started with --lr_plain=0.4" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["--nobfloat16", "--bfloat16"])
def test_scoring_cost_records_shares_and_the_settings_they_were_measured_with(dtype, tmp_path):
    few = ("--replicas=2", "--hidden=8", "--devices=1", "--cost_weightings=softmax_loss", "--steps=2", "--subsets=0,50")
    assert invoke(scoring_cost.main, *few, dtype, "--repeats=1", f"--workdir={tmp_path}") == 0
    header, *shares = read_rows(tmp_path)
    assert set(header["settings"]) == set(scoring_cost.SETTINGS)
    assert header["settings"]["bfloat16"] == (dtype == "--bfloat16")
    assert [row["score_samples"] for row in shares] == [200, 50]
    assert "| softmax_loss |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_every_scheme_runs(tmp_path):
    assert invoke(scenarios.main, *SMALL, "--scenarios=noisy2", "--seeds=0", f"--workdir={tmp_path}") == 0
    cells = [row for row in read_rows(tmp_path) if row["kind"] == "cell"]
    assert [row["weighting"] for row in cells] == list(WEIGHTINGS)
    assert all(row["test_loss"] is not None and sum(row["weights"]) == pytest.approx(1, abs=1e-3) for row in cells)


def test_the_preset_of_the_matrix_is_understood():
    with flagsaver.flagsaver():
        preset = ROOT / "experiments" / "presets" / "fashion_scenarios.flags"
        assert app.parse(["binary", f"--flagfile={preset}"]) == ["binary"]
        assert (flags.FLAGS.replicas, flags.FLAGS.inner) == (8, "momentum")
