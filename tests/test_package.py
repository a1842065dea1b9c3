"""What is built: a wheel that does without the repository, from any folder, and the source archive it is built from."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools import find_packages

from experiments import wavg

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = (
    *("wavg_jax", "experiments", "pyproject.toml"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"),
)
QUICK = ("--rounds=2", "--replicas=2", "--local_steps=2", "--hidden=8", "--devices=1")


def said(*command, cwd, code=0, **variables):
    """What a command writes, both streams; it must end with the exit code."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"JAX_PLATFORMS": "cpu", "COLUMNS": "80"} | variables
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and of the source archive that it was built from, made of a copy of the tree."""
    folder = tmp_path_factory.mktemp("built")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name, **({"ignore": ignored} if copy is shutil.copytree else {}))
    said(sys.executable, "-m", "build", "--no-isolation", ".", cwd=folder)
    return folder / "dist"


def ignored(folder, names):
    return [name for name in names if name in ("results", "notebooks", "__pycache__")]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A new environment with the wheel, and with what this one has beside the library."""
    folder = tmp_path_factory.mktemp("environment")
    (wheel,) = built.glob("*.whl")
    said(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    said(
        *(sys.executable, "-m", "pip", "--python", str(folder), "--disable-pip-version-check"),
        *("install", "--no-deps", "--no-index", str(wheel)),
        cwd=folder,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    # Lines of a .pth file only add folders: no editable installation in them is found.
    beside = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "beside.pth").write_text("\n".join(beside) + "\n")
    return folder / "bin"


def test_every_package_is_listed():
    # The peers' workers run in environments of their own.
    binaries = find_packages(ROOT / "experiments", exclude=["benchmarks.peer_workers"])
    expected = {*find_packages(ROOT, include=["wavg_jax*"]), "wavg_commands", *(f"wavg_commands.{b}" for b in binaries)}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == expected


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_the_binaries_and_nothing_else_at_its_top(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "wavg_jax",
        "wavg_commands",
        f"wavg_jax-{PROJECT['version']}.dist-info",
    }
    assert {"wavg_jax/py.typed", "wavg_jax/data/digits.npz", "wavg_commands/presets/fashion.flags"} <= set(names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "wavg_jax").rglob("*.py")}
    assert modules == {name for name in names if re.match(r"wavg_jax/.*\.py$", name)}
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    assert {"experiments/train.py", "experiments/presets/digits.flags"} <= inside
    assert not [name for name in inside if name.startswith("experiments/results")]
    said(sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir()), cwd=built)


@pytest.mark.slow
def test_the_installed_command_runs_in_any_folder_even_beside_other_experiments(installed, tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("raise ValueError('of the user')")
    command = str(installed / "wavg")
    assert said(command, "--version", cwd=tmp_path) == f"wavg {PROJECT['version']}\n"
    assert "wrote a/report.md" in said(command, "train", "--arm=plain", "--workdir=a", *QUICK, cwd=tmp_path)
    assert "wavg report DIR..." in (tmp_path / "a" / "report.md").read_text()
    preset = "--flagfile=experiments/presets/digits.flags"  # beside the binaries, not in this folder
    written = said(command, "launch", "--processes=1", "--", "train", preset, "--help", cwd=tmp_path)
    assert "wavg train --arm=weighted" in written
    assert "experiments.train" not in written


@pytest.mark.slow
def test_the_readme_snippet_runs_from_the_wheel(installed, tmp_path):
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    where = "import wavg_jax; print(wavg_jax.__file__)"
    written = said(str(installed / "python"), "-c", f"{snippet}\n{where}", cwd=tmp_path)
    assert str(installed.parent) in written


def test_the_command_lists_every_binary_with_its_purpose_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["wavg"])
    wavg.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    named = [line.split()[0] for line in lines if re.match(r"  \w", line)]
    assert named == sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py") if path.stem != "wavg")


def test_an_unknown_command_is_one_line_that_names_the_others(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wavg", "compair"])
    with pytest.raises(SystemExit) as ended:
        wavg.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is no command 'compair'; choose from chaos, compare, elastic, ")


def test_citation_and_project_name_the_same_version_and_licence():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation


def pinned(name):
    """{project: versions} of a file of pinned versions."""
    lines = map(Requirement, (ROOT / ".ci" / name).read_text().splitlines())
    found = {}
    for one in lines:
        (pin,) = one.specifier
        assert pin.operator == "=="
        found.setdefault(canonicalize_name(one.name), set()).add(Version(pin.version))
    return found


def test_the_pinned_versions_are_the_floors_of_the_project_and_newer_ones():
    """`.ci/lock` writes them anew."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {**project["optional-dependencies"], "": project["dependencies"]}
    floors, newest = pinned("floors.txt"), pinned("newest.txt")
    checked = 0
    for extra in ("", "run", "report", "tfds", "experiments", "soup", "tokenizers", "sklearn"):
        for asked in map(Requirement, extras[extra]):
            least = [Version(one.version).release for one in asked.specifier if one.operator == ">="]
            name = canonicalize_name(asked.name)
            if least:
                (floor,) = floors[name]
                assert floor.release[: len(least[0])] == least[0], name
                assert all(asked.specifier.contains(version) for version in newest[name]), name
                checked += 1
    assert checked > 15
