"""Every command of a docstring, the READMEs or a preset parses, and gives no flag that its binary does not read."""

import importlib
import pathlib
import re
import shlex

import pytest
from absl import flags
from absl.testing import flagsaver
from damage import read_damaged

from experiments.setup import app
from wavg_jax.base import SettingsError

ROOT = pathlib.Path(__file__).parents[2]
FILES = [path for path in sorted((ROOT / "experiments").rglob("*.py")) if "app.run(main)" in path.read_text()]
NAMES = [".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts) for path in FILES]
BINARIES = {name: importlib.import_module(f"experiments.{name}") for name in NAMES}
COMMAND = re.compile(r"python -m experiments\.([\w.]*\w)([^`\n|]*)")


def _commands():
    """(binary, arguments) of every command written down; `--flagfile=...` is the flag file of the one before."""
    pages = [ROOT / name for name in ("README.md", "experiments/README.md", "experiments/results/README.md")]
    pages += sorted((ROOT / "experiments" / "presets").glob("*.flags"))
    scripts = [ROOT / "experiments" / "presets" / name for name in ("slurm.sbatch", "kubernetes.yaml")]
    joined = [re.sub(r"\\?\n\s+", " ", path.read_text()).replace("$JOB_COMPLETION_INDEX", "0") for path in scripts]
    texts = [*joined, *(path.read_text() for path in pages), *(module.__doc__ for module in BINARIES.values())]
    found = {}
    for text in texts:
        flagfile = ""
        for name, rest in COMMAND.findall(text):
            arguments = [argument for argument in shlex.split(rest) if argument != "&&"]
            arguments = [flagfile if argument == "--flagfile=..." else argument for argument in arguments]
            flagfile = next((one for one in arguments if one.startswith("--flagfile=")), "")
            found[f"{name} {' '.join(arguments)}".strip()] = (name, arguments)
    return found


COMMANDS = _commands()


def test_every_binary_has_a_command_in_its_docstring():
    assert set(BINARIES) == {name for name, _ in COMMANDS.values()}
    assert all(f"python -m experiments.{name}" in module.__doc__ for name, module in BINARIES.items())


def _unread(name, arguments):
    """The flags given to a binary that are not its own, nor among those it declares to read."""
    own = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(BINARIES[name])} | {"flagfile", *app.OWN}
    own |= {flag.short_name for flag in flags.FLAGS.get_key_flags_for_module(BINARIES[name])}
    with flagsaver.flagsaver():
        app.parse(["binary", *arguments])
        return sorted(flag for flag in flags.FLAGS if flags.FLAGS[flag].present and flag not in own)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse_and_give_no_flag_that_is_not_read(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert _unread(*COMMANDS[command]) == []


def test_a_flag_of_another_binary_is_found():
    assert _unread("reductions", ["--steps=2", "--tune_rates=1", "--pull=1"]) == ["pull", "tune_rates"]
    with pytest.raises(SystemExit):
        _unread("compare", ["--rundes=3"])


@pytest.mark.fuzz
def test_a_damaged_flag_file_is_read_or_refused_with_one_line(cases, tmp_path, capfd):
    file = tmp_path / "a.flags"
    file.write_text("# a run\n--dataset=digits\n--rounds=20\n--hidden=128,64\n--lr_plain=0.1\n--resume\n")

    def read():
        ended = None
        with flagsaver.flagsaver():
            try:
                app.parse(["binary", f"--flagfile={file}"])
            except SystemExit as caught:
                ended = caught.code
        said = capfd.readouterr().err
        if ended == 2:
            assert said.startswith("error: ")
            raise SettingsError(said.rstrip("\n"))
        assert ended in (None, 0)  # 0 where the damage asks for help

    with cases("files: flagfile") as tried:
        read_damaged(tmp_path, read, tried, 0)
    assert tried.counts["refused"] > tried.tries / 5
