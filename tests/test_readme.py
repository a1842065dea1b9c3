"""What the README says is true: its code runs, its files and flags exist."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from experiments import compare, report, train, tune
from wavg_jax.training import fit as trainer

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


OWN, RUN = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_a_loop_of_one_s_own_takes_the_recommended_weighting_and_compiles_it_once(compilations):
    assert "wavg.learned()" in OWN
    factors = jnp.float32([0.9, 0.5, 0.5, 2.0])[:, None, None]  # the least loss is at 0, so the last replica is bad
    names = {
        "params": {"w": jnp.ones((3, 2))},
        "K": 4,
        "batches": None,
        "my_local_training": jax.jit(lambda stacked, batches: jax.tree.map(lambda x: x * factors, stacked)),
        "my_evaluation": lambda params, weights: {"loss": (params["w"] ** 2).sum(), "accuracy": jnp.float32(0)},
    }
    exec(OWN, names)
    assert names["params"]["w"].max() < 0.9
    assert names["weights"][3] < 0.1 < names["weights"][1]
    compiled = len(compilations)
    assert compiled > 0
    _, each = OWN.split("# Each round:\n")
    for _ in range(2):
        exec(each, names)
    assert len(compilations) == compiled
    assert names["update"]._cache_size() == 1


@pytest.mark.slow
def test_the_code_of_a_whole_run_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(OWN.splitlines()[1], names)  # the import of the library
    exec(RUN.replace("rounds=20", "rounds=2"), names)
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
