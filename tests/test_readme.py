"""What the README says is true: its code runs, its files and flags exist."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from experiments import compare, report, train, tune
from wavg_jax import trainer

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_code_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own, run = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {
        "params": {"w": jnp.ones((3, 2))},
        "K": 4,
        "batches": None,
        "my_local_training": lambda stacked, batches: (jax.tree.map(lambda x: x * 0.5, stacked), jnp.arange(1.0, 5.0)),
    }
    exec(own, names)
    assert names["params"]["w"].shape == (3, 2)
    assert names["weights"][0] > names["weights"][3]
    exec(run.replace("rounds=20", "rounds=2"), names)
    assert (tmp_path / "runs" / "a" / "rows.jsonl").exists()
    assert names["result"].rows[-1]["round"] == 2


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", TEXT))))
def test_links_point_at_files(target):
    assert (ROOT / target).exists()


def test_flags_and_modules_that_are_named_exist():
    assert len({binary.main for binary in (compare, report, train, tune)}) == 4  # each defines flags when imported
    known = set(flags.FLAGS)
    for name in re.findall(r"--([a-z_]+)", TEXT):
        assert name in known | {"help", "flagfile"}, name
    for name in re.findall(r"`((?:wavg_jax/)?[a-z_]+\.py|data/|models/)`", TEXT):
        path = name.removeprefix("wavg_jax/")
        assert (ROOT / "wavg_jax" / path).exists(), name
    assert callable(trainer.fit)
