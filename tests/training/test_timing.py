"""The critical path: its parts are measured, and each arm is charged with what it does."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from absl import flags
from absl.testing import flagsaver
from small import regression, sharded

import wavg_jax as wavg
from experiments.setup import app, arms, problem
from wavg_jax import data
from wavg_jax.base import Batch
from wavg_jax.rounds.forward import Forward, metrics
from wavg_jax.training import timing
from wavg_jax.training.batches import as_targets
from wavg_jax.training.recipe import make_recipe

TASK = regression()


def parts(averager, source, **options):
    recipe = make_recipe(TASK, source, averager, optax.sgd(0.1), layout=wavg.Layout(devices=1))
    return timing.measure_parts(recipe, source, **({"local_steps": 4, "batch_size": 8, "repeats": 2} | options))


def asked(chosen, task, source):
    """The critical path of every arm, asked for in their order."""
    path_of = arms.critical_path(chosen, task, source)
    return {arm.name: path_of(arm.name) for arm in chosen}


def test_every_part_that_a_round_has_takes_time_and_no_other():
    scored = parts(wavg.averager(wavg.softmax("loss")), sharded())
    assert min(scored) > 0
    plain = parts(wavg.averager(wavg.uniform()), sharded())
    assert plain.score == 0
    assert min(plain.local, plain.blend, plain.mean) > 0
    alone = parts(wavg.averager(wavg.uniform()), data.pool(sharded()))
    assert alone.local > 0
    assert alone[1:] == (0, 0, 0)


def test_a_weighting_that_needs_several_replicas_is_timed_and_one_that_needs_more_is_refused_at_once(compilations):
    recipe = make_recipe(TASK, sharded(), wavg.averager(wavg.robust.krum(1)), optax.sgd(0.1))
    assert timing.measure_parts(recipe, sharded(), local_steps=1, batch_size=8, repeats=1, local=7.0).local == 7.0
    recipe = make_recipe(TASK, sharded(), wavg.averager(wavg.robust.krum(2)), optax.sgd(0.1))
    done = len(compilations)
    with pytest.raises(wavg.SettingsError, match="byzantine=2 is too large for replicas=4"):
        timing.check_parts(recipe, sharded())
    assert len(compilations) == done


def test_a_device_is_charged_with_its_share_of_one_mean(monkeypatch):
    # Whatever is timed takes 8 s, the 10 means that are timed together too; each of 4 devices sums a quarter of one.
    monkeypatch.setattr(timing, "_seconds", lambda function, arguments, repeats: 8.0)
    found = parts(wavg.averager(wavg.uniform()), sharded())
    assert found == pytest.approx((8.0, 0.0, 8.0, 8.0 / 10 / 4))


def test_each_arm_is_charged_with_what_it_does(monkeypatch):
    # One replica's phase 1 s, all steps one after another 7 s, scoring 0.1, blend 0.01, or 0.05 with a search, one
    # device's share of a mean 0.001.
    def measured(recipe, source, *, local_steps, batch_size, local):
        locals_given.append(local)
        if len(source.shards) == 1:
            return timing.Parts(7.0, 0.0, 0.0, 0.0)
        if recipe.averager.needs:
            return timing.Parts(local or 1.0, 0.1, 0.05, 0.001)
        return timing.Parts(1.0, 0.0, 0.01, 0.001)

    locals_given = []

    monkeypatch.setattr(timing, "measure_parts", measured)
    with flagsaver.flagsaver():
        app.parse(["binary", "--local_steps=50"])
        dataset = data.digits()
        task, source = problem.make_task(dataset), problem.make_data(dataset, 0)
        paths = asked(arms.make_arms(), task, source)
        assert locals_given == [None, None, 1.0]  # sequential, plain, and weighted, which trains like plain
        few = asked(arms.make_arms(("plain",)), task, source)
        app.parse(["binary", "--local_steps=50", "--schedule=linear"])
        changing = asked(arms.make_arms(("plain", "weighted")), task, source)
    totals = {name: round(path["round"], 6) for name, path in paths.items()}
    assert totals == {"sequential": 7.0, "sync": 1.05, "plain": 1.01, "weighted": 1.15}
    assert few == {"plain": paths["plain"]}
    assert changing == {"plain": None, "weighted": None}
    # Newer Pythons add floats up more exactly than a + b + c does.
    assert all(path["round"] == pytest.approx(path["local"] + path["score"] + path["blend"]) for path in paths.values())
    assert all((path["exchange"], path["link"]) == (0.0, None) for path in paths.values())
    assert flags.FLAGS.local_steps != 50


def exchanges(monkeypatch, *arguments):
    """The seconds of each arm's exchanges in a round; its parts take 1 s together."""
    monkeypatch.setattr(timing, "measure_parts", lambda *_, **__: timing.Parts(1.0, 0.0, 0.0, 0.0))
    with flagsaver.flagsaver():
        app.parse(["binary", "--local_steps=50", "--heldout=100", *arguments])
        dataset = problem.load()
        task, source = problem.make_task(dataset), problem.make_data(dataset, 0)
        paths = asked(arms.make_arms(), task, source)
    assert all(path["round"] == pytest.approx(1 + path["exchange"]) for path in paths.values())
    return {name: path["exchange"] for name, path in paths.items()}, paths["plain"]["link"]


