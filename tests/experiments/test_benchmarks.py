"""The benchmarks run at the smallest sizes and leave rows and a report; what they work out of times is right."""

import importlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from binary import invoke
from small import regression

from experiments.benchmarks import harness, limits, load, networks, own_networks, roofline, round_anatomy, startup
from experiments.benchmarks.user_networks import KINDS
from experiments.setup import app
from wavg_jax import data, models
from wavg_jax.base import Batch, WavgError
from wavg_jax.storage.rows import read_rows
from wavg_jax.training.operations import training_flops

BENCHMARKS = (
    *("compile_time", "memory", "own_networks", "roofline"),
    *("round_anatomy", "startup", "sync_cost", "throughput", "endurance", "footprint"),
)
SMALL = ("--shrink=16", "--round_steps=2", "--replica_counts=2")


HARDWARE = {"processor": "P", "isa": "AVX2", "cores": 2, "count": 1, "kind": "k", "device": "cpu"}


def main(name):
    return importlib.import_module(f"experiments.benchmarks.{name}").main


def test_cases_are_called_in_turn_and_the_first_call_of_each_does_not_count():
    clock, called, told = iter(range(100)), [], []

    def case(name):
        return lambda: called.append(name) or float(next(clock))

    times = harness.alternate({name: case(name) for name in "abc"}, 2, told.append)
    assert "".join(called) == "abcabcabc" == "".join(told)
    assert {name: seconds.tolist() for name, seconds in times.items()} == {"a": [3, 6], "b": [4, 7], "c": [5, 8]}


def test_a_ratio_is_the_median_of_paired_ratios_and_not_the_ratio_of_medians():
    # The machine was four times slower in the last turn. Ratios: 1, 2, 3, 2.
    above, below = np.array([1.0, 2.0, 3.0, 8.0]), np.array([1.0, 1.0, 1.0, 4.0])
    found = harness.ratio(above, below)
    assert found == (2.0, 1.75, 2.25)
    assert str(found) == "2.00 (1.75 to 2.25)" == harness.shown(list(found))
    assert harness.ratio(above, below, 10.0) == (20.0, 17.5, 22.5)


def test_a_figure_stands_in_the_column_of_the_device_it_was_measured_on():
    table = harness.BenchmarkTable("A title", "What it is.", ("network",), [("mlp", "0.9")])
    head = {"command": "python", "hardware": HARDWARE, "versions": {}, "environment": {}}
    for device, line in (("cpu", "| mlp | 0.9 | not measured |"), ("gpu", "| mlp | not measured | 0.9 |")):
        text = harness.markdown({**head, "hardware": {**head["hardware"], "device": device}}, [table], [])
        assert "| network | CPU | GPU |" in text
        assert line in text


def test_a_report_names_its_machine_and_what_its_speed_depends_on():
    flag = "--xla_cpu_max_isa=AVX2"
    head = {"hardware": HARDWARE, "versions": {"jax": "1.0"}, "environment": {"XLA_FLAGS": flag}}
    assert harness.host(head) == f"P, AVX2, 2 cores; 1 cpu devices (k); jax 1.0; XLA_FLAGS={flag}."
    table = harness.BenchmarkTable("A title", "What it is.", ("network",), [("mlp", "0.9")])
    lines = harness.markdown({**head, "command": "python"}, [table], ["Load.", "**Warning**"]).splitlines()
    assert lines[4:11] == [harness.host(head), "", "Load.", "", "**Warning**", "", "What it is."]


def test_operations_are_those_of_the_products_forward_and_backward():
    # 28 x 28 x 1 images. The first layer has no gradient by its input.
    found = {name: networks.build(name).flops for name in ("mlp", "cnn", "transformer")}
    assert found["mlp"] == 2 * (2 * 784 * 512 + 3 * (512 * 512 + 512 * 10))
    first, second = 28 * 28 * 32 * 9, 14 * 14 * 64 * 9 * 32
    assert found["cnn"] == 2 * (2 * first + 3 * (second + 7 * 7 * 64 * 128 + 128 * 10))
    # Of 64 tokens of width 128: 12 width^2 a layer, attention 2 x length x width, logits width x 256.
    assert found["transformer"] == 2 * 3 * 64 * (2 * (12 * 128**2 + 2 * 64 * 128) + 128 * 256)


