"""Several real processes keep one journal: rows, checkpoints and refusals."""

import pytest

from tests.spawn import joined, spawn
from wavg_jax.devices import processes
from wavg_jax.storage.checkpoints import SUMS
from wavg_jax.storage.rows import read_rows

COMMON = """
import pathlib
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import wavg_jax as wavg
from wavg_jax.base import Replicas, TrainState
from wavg_jax.storage.journal import open_journal
from wavg_jax.storage.schema import run_row

workdir = pathlib.Path(ARGUMENTS[0])
mesh = Mesh(np.asarray(jax.devices()), ("replicas",))
stacked, shared = NamedSharding(mesh, PartitionSpec("replicas")), NamedSharding(mesh, PartitionSpec())
K = 4

def spread(values, sharding):
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

def values(step):
    rng = np.random.default_rng(step)
    params = {"w": rng.normal(size=(5, 3)).astype(np.float32)}
    each = {"w": rng.normal(size=(K, 5, 3)).astype(np.float32)}
    keys = rng.integers(0, 2**32, (K, 2), np.uint32)
    return params, each, keys

def state(step):
    params, each, keys = values(step)
    rng = jax.jit(jax.random.wrap_key_data)(spread(keys, stacked))
    put = lambda tree, sharding: jax.tree.map(lambda x: spread(x, sharding), tree)
    return TrainState(
        put(params, shared), {}, Replicas(put(each, stacked), {}, {}, rng), {},
        spread(np.asarray(step, np.int32), shared),
    )

def check(got, step):
    assert int(got.round) == step
    params, each, keys = values(step)
    raw = jax.jit(jax.random.key_data)(got.replicas.rng)
    for array, expected in ((got.params["w"], params["w"]), (got.replicas.params["w"], each["w"]), (raw, keys)):
        assert array.dtype == expected.dtype and array.shape == expected.shape
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])
    assert got.replicas.params["w"].sharding == stacked

def first(rounds, **settings):
    return {
        "kind": "run", "run": "run", "arm": "a", "seed": 0, "dataset": "d", "classes": 2, "train_samples": 8,
        "heldout_samples": 2, "test_samples": 2, "shard_sizes": [2] * K, "noisy_shards": [], "data_crc": 1,
        "local_steps": 1, "batch_size": 1, "parameters": 15, "score_samples": 2, "faults": None, "rounds": rounds,
        "replicas": K, "checkpoint_every": 1, "replica_map": "vmap", "settings": settings, "writer": processes.index(),
    }

def advance(journal, numbers, save=True):
    for number in numbers:
        journal.append(
            {"kind": "round", "round": number, "local_steps": 1, "samples": 4, "elapsed": 1.0, "train_loss": 0.5,
             "weights": [0.25] * K, "alive": [True] * K}
        )
        if save:
            journal.save(journal.snapshot(state(number)))
"""

SAVE = """
with processes.guarded(), open_journal(workdir, "run") as journal:
    check(journal.begin(first(4), state(0), resume=False), 0)
    advance(journal, (1, 2, 3))
    journal.wait()
    print(len(journal.rows()))
"""

RESUME = """
with processes.guarded(), open_journal(workdir, "run") as journal:
    check(journal.begin(first(5), state(0), resume=True), 3)
    assert [row.get("round") for row in journal.rows()] == [None, 1, 2, 3]
    assert journal.rows()[0]["writer"] == 0
    advance(journal, (4, 5))
    print(len(journal.rows()))
"""


