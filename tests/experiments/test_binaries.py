"""The binaries as a user meets them: what bad input says, that it writes nothing, and that the main job works."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from binary import invoke

import wavg_jax as wavg
from experiments import chaos, compare, evidence, reductions, report, scenarios, scoring_cost, stragglers, train, tune
from experiments.setup import app, arms, choices, problem
from experiments.setup.shared_flags import COMPARED
from wavg_jax import data
from wavg_jax.devices import machine
from wavg_jax.storage.rows import read_rows
from wavg_jax.training import schedule

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
QUICK = ("--rounds=2", "--replicas=2", "--local_steps=2", "--hidden=8", "--devices=1")
PLAIN = "--weighting=plain"
"""Compiles sooner, where a process of its own is asked about something else."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data files, good and bad, and a finished run."""
    folder = tmp_path_factory.mktemp("input")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (300, 6), dtype=np.uint8), rng.integers(0, 3, 300)
    good = {"x_train": x, "y_train": y, "x_test": x[:50], "y_test": y[:50]}
    spoilt = x.astype(np.float32)
    spoilt[17, 2] = np.nan
    files = {
        "good": good,
        "negative_label": good | {"y_train": np.where(np.arange(300) == 5, -1, y)},
        "stray_label": good | {"y_train": np.where(np.arange(300) == 5, 250, y)},
        "nan_image": good | {"x_train": spoilt},
        "no_labels": {"x_train": x},
    }
    for name, arrays in files.items():
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "torn.npz").write_bytes((folder / "good.npz").read_bytes()[:1000])
    (folder / "file").write_text("not a folder")
    (folder / "empty").mkdir()
    corrupt = folder / "corrupt" / "mnist"
    corrupt.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (corrupt / f"{part}-{kind}-ubyte.gz").write_bytes(b"\x1f\x8b not what was published")
    assert invoke(train.main, *QUICK, f"--workdir={folder / 'done'}") == 0
    return folder


