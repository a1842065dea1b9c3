"""Which way to run the replicas is chosen: by leads beyond the noise of a trial, for networks that are worth one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import sharded

import wavg_jax as wavg
from wavg_jax import models
from wavg_jax.base import Batch
from wavg_jax.training import automap
from wavg_jax.training.operations import training_flops
from wavg_jax.training.recipe import make_recipe


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    monkeypatch.setattr(automap, "_SECONDS", 0)
    monkeypatch.setattr(automap, "_known", {})


def chosen(**seconds):
    """What is chosen of trials that take these seconds, one entry after another, over and over."""
    runs = {name: itertools.cycle(values) for name, values in seconds.items()}
    return automap._fastest({name: lambda run=run: next(run) for name, run in runs.items()})


def noisy(seed, name, median, spread):
    rng = np.random.default_rng([seed, *name.encode()])
    return median * np.exp(rng.normal(0, spread, 1 + automap._TURNS))


def test_differences_within_the_noise_keep_the_first():
    found = [chosen(map=noisy(seed, "map", 1.0, 0.2), vmap=noisy(seed, "vmap", 1.0, 0.2)) for seed in range(100)]
    assert found.count("map") >= 95  # by their medians alone it would be half of them


def test_a_small_lead_keeps_the_first_however_certain_it_is():
    assert chosen(map=[1.04], vmap=[1.0]) == "map"
    assert chosen(map=[1.06], vmap=[1.0]) == "vmap"


def test_a_clear_lead_beyond_the_noise_wins():
    for seed in range(20):
        seconds = {name: noisy(seed, name, median, 0.02) for name, median in (("map", 1.3), ("vmap", 1.0))}
        assert chosen(**seconds) == "vmap"
    assert chosen(map=[1.4], vmap=[1.2], unroll=[1.0]) == "unroll"


def test_what_slows_both_ways_alike_is_no_noise():
    busy = np.array([1, 1, 3, 1, 2, 5, 1])
    assert chosen(map=1.2 * busy, vmap=1.0 * busy) == "vmap"


def test_a_hopeless_way_is_dropped_but_not_for_one_slow_turn():
    ran = []

    def trial(name, seconds):
        return lambda: ran.append(name) or seconds

    assert automap._fastest({"map": trial("map", 2.1), "vmap": trial("vmap", 1.0)}) == "vmap"
    assert ran.count("map") == 3
    assert chosen(map=[1, 9, 1, 1, 1, 1, 1], vmap=[1]) == "map"


def test_no_turn_begins_after_the_longest_time(monkeypatch):
    clock = itertools.count(0.0, 4.0)
    monkeypatch.setattr(automap.time, "perf_counter", lambda: next(clock))
    runs = []
    automap._fastest({name: lambda: runs.append(1) or 1.0 for name in ("map", "vmap")})
    assert len(runs) == 2 * (1 + 3)  # the turns end at 4, 8 and 12 seconds


WIDTH, TURNS = 8, 50


def recurrent(loop):
    """A classifier that multiplies its hidden numbers by the same matrix in every turn of a loop."""

    def init(rng):
        return {"into": jnp.ones((4, WIDTH)), "w": jnp.eye(WIDTH), "out": jnp.ones((WIDTH, 3))}, {}

    def apply(params, mutable, x, *, train, rng):
        hidden = loop(lambda h: jnp.tanh(h @ params["w"]), x @ params["into"])
        return hidden @ params["out"], mutable

    return models.classifier(init, apply)


def by_scan(step, start):
    return jax.lax.scan(lambda h, _: (step(h), None), start, length=TURNS)[0]


def by_while(step, start):
    return jax.lax.while_loop(lambda h: h.sum() < 3, step, start)


def test_operations_inside_a_loop_count_as_often_as_it_turns():
    batch = Batch(jax.ShapeDtypeStruct((4, 4), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32))
    once, outer = 2 * 4 * WIDTH * WIDTH, 2 * 4 * (2 * 4 * WIDTH + 3 * WIDTH * 3)
    assert training_flops(recurrent(by_scan), batch) == 3 * TURNS * once + outer
    assert training_flops(recurrent(by_while), batch) == np.inf


def test_a_network_with_a_loop_inside_is_not_taken_for_a_small_one(monkeypatch):
    data = sharded()
    recipe = make_recipe(
        recurrent(by_scan), data, wavg.averager(wavg.uniform()), optax.sgd(0.1), layout=wavg.Layout(devices=1)
    )
    batch = automap._shapes(recipe, data, 8)
    step = len(data.shards) * training_flops(recipe.task, batch)
    monkeypatch.setattr(automap, "_trials", lambda recipes, *_: {"map": lambda: 1.0, "vmap": lambda: 1.0})
    monkeypatch.setattr(automap, "_FLOPS", 10 * step)

    def settled(steps):
        return automap.settle(recipe, data, batch_size=8, steps=steps).placement.replica_map

    assert (settled(9), settled(11)) == ("vmap", "map")


def test_a_trial_takes_more_steps_the_smaller_the_network():
    counts = [automap._steps(flops) for flops in (0.0, 1e6, 2.5e9, 1e12, float("inf"))]
    assert counts == [automap._MOST, automap._MOST, 4, automap._FEWEST, automap._FEWEST]
