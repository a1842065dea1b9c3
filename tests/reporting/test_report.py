"""report.md and report.html of rows as a comparison leaves them, and the binary that builds them."""

import json
import pathlib
import re
import subprocess
import sys
import unittest.mock
from collections.abc import Iterator

import pytest
from absl import flags
from absl.testing import flagsaver
from reports import MINUS, Row, make_rows, make_run, text_of

from experiments import report as binary
from wavg_jax.base import DataError, WavgError, WorkdirError
from wavg_jax.reporting import Caller, canvas, run_report, write_report
from wavg_jax.reporting.document import dated

CALLER = Caller(prefix="--", rebuild="build DIR...")


@pytest.fixture(autouse=True, scope="module")
def coarse() -> Iterator[None]:
    """Draws few dots: what the figures look like is not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "DPI", 30)
        yield


def test_the_report_is_dated_by_its_rows(written: pathlib.Path) -> None:
    assert "\nThe rows do not say when the runs were made.\n" in (written / "report.md").read_text()
    days = [{"started": f"2026-01-{day:02}T10:11:12Z"} for day in (31, 30)]
    assert dated(days) == "The runs were started from 2026-01-30 to 2026-01-31 (UTC)."
    assert dated([*days[:1], {}]) == "The runs were started on 2026-01-31 (UTC); some rows do not say when."


@pytest.mark.usefixtures("one_plot")
def test_arm_names_are_text_and_never_markup(tmp_path: pathlib.Path) -> None:
    rows = [row | {"arm": "[red]<b>|x|</b>"} for row in make_rows(seeds=1, arms=("weighted",))]
    assert "[red]<b>|x|</b>" in text_of(rows)
    write_report(tmp_path, rows)
    page = (tmp_path / "report.html").read_text()
    assert "[red]&lt;b&gt;|x|&lt;/b&gt;" in page
    assert "<b>" not in page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the report of `make_rows()`."""
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, make_rows(), caller=CALLER)
    return folder


def test_the_report_names_setup_and_how_to_build_it_again(written: pathlib.Path) -> None:
    text = (written / "report.md").read_text()
    for expected in (
        "## 2 of 8 shards with random labels\n\nfashion_mnist, 8 replicas, noisy shards 0, 1.\n",
        "| splits | train 55,000, held-out 5,000, test 10,000 |",
        "| shards | 8 of 6,875 to 6,875 samples; noisy: 0, 1 |",
        "| seeds | sequential: 0, 1, 2; sync: 0, 1, 2; plain: 0, 1, 2; weighted: 0, 1, 2 |",
        "| hardware | device cpu, kind cpu, count 1, processor Any Processor 3000, cores 2 |",
        "| versions | jax 0.10.2, flax 0.12.8, python 3.11.7, wavg_jax 0.1.0 |",
        "\n--hidden=256,256\n",
        "\n--augment=false\n",
        "```\nbuild DIR...\n```",
    ):
        assert expected in text
    assert "--parameters" not in text
    for name in re.findall(r"\((plots/[^)]*)\)", text):
        assert (written / name).read_bytes().startswith(b"\x89PNG")