@pytest.mark.parametrize(("given", "split"), [((), 8), (("--devices=2",), 2), (("--devices=6",), 4)])
def test_arms_of_one_replica_split_their_batches_over_as_many_devices_as_asked_for(given, split, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # on a CPU they stay on one
    with flagsaver.flagsaver():
        app.parse(["train", *given])
        assert arms._devices_of_batch(16) == split


BAD = [
    (compare, ["--rundes=3"], "rundes"),
    (compare, ["--weighting=acuracy"], "acuracy"),
    (compare, ["--rounds=0"], "rounds"),
    (compare, ["--rounds=ten"], "--rounds=ten: it must be a positive whole number"),
    (compare, ["--resume=maybe"], "--resume=maybe: it must be true or false"),
    (compare, ["--pull=2"], "--pull=2: it must be a number in the range [0, 1]"),
    (compare, ["--devices=3"], "set --replicas to 3 or 6, or --devices to 2 or 4"),
    (compare, ["--flagfile={folder}/nowhere.flags"], "nowhere.flags"),
    (compare, ["rounds=3"], "--name=value"),
    (compare, ["--arms=weighted,median"], "--arms"),
    (compare, ["--seeds=1,x"], "--seeds"),
    (compare, ["--seeds=1,1"], "--seeds"),
    (compare, ["--dataset=imagenet"], "--dataset"),
    (compare, ["--dataset={folder}/nowhere.npz"], "nowhere.npz"),
    (compare, ["--dataset={folder}/torn.npz"], "torn.npz"),
    (compare, ["--dataset={folder}/no_labels.npz"], "y_train"),
    (compare, ["--dataset={folder}/negative_label.npz"], "label"),
    (compare, ["--dataset={folder}/nan_image.npz"], "17"),
    (compare, ["--dataset={folder}/good.npz", "--heldout=50", "--model=cnn"], "--model"),
    (compare, ["--dataset=mnist", "--data_dir={folder}/empty"], "--data_dir"),
    (compare, ["--dataset=mnist", "--data_dir={folder}/corrupt"], "train-images-idx3-ubyte.gz"),
    (compare, ["--replicas=5000", "--batch_size=1"], "--replicas"),
    (compare, ["--replicas=9223372036854775808"], "--replicas=9223372036854775808: give 4294967295 at most"),
    (compare, ["--batch_size=1000"], "--batch_size"),
    (compare, ["--heldout=5000"], "--heldout"),
    (compare, ["--heldout=0"], "--heldout"),
    (tune, ["--heldout=0"], "--heldout"),
    (tune, ["--rates=nan"], "--rates"),
    (compare, ["--lr_plain=nan"], "--lr_plain"),
    (compare, ["--seeds=4294967296"], "--seed"),
    (compare, ["--dataset={folder}/stray_label.npz"], "250"),
    (compare, ["--noisy=9"], "--noisy"),
    (compare, ["--weighting=softmax_loss", "--temperature=0"], "--temperature"),
    (compare, ["--hidden=-3"], "--hidden"),
    (compare, ["--partition=sized", "--proportions=0,1"], "--proportions"),
    (compare, ["--partition=dirichlet", "--alpha=0"], "--alpha"),
    (compare, ["--devices=64"], "--devices"),
    (compare, ["--workdir={folder}/file"], "--workdir"),
    (compare, ["--workdir=/proc/run"], "--workdir"),
    (compare, ["--resume"], "--workdir"),
    (compare, ["--outer_lr=0.5"], "--outer=none"),
    (compare, ["--outer=lookahead", "--outer_momentum=0.5"], "--outer=lookahead"),
    (compare, ["--outer=nesterov", "--outer_tau=0.1"], "--outer=nesterov"),
    (compare, ["--outer=fedadam", "--outer_tau=0"], "tau"),
    (compare, ["--outer=lookahead", "--arms=plain,diloco"], "leave it out, or these arms"),
    (compare, ["--arms=weighted_diloco", "--weighting=iso_c"], "leave out the arm weighted_diloco"),
    (compare, ["--smoothing=ema", "--ema_decay=1"], "--ema_decay"),
    (compare, ["--drift=scaffold", "--inner=adam"], "--drift=scaffold reads gradients off the steps of SGD"),
    (train, [*QUICK, "--drift=fedprox", "--fragments=2"], "AtSync: --drift corrects steps"),
    (compare, ["--steps=5"], "--steps"),
    (train, ["--seeds=1"], "--seeds"),
    (tune, ["--resume"], "--resume"),
    (reductions, ["--pull=0.5"], "--pull has no effect"),
    (reductions, ["--seeds=1,1"], "each seed once"),
    (scoring_cost, ["--local_steps=5"], "--local_steps has no effect"),
    (scoring_cost, ["--heldout=0"], "--heldout=0"),
    (train, ["--arm=median"], "median"),
    (train, [*QUICK, "--workdir={folder}/done"], "--resume"),
    (train, [*QUICK, "--workdir={folder}/done", "--resume", "--lr_weighted=0.7"], "--lr_weighted=0.4"),
    (train, [*QUICK[:-2], "--devices=1", "--workdir={folder}/done", "--resume", "--hidden=16"], "--hidden=['8'], now"),
    (train, [*QUICK, "--workdir={folder}/done", "--resume", "--rounds=1"], "--rounds=1"),
    (scenarios, ["--scenarios=iid,warm"], "--scenarios"),
    (report, [], "RUN"),
    (report, ["{folder}/empty"], "rows.jsonl"),
    (report, ["{folder}/done", "--out={folder}/file"], "file"),
]


@pytest.mark.parametrize(("binary", "arguments", "says"), BAD, ids=[" ".join(case[1]) or "nothing" for case in BAD])
def test_bad_input_is_one_clear_line_exit_code_2_and_nothing_written(
    binary, arguments, says, folder, capfd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where runs/ would be
    arguments = [argument.format(folder=folder) for argument in arguments]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert invoke(binary.main, *arguments) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_user_s_own_arrays_train_from_the_command_line(folder, tmp_path):
    arguments = (*QUICK, f"--dataset={folder}/good.npz", "--heldout=50", "--partition=sized", "--proportions=1,3")
    assert invoke(train.main, *arguments, f"--workdir={tmp_path}") == 0
    first = read_rows(tmp_path)[0]
    assert (first["dataset"], first["shard_sizes"]) == ("good", [63, 187])


def test_flags_reach_the_pull_the_schedule_and_the_chance():
    with flagsaver.flagsaver():
        app.parse(["binary", "--pull_toward=old", "--pull=0.25", "--post_local_steps=2", "--local_steps=8"])
        restart = arms.make_arms(("plain",))[0].averager.restart
        post_local = choices.SCHEDULES["post_local"](flags.FLAGS)
        assert problem.load().classes == 10
        assert flags.FLAGS.chance == 0.1
    assert restart(np.float32([8, 4]), np.float32(0), np.float32(1)).tolist() == [6, 3]
    assert [post_local.steps(schedule.Past(0, done, ())) for done in (0, 1, 2)] == [1, 1, 8]


def run(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_disk_that_runs_full_is_one_clear_line_and_can_be_resumed(tmp_path):
    command = ("experiments.train", *QUICK[1:], "--rounds=40", PLAIN, f"--workdir={tmp_path}", "--checkpoint_every=50")
    limited = ["bash", "-c", 'ulimit -f 12; exec "$@"', "bash", sys.executable, "-m", *command]  # no file over 12 KiB
    full = subprocess.run(limited, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert full.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in full.stderr
    whole = read_rows(tmp_path)  # every line is whole
    assert (tmp_path / "rows.jsonl").read_bytes().endswith(b"\n")
    assert 1 < len(whole) < 41
    again = run(*command, "--resume")
    assert again.returncode == 0, again.stderr
    assert [row["round"] for row in read_rows(tmp_path)[1:]] == list(range(1, 41))


def test_a_stop_in_the_last_round_of_one_run_begins_no_other(tmp_path, monkeypatch):
    begun = []

    def fit(*_, store, **__):
        begun.append(store.name)
        return wavg.Result({}, {}, None, [], stopped=True)

    monkeypatch.setattr(wavg, "fit", fit)
    monkeypatch.setattr(arms, "critical_path", lambda *_: lambda name: None)
    assert invoke(compare.main, *QUICK, "--seeds=0", f"--workdir={tmp_path}") == 143
    assert begun == ["sequential-seed0"]


@pytest.mark.slow
def test_compare_leaves_rows_plots_and_a_report_of_two_scenarios_and_resumes(tmp_path, monkeypatch, compilations):
    compiled = {}

    def watched(*positional, store, on_round, fit=wavg.fit, **options):
        name = store.name

        def stop(row):
            if name == "plain-noisy1-seed1" and not options["resume"]:
                os.kill(os.getpid(), signal.SIGTERM)

        before = len(compilations)
        result = fit(*positional, on_round=[*on_round, stop], store=store, **options)
        compiled[name] = len(compilations) - before
        return result

    monkeypatch.setattr(wavg, "fit", watched)
    arguments = (*QUICK, "--seeds=0,1", f"--workdir={tmp_path}")
    assert invoke(compare.main, *arguments) == 143
    assert invoke(compare.main, *arguments, "--resume") == 0
    assert compiled["plain-seed0"] > 0
    # The others have another learning rate there.
    assert [compiled[f"{arm}-noisy1-seed0"] for arm in ("plain", "weighted")] == [0, 0]
    assert [compiled[f"{arm}-noisy1-seed1"] for arm in COMPARED] == [0] * 4
    rows = read_rows(tmp_path)
    assert len(rows) == 2 * 4 * 2 * (1 + 2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {row["run"] for row in rows}
    assert len({row["samples"] for row in rows if row.get("round") == 2}) == 1  # an equal budget
    assert all(row["critical_path"]["round"] > 0 for row in rows if row["kind"] == "run")
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.jsonl",
        "report.md",
        "report.html",
        "plots",
        "checkpoints",
    }
    written = (tmp_path / "report.md").read_bytes()
    assert invoke(compare.main, *arguments, "--resume") == 0
    assert read_rows(tmp_path) == rows
    assert (tmp_path / "report.md").read_bytes() == written


@pytest.mark.slow
def test_a_disk_that_runs_full_in_a_checkpoint_leaves_none_half_written(tmp_path):
    command = ("experiments.train", *QUICK[:3], "--hidden=512", PLAIN, f"--workdir={tmp_path}", "--checkpoint_every=1")
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", sys.executable, "-m", *command]
    full = subprocess.run(limited, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert [line for line in full.stderr.splitlines() if line.startswith("error: ")] != []
    assert "Traceback" not in full.stderr
    assert list((tmp_path / "checkpoints" / "weighted-seed0").iterdir()) == []


OTHER = [
    ["--partition=dirichlet", "--weighting=inverse_grad_norm", "--inner=adam", "--lr_weighted=0.01"],
    ["--weighting=softmax_loss", "--temperature=0.5", "--outer=nesterov", "--opt_state_at_sync=average"],
    ["--weighting=softmax_loss", "--drift=scaffold", "--inner=momentum", "--outer=fedyogi", "--outer_tau=0.1"],
    ["--weighting=plain", "--partition=dirichlet", "--drift=fedprox", "--prox_mu=0.1", "--smoothing=lawa"],
    ["--weighting=inverse_loss", "--augment", "--opt_state_at_sync=reset", "--dropout=0.1", "--noisy=1"],
]


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("arguments", OTHER, ids=" ".join)
def test_the_other_options_work_too(arguments, tmp_path):
    assert invoke(train.main, *QUICK, *arguments, f"--workdir={tmp_path}") == 0
    first, *_, last = read_rows(tmp_path)
    assert np.isfinite(last["test_loss"])
    assert first["settings"]["weighting"] in arguments[0] + arguments[1]
    assert first["noisy_shards"] == ([0] if "--noisy=1" in arguments else [])


@pytest.mark.slow
def test_tune_judges_on_the_held_out_split_and_does_not_touch_the_test_split(capfd, monkeypatch):
    def poisoned(*asked, load=data.load, **how):
        dataset = load(*asked, **how)
        return dataset._replace(test=dataset.test._replace(y=np.zeros_like(dataset.test.y)))

    arguments = (*QUICK, "--tune=plain", "--noisy=0", "--rates=0.1,0.4", "--tuning_seeds=7")
    said = []
    for load in (data.load, poisoned):
        monkeypatch.setattr(data, "load", load)
        assert invoke(tune.main, *arguments) == 0
        said.append("\n".join(line for line in capfd.readouterr().out.splitlines() if "rounds," not in line))
    honest = said[0]
    assert said[1] == honest
    assert "--lr_plain=0.4 (at the edge of the rates tried: try more)" in honest


@pytest.mark.slow
@pytest.mark.parametrize("binary", ["compare", "train", "report", "tune", "scenarios"])
def test_help_says_what_the_binary_is_for_and_shows_its_flags(binary):
    said = run(f"experiments.{binary}", "--help").stdout
    assert f"python -m experiments.{binary}" in said
    own = {"report": ["--out"], "scenarios": ["--dataset", "--weightings", "--lr_iid", "--seeds"]}
    for flag in own.get(binary, ["--dataset", "--replicas", "--weighting", "--lr_plain"]):
        assert flag in said
    assert ("--partition" in said) == (binary not in ("report", "scenarios"))


PRESETS_OF = (chaos, evidence, stragglers)
"""Binaries with flags of their own in presets."""


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "experiments" / "presets").glob("*.flags")), ids=lambda path: path.stem
)
def test_every_preset_is_understood(preset):
    with flagsaver.flagsaver():
        assert app.parse(["binary", f"--flagfile={preset}"]) == ["binary"]
        assert set(preset.stem.split("_")) & set(flags.FLAGS.dataset.split("_"))


@pytest.mark.slow
def test_a_binary_uses_every_core_keeps_its_programs_and_computes_in_bfloat16(tmp_path):
    cache, rows = tmp_path / "cache", {}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        command = [sys.executable, "-m", "experiments.train", f"--workdir={folder}", f"--compilation_cache={cache}"]
        command += ["--rounds=2", "--hidden=8", PLAIN, f"--compute_dtype={dtype}", "--matmul_precision=float32"]
        subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=True, capture_output=True)
        rows[dtype] = read_rows(folder)
    for first, *_ in rows.values():
        assert first["devices"] == max(n for n in range(1, machine.cores() + 1) if 4 % n == 0)
        assert first["hardware"]["count"] == machine.cores()
    losses = [rows[dtype][-1]["train_loss"] for dtype in rows]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert any(path.name.startswith("jit_run") for path in cache.iterdir())


def test_more_cpu_devices_than_can_work_are_refused_in_one_line():
    most = max(64, machine.cores())
    refused = run("experiments.train", "--devices=1000", "--replicas=1000")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"error: --devices=1000: at most {most} CPU devices" in refused.stderr


def test_ctrl_c_while_jax_is_set_up_is_one_line_and_exit_code_130():
    code = "import os, signal; from experiments.setup import app; app.run(print)"
    late = "app.configure = lambda: os.kill(os.getpid(), signal.SIGINT)"
    command = [sys.executable, "-c", code.replace("app.run", f"{late}; app.run")]
    said = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout, said.stderr) == (130, "", "interrupted\n")


