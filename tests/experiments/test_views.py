"""Live views from the command line: what --log_to and --profile write, and what they refuse."""

import re
import sys

import pytest
from binary import invoke

from experiments import compare, train, tune

QUICK = ("--rounds=2", "--replicas=2", "--local_steps=2", "--hidden=8", "--devices=1")


def test_a_run_is_logged_and_traced_where_its_flags_say_and_a_log_repeats_no_line(tmp_path, capfd):
    pytest.importorskip("tensorboardX")
    where = (f"--workdir={tmp_path / 'run'}", f"--log_to=tensorboard:{tmp_path / 'events'}", "--profile=2")
    assert invoke(train.main, *where, *QUICK) == 0
    assert list((tmp_path / "events" / "weighted-seed0").iterdir())
    assert list((tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz"))
    written = "\n".join(capfd.readouterr())
    lines = [line.strip() for line in written.splitlines() if len(line.split()) > 3]
    assert len(set(lines)) == len(lines)
    assert not re.search(r"samples/s| left\b|\r|\x1b", written)  # the bar's


@pytest.mark.parametrize("given", ["tensorboard", "tensorboard:", "comet:x", "tensorboard:a,b"])
def test_a_view_that_is_none_is_refused_before_anything_is_written(given, tmp_path, capfd):
    for binary in (train, compare):
        assert invoke(binary.main, f"--workdir={tmp_path / 'run'}", f"--log_to={given}", *QUICK) == 2
        (line,) = capfd.readouterr().err.splitlines()
        said = given.rpartition(",")[2]
        assert line.startswith(f"error: --log_to={said}: give tensorboard:FOLDER, mlflow:URI or wandb:PROJECT")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_line_that_names_its_extra(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert invoke(train.main, f"--workdir={tmp_path / 'run'}", "--log_to=wandb:x", *QUICK) == 2
    said = "error: live.wandb needs wandb, which is not installed: pip install 'wavg-jax[wandb]'\n"
    assert capfd.readouterr().err == said


def test_a_trace_of_no_round_and_a_view_where_there_is_none_are_refused(tmp_path, capfd):
    assert invoke(train.main, f"--workdir={tmp_path / 'run'}", "--profile=3", *QUICK) == 2
    assert capfd.readouterr().err == "error: --profile=3: the run takes a trace of 1 to 2; choose another round\n"
    assert invoke(tune.main, "--log_to=wandb:x", *QUICK) == 2
    assert "error: --log_to has no effect here" in capfd.readouterr().err
