"""Checkpoints from the command line: a run's network to a file, several of them to one, and what bad input says."""

import pathlib
import sys

import numpy as np
import pytest
import safetensors.numpy
from binary import invoke

from experiments import soup, train

QUICK = (
    "--arm=plain",
    "--rounds=2",
    "--replicas=2",
    "--local_steps=20",
    "--hidden=8",
    "--devices=1",
    "--replica_map=map",
)
NETWORK = ("--dataset=digits", "--hidden=8")
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The network of a run, one close to it, and one that is next to none."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = [str(folder / f"{name}.safetensors") for name in "abc"]
    assert invoke(train.main, *QUICK, f"--export={paths[0]}", f"--workdir={folder / 'run'}") == 0
    trained, rng = safetensors.numpy.load_file(paths[0]), np.random.default_rng(0)
    close = {name: x + 0.01 * rng.normal(size=x.shape).astype(np.float32) for name, x in trained.items()}
    safetensors.numpy.save_file(close, paths[1])
    safetensors.numpy.save_file({name: -x for name, x in trained.items()}, paths[2])
    return paths


def test_runs_to_an_average_that_leaves_the_worst_out(files, tmp_path, capfd):
    out = tmp_path / "soup.safetensors"
    assert invoke(soup.main, *files, "-o", str(out), "--weighting=greedy_soup", *NETWORK) == 0
    a, b, average = (safetensors.numpy.load_file(path) for path in (*files[:2], out))
    assert sorted(average) == ["Dense_0.bias", "Dense_0.kernel", "Dense_1.bias", "Dense_1.kernel"]
    mixes = [{name: sum(x[name] for x in some) / len(some) for name in a} for some in ([a], [b], [a, b])]
    assert any(all(np.allclose(average[name], mix[name], atol=1e-6) for name in mix) for mix in mixes)
    said = " ".join(capfd.readouterr().out.split())
    report = (tmp_path / "soup-report" / "report.md").read_text()
    for words in (said, report):
        assert "4 tensors were averaged" in words
        assert "accuracy" in words
    assert "| the average |" in report.replace("*", "")
    assert "--weighting=greedy_soup" in report
    assert (tmp_path / "soup-report" / "report.html").stat().st_size > 1000


def test_given_shares_need_no_data(files, tmp_path):
    out = tmp_path / "soup.safetensors"
    assert invoke(soup.main, *files[:2], f"--output={out}", "--shares=3,1") == 0
    a, b, average = (safetensors.numpy.load_file(path) for path in (*files[:2], out))
    for name in a:
        np.testing.assert_allclose(average[name], 0.75 * a[name] + 0.25 * b[name], atol=1e-6)


def test_a_network_of_ones_own(files, tmp_path, monkeypatch, capfd):
    """Under the names that PyTorch gives a state dict, with kernels the other way round."""
    module = """
import jax.numpy as jnp
import jax
from wavg_jax import models

def network():
    def init(rng):
        shapes = {"0.weight": (8, 64), "0.bias": (8,), "2.weight": (10, 8), "2.bias": (10,)}
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}, {}

    def apply(params, mutable, x, *, train, rng):
        x = x.reshape(len(x), -1)
        for n in (0, 2):
            x = jax.nn.relu(x) if n else x
            x = x @ params[f"{n}.weight"].T + params[f"{n}.bias"][None]
        return x, mutable

    return models.classifier(init, apply)
"""
    (tmp_path / "mine.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    theirs = []
    for path in files:
        stored = safetensors.numpy.load_file(path)
        torch = {f"{2 * n}.weight": np.ascontiguousarray(stored[f"Dense_{n}.kernel"].T) for n in (0, 1)}
        torch |= {f"{2 * n}.bias": stored[f"Dense_{n}.bias"] for n in (0, 1)}
        theirs.append(str(tmp_path / pathlib.Path(path).name))
        safetensors.numpy.save_file(torch, theirs[-1], {"format": "pt"})
    arguments = ("--weighting=accuracy", "--dataset=digits", "--task=mine:network")
    assert invoke(soup.main, *theirs, f"--output={tmp_path / 'out.safetensors'}", *arguments) == 0
    with safetensors.safe_open(tmp_path / "out.safetensors", framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert opened.get_slice("0.weight").get_shape() == [8, 64]
    assert "the average" in capfd.readouterr().out
    assert invoke(soup.main, *theirs, *arguments[:2], "--task=mine:nothing") == 2
    assert "--task=mine:nothing cannot be called" in capfd.readouterr().err


BAD = [
    (["--weighting=learned"], "--weighting=learned reads 'evaluate', which files do not tell: give --dataset"),
    (["--weighting=model_stock"], "give --base, what they were fine-tuned from"),
    (["--shares=1"], "--shares=1: give 2 numbers"),
    (["--shares=1,1", "--weighting=learned"], "leave out --weighting"),
    (["--output=soup.pt"], "--output=soup.pt: give a .safetensors file"),
    (["--replicas=4"], "--replicas has no effect here"),
    (["--dataset=digits", "--hidden=9"], "the task's network has a tensor 'Dense_0.bias' of shape [9]"),
    (["nowhere.safetensors"], "there is no checkpoint nowhere.safetensors"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_is_one_line_and_writes_nothing(files, arguments, says, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert invoke(soup.main, *files[:2], *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert [*tmp_path.iterdir()] == []


VAIN = [
    (("--outer=nesterov",), "give --base"),
    (("--outer_lr=0.5",), "--outer=none"),
    (("--weighting=steps",), "which only training tells"),
    (("--weighting=accuracy", "--heldout=0", *NETWORK), "--heldout=0"),
]


@pytest.mark.parametrize(("arguments", "says"), VAIN, ids=[" ".join(given) for given, _ in VAIN])
def test_what_a_soup_cannot_use_is_one_clear_line(arguments, says, files, tmp_path, capfd):
    assert invoke(soup.main, *files[:2], f"--output={tmp_path / 'out.safetensors'}", *arguments) == 2
    assert says in capfd.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_rule_that_knows_chance_runs(files, tmp_path):
    arguments = ("--weighting=accuracy_above_chance", *NETWORK)
    assert invoke(soup.main, *files[:2], f"--output={tmp_path / 'out.safetensors'}", *arguments) == 0