def test_a_stock_convolution_counts_like_a_product_of_patches():
    image, kernel = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 5))

    def init(rng):
        return {"kernel": kernel}, {}

    def apply(params, mutable, x, *, train, rng):
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, params["kernel"], (2, 2), "SAME", dimension_numbers=axes)
        return y.mean((1, 2)), mutable

    counted = training_flops(models.classifier(init, apply), Batch(image, jnp.zeros(2, jnp.int32)))
    assert counted == 2 * 2 * (2 * 5 * 5 * 5 * 27)


@pytest.mark.parametrize("name", KINDS)
def test_every_network_as_users_write_it_can_be_trained(name):
    assert own_networks.build(name, 4).flops > 0  # counted in its gradient


def test_what_bounds_a_network_is_read_off_the_shares():
    # 10 seconds for a batch of 8, 7 for half of it: 4 of them do not depend on the batch. Of 3 samples, half is 1.
    assert roofline.fixed_share(np.array([10.0]), np.array([7.0]), 8).median == pytest.approx(0.4)
    assert roofline.fixed_share(np.array([10.0]), np.array([6.0]), 3).median == pytest.approx(0.4)
    assert roofline.bound({"compute": 0.6, "memory": 0.7, "fixed": 0.1}) == "memory"
    assert roofline.bound({"compute": 0.4, "memory": 0.3, "fixed": 0.1}) == "none alone"


def test_a_copy_copies_and_a_product_multiplies():
    assert limits.copy(8e3, devices=2).amount == 8e3 == limits.memcpy(8e3).amount
    assert limits.matmul(2, 16, 3).amount == 2 * 16**3 * 3 * 2
    assert min(limit.case() for limit in (limits.copy(8e3, devices=2), limits.memcpy(8e3), limits.matmul(2, 16))) > 0


@pytest.fixture
def tiny(monkeypatch):
    """Puts a network that compiles at once in the place of all."""
    rng = np.random.default_rng(0)
    train = data.Split(rng.normal(size=(networks.SAMPLES, 4)).astype(np.float32), np.zeros(networks.SAMPLES, np.int32))
    dataset = data.Dataset("tiny", train, data.Split(train.x[:9], train.y[:9]), 3)
    net = networks.network("tiny", regression(), dataset, networks.as_stored, 4)
    monkeypatch.setattr(networks, "build", lambda name, shrink, dtype: net)


CASES = {
    "compile_time": ("--depths=1", "--replica_counts=2", "--compiled_weightings=uniform"),
    "memory": ("--maps=map", "--networks=mlp", "--replica_counts=2"),
    "sync_cost": ("--sizes=0.0001", "--repeats=1", "--networks=mlp", "--replica_counts=2"),
    "throughput": (
        "--maps=vmap",
        "--device_counts=1",
        "--repeats=1",
        "--networks=mlp",
        "--round_steps=2",
        "--replica_counts=2",
    ),
}
SLOW = {
    "endurance": ("--endured=40", "--weighting=plain"),
    "footprint": ("--footprints=small",),
    "memory": ("--networks=resnet20,transformer", "--shrink=8", "--replica_counts=1"),
    "own_networks": (*SMALL, "--shrink=4", "--networks=cnn,linen_cnn,strided", "--repeats=1"),
    "roofline": (*SMALL, "--networks=cnn,transformer", "--shrink=8", "--product=16", "--repeats=1"),
    "round_anatomy": (*SMALL, "--networks=cnn", "--scored=learned:50", "--checkpoint_every=1", "--repeats=1"),
    "startup": ("--repeats=1", "--starts=import,train"),
    "throughput": (*SMALL, "--networks=cnn", "--repeats=1", "--replica_counts=1,2", "--maps=auto,unroll"),
}


