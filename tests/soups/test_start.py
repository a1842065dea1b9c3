"""Training that starts from what another run left."""

import jax
import numpy as np
import pytest
from binary import invoke
from runs import TASK, run
from small import sharded

import wavg_jax as wavg
from experiments import train
from wavg_jax.base import DataError
from wavg_jax.storage.rows import read_rows


def test_another_number_of_replicas_starts_from_the_blend(tmp_path):
    first = run(sharded(4), workdir=tmp_path / "first")
    with pytest.raises(wavg.ResumeError, match=r"replicas=4, now it is 2.*start_from takes the blend"):
        run(sharded(2), workdir=tmp_path / "first", resume=True)
    task = wavg.start_from(TASK, tmp_path / "first" / "checkpoints" / "run" / "3")
    params, mutable = task.init(jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, (params, mutable), (first.params, first.mutable))
    second = run(sharded(2), task=task, workdir=tmp_path / "second", rounds=1)
    assert second.rows[0]["replicas"] == 2
    fresh = run(sharded(2), rounds=1)
    assert second.rows[-1]["train_loss"] < 0.8 * fresh.rows[-1]["train_loss"]  # it goes on, and does not begin anew


def test_a_file_of_ones_own_starts_a_run_and_other_tensors_in_it_are_left_out(tmp_path):
    file = tmp_path / "network.safetensors"
    params = {"w": np.full((4, 3), 0.5, np.float64), "b": np.arange(3.0), "head": np.ones(7)}
    wavg.save_safetensors(file, params, {"seen": np.float32(2)})
    found, mutable = wavg.start_from(TASK, file).init(jax.random.key(0))
    assert found["w"].dtype == np.float32
    np.testing.assert_array_equal(found["b"], [0, 1, 2])
    assert sorted(found) == ["b", "w"]
    assert float(mutable["seen"]) == 2


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (
            {"w": np.zeros((4, 2)), "b": np.zeros(3)},
            r"'w' of shape \[4, 3\]; the checkpoints have float64\[4, 2\] there",
        ),
        ({"b": np.zeros(3)}, "'w' of shape .* have none"),
        ({"w": np.full((4, 3), np.nan), "b": np.zeros(3)}, "'w' in .* not finite: give an earlier checkpoint"),
    ],
)
def test_what_is_not_the_network_is_refused(params, says, tmp_path):
    file = tmp_path / "network.safetensors"
    wavg.save_safetensors(file, params, {"seen": np.float32(0)})
    with pytest.raises(DataError, match=says):
        wavg.start_from(TASK, file)


def test_the_binary_starts_from_a_checkpoint(tmp_path, capfd):
    quick = ("--dataset=digits", "--model=mlp", "--hidden=8", "--rounds=2", "--devices=1", "--weighting=plain")
    assert invoke(train.main, *quick, "--replicas=2", f"--workdir={tmp_path / 'a'}") == 0
    checkpoint = next((tmp_path / "a" / "checkpoints").glob("*/2"))
    again = (*quick, "--replicas=4", f"--start_from={checkpoint}", f"--workdir={tmp_path / 'b'}")
    assert invoke(train.main, *again) == 0
    losses = [[row["test_loss"] for row in read_rows(tmp_path / name)[1:]] for name in "ab"]
    assert losses[1][0] < losses[0][0]
    capfd.readouterr()
    assert invoke(train.main, *quick, "--replicas=4", "--hidden=9", f"--start_from={checkpoint}") == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "the task's network has a tensor" in line
