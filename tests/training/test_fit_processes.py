"""fit and make_rounds in several real processes over loopback: the same rows as in one, and one end for all."""

import json

import numpy as np
import pytest
from spawn import joined, spawn

RUN = """
import json, pathlib
import numpy as np, optax
import wavg_jax as wavg
folder = pathlib.Path(ARGUMENTS[0])
options = json.loads(ARGUMENTS[1])
K, ROUNDS, WORKDIR, RESUME = (options.get(name, default) for name, default in (
    ("replicas", 4), ("rounds", 3), ("workdir", None), ("resume", False)))
dataset = wavg.data.load("digits")
deal = lambda split, seed: wavg.data.dirichlet(split.y, K, 1.0, seed)
data = wavg.data.shard(dataset, deal, heldout=200, seed=0, noisy=(0,))
if options.get("pooled"):
    data = wavg.data.pool(data)
task = wavg.models.from_linen(wavg.models.MLP(hidden=(32,), classes=10), (8, 8, 1))
weighting = {"learned": wavg.learned, "softmax": lambda: wavg.softmax("loss", 0.2), "plain": wavg.uniform,
    "krum": lambda: wavg.robust.multi_krum(1, keep=3), "distance": lambda: wavg.inverse("distance")}
averager = wavg.averager(weighting[options.get("weighting", "plain")](), outer=optax.sgd(0.9, momentum=0.3))
inner = optax.sgd(0.05, momentum=0.9)
liars = wavg.faults.simulate(K, sent={0: 0, 3: 0}, mean={0: 1, 3: 1}, deviation={0: -1, 3: -1}, noise={3: 0.01})
"""
FIT = """
result = wavg.fit(
    task, data, averager, inner=inner, local_steps=8, rounds=ROUNDS, batch_size=16,
    at_sync=wavg.AtSync(wire=options.get("wire", "float32"), drift=options.get("scaffold") and
    wavg.drift.scaffold(options["scaffold"])), workdir=WORKDIR, resume=RESUME, progress=False,
    layout=wavg.Layout(replica_map="vmap", resident=options.get("resident")),
    store=wavg.Store(checkpoint_every=2), faults=liars if options.get("liars") else None,
)
(folder / f"rows-{P}-{INDEX}.json").write_text(json.dumps(result.rows))
"""


def rows(folder, processes, options, script=FIT, devices=1):
    """The rows of a run, in each of its processes."""
    done = spawn(processes, joined(RUN + script), folder, json.dumps(options), devices=devices, timeout=150)
    assert [one.returncode for one in done] == [0] * processes, [one.stderr for one in done]
    return [json.loads((folder / f"rows-{processes}-{i}.json").read_text()) for i in range(processes)]


def numbers(found):
    """What must not depend on where the replicas live."""
    return [[row[name] for name in ("train_loss", "test_loss", "test_accuracy", "weights")] for row in found[1:]]


def assert_alike(one, other, wire="float32"):
    # On a narrow wire a last bit decides which way a number is rounded, by 2^-9 or a step of 1/127.
    close = {"rtol": 2e-5, "atol": 2e-6} if wire == "float32" else {"rtol": 1e-3, "atol": 1e-4}
    for a, b in zip(numbers(one), numbers(other), strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, **close)
    assert one[0]["data_crc"] == other[0]["data_crc"]


CASES = {
    "plain": {},
    "learned": {"weighting": "learned"},
    "int8": {"weighting": "softmax", "wire": "int8"},
    "bfloat16, streamed": {"weighting": "learned", "wire": "bfloat16", "resident": False},
    "robust": {"weighting": "krum"},
    "distance": {"weighting": "distance"},
    "liars": {"weighting": "softmax", "liars": True},
    "control variates": {"weighting": "softmax", "scaffold": 0.5},
    "one replica, split batches": {"pooled": True},
}


IN_FOUR = ("learned", "int8", "one replica, split batches")


