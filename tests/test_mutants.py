"""The record of mutants: each survivor is named with a test that is there, or with a reason; the counts are right."""

import json
import pathlib

import mutants
import pytest

RECORDED = mutants.ROOT / "experiments" / "results" / "mutants"
RECORD = json.loads((RECORDED / "mutants.json").read_text())
SURVIVORS = [row for row in RECORD["mutants"] if not row["killed_by"]]


@pytest.mark.parametrize("row", SURVIVORS, ids=lambda row: f"{row['path']}:{row['line']}")
def test_a_survivor_is_killed_since_by_a_test_that_is_there_or_explained(row):
    if mutants.equivalent(row):
        return
    file, name = row["verdict"].split("::")
    assert row["killed_since"]
    assert f"def {name.partition('[')[0]}(" in (mutants.ROOT / "tests" / file).read_text()


def test_the_page_is_that_of_the_record():
    assert mutants.page(RECORD) == (RECORDED / "mutants.md").read_text()
    since = mutants.share(RECORD, lambda row: bool(row["killed_by"] or row.get("killed_since")))
    assert since == pytest.approx(RECORD["since"])
    assert mutants.share(RECORD, lambda row: bool(row["killed_by"])) == pytest.approx(RECORD["at_first"])


def test_shares_by_hand():
    def row(module, killed_by, verdict=""):
        return {"module": module, "killed_by": killed_by, "verdict": verdict}

    rows = [row("a", "x"), row("a", "", "a.py::test"), row("a", "", "equivalent"), row("b", "x")]
    found = mutants.share({"places": {"a": 30, "b": 10, "c": 60}, "mutants": rows}, lambda row: bool(row["killed_by"]))
    assert (found["killed"], found["of"]) == (2, 3)
    assert found["of_places"] == pytest.approx((30 * 0.5 + 10) / 40)  # of c, nothing was tried
    assert (found["low"], found["high"]) == pytest.approx((0.208, 0.939), abs=1e-3)


def test_operators_stay_in_their_family_and_types_are_left_alone():
    assert mutants.same_family("core/ReplaceBinaryOperator_Add_Mul")
    assert not mutants.same_family("core/ReplaceBinaryOperator_Add_LShift")
    assert not mutants.same_family("core/ReplaceComparisonOperator_Is_Lt")
    assert all(map(mutants.same_family, ("core/AddNot", "core/ReplaceUnaryOperator_USub_Not", "core/NumberReplacer")))
    source = "def f(x: int | None, *, y=1 | 2) -> int | str:\n    z: int | None = x | y\n"
    spans = [source.splitlines()[start[0] - 1][start[1] : end[1]] for start, end in mutants.annotations(source)]
    assert sorted(spans) == ["int | None", "int | None", "int | str"]


def test_files_and_tests_of_every_module_are_there():
    for module in mutants.MODULES.values():
        for name in module.files.split():
            assert (mutants.ROOT / "wavg_jax" / f"{name}.py").exists()
        for name in f"{module.own} {module.neighbours}".split():
            assert pathlib.Path(mutants.ROOT / "tests" / f"{name}.py").exists()
