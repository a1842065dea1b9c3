"""Which recordings are older than the code that they ran."""

import json
import subprocess

import pytest
from binary import invoke

import wavg_jax as wavg
from experiments import stale
from wavg_jax.storage.rows import read_rows


def test_a_program_needs_what_it_imports():
    files = stale.needed("experiments.evidence")
    assert {"experiments/setup/trial.py", "wavg_jax/rounds/round.py", "wavg_jax/averaging/averager.py"} <= files
    assert {"experiments/setup/__init__.py", "wavg_jax/rounds/__init__.py"} <= files  # they run on the way
    assert "experiments/soup.py" not in files
    assert not [path for path in files if not (stale.ROOT / path).exists()]


def test_a_program_needs_what_it_starts():
    assert "experiments/train.py" in stale.needed("experiments.benchmarks.links")
    assert {"experiments/train.py", "experiments/compare.py"} <= stale.needed("experiments.benchmarks.startup")
    workers = {path.name for path in (stale.ROOT / "experiments/benchmarks/peer_workers").glob("*_worker.py")}
    started = {path.rpartition("/")[2] for path in stale.needed("experiments.benchmarks.peers")}
    assert {"ours_worker.py", "torch_worker.py"} <= workers & started
    assert "experiments/train.py" not in stale.needed("experiments.scenarios")


def test_a_program_needs_what_computes_rows_of_what_reports_are_made_of():
    parts = {f"wavg_jax/reporting/{name}.py" for name in ("matrix", "recovery", "statistic", "wording")}
    assert parts <= stale.needed("experiments.expected")
    assert not stale.REPORTS & stale.needed("experiments.expected")
    assert not parts & stale.needed("experiments.compare")
    assert all((stale.ROOT / path).exists() for path in stale.REPORTS)


def test_the_program_of_a_training_is_told_where_it_can_be(tmp_path):
    run = {"kind": "run", "run": "plain-seed0"}
    compare, train_ = "experiments.compare", "experiments.train"
    assert stale.programs_of([run], tmp_path) == (compare, train_)
    assert stale.programs_of([run, run], tmp_path) == (compare,)
    (tmp_path / "run.flags").write_text("# python -m experiments.train --arm=ARM, then python -m experiments.report\n")
    assert stale.programs_of([run, run], tmp_path) == (train_,)
    for name, made in (("digits", compare), ("cifar10_94_short", train_), ("smoke_mnist", train_)):
        assert stale.programs_of(read_rows(stale.RESULTS / name), stale.RESULTS / name) == (made,)
    with pytest.raises(wavg.DataError, match="is no more"):
        stale.programs_of([{"kind": "benchmark", "run": "x", "name": "another"}], tmp_path)


def test_comments_and_docstrings_are_no_code():
    one, two = "def f(x):\n    return x\n", 'def f(x):\n    """Text."""\n    return x  # as it is\n'
    assert stale._code(one) == stale._code(two) != stale._code(one.replace("x\n", "-x\n"))


def test_recordings_are_told_from_newer_code(capfd, tmp_path, monkeypatch):
    commit = subprocess.run(
        ["git", "-C", str(stale.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout[:7]
    rows = [json.loads(line) for line in (stale.RESULTS / "scenarios" / "rows.jsonl").read_text().splitlines()[:2]]
    changed = stale.changed
    folders = [tmp_path / name for name in ("named", "unnamed", "lost", "none")]
    for folder, version in zip(folders, (f"0.1.0+g{commit}", "0.1.0", "0.1.0+gdeadbee"), strict=False):
        folder.mkdir()
        rows[0]["versions"]["wavg-jax"] = version
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(stale, "changed", lambda *asked: [] if asked[1] == commit else changed(*asked))
    assert invoke(stale.main, *map(str, folders)) == 0
    named, unnamed, lost, none, *_, last = (line for line in capfd.readouterr().out.splitlines()[1:] if line)
    assert named.split()[1:] == [commit, "scenarios", "nothing"]
    assert unnamed.split()[1:] == ["-", "scenarios", "unknown"]
    assert "error: the repository has no commit deadbee" in lost
    assert "error: no rows in" in none  # and the others are listed all the same
    assert last == (
        "0 of 4 recordings ran code that has changed since; 1 unknown, since their rows name no commit; "
        "2 not judged, for the errors above."
    )
