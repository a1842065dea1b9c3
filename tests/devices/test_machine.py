"""The version that rows carry tells commits apart, and takes no other repository for ours."""

import importlib.metadata
import json
import pathlib
import subprocess

import pytest

import wavg_jax as wavg
from wavg_jax.devices import machine
from wavg_jax.training import automap

PROJECT = '[project]\nname = "wavg-jax"\n'


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with a package beside its pyproject.toml."""
    package = tmp_path / "wavg_jax"
    package.mkdir()
    (package / "a.py").write_text("")
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "first")
    return package


def test_the_package_says_its_version():
    assert wavg.__version__ == importlib.metadata.version("wavg-jax")
    assert machine.versions()["wavg-jax"].split("+")[0] == wavg.__version__
    assert set(machine.versions()) == {"python", "jax", "jaxlib", "flax", "optax", "numpy", "wavg-jax"}


def test_a_checkout_says_its_commit_and_whether_files_have_changed(checkout, monkeypatch):
    commit = git(checkout, "rev-parse", "--short=7", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    assert machine._checked_out(checkout) == commit
    (checkout / "a.py").write_text("changed")
    assert machine._checked_out(checkout) == f"{commit}.dirty"


def test_another_repository_does_not_pass_for_ours_and_a_missing_git_is_no_error(checkout, monkeypatch):
    inside = checkout.parent / "environment" / "wavg_jax"  # such as an environment's site-packages inside a checkout
    inside.mkdir(parents=True)
    assert machine._checked_out(inside) is None
    monkeypatch.setenv("PATH", "")
    assert machine._checked_out(checkout) is None
    monkeypatch.undo()
    (checkout.parent / "pyproject.toml").write_text(PROJECT.replace("wavg", "other"))
    assert machine._checked_out(checkout) is None


def test_a_package_that_pip_installed_from_a_repository_says_its_commit(tmp_path, monkeypatch):
    class Installed:
        def read_text(self, name):
            return json.dumps({"url": "https://host/wavg", "vcs_info": {"vcs": "git", "commit_id": "0123456789"}})

        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    assert machine._installed_from(tmp_path / "wavg_jax") == "0123456"
    assert machine._installed_from(pathlib.Path("/elsewhere/wavg_jax")) is None
    monkeypatch.setattr(Installed, "read_text", lambda self, name: None)
    assert machine._installed_from(tmp_path / "wavg_jax") is None


def test_a_new_commit_does_not_time_the_replica_maps_again(monkeypatch):
    before = automap._where()
    monkeypatch.setattr(machine, "build", lambda: "0.1.0+gfffffff")
    assert automap._where() == before


@pytest.mark.parametrize(
    ("flags", "xla", "says"),
    [
        ("fpu sse4_2 avx avx2", None, "AVX2"),
        ("fpu sse4_2 avx avx2 avx512f avx512_bf16", None, "AVX512_BF16"),
        ("fpu sse4_2 avx avx2 avx512f", "--xla_cpu_max_isa=avx2", "AVX2 (xla_cpu_max_isa; the processor has AVX512)"),
        ("avx2 avx512f", "--a=1 --xla_cpu_max_isa=AVX --xla_cpu_max_isa=AVX512", "AVX512"),  # the last one counts
        ("fpu avx2", "--xla_cpu_max_isa=AMX", "AVX2"),  # no cap at all
        ("fpu avx2", "--xla_cpu_max_isa=NONE", "AVX2"),
        ("fp asimd", "--xla_cpu_max_isa=AVX2", "unknown"),
    ],
)
def test_the_instruction_set_is_the_processors_or_its_cap(flags, xla, says, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some: Processor\nflags\t\t: {flags}\nvmx flags\t: amx_fp16\n\n")
    monkeypatch.setattr(machine, "_CPUINFO", cpuinfo)
    monkeypatch.setenv("XLA_FLAGS", xla or "")
    assert machine.isa() == says
    assert machine.hardware()["isa"] == says
    assert machine.hardware()["processor"] == "Some: Processor"


def test_a_machine_that_tells_nothing_has_an_unknown_instruction_set(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "missing")
    assert machine.isa() == "unknown"
