"""What the pages of docs/ say is true: their code runs, nothing public is missing, numbers are those recorded."""

import inspect
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import pytest

import wavg_jax as wavg
from wavg_jax import reporting

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
OWN = sorted(path for path in DOCS.glob("*.md") if not path.is_symlink())
CODE = {path.name: re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL) for path in OWN}
WEIGHTINGS = (DOCS / "weightings.md").read_text()
MODULES = {"reporting": reporting} | {
    name: getattr(wavg, name) for name in wavg.__all__ if inspect.ismodule(getattr(wavg, name))
}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, blocks in CODE.items() if blocks])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in CODE[page]:
        exec(block, names)
    assert EXPECTED[page](names, capsys.readouterr().out)


def finds_bad_shards(names, said):
    weights = names["weighted"].rows[-1]["weights"]
    better = names["weighted"].rows[-1]["test_loss"] < names["plain"].rows[-1]["test_loss"]
    return better and max(weights[0], weights[2]) < min(weights[1], weights[3]) and said.endswith("True\n")


EXPECTED = {
    "quickstart.md": finds_bad_shards,
    "bad_shards.md": lambda names, said: names["worth"].argmin() == 1 and names["worth"][1] < 0,
    "local_steps.md": lambda names, said: said == "25\n",
    "reliability.md": lambda names, said: said == "True\n",
    "weightings.md": lambda names, said: names["weights"].tolist() == [0.5, 0.5, 0.0],
}


def documented():
    """The names that the reference has: {module: names}, or None where all of a module's are."""
    found = {}
    for path in (DOCS / "api").glob("*.md"):
        module = "wavg_jax"
        for directive, name in re.findall(r"^\.\. (\w+):: ([\w.]+)$", path.read_text(), re.MULTILINE):
            if directive == "currentmodule":
                module = name
            elif directive == "automodule":
                module, found[name] = name, None
            else:
                found.setdefault(module, set()).add(name)
    return found


def test_the_reference_has_every_public_name():
    found = documented()
    assert {name for name, names in found.items() if names is None} == {f"wavg_jax.{name}" for name in MODULES}
    assert found["wavg_jax"] == set(wavg.__all__) - set(MODULES)


def weightings():
    """The functions of the library that return a weighting."""
    for module in (wavg, wavg.robust):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) and inspect.signature(value).return_annotation is wavg.Weighting:
                yield name


def test_the_page_of_weightings_has_each_with_formula_cost_evidence_and_use():
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", WEIGHTINGS, re.DOTALL | re.MULTILINE))
    assert set(sections) == set(weightings())
    for name, text in sections.items():
        says = text.split("- **Cost**")[0].strip()
        assert says, name
        assert [word for word in ("Cost", "Evidence", "Use it") if f"- **{word}**" not in text] == [], name


def rows_of(table):
    """{first cell: the other cells} of a table in Markdown, with its header as ''."""
    lines = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"
    ]
    return {"": lines[0]} | {line[0]: line for line in lines[2:]}


def test_the_accuracies_of_weightings_are_those_of_the_reports():
    tables = re.findall(r"\[report\]\(\.\./(.*?)\)\):\n\n((?:\|.*\n)+)", WEIGHTINGS)
    assert len(tables) == 2
    for report, table in tables:
        recorded = rows_of((ROOT / report).read_text().split("## Test accuracy (%)")[1].split("##")[0])
        columns = [recorded[""].index(name) for name in ("IID", "4 of 8 noisy", "Dirichlet 0.1")]
        columns.append(next(i for i, name in enumerate(recorded[""]) if name.startswith("1 of 8 at 10")))
        written = rows_of(table)
        del written[""]
        assert len(written) > 5
        for name, cells in written.items():
            name = name.rsplit("`", 1)[1]  # behind the call
            assert cells[1:] == [recorded[name][column] for column in columns], name


def test_the_accuracies_of_local_steps_are_those_of_the_report():
    report = (ROOT / "experiments/results/reductions_fashion/report.md").read_text()
    recorded = rows_of(report.split("## Test accuracy (%)")[1].split("##")[0])["plain"][1:]
    assert rows_of((DOCS / "local_steps.md").read_text())["test accuracy, %"][1:] == recorded


@pytest.mark.parametrize("path", sorted((DOCS / "pictures").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_drawn_for_readers_of_screens_too_and_in_colours_of_the_page(path):
    picture = ElementTree.parse(path).getroot()
    assert len(picture.findtext("{http://www.w3.org/2000/svg}title")) > 40
    assert not re.search(r"(fill|stroke)=\"#|style=\"[^\"]*#", path.read_text())
    assert f":file: pictures/{path.name}" in (DOCS / "concepts.md").read_text()


QUESTIONS = (
    "momentum",
    "BatchNorm",
    "differ in speed",
    "Which replica",
    "Step counters",
    "How much memory",
    "Why is one GPU",
    "What is a quorum",
)


def test_the_questions_of_users_of_neighbours_are_answered():
    answers = re.split(r"\n\n(?=\*\*)", (DOCS / "faq.md").read_text())
    for question in QUESTIONS:
        assert any(question in answer and len(answer) > 150 for answer in answers), question


def test_the_site_is_built_without_a_warning_beside_the_lint():
    line = "python -m sphinx -q -W --keep-going -n -b html docs"
    assert line in (ROOT / ".ci" / "run").read_text()
    assert "fail_on_warning: true" in (ROOT / ".readthedocs.yaml").read_text()