# 64-8-10: 610 parameters; a ring over 4 devices sends 8 * 610 * 3 / 4 = 3,660 bytes.
SLOW = ("--hidden=8", "--link_bandwidth=29280")
RING, GATHER = 1.0, 2.0


@pytest.mark.parametrize(
    ("arguments", "plain", "weighted"),
    [
        (["--weighting=accuracy"], RING, RING),
        (["--weighting=learned"], RING, GATHER),
        (["--weighting=greedy_soup"], RING, GATHER),
        (["--weighting=krum"], RING, GATHER),
        (["--weighting=norm_preserving"], RING, 2 * RING),
        (["--weighting=accuracy", "--reduce=norm_preserving"], 2 * RING, 2 * RING),
        (["--weighting=accuracy", "--inner=momentum", "--opt_state_at_sync=average"], 2 * RING, 2 * RING),
    ],
    ids=str,
)
def test_each_arm_is_charged_with_what_it_sends_over_the_link(arguments, plain, weighted, monkeypatch):
    found, link = exchanges(monkeypatch, *SLOW, *arguments)
    assert found == pytest.approx({"sequential": 0, "sync": 50 * RING, "plain": plain, "weighted": weighted}, rel=1e-3)
    assert link == {"bandwidth": 29280, "latency": 0, "overhead": 0}


def test_latency_and_overhead_count_with_every_exchange(monkeypatch):
    found, link = exchanges(monkeypatch, "--link_latency=0.1", "--link_overhead=0.01", "--weighting=learned")
    assert found == pytest.approx({"sequential": 0, "sync": 50 * 0.61, "plain": 0.61, "weighted": 0.31})
    assert link["bandwidth"] == float("inf")


def test_a_recipe_of_an_arm_scores_and_smooths_as_the_run_does():
    with flagsaver.flagsaver():
        app.parse(["binary", "--score_samples=50", "--smoothing=swa"])
        dataset = problem.load()
        recipe = arms.recipe_of(
            arms.make_arms(("weighted",))[0], problem.make_task(dataset), problem.make_data(dataset, 0)
        )
    assert recipe.scoring.samples == 50
    assert recipe.at_sync.smoothing is not None


def test_a_network_that_computes_in_its_inputs_dtype_is_scored_in_bfloat16():
    with flagsaver.flagsaver():
        app.parse(["binary", "--hidden=8"])
        dataset = problem.load()
        task, source = problem.make_task(dataset, of_inputs=True), problem.make_data(dataset, 0)
        fixed = problem.make_task(dataset)
    params, mutable = task.init(jax.random.key(0))
    held_out = Batch(source.heldout.x, as_targets(source.heldout.y))

    def loss(task, dtype):
        forward = Forward(task, source.prepare, dtype)
        return jax.jit(functools.partial(metrics, forward))(params, mutable, held_out)["loss"]

    wide, narrow = loss(task, None), loss(task, jnp.bfloat16)
    assert 1e-5 < abs(wide - narrow) < 0.1
    assert wide == loss(fixed, None)
