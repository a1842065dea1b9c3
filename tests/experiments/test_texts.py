"""Language models from the commands: a text of one's own to a trained model, its bits per byte, and what it writes."""

import pathlib

import numpy as np
import pytest
from binary import invoke

from experiments import compare, reductions, train, tune
from wavg_jax.storage.rows import read_rows

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
    *("--model=transformer", "--layers=1", "--width=16", "--heads=2", "--context=16", "--devices=1"),
    *("--replica_map=map", "--heldout=20", "--replicas=2", "--local_steps=3", "--rounds=2", "--batch_size=4"),
)
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return path


def test_a_text_to_a_trained_model_and_a_sample_in_one_command(text, tmp_path, capfd):
    folder = tmp_path / "run"
    assert (
        invoke(
            train.main,
            *SMALL,
            f"--dataset={text}",
            "--arm=plain",
            "--inner=adam",
            "--lr_plain=0.01",
            f"--workdir={folder}",
        )
        == 0
    )
    first, *rounds = read_rows(folder)
    # 9,000 bytes are 562 windows of 16; 28 are for testing, 20 held out.
    assert (first["dataset"], first["classes"], first["test_samples"]) == ("mine", 256, 28)
    assert (first["train_samples"], first["noise"], first["target_accuracy"]) == (514, "shuffled bytes", None)
    for row in rounds:
        assert row["test_bits_per_byte"] == pytest.approx(row["test_loss"] / np.log(2), rel=1e-5)
    assert rounds[-1]["test_bits_per_byte"] < rounds[0]["test_bits_per_byte"] < 8
    assert "sample" not in rounds[0]
    sample = rounds[-1]["sample"]
    assert len(sample["prompt"]) == 16
    assert sample["prompt"] in text.read_text()
    assert 0 < len(sample["text"]) <= 256
    report, said = (folder / "report.md").read_text(), capfd.readouterr().out
    for words in (report, said):
        assert "bits per byte" in words
        assert sample["text"].split("\n")[0][:40].rstrip() in words
    assert "### What the networks write" in report
    assert "target accuracy" not in report


def test_corrupted_shards_of_a_text_are_shuffled_and_said_so(tmp_path, capfd):
    """The embedded text, with clean and with corrupted shards."""
    folder = tmp_path / "docs"
    arguments = ("--dataset=python_docs", "--noisy=0,1", "--arms=plain", "--seeds=0", "--partition=interleaved")
    assert invoke(compare.main, *SMALL, *arguments, "--lr_plain=0.1", f"--workdir={folder}") == 0
    rows = read_rows(folder)
    runs = [row for row in rows if row["kind"] == "run"]
    assert [row["noisy_shards"] for row in runs] == [[], [0]]
    assert len({row["data_crc"] for row in runs}) == 2
    report, said = (folder / "report.md").read_text(), " ".join(capfd.readouterr().out.split())
    assert "## 1 of 2 interleaved shards with shuffled bytes" in report
    assert "then with 1 of 2 shards with shuffled bytes" in said
    assert "random labels" not in report + said


def test_tuning_judges_a_text_by_bits_per_byte(text, capfd):
    arguments = (f"--dataset={text}", "--tune=plain", "--rates=0.0001,0.3", "--tuning_seeds=0", "--noisy=0")
    assert invoke(tune.main, *SMALL, *arguments) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "held-out bits per byte" in said
    assert "--lr_plain=0.3" in said


BAD = [
    (train, ["--dataset={text}"], "--model=mlp needs other data, not mine; use --model=transformer"),
    (train, ["--model=transformer"], "--model=transformer needs a text, not digits; use --model=mlp"),
    (train, ["--layers=2"], "--layers has no effect with --model=mlp"),
    (train, ["--context=32"], "--context has no effect on digits"),
    (train, ["--dataset={text}", "--model=transformer", "--augment"], "--augment has no effect on mine"),
    (train, ["--dataset={text}", "--model=transformer", "--hidden=3"], "--hidden has no effect with --model=transfo"),
    (train, ["--dataset={text}", "--model=transformer", "--context=5000"], "too few for three windows of --context"),
    (
        train,
        ["--dataset={text}", "--model=transformer", "--heads=3", "--context=16"],
        "--width=128 is not a multiple of 6, as --heads=3 needs",
    ),
    (
        train,
        ["--dataset={text}", "--model=transformer", "--partition=dirichlet", "--context=16"],
        "one class per sample",
    ),
    (train, ["--dataset=tiny_shakespeare", "--data_dir=/nowhere"], "set --data_dir to the folder that has it"),
    (train, ["--dataset=/nowhere/some.txt"], "/nowhere/some.txt cannot be read"),
    (reductions, ["--dataset={text}"], "mine is a text, and this command trains classifiers"),
]


@pytest.mark.parametrize(("binary", "arguments", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_input_gives_one_clear_line(binary, arguments, words, text, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert invoke(binary.main, *(argument.format(text=text) for argument in arguments)) == 2
    said = capfd.readouterr().err.strip()
    assert words in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("python_docs", 0.2e6, 0.9e6), ("shakespeare", 0.2e6, 0.9e6), ("shakespeare_25m", 25e6, 26e6)],
)
def test_presets_of_texts_are_as_large_as_they_say(name, least, most):
    words = (ROOT / "experiments" / "presets" / f"{name}.flags").read_text()
    sizes = {part.split("=")[0]: part.split("=")[1] for part in words.split("\n") if part.startswith("--")}
    layers, width = int(sizes["--layers"]), int(sizes["--width"])
    count = 12 * layers * width**2 + 256 * width
    assert f"{round(count / 1e4) * 10_000:,} parameters" in words
    assert least < count < most
    assert 64 <= int(sizes["--context"]) <= 128