def succeed(count, script, workdir, **options):
    done = spawn(count, joined(COMMON + script), workdir, **options)
    assert [(process.returncode, process.stderr) for process in done] == [(0, "")] * count
    return [process.stdout for process in done]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_what_processes_save_others_restore_bit_for_bit(before, after, tmp_path):
    assert succeed(before, SAVE, tmp_path, devices=4 // before) == ["4\n"] * before
    assert names(tmp_path) == ["checkpoints", "rows.jsonl"]
    assert names(tmp_path / "checkpoints" / "run") == ["2", "3"]
    assert (tmp_path / "checkpoints" / "run" / "3" / SUMS).exists()
    assert succeed(after, RESUME, tmp_path, devices=4 // after) == ["6\n"] * after
    assert [row.get("round") for row in read_rows(tmp_path)] == [None, 1, 2, 3, 4, 5]
    assert names(tmp_path / "checkpoints" / "run") == ["4", "5"]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_processes_resume_after_one_was_killed_while_they_saved(victim, tmp_path):
    kill = f"""
with processes.guarded(), open_journal(workdir, "run") as journal:
    journal.begin(first(9), state(0), resume=False)
    advance(journal, (1, 2, 3))
    journal.wait()
    processes.barrier("sealed")  # by process 0, which would end with the other one
    advance(journal, (4,), save=False)
    if INDEX == {victim}:
        os.kill(os.getpid(), 9)
    advance(journal, (5, 6, 7))
"""
    done = spawn(2, joined(COMMON + kill), tmp_path, devices=2)
    codes = [processes.EXIT_CODE] * 2
    codes[victim] = -9
    assert [process.returncode for process in done] == codes
    assert succeed(2, RESUME, tmp_path, devices=2) == ["6\n"] * 2


def test_a_save_leaves_the_devices_to_the_round_under_way(tmp_path):
    script = """
from jax.experimental import multihost_utils
def refused(*_, **__):
    raise AssertionError("a save exchanges over the devices")
with processes.guarded(), open_journal(workdir, "run") as journal:
    journal.begin(first(4), state(0), resume=False)
    names = ("broadcast_one_to_all", "process_allgather", "sync_global_devices")
    before = [getattr(multihost_utils, name) for name in names]
    for name in names:
        setattr(multihost_utils, name, refused)
    advance(journal, (1, 2, 3))
    journal.wait()
    for name, function in zip(names, before):
        setattr(multihost_utils, name, function)
"""
    succeed(2, script, tmp_path, devices=2)
    assert names(tmp_path / "checkpoints" / "run") == ["2", "3"]


REFUSED = """
from wavg_jax.base import WavgError
def refused(given, resume, start=None):
    try:
        with open_journal(workdir, "run") as journal:
            journal.begin(given, start or state(0), resume=resume)
    except WavgError as error:
        print(type(error).__name__, error)
"""


def test_all_processes_refuse_with_the_same_words(tmp_path):
    succeed(1, SAVE, tmp_path, devices=4)
    asked = """
refused(first(4), False)
refused(first(2), True)
refused(first(4, rate=0.1), True)
refused(first(4, rate=INDEX), True)
refused(first(4), True, state(0)._replace(mutable=jnp.zeros(2)))
"""
    expected = (
        "SettingsError the folder already holds the run 'run'",
        "ResumeError 'run' has done 3 rounds already",
        "ResumeError cannot resume 'run': it was started with rate=None, now it is 0.1",
        "SettingsError process 1 was given rate=1, process 0 rate=0; give all",
        "is of another network, optimizer, averager or version: mutable was missing",
    )
    said = succeed(2, REFUSED + asked, tmp_path, devices=2)
    assert said[0] == said[1]
    for line, words in zip(said[0].splitlines(), expected, strict=True):
        assert words in line
    assert names(tmp_path) == ["checkpoints", "rows.jsonl"]


def test_a_folder_in_use_is_refused_by_all(tmp_path):
    from wavg_jax.storage.lock import hold

    with hold(tmp_path):
        said = succeed(2, REFUSED + "refused(first(4), False)", tmp_path)
    assert said[0] == said[1]
    assert "is in use by process" in said[0]


def test_a_folder_that_processes_do_not_share_is_refused_by_all(tmp_path):
    script = REFUSED.replace("open_journal(workdir", "open_journal(workdir / str(INDEX)") + "refused(first(4), False)"
    said = succeed(2, "from wavg_jax.storage import lock\nlock._SIGHT = 0.5\n" + script, tmp_path)
    assert said[0] == said[1].replace(f"{tmp_path}/1:", f"{tmp_path}/0:")
    assert "WorkdirError process 1 of 2 does not see what process 0 writes to" in said[0]
    assert "workdir=" in said[0]


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_ends_the_other(tmp_path):
    script = """
from orbax.checkpoint import v1 as ocp
def full(*args, **kwargs):
    raise OSError(28, os.strerror(28))
with processes.guarded(), open_journal(workdir, "run") as journal:
    journal.begin(first(4), state(0), resume=False)
    if INDEX == 1:
        ocp.save = full
    advance(journal, (1, 2))
"""
    done = spawn(2, joined(COMMON + script), tmp_path, devices=2)
    assert [process.returncode for process in done] == [processes.EXIT_CODE, 1]
    assert "No space left" in done[1].stderr
    assert done[0].stderr.count("\n") == 1
    assert "process 1 of 2" in done[0].stderr
    assert "No space left" in done[0].stderr
