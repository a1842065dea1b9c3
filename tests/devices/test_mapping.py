"""Every replica map gives the same run; one is chosen once and stored (how, `tests/training/test_automap.py` says)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import train
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax.base import SettingsError
from wavg_jax.devices import mapping, placement
from wavg_jax.training import automap, programs
from wavg_jax.training.recipe import make_recipe

TASK, INNER, PLAIN = regression(), optax.sgd(0.1, momentum=0.9), wavg.averager(wavg.uniform())
OPTIONS = {"inner": INNER, "local_steps": 3, "rounds": 2, "batch_size": 8}


@pytest.fixture
def recipe():
    return make_recipe(TASK, sharded(), PLAIN, INNER, layout=wavg.Layout(devices=1))


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(automap, "_known", {})


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_replica_map_gives_the_same_run(devices):
    runs = {name: train(TASK, sharded(), PLAIN, devices=devices, replica_map=name, **OPTIONS) for name in mapping.MAPS}
    assert [run.rows[0]["replica_map"] for run in runs.values()] == list(mapping.MAPS)
    for run in runs.values():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run.params, runs["vmap"].params)
        assert run.rows[-1]["test_accuracy"] == runs["vmap"].rows[-1]["test_accuracy"]


@pytest.mark.parametrize("name", ["pmap", None])
def test_an_unknown_replica_map_is_refused(name):
    with pytest.raises(SettingsError, match=r"^replica_map=.*: set replica_map= to one of auto, vmap, map, unroll"):
        train(TASK, sharded(), PLAIN, replica_map=name, **OPTIONS)
    with pytest.raises(SettingsError, match="to one of vmap, map, unroll"):
        placement.place(4, 1, name)


def fake_trials(monkeypatch, seconds):
    """Fakes trials of the given seconds; returns the names of the maps tried."""
    tried = []

    def trials(recipes, data, batch_size, steps):
        tried.append(list(recipes))
        return {name: lambda name=name: seconds[name] for name in recipes}

    monkeypatch.setattr(automap, "_trials", trials)
    monkeypatch.setattr(automap, "_SECONDS", 0.01)
    return tried


def test_the_fastest_map_is_chosen_once(monkeypatch, recipe):
    tried = fake_trials(monkeypatch, {"vmap": 3.0, "map": 1.0, "unroll": 2.0})
    settled = automap.settle(recipe, sharded(), batch_size=8)
    assert settled.placement == placement.place(4, 1, "map")
    other = recipe._replace(averager=wavg.averager(wavg.softmax("loss", 1.0)))
    assert automap.settle(other, sharded(), batch_size=8).placement.replica_map == "map"
    assert tried == [["map", "vmap"]]  # four replicas on a device are not written out
    automap.settle(recipe, sharded(), batch_size=4)
    on_two = make_recipe(TASK, sharded(), PLAIN, INNER, layout=wavg.Layout(devices=2))
    automap.settle(on_two, sharded(), batch_size=8)
    assert tried[1:] == [["map", "vmap"], ["map", "vmap", "unroll"]]


def test_nothing_is_timed_if_nothing_can_be_gained(monkeypatch, recipe):
    tried = fake_trials(monkeypatch, {})
    assert automap.settle(recipe, sharded(), batch_size=8, steps=100).placement.replica_map == "vmap"
    assert automap.settle(recipe, sharded(), batch_size=8, decided="unroll").placement.replica_map == "unroll"
    alone = make_recipe(TASK, sharded(), PLAIN, INNER, layout=wavg.Layout(devices=4))
    assert automap.settle(alone, sharded(), batch_size=8) is alone
    assert tried == []


def test_the_choice_is_stored_beside_the_compiled_programs(monkeypatch, recipe, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        tried = fake_trials(monkeypatch, {"vmap": 1.0, "map": 3.0})
        for _ in range(2):
            monkeypatch.setattr(automap, "_known", {})  # as in another process
            assert automap.settle(recipe, sharded(), batch_size=8).placement.replica_map == "vmap"
        assert len(tried) == 1
        (tmp_path / automap.FILE).write_text("{ cut sho")
        monkeypatch.setattr(automap, "_known", {})
        automap.settle(recipe, sharded(), batch_size=8)
        assert len(tried) == 2
        assert list(json.loads((tmp_path / automap.FILE).read_text()).values()) == ["vmap"]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("kept", ['{"%s": "pmap"}', '["vmap"]'])
def test_a_meaningless_stored_choice_is_made_again(kept, monkeypatch, recipe, tmp_path):
    tried = fake_trials(monkeypatch, {"vmap": 1.0, "map": 3.0})
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    monkeypatch.setattr(automap, "_fingerprint", lambda *about: "key")
    try:
        (tmp_path / automap.FILE).write_text(kept.replace("%s", "key"))
        assert automap.settle(recipe, sharded(), batch_size=8).placement.replica_map == "vmap"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert len(tried) == 1


def test_a_map_that_does_not_compile_is_tried_again(monkeypatch):
    failing, compiles = [True], jax.stages.Lowered.compile

    def once(self, *args, **options):
        if failing.pop():
            raise RuntimeError("no memory")
        return compiles(self, *args, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", once)
    program = jax.jit(lambda x: x + 1)
    with pytest.raises(RuntimeError, match="no memory"):
        programs.compiled(program, jnp.ones(2))
    failing.append(False)
    programs.compiled(program, jnp.ones(2))
    assert not failing


def test_the_real_trials_run(recipe, monkeypatch):
    monkeypatch.setattr(automap, "_SECONDS", 0.01)
    settled = automap.settle(recipe, sharded(), batch_size=8)
    assert settled.placement.replica_map in mapping.MAPS


def test_a_resumed_run_keeps_its_replica_map(monkeypatch, tmp_path):
    monkeypatch.setattr(automap, "_FLOPS", 0)
    options = OPTIONS | {"devices": 1, "workdir": tmp_path}
    fake_trials(monkeypatch, {"vmap": 3.0, "map": 1.0})
    train(TASK, sharded(), PLAIN, **options)
    monkeypatch.setattr(automap, "_known", {})
    fake_trials(monkeypatch, {"vmap": 1.0, "map": 3.0})
    again = train(TASK, sharded(), PLAIN, resume=True, **(options | {"rounds": 3}))
    straight = train(TASK, sharded(), PLAIN, devices=1, replica_map="map", **(OPTIONS | {"rounds": 3}))
    jax.tree.map(np.testing.assert_array_equal, again.params, straight.params)


@pytest.mark.parametrize("heldout", [20, pytest.param(21, marks=pytest.mark.slow)])
def test_all_devices_together_score_a_blend_with_the_same_result(heldout):
    """4 devices share 20 samples, but not 21."""
    averager, source = wavg.averager(wavg.learned()), sharded(noisy=(0,), heldout=heldout)
    runs = [train(TASK, source, averager, devices=devices, **OPTIONS) for devices in (1, 4)]
    for one, four in zip(runs[0].rows[1:], runs[1].rows[1:], strict=True):
        assert max(one["weights"]) - min(one["weights"]) > 0.05
        np.testing.assert_allclose(one["weights"], four["weights"], atol=1e-4)
        np.testing.assert_allclose(one["test_loss"], four["test_loss"], rtol=1e-4)


@pytest.mark.parametrize("name", mapping.MAPS)
def test_what_is_held_may_be_written_over_in_place(name):
    held = {"w": jnp.arange(6.0).reshape(3, 2), "rng": jax.random.split(jax.random.key(0), 3)}

    def one(item, shared):
        held, x = item
        after = {"w": held["w"] + x + shared, "rng": jax.random.split(held["rng"])[0]}
        return after, (held["w"].sum(), x)

    given, shared = jnp.array([10.0, 20.0, 30.0]), jnp.float32(1)
    after, (sums, xs) = jax.jit(mapping.mapped(name, one, in_place=True))((held, given), shared)
    np.testing.assert_array_equal(after["w"], held["w"] + given[:, None] + 1)
    np.testing.assert_array_equal(sums, held["w"].sum(1))
    np.testing.assert_array_equal(xs, given)
    expected = jax.random.key_data(jax.vmap(lambda rng: jax.random.split(rng)[0])(held["rng"]))
    np.testing.assert_array_equal(jax.random.key_data(after["rng"]), expected)


@pytest.mark.optimized
def test_replicas_in_turn_need_no_second_copy_of_their_state():
    replicas, width = 16, 128
    task = wavg.models.from_linen(wavg.models.MLP(hidden=(width, width), classes=10), (width,))
    rounds = wavg.make_rounds(task, PLAIN, INNER, placement=placement.place(replicas, 1, "map"))
    state = jax.eval_shape(lambda rng: rounds.init(rng, replicas), jax.random.key(0))
    x = jax.ShapeDtypeStruct((replicas, 3, 4, width), jnp.float32)
    batches = wavg.Batch(x, jax.ShapeDtypeStruct((replicas, 3, 4), jnp.int32))
    program = jax.jit(rounds.step, donate_argnums=0).lower(state, batches).compile()
    one_copy = wavg.tree.nbytes(jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, state.replicas.params)))
    assert program.memory_analysis().temp_size_in_bytes < 1.6 * one_copy  # parameters and momentum are two


def test_replicas_in_turn_may_give_keys_and_take_empty_arrays():
    def split(one, shared):
        empty, key = one
        return jax.random.split(key, 2), empty

    keys, empty = jax.random.split(jax.random.key(0), 3), jnp.zeros((3, 0))
    found, nothing = mapping.mapped("map", split)((empty, keys), None)
    assert found.shape == (3, 2)
    assert nothing.shape == (3, 0)
    expected = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(expected))