@pytest.mark.slow
def test_a_damaged_program_in_the_cache_is_one_line_and_is_mended(tmp_path):
    command = ("experiments.train", *QUICK, PLAIN, f"--compilation_cache={tmp_path / 'cache'}")
    assert run(*command, f"--workdir={tmp_path / 'a'}").returncode == 0
    (kept,) = (tmp_path / "cache").glob("jit_evaluate-*-cache")
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])  # as a kill leaves it
    again = run(*command, f"--workdir={tmp_path / 'b'}")
    assert again.returncode == 0
    assert again.stderr.strip() == "warning: the cached program jit_evaluate is damaged; compiling it again"
    assert run(*command, f"--workdir={tmp_path / 'c'}").stderr == ""


def test_a_guard_watches_every_blend_and_one_that_cannot_is_refused(tmp_path, capfd):
    assert invoke(train.main, "--arm=plain", "--guard=3", *QUICK, f"--workdir={tmp_path / 'a'}") == 0
    _, *rounds = read_rows(tmp_path / "a")
    assert [set(row["guard"]) for row in rounds] == [{"loss", "bound", "rolled_back", "rate"}] * 2
    assert rounds[1]["guard"]["bound"] == pytest.approx(3 * rounds[0]["guard"]["loss"], rel=1e-6)
    assert invoke(train.main, "--arm=plain", "--guard=1", *QUICK, f"--workdir={tmp_path / 'b'}") == 2
    assert "error: --guard=1: give a multiple" in capfd.readouterr().err
