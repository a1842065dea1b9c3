"""Without the extras everything works but folders, bars, reports and TFDS, and what is missing is named in one line."""

import pathlib
import subprocess
import sys

import pytest
from runs import ENVIRONMENT

import wavg_jax as wavg
from wavg_jax.extras import need

ROOT = pathlib.Path(__file__).parent.parent
# flax and optax import parts of absl, orbax and rich themselves, so they come first.
BARE = """
import runpy, sys
import flax.linen, flax.nnx, optax

optional = ["IPython", "PIL", "absl", "filelock", "markdown_it", "matplotlib", "orbax", "rich", "scipy"]
optional += ["ray", "orbax.checkpoint", "rich.console", "rich.progress", "rich.table", "tensorflow_datasets"]
sys.modules.update(dict.fromkeys(optional))  # None: importing one fails
"""


def bare(code, *arguments):
    """Runs code in a process that has no optional package."""
    command = [sys.executable, *arguments, "-c", BARE + code]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)


def test_averager_rounds_and_fit_without_a_folder_need_no_extra_and_a_folder_says_which():
    done = bare("runpy.run_path('.ci/light.py')", "-W", "error")
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")  # no bar, and no complaint that there is none


@pytest.mark.parametrize("name", ["filelocks", "filelocks.unix", "wavg_jax.filelocks"])
def test_a_missing_package_is_one_line_that_names_its_extra(name):
    with pytest.raises(wavg.MissingExtra) as raised:
        need(name, extra="run", why="workdir=")
    missing = name.removesuffix(".unix")
    assert str(raised.value) == f"workdir= needs {missing}, which is not installed: pip install 'wavg-jax[run]'"
    assert isinstance(raised.value, ImportError)
    assert isinstance(raised.value, wavg.WavgError)


def test_a_package_that_is_there_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs") as raised:
        need("broken_package", extra="run", why="workdir=")
    assert not isinstance(raised.value, wavg.MissingExtra)


def test_the_binaries_name_the_extra_in_one_line():
    code = "sys.argv[:] = ['-m']\nimport experiments"  # as Python has it while it looks for experiments.compare
    done = bare(code)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the binaries need absl-py, filelock, ")
    assert line.endswith('python -m pip install -e ".[experiments]"')


def test_the_workers_of_the_peers_need_no_extra():
    code = "sys.argv[:] = ['-m']\nsys.orig_argv = ['python', '-m', 'experiments.benchmarks.peer_workers.x']\n"
    assert bare(code + "import experiments").returncode == 0


def test_elastic_runs_name_their_extra_before_anything_is_trained():
    code = """
import wavg_jax as wavg
from runs import INNER, TASK, WEIGHTED
from small import sharded

wavg.elastic.fit(TASK, sharded(4), WEIGHTED, inner=INNER, local_steps=2, rounds=2, batch_size=8)
"""
    done = bare(code)
    line = done.stderr.splitlines()[-1]
    assert line.endswith("elastic.fit needs ray, which is not installed: pip install 'wavg-jax[ray]'")
