"""The programs of a recipe: compiled side by side for shapes that are known before the numbers are."""

import jax
import optax
import pytest
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax import data
from wavg_jax.training.programs import programs_of
from wavg_jax.training.recipe import make_recipe

CASES = {
    "one device": (1, {}),
    "replicas over devices": (2, {}),
    "one replica over devices": (2, {"pooled": True}),
    "a variate, a residual and smoothing": (
        2,
        {"at_sync": wavg.AtSync(wire="int8", drift=wavg.drift.scaffold(0.1), smoothing=wavg.smoothing.ema(0.9))},
    ),
    "fragments": (2, {"at_sync": wavg.AtSync(fragments=2)}),
    "scored every second round": (2, {"scoring": wavg.Scoring(every=2)}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_state_is_of_the_shapes_and_where_it_was_said_to_be(case):
    devices, options = CASES[case]
    source = data.pool(sharded()) if options.get("pooled") else sharded()
    options = {name: value for name, value in options.items() if name != "pooled"}
    averager = wavg.averager(wavg.softmax("loss", 1.0))
    layout = wavg.Layout(devices=devices)
    recipe = make_recipe(regression(), source, averager, optax.sgd(0.1, momentum=0.9), layout=layout, **options)
    shapes, state = programs_of(recipe, len(source.shards)).begin(jax.random.key(3))
    made = state()
    assert jax.tree.structure(shapes) == jax.tree.structure(made)
    for said, found in zip(jax.tree.leaves(shapes), jax.tree.leaves(made), strict=True):
        assert (said.shape, said.dtype) == (found.shape, found.dtype)
        assert said.sharding.is_equivalent_to(found.sharding, found.ndim)


def test_the_first_state_compiles_once_for_all_seeds(compilations):
    recipe = make_recipe(regression(), sharded(), wavg.averager(wavg.uniform()), optax.sgd(0.1))
    programs = programs_of(recipe, 4)
    keys = [jax.random.key(seed) for seed in range(2)]
    states = [programs.init(keys[0])]
    done = len(compilations)
    states.append(programs.init(keys[1]))
    assert len(compilations) == done
    assert not (states[0].params["w"] == states[1].params["w"]).all()