def cases(fast, names):
    return [pytest.param(CASES[name], id=name, marks=[] if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("options", cases(("learned",), ("learned", *(name for name in CASES if name not in IN_FOUR))))
def test_two_processes_give_the_rows_of_one(options, tmp_path):
    (alone,) = rows(tmp_path, 1, options)
    both = rows(tmp_path, 2, options)
    assert numbers(both[0]) == numbers(both[1])  # each knows all, to the bit: they read the same arrays
    assert both[0][0]["hardware"]["processes"] == 2
    assert_alike(both[0], alone, options.get("wire", "float32"))


@pytest.mark.parametrize("options", cases((), IN_FOUR))
def test_four_processes_and_four_devices_give_the_rows_of_one(options, tmp_path):
    (alone,) = rows(tmp_path, 1, options)
    four = rows(tmp_path, 4, options)
    assert_alike(four[3], alone, options.get("wire", "float32"))
    (spread,) = rows(tmp_path, 1, options, devices=4)
    assert_alike(spread, alone, options.get("wire", "float32"))
    both = rows(tmp_path, 2, options, devices=2)
    assert_alike(both[0], alone, options.get("wire", "float32"))


@pytest.mark.slow
def test_eight_replicas_on_eight_devices_give_the_rows_of_one(tmp_path):
    options = {"replicas": 8, "weighting": "learned"}
    (alone,) = rows(tmp_path, 1, options)
    (spread,) = rows(tmp_path, 1, options, devices=8)
    assert_alike(spread, alone)
    both = rows(tmp_path, 2, options, devices=4)
    assert both[0][0]["devices"] == 8
    assert_alike(both[1], alone)


ROUNDS_ALONE = """
import jax
where = wavg.place(K)
rounds = wavg.make_rounds(task, averager, optax.sgd(0.05), placement=where)
state, step = rounds.init(jax.random.key(0), replicas=K), jax.jit(rounds.step)
x, y = dataset.train.x.astype("float32") / 16, dataset.train.y
mine = where.mine(K)  # the replicas of this process
for n in range(3):
    i = np.random.default_rng(n).integers(len(y), size=(K, 8, 16))[mine]
    state, log = step(state, wavg.Batch(*(where.share(a[i]) for a in (x, y))))
found = [{}] + [{"train_loss": np.asarray(log.train_loss).tolist(), "test_loss": 0, "test_accuracy": 0,
    "weights": np.asarray(log.weights).tolist()}]
(folder / f"rows-{P}-{INDEX}.json").write_text(json.dumps(found))
"""


def test_rounds_of_ones_own_loop_run_in_two_processes(tmp_path):
    (alone,), both = (rows(tmp_path, count, {}, ROUNDS_ALONE) for count in (1, 2))
    for a, b in zip(numbers(alone), numbers(both[1]), strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)


@pytest.mark.parametrize("counts", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_a_run_resumes_with_another_number_of_processes(counts, tmp_path):
    options = {"weighting": "softmax", "wire": "int8"}
    (straight,) = rows(tmp_path, 1, options | {"rounds": 4})
    options |= {"workdir": str(tmp_path / "run")}
    rows(tmp_path, counts[0], options | {"rounds": 2})
    resumed = rows(tmp_path, counts[1], options | {"rounds": 4, "resume": True})
    for found in resumed:
        assert_alike(found, straight, "int8")


@pytest.mark.slow
@pytest.mark.parametrize("options", cases((), ("plain", "int8")))
def test_a_run_resumes_bit_for_bit_with_as_many_processes(options, tmp_path):
    # The run that never stops and the first part of the other one share processes, which have joined and compiled.
    first = FIT + "straight = result.rows\nROUNDS, WORKDIR = 2, options['later']\n" + FIT
    last = "(folder / f'rows-{P}-{INDEX}.json').write_text(json.dumps(straight))\n"
    workdir = str(tmp_path / "run")
    straight = rows(tmp_path, 2, options | {"rounds": 4, "later": workdir}, first + last)
    resumed = rows(tmp_path, 2, options | {"workdir": workdir, "rounds": 4, "resume": True})
    assert numbers(resumed[0]) == numbers(straight[0])


STOPPED = """
import os, signal
def stop(row):
    if row["round"] == 2 and INDEX == 1:
        os.kill(os.getpid(), signal.SIGTERM)
try:
    wavg.fit(task, data, averager, inner=optax.sgd(0.05), local_steps=8, rounds=50, batch_size=16, workdir=WORKDIR,
        progress=False, on_round=stop, layout=wavg.Layout(replica_map="vmap"))
except wavg.Stopped as stopped:
    (folder / f"rows-{P}-{INDEX}.json").write_text(json.dumps(stopped.result.rows))
"""


def test_sigterm_to_one_process_stops_all_after_the_same_round_with_a_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    both = rows(tmp_path, 2, {"workdir": str(workdir)}, STOPPED)
    done = len(both[0]) - 1
    assert numbers(both[0]) == numbers(both[1])
    assert 2 <= done <= 4
    assert (workdir / "checkpoints" / "run" / str(done)).is_dir()


DIFFERENT = """
def say(found=data, rate=0.05, wire="float32", **options):
    try:
        wavg.fit(task, found, averager, inner=optax.sgd(rate), local_steps=8, batch_size=16, progress=False,
            at_sync=wavg.AtSync(wire=wire), **{"rounds": 1, "layout": wavg.Layout(replica_map="vmap")} | options)
    except wavg.SettingsError as error:
        print(error)
    else:
        print("no error")
changed = data._replace(train=data.train._replace(x=data.train.x + INDEX))
say(rounds=3 + 2 * INDEX)
say(store=wavg.Store(checkpoint_every=1 + INDEX))
say(store=wavg.Store(settings={"lr": INDEX}))
say(scoring=wavg.Scoring(test_every=1 + INDEX))
say(wire=["float32", "int8"][INDEX])
say(rate=[0.05, 0.5][INDEX])
say(wavg.data.shard(dataset, deal, heldout=200, seed=INDEX))
say(wavg.data.shard(dataset, lambda split, seed: deal(split, INDEX), heldout=200, seed=0))
say(data._replace(test=data.test._replace(x=data.test.x + INDEX)))
say(wavg.data.pool(changed))
say(wavg.data.shard(dataset, lambda split, seed: wavg.data.iid(len(split.y), 3, seed), heldout=200, seed=0))
say(on_round=[(), [lambda row: True]][INDEX], rounds=2)  # may differ
"""


def test_processes_that_were_given_different_things_or_what_they_cannot_share_all_refuse(tmp_path):
    done = spawn(2, joined(RUN + DIFFERENT), tmp_path, "{}", timeout=150)
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert done[0].stdout == done[1].stdout
    said = done[0].stdout.splitlines()
    program = "would run another round than process 0; give all processes the same task, averager, inner optimizer"
    expected = (
        *("rounds=5, process 0 rounds=3; give all processes the same settings", "checkpoint_every=2", "lr=1"),
        *("test_every=2", "wire='int8', process 0 wire='float32'", program, "other held-out samples"),
        *("other shards than process 0; give all processes the same data", "other test samples"),
        "other training samples",
        "3 replicas do not spread evenly over 2 processes: set replicas= to 2 or 4, or start another number",
        "no error",
    )
    for line, words in zip(said, expected, strict=True):
        assert words in line
    assert [line.split()[:2] for line in said[:-2]] == [["process", "1"]] * (len(said) - 2)