def test_the_same_rows_give_the_same_bytes(written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    again = write_report(tmp_path, json.loads(json.dumps(make_rows())), caller=CALLER)
    assert len(again) == 9
    for path in again:
        assert path.read_bytes() == (written / path.relative_to(tmp_path)).read_bytes(), path.name


@pytest.fixture
def one_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces drawing, which takes most of the time, where files matter and figures do not."""
    monkeypatch.setattr(
        run_report, "draw_scenario", lambda *_: (canvas.Plot("only", "Only", "A plot.", b"png", b"dark"),)
    )
    monkeypatch.setattr(
        run_report, "draw_headline", lambda *_: canvas.Plot("headline", "First", "A plot.", b"png", b"dark")
    )


@pytest.mark.usefixtures("one_plot")
def test_scenarios_get_sections_and_plots_of_their_own(tmp_path: pathlib.Path) -> None:
    write_report(tmp_path, [*make_run("weighted", 0, (0, 1)), *make_run("weighted", 0, ())])
    text = (tmp_path / "report.md").read_text()
    assert "## 2 of 8 shards with random labels\n\nfashion_mnist, 8 replicas, noisy shards 0, 1.\n" in text
    assert "## Clean shards\n\nfashion_mnist, 8 replicas, no noisy shards.\n" in text
    assert text.count("### Final quality") == 2
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"headline.png", "1-only.png", "2-only.png"}
    assert re.findall(r"\((plots/.*)\)", text) == [*("plots/headline.png", "plots/1-only.png", "plots/2-only.png")]


@pytest.mark.usefixtures("one_plot")
def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: pathlib.Path) -> None:
    write_report(tmp_path, make_rows(seeds=1))
    old = (tmp_path / "report.md").read_bytes()
    with pytest.raises(DataError):
        write_report(tmp_path, [])
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WorkdirError, match="cannot be written"):
        write_report(tmp_path / "file", make_rows(seeds=1))
    full = unittest.mock.patch("os.replace", side_effect=OSError(28, "No space left on device"))
    with full, pytest.raises(WorkdirError, match="No space left on device"):
        write_report(tmp_path, make_rows(seeds=2))
    assert (tmp_path / "report.md").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "plots", "report.html", "report.md"]


@pytest.mark.parametrize(
    "rows",
    [
        make_rows(seeds=1, arms=("sequential",)),
        make_run("plain", 0, (), rounds=1),
        [row | {"test_accuracy": None, "effective_replicas": None} for row in make_rows(seeds=2, arms=("weighted",))],
        [row | {"weights": [None] * 8, "alive": [False] * 8} for row in make_run("weighted", 0, ())],
    ],
    ids=["one replica", "one round", "not finite", "all dead"],
)
def test_odd_rows_are_reported_all_the_same(rows: list[Row], tmp_path: pathlib.Path) -> None:
    assert tmp_path / "report.md" in write_report(tmp_path, rows)
    assert text_of(rows)


def test_the_binary_builds_the_report_from_the_rows_alone(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], one_plot: None
) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        rows = [*make_run("plain", seed, ()), *make_run("weighted", seed, ())]
        (tmp_path / str(seed) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(out=str(tmp_path / "both")):
        binary.main([str(tmp_path / "0"), str(tmp_path / "1" / "rows.jsonl")])
    said = capsys.readouterr().out
    assert re.search(rf"weighted {MINUS} plain +2 ", said)
    assert said.index("Did weighting help? Too few seeds to show a difference: clean shards.") > said.index("Weights")
    assert said.index("One device that is already busy") < said.index("Did weighting help?")
    assert said.count("wrote") == 1
    assert said.endswith(f"\nwrote {tmp_path / 'both' / 'report.md'}, report.html and plots/\n")
    assert (tmp_path / "both" / "report.html").exists()
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["rows.jsonl"]
    binary.main([str(tmp_path / "1" / "rows.jsonl")])
    assert (tmp_path / "1" / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no RUN given"),
        ("", "no rows"),
        ('{"kind": "run"\n{}\n', "line 1"),
        ('{"kind": "run", "run": "a"}\n', "lacks"),
    ],
)
def test_bad_input_to_the_binary_is_refused_before_anything_is_written(
    content: str | None, message: str, tmp_path: pathlib.Path
) -> None:
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(WavgError, match=message) as caught:
        binary.main([] if content is None else [str(tmp_path)])
    assert "\n" not in str(caught.value)
    assert len(list(tmp_path.iterdir())) == (content is not None)


def test_bad_input_to_the_binary_is_one_line_and_exit_code_2(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "experiments.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no rows in" in done.stderr
    assert done.stderr.count("\n") == 1
