"""The binaries in a terminal: the line that says what is being done, Ctrl-C at any moment, and the help."""

import io
import re
import sys

import pytest
import terminal
from absl.testing import flagsaver
from rich.console import Console
from test_commands import BINARIES

from experiments.setup import app, help_text, shared_flags
from wavg_jax.training import progress

QUICK = ("--rounds=2", "--replicas=2", "--local_steps=2", "--hidden=8", "--devices=1", "--compilation_cache=")


def test_ctrl_c_while_a_binary_is_imported_is_one_line_and_exit_code_130():
    assert terminal.run("experiments.train", interrupt_at=["starting"])[0] == 130
    code, shown = terminal.run("experiments.benchmarks.throughput", interrupt_at=["starting"])
    assert (code, shown.replace("starting", "").split()) == (130, ["interrupted"])


def test_ctrl_c_while_a_run_is_compiled_is_one_line_exit_code_130_and_nothing_written(tmp_path):
    code, shown = terminal.run("experiments.train", f"--workdir={tmp_path / 'run'}", *QUICK, interrupt_at=["compiling"])
    assert code == 130, shown
    assert "Traceback" not in shown
    assert shown.rstrip().splitlines()[-1].strip() == "interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_first_ctrl_c_finishes_the_round_and_a_second_does_not(tmp_path):
    long = ("--replicas=2", "--hidden=8", "--devices=1", "--weighting=plain", "--rounds=1000", "--local_steps=50000")
    code, shown = terminal.run("experiments.train", f"--workdir={tmp_path / 'a'}", *long, interrupt_at=[": round 1"])
    assert code == 143, shown
    assert "with a checkpoint" in shown
    longer = (*long[:-1], "--local_steps=2000000")
    ask = [": round 1 ...", ": round 1 ..."]
    code, shown = terminal.run("experiments.train", f"--workdir={tmp_path / 'b'}", *longer, interrupt_at=ask)
    assert (code, shown.rstrip().splitlines()[-1].strip()) == (130, "interrupted")
    assert "Traceback" not in shown


def test_a_run_says_what_it_is_doing_from_the_first_second_on(tmp_path):
    odd = tmp_path / "a[/y]"
    code, shown = terminal.run("experiments.train", f"--workdir={odd}", *QUICK)
    assert code == 0, shown
    said = [shown.index(word) for word in ("starting", "loading data ...", "compiling ...", "accuracy", "wrote")]
    assert said == sorted(said)
    assert f"wrote {odd}/report.md" in " ".join(shown.split("\n")).replace("\r", "")
    bars = [line for line in shown.replace("\r", "\n").splitlines() if line.endswith("left")]
    assert bars
    assert max(map(len, bars)) <= 80
    last = re.search(
        r"weighted-seed0: accuracy [\d.]+ %, \d.\d effective, [\d.]+[kM]? samples/s +2/2 +\d+:\d\d left", shown
    )
    assert last, bars[-1]


def at_80(monkeypatch):
    """Makes the terminal one of 80 columns, and returns what is written to it."""
    written = io.StringIO()
    screen = Console(file=written, width=80, force_terminal=True, force_jupyter=False, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda stderr: screen)
    return written


@pytest.mark.parametrize(
    "text", ["sequential-seed1000: test accuracy 100.0 %", "[/y] " * 40], ids=["longest", "longer"]
)
def test_the_bar_fits_80_columns_and_keeps_its_numbers(text, monkeypatch):
    written = at_80(monkeypatch)
    with progress.bar(1240, 1100) as advance:
        progress.doing("compiling")
        advance(text)
    lines = [line for line in written.getvalue().replace("\r", "\n").splitlines() if "left" in line]
    assert max(len(line.split("\x1b")[0]) for line in lines) <= 80
    assert "1101/1240" in lines[-1]
    assert text[:30] in lines[-1]


def test_a_warning_is_a_line_above_the_bar_and_an_error_takes_the_bar_away(monkeypatch):
    written = at_80(monkeypatch)
    with pytest.raises(ValueError, match="gone"), progress.bar(3) as advance:  # noqa: PT012
        advance("one")
        print("warning: replica 3 [/y]", file=sys.stderr)
        raise ValueError("gone")
    text = written.getvalue()
    assert "warning: replica 3 [/y]\n" in text
    assert text.rstrip().endswith("\x1b[2K")  # the last thing done is to clear the line


def test_without_a_bar_what_is_being_done_goes_nowhere(capfd):
    progress.doing("compiling")
    with progress.bar(2) as advance:  # not a terminal
        progress.doing("compiling")
        advance("one")
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the Jupyter client
def test_a_notebook_shows_one_line_without_widgets():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    source = """
from wavg_jax.training import progress
with progress.bar(40) as advance:
    progress.doing("compiling")
    for i in range(40):
        advance(f"round {i}")
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=100).execute()
    (output,) = notebook.cells[0].outputs
    assert list(output["data"]) == ["text/plain"]
    assert output["data"]["text/plain"].startswith("round 39  [####################] 40/40  ")


@pytest.mark.parametrize("name", BINARIES)
def test_help_fits_80_columns_breaks_no_word_and_shows_every_flag_with_its_default(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = help_text.text(BINARIES[name], shared_flags.TOPICS | {"JAX": app.OWN}, app.OWN)
    assert max(map(len, said.splitlines())) <= 80
    assert said.startswith(BINARIES[name].__doc__.split()[0])
    assert f"python -m experiments.{name}" in said
    for flag in app.F.get_key_flags_for_module(BINARIES[name]):
        assert f"--{flag.name}" in said or f"--no{flag.name}" in said
        for word in (flag.help or "").split(">:")[-1].split():
            assert word in said.split()
    if name == "train":
        titles = [line for line in said.splitlines() if line.endswith(":") and not line.startswith(" ")]
        assert titles == ["This command:", "Data:", "Network:", "Training:", "Averaging:", "The run:", "JAX:"]
        assert "--replicas=4 " in said


def test_placeholders_say_what_a_value_is_and_equal_defaults_are_one():
    said = help_text.text(BINARIES["compare"], shared_flags.TOPICS, [])
    for shown in ("--lr_sync=RATE", "--outer_lr=RATE", "--noisy=N", "--score_samples=N", "--workdir=WORKDIR"):
        assert f"  {shown} " in said or f"  {shown}\n" in said
    assert "by default 0.4." in said
    assert "0.4 with noisy" not in said


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort"])
def test_help_ends_with_exit_code_0(flag, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", BINARIES["train"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        app.parse(["binary", flag])
    assert ended.value.code == 0
    assert capfd.readouterr().out.startswith("Trains one arm alone")


def test_help_of_a_real_process_and_an_unknown_flag_with_a_suggestion():
    code, shown = terminal.run("experiments.benchmarks.throughput", "--help")
    assert code == 0
    assert "--replica_counts" in shown
    code, shown = terminal.run("experiments.report", "--helpfull")
    assert code == 0
    assert "--verbosity" in shown
    code, shown = terminal.run("experiments.train", "--rundes=3")
    assert code == 2
    assert "Did you mean: rounds" in shown
