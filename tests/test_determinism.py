"""What is the same bits and what the same to rounding: one run, trained again in processes of their own."""

import json
import subprocess
import sys

import numpy as np
import pytest
from runs import ENVIRONMENT, HERE

RUN = """
import json, sys
sys.path.insert(0, "tests")
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np, optax
import wavg_jax as wavg
from runs import WEIGHTED, run
from small import sharded

task = wavg.models.from_linen(wavg.models.MLP(hidden=(32,), classes=3), (4,))
result = run(sharded(), WEIGHTED, task, optax.sgd(0.1, momentum=0.9), devices=int(sys.argv[1]), replica_map="vmap")
numbers = [[row[name] for name in ("train_loss", "test_loss", "weights", "scores")] for row in result.rows[1:]]
print(json.dumps({"rows": numbers, "params": [np.asarray(x).tolist() for x in jax.tree.leaves(result.params)]}))
"""


def trained(devices=1, isa=None):
    flags = {} if isa is None else {"XLA_FLAGS": f"--xla_cpu_max_isa={isa}"}
    command = [sys.executable, "-c", RUN, str(devices)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parent, env=ENVIRONMENT | flags, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def flat(found):
    """All numbers of a run, in order."""
    if isinstance(found, dict):
        return [x for value in found.values() for x in flat(value)]
    return [x for value in found for x in flat(value)] if isinstance(found, list) else [found]


@pytest.fixture(scope="module")
def once():
    return trained()


@pytest.mark.slow
@pytest.mark.optimized
def test_the_same_seed_in_another_process_gives_the_same_bits(once):
    assert trained() == once


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("other", [{"devices": 2}, {"isa": "SSE4_2"}, {"isa": "AVX2"}], ids=str)
def test_other_devices_and_other_instructions_give_the_same_to_rounding(once, other):
    np.testing.assert_allclose(flat(trained(**other)), flat(once), rtol=1e-4, atol=1e-6)
