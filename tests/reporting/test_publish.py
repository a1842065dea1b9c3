"""The two calls into the room: rows alone are enough, in a notebook, a terminal or a folder."""

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from reports import MINUS, PAIRS, Row, make_rows, make_run, text_of

from wavg_jax import reporting
from wavg_jax.base import DataError
from wavg_jax.reporting import canvas

ROOM = pathlib.Path(reporting.__file__).parent

# What a notebook on recorded rows runs, with a stand-in for the library's own `__init__`, which imports all rooms.
NOTEBOOK = """
import json, pathlib, sys, types
library = types.ModuleType("wavg_jax")
library.__path__ = [sys.argv[1]]
sys.modules["wavg_jax"] = library

from wavg_jax import reporting
assert not {"matplotlib", "scipy", "rich", "markdown_it"} & set(sys.modules), "imported before it is needed"
rows = [json.loads(line) for line in open(sys.argv[2])]
from wavg_jax.reporting import canvas
canvas.DPI = 30
report = reporting.summarise(rows)
assert "<table>" in report._repr_html_()
assert all(plot._repr_png_().startswith(b"\\x89PNG") for plot in report.figures())
reporting.write_report(sys.argv[3], rows)
used = {name.split(".")[2] for name in sys.modules if name.startswith("wavg_jax.devices.")}
assert used <= {"network", "processes", "watch", "sockets"}, used  # what a link costs, and which process writes
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("wavg_jax.")}
print(sorted(rooms))
"""


def test_a_notebook_summarises_and_writes_from_rows_without_a_line_of_training(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    arguments = [str(ROOM.parent), str(tmp_path / "rows.jsonl"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", NOTEBOOK, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['arguments', 'base', 'devices', 'extras', 'lazy', 'reporting', 'storage']"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "report.html", "plots"}


def test_the_room_knows_no_binary_and_no_flag() -> None:
    for path in ROOM.glob("*.py"):
        text = path.read_text()
        assert "experiments" not in text, path
        # Two dashes begin a flag, but also the name of a colour in CSS.
        assert not re.search(r"[\s\"'(]--\w", text) or path.name == "page.py", path


def test_a_notebook_shows_the_answer_and_the_tables() -> None:
    shown = reporting.summarise(make_rows())._repr_html_()
    assert shown.index("Did weighting help?") < shown.index("<strong>Weighting helped:") < shown.index("<table>")
    assert shown.count("<table>") == 4
    assert "<img" not in shown
    assert "<style" not in shown  # which would restyle the whole notebook


def test_a_name_that_the_room_does_not_have_is_an_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'sumarise'"):
        reporting.sumarise  # noqa: B018


def test_a_missing_extra_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.delitem(vars(reporting), "summarise", raising=False)
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImportError, match="reports need matplotlib: pip install") as caught:
        reporting.summarise  # noqa: B018
    assert "\n" not in str(caught.value)


def renamed(rows: list[Row], **names: str) -> list[Row]:
    return [row | {"arm": names.get(row["arm"], row["arm"])} for row in rows]


def test_any_names_of_arms_do_and_equal_weights_mark_the_reference() -> None:
    rows = renamed(make_rows(), plain="baseline", weighted="ours", sync="big batch")
    said = text_of(rows, 200)
    assert "ours ended with a test accuracy" in said
    assert re.search("points above baseline's", said)
    assert f"ours {MINUS} baseline" in said
    alone = [row for row in rows if row["arm"] != "baseline"]
    assert "No reference to compare with: 2 of 8 shards" in text_of(alone, 200)


def test_the_reference_may_be_named() -> None:
    (one,) = reporting.summarise(make_rows(), reference="sync").summaries
    assert one.reference == "sync"
    assert set(one.arms[2].differences) > {"accuracy", "loss"}
    (one,) = reporting.summarise(make_rows(), reference="nobody").summaries
    assert one.reference == ""
    assert not any(arm.differences for arm in one.arms)


def test_arms_are_described_by_their_rows_unless_the_caller_knows_better(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canvas, "DPI", 30)
    rows = make_rows(seeds=1, arms=("sync", "plain", "weighted"))
    reporting.write_report(tmp_path, rows, caller=reporting.Caller({"weighted": "what we sell"}))
    text = (tmp_path / "report.md").read_text()
    assert "- **sync**: one network, 50 steps a round with batch size 32.\n" in text
    plain = "8 replicas, 50 steps a round with batch size 32, blended with equal weights after every round"
    assert f"- **plain**: {plain}.\n" in text
    assert "- **weighted**: what we sell.\n" in text
    assert "\nhidden=256,256\n" in text  # a setting, and no flag
    assert "Build it again" not in text


def test_rows_that_fit_no_report_are_refused_in_one_line() -> None:
    with pytest.raises(DataError, match="hold no run"):
        reporting.summarise([])
    with pytest.raises(DataError, match="'plain-seed0', which has no run row"):
        reporting.summarise(make_run("plain", 0, ())[1:])
