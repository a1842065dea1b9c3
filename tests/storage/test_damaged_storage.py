"""Whatever is done to what a run left on disk, it is read, or refused with one line, and no damaged checkpoint is ever
restored. `--fuzz=2000` tries so many of each kind."""

import json
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import odd, read_damaged
from reports import make_run, text_of
from runs import ENVIRONMENT, HERE

from wavg_jax import reporting
from wavg_jax.base import DataError, Replicas, TrainState
from wavg_jax.storage.checkpoints import open_checkpoints, snapshot
from wavg_jax.storage.rows import read_rows
from wavg_jax.storage.tensors import open_tensors, save_safetensors

pytestmark = pytest.mark.fuzz


def safetensors(folder):
    params = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(3)}
    save_safetensors(folder / "a.safetensors", params, metadata={"format": "pt"})

    def read():
        with open_tensors(folder / "a.safetensors") as opened:
            return [opened.read(name) for name in opened.specs]

    return read


def rows(folder):
    recorded = [row for arm in ("plain", "weighted") for seed in (0, 1) for row in make_run(arm, seed, (), rounds=2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in recorded))
    return lambda: reporting.summarise(read_rows(folder))


@pytest.mark.parametrize("kind", [safetensors, rows])
def test_a_damaged_file_is_read_or_refused_with_one_line(kind, cases, tmp_path):
    read = kind(tmp_path)
    read()
    with cases(f"files: {kind.__name__}") as tried:
        read_damaged(tmp_path, read, tried, kind.__name__)
    assert tried.counts["refused"] > tried.tries / 5


def test_odd_rows_are_reported_or_refused_with_one_line(cases, tmp_path):
    recorded = [row for arm in ("plain", "weighted") for seed in (0, 1) for row in make_run(arm, seed, (), rounds=2)]
    draw = random.Random(0)
    with cases("rows with odd values") as tried:
        for number in range(tried.tries):
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd(recorded, draw)))
            with tried.case(f"odd rows {number}"):
                assert text_of(read_rows(tmp_path))
    assert min(tried.counts["refused"], tried.counts["ran"]) > 0


ABSURD = """
import resource, sys
sys.path.insert(0, "tests")
from damage import absurd
from reports import make_run, text_of
from runs import ENVIRONMENT, HERE
from wavg_jax.base import DataError
from tests.reporting.test_matrix import rows as make_matrix

counts = {"reported": 0, "refused": 0}
recorded = [row for arm in ("plain", "weighted") for seed in (0, 1) for row in make_run(arm, seed, (), rounds=2)]
recorded[2] |= {"workers": [{"worker": 0, "was": "computed", "sent": 0.0, "ended": 0.1, "computed": 0.1, "why": ""}]}
text_of(recorded)  # imports what draws and counts
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30,) * 2)
for rows in [*absurd(recorded, (0, 2)), *absurd(make_matrix(), (0, 1))]:
    try:
        assert text_of(rows)
        counts["reported"] += 1
    except DataError as error:
        assert len(str(error)) < 1000 and "\\n" not in str(error)
        counts["refused"] += 1
print(counts["reported"], counts["refused"])
"""


@pytest.mark.slow
def test_numbers_that_are_absurd_take_no_memory_and_overflow_nowhere():
    """Each number of a row in turn is huge or tiny, under a limit of memory; a warning would be an error."""
    command = [sys.executable, "-W", "error", "-c", ABSURD]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parent, env=ENVIRONMENT, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    reported, refused = map(int, done.stdout.split())
    assert min(reported, refused) > 100


def test_a_round_number_far_beyond_the_others_is_said_to_lack_those_between():
    recorded = make_run("plain", 0, (), rounds=3)
    recorded[-1]["round"] = 10**18
    with pytest.raises(DataError, match=f"lacks round 3 to {10**18 - 1}; restore"):
        reporting.summarise(recorded)
    recorded = [row | {"round": 2 * row["round"]} if "round" in row else row for row in make_run("plain", 0, ())]
    with pytest.raises(DataError, match=r"lacks round 1, 3, 5, .* 19, and 2 gaps more; restore"):
        reporting.summarise(recorded)
    recorded[-1]["round"] = 2.5
    with pytest.raises(DataError, match=r"round number 2\.5, not a whole one"):
        reporting.summarise(recorded)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)


def state(step):
    draw = np.random.default_rng(step)

    def leaf(*shape):
        return jnp.asarray(draw.normal(size=shape).astype(np.float32))

    replicas = Replicas({"w": leaf(4, 5, 3)}, {"trace": leaf(4, 5, 3)}, {}, jax.random.split(jax.random.key(step), 4))
    return TrainState({"w": leaf(5, 3)}, {"seen": leaf()}, replicas, {}, jnp.int32(step))


def plain(held):
    return jax.tree.map(
        np.asarray, held._replace(replicas=held.replicas._replace(rng=jax.random.key_data(held.replicas.rng)))
    )


def test_no_damaged_checkpoint_is_ever_restored(cases, tmp_path):
    """Also where both are damaged, or one of them and the sums of the other."""
    saved = {step: plain(state(step)) for step in (1, 2)}
    with open_checkpoints(tmp_path) as opened:
        for step in saved:
            opened.save(snapshot(state(step)))
        opened.wait()
        assert opened.find().whole == 2
        for step in saved:
            same(plain(opened.restore(step, state(0))), saved[step])
        found = {1: 0, 2: 0, None: 0}

        def read():
            whole = opened.find().whole
            found[whole] += 1
            return whole

        def check(whole):
            changed = {path.relative_to(tmp_path).parts[0] for path, raw in before.items() if path.read_bytes() != raw}
            assert str(whole) not in changed

        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with cases("files: checkpoint", 10) as tried:
            read_damaged(tmp_path, read, tried, 0, check)
        assert found[2] > 0
        assert found[1] > tried.tries / 10
        assert sum(found.values()) == tried.tries