def check(name, arguments, folder):
    """Runs a benchmark, and checks that all it measured is in its rows and its report."""
    assert invoke(main(name), *arguments, f"--workdir={folder}") == 0
    head, *cases, loaded = read_rows(folder)
    assert (head["kind"], head["run"], head["hardware"]["device"]) == ("benchmark", name, "cpu")
    assert {row["kind"] for row in cases} == {"case"}
    assert (loaded["kind"], loaded["run"]) == ("load", name)
    text = (folder / "report.md").read_text()
    assert harness.host(head) in text
    assert all(line in text for line in load.lines(loaded))
    assert f"python -m experiments.benchmarks.{name} --" in text
    assert text.count("not measured") == len(cases)
    assert head["versions"]["jax"] in text
    return cases


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_leaves_rows_and_a_report(name, tmp_path, tiny):
    folder = tmp_path / "out"
    cases = check(name, CASES[name], folder)
    assert len(cases) == (5 if name == "sync_cost" else 1)
    assert invoke(main(name), *CASES[name], f"--workdir={folder}") == 2  # there are rows already
    assert [path.name for path in sorted(folder.iterdir())] == ["report.md", "rows.jsonl"]


@pytest.mark.slow
def test_a_round_is_taken_apart(tmp_path, tiny):
    arguments = (
        "--scored=plain:0,learned:50",
        "--checkpoint_every=1",
        "--repeats=1",
        "--networks=mlp",
        "--round_steps=2",
    )
    cases = check("round_anatomy", arguments, tmp_path / "out")
    assert [row["score_samples"] for row in cases] == [None, 50]
    assert all(set(row["parts"]) == {*round_anatomy.PARTS, "rest"} for row in cases)
    assert sum(cases[0]["parts"].values()) == pytest.approx(cases[0]["whole"])  # one turn, so medians add up
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["report.md", "rows.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_benchmark_runs_with_the_networks_that_it_is_made_for(name, tmp_path):
    check(name, SLOW[name], tmp_path / "out")


def test_startup_starts_everything_cold_and_then_warm(tmp_path, monkeypatch):
    caches = []

    def first_round(what, workdir, environment):
        cold = environment["JAX_COMPILATION_CACHE_DIR"] not in caches
        caches.append(environment["JAX_COMPILATION_CACHE_DIR"])
        return 4.0 if cold else 2.0

    monkeypatch.setattr(startup, "first_round", first_round)
    cases = check("startup", ("--repeats=2", "--starts=train,compare"), tmp_path)
    assert {(row["what"], row["cache"]): row["seconds"] for row in cases} == {
        (what, cache): [seconds] * 2 for what in ("train", "compare") for cache, seconds in (("cold", 4), ("warm", 2))
    }


def test_a_process_that_comes_to_no_round_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(startup.sys, "executable", "false")
    with flagsaver.flagsaver():
        app.parse(["binary"])
        with pytest.raises(WavgError, match="finished no round"):
            startup.first_round("train", tmp_path, {})


BAD = [
    ("throughput", "--networks=lstm", "--networks=lstm"),
    ("throughput", "--maps=pmap", "--maps=pmap"),
    ("throughput", "--device_counts=64", "--device_counts=64"),
    ("throughput", "--replica_counts=0", "--replica_counts=0"),
    ("throughput", "--replica_counts=300", "--replica_counts"),
    ("throughput", "--local_steps=5", "--local_steps has no effect"),
    ("own_networks", "--networks=mlp", "--networks=mlp"),
    ("memory", "--repeats=3", "--repeats has no effect"),
    ("roofline", "--shrink=64", "--shrink=64"),
    ("sync_cost", "--sizes=many", "--sizes=many"),
    ("round_anatomy", "--scored=learned:6000", "--scored=learned:6000"),
    ("startup", "--starts=tea", "--starts=tea"),
    ("compile_time", "--depths=deep", "--depths=deep"),
    ("endurance", "--endured=25", "--endured=25"),
    ("footprint", "--footprints=all", "--footprints=all"),
    ("compile_time", "--depths=0", "--depths=0"),
    ("compile_time", "--compiled_weightings=softmax", "--compiled_weightings=softmax"),
]


@pytest.mark.parametrize(("name", "argument", "says"), BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_written(name, argument, says, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(main(name), argument) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_commands_of_a_benchmark_give_flags_that_it_reads(name):
    module = importlib.import_module(f"experiments.benchmarks.{name}")
    commands = re.findall(rf"python -m experiments\.benchmarks\.{name}(.*)", module.__doc__)
    assert len(commands) > 1
    for arguments in commands:
        with flagsaver.flagsaver():
            app.parse(["binary", *shlex.split(arguments)])
            assert {flag for flag in flags.FLAGS if flags.FLAGS[flag].present} <= {*module.READS}
    assert {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)} == {*module.READS, "workdir"}
