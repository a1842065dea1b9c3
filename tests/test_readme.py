"""What README says is true: its snippets run as they stand, and the files and flags it names exist."""

import importlib
import pathlib
import re

import numpy as np
import pytest
from absl import flags

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    name: ROOT / name
    for name in (
        *("README.md", "BUILD_NOTES.md", ".github/CONTRIBUTING.md", "docs/faq.md", "docs/features.md"),
        *("experiments/README.md", "experiments/results/README.md"),
    )
}
PAGES |= {f"docs/{path.name}": path for path in (ROOT / "docs").glob("*.md") if not path.is_symlink()}
TEXTS = {name: path.read_text() for name, path in PAGES.items()}


AVERAGING, ROUND, RUN, WORKERS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_only_the_averaging_runs_as_it_stands_and_leaves_out_the_bad_shard():
    names = {}
    exec(AVERAGING, names)
    assert np.abs(names["params"] - np.array([1.0, -2.0, 0.5])).max() < 1e-3
    assert names["weights"][3] < 1e-3
    assert names["update"]._cache_size() == 1


def test_one_round_runs_as_it_stands_and_compiles_once():
    names = {}
    exec(ROUND, names)
    assert int(names["state"].round) == 20
    assert names["step"]._cache_size() == 1
    x, y = names["held_out"]
    logits = names["task"].predict(names["state"].params, names["state"].mutable, x)
    assert (np.argmax(logits, axis=1) == y).mean() > 0.8


def test_the_whole_run_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(RUN, names)
    assert (tmp_path / "runs" / "a" / "rows.jsonl").exists()
    last = names["result"].rows[-1]
    assert last["round"] == 20
    assert last["test_accuracy"] > 0.8


@pytest.mark.slow
def test_the_same_run_in_workers_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(RUN + WORKERS, names)
    last = names["result"].rows[-1]
    assert last["round"] == 20
    assert last["test_accuracy"] > 0.8
    assert len(last["workers"]) == 4


def _anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


FOUND = {(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\(([^)]+)\)", text)}
# Those within the site are checked by Sphinx, which knows what a page includes.
LINKS = sorted(one for one in FOUND if not one[1].startswith("https://") and (one[0][:5] != "docs/" or "../" in one[1]))


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_point_at_files_and_headings(page, link):
    path, _, anchor = link.partition("#")
    target = (PAGES[page].parent / path).resolve() if path else PAGES[page]
    assert target.exists()
    assert not anchor or anchor in _anchors(target)


def test_pictures_are_recorded_files():
    sources = re.findall(r'<img src="([^"]+)"', README)
    assert sources
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "BUILD_NOTES.md"])  # that names XLA's flags too
def test_flags_that_are_named_exist(page):
    for binary in (
        "compare",
        "elastic",
        "evidence",
        "expected",
        "torture",
        "report",
        "soup",
        "train",
        "tune",
        "plan",
        "launch",
        "benchmarks.links",
        "benchmarks.peers",
        "benchmarks.throughput",
    ):  # each defines flags when imported
        assert callable(importlib.import_module(f"experiments.{binary}").main)
    known = set(flags.FLAGS) | {"help", "flagfile", "fuzz"}  # the last is pytest's
    assert {name for name in re.findall(r"--([a-z_]+)", TEXTS[page]) if not name.startswith("xla_")} <= known


def test_the_map_names_every_room():
    rooms = {path.parent.name for path in (ROOT / "wavg_jax").glob("*/__init__.py")}
    rows = re.findall(r"^\| (`\w+/`(?:, `\w+/`)*) \|", README, re.MULTILINE)
    assert {room for row in rows for room in re.findall(r"`(\w+)/`", row)} - {"wavg_jax"} == rooms


def test_modules_that_the_notes_name_exist():
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", TEXTS["BUILD_NOTES.md"]))
    assert len(named) > 5
    assert {name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "wavg_jax"))} == set()
