"""Weightings, averagers and whole fits with settings drawn at random: each runs or is refused with one line."""

import inspect

import hypothesis.strategies as st
import jax
import numpy as np
import optax
import pytest
from runs import TASK, leaves, train
from scheme_table import COMMON, TABLE, signals, stack
from small import sharded
from test_fuzz_arrays import FORMS, INF, JUNK, NAN, kept, unchanged
from test_misuse import OTHERS

import wavg_jax as wavg
from wavg_jax import data, tree

pytestmark = pytest.mark.fuzz

RULES = ["uniform", "proportional", "softmax", "rank", "best", "inverse/layers", "fisher_merging", "coordinate_median"]
RULES += ["geometric_median", "multi_krum", "shortlist", "uniform_floor", "momentum"]
VALUES = [0.0, 1.0, NAN, INF, -INF, 1e38, 1e-38, -1.0]


def problem(replicas):
    """Stacked parameters, one replica of them, and signals."""
    stacked = jax.device_put(stack(replicas))
    return stacked, tree.replica(stacked, 0), signals(stacked)


@st.composite
def updates(draw):
    """A rule and the arguments of its update, of which one may be junk."""
    replicas = draw(st.sampled_from([1, 2, 4, 5, 64]))
    name = draw(st.sampled_from(RULES))
    stacked, params, measured = problem(replicas)
    given = {"stacked": stacked, "params": params, "alive": draw(st.sampled_from([None, "some"])), **measured}
    if given["alive"]:
        given["alive"] = np.array(draw(st.lists(st.booleans(), min_size=replicas, max_size=replicas)))
    loss = np.array(measured["loss"])
    for k in draw(st.lists(st.integers(0, replicas - 1), max_size=3)):
        loss[k] = draw(st.sampled_from(VALUES))
    given |= {"loss": loss, "accuracy": loss}
    if draw(st.booleans()):
        given[draw(st.sampled_from(["stacked", "params", "alive", "loss", "accuracy"]))] = draw(JUNK)
    return name, replicas, given


def test_updates_of_averagers(cases):
    def body(value):
        name, replicas, given = value
        averager = wavg.averager(TABLE[name].make())
        _, params, _ = problem(replicas)
        state = averager.init(params, replicas)
        before = kept(given)
        own = {need: COMMON.get(need, given.get(need)) for need in averager.needs}
        blend, _, weights = averager.update(given["stacked"], state, given["params"], alive=given["alive"], **own)
        unchanged(given, before)
        assert jax.tree.structure(blend) == jax.tree.structure(params)
        for x in jax.tree.leaves((blend, weights)):
            assert np.isfinite(x).all()

    with cases("settings: averager.update") as tried:
        tried.draw(updates(), body)
    assert min(tried.counts["ran"], tried.counts["refused"]) > 0


CALLS = {}
for _, _call, _name in OTHERS:
    _of = inspect.getclosurevars(_call).nonlocals
    if _name not in ("input_shape", "hidden"):  # a shape may be one, and not that of the user's own network
        CALLS[f"{_of['function'].__name__}({_name})"] = (_of["function"], _name, _of["others"])


@st.composite
def makings(draw):
    """A function that makes a rule, the argument to be drawn, and its value."""
    name = draw(st.sampled_from(sorted(CALLS)))
    return name, draw(st.one_of(JUNK, st.floats(), st.integers(0, 2**70)))


def test_what_makes_rules(cases):
    """What takes a value is used with it."""
    stacked, params, measured = problem(5)

    def body(value):
        name, given = value
        function, argument, others = CALLS[name]
        if argument == "replicas" and isinstance(given, int) and given > 10**4:
            return  # as many replicas as asked for
        if callable(given):
            return  # a function of one's own fails in its own words
        made = function(**others, **{argument: given})
        if isinstance(made, wavg.Weighting):
            made = wavg.averager(made)
        if isinstance(made, wavg.Averager):
            own = {need: COMMON.get(need, measured.get(need)) for need in made.needs}
            jax.eval_shape(lambda stacked: made.update(stacked, made.init(params, 5), params, **own), stacked)
        if isinstance(made, optax.GradientTransformation):
            jax.eval_shape(lambda params: made.update(params, made.init(params), params), params)

    with cases("settings: rules and optimizers", 4) as tried:
        tried.draw(makings(), body)
    assert min(tried.counts["ran"], tried.counts["refused"]) > 0


DATA = {replicas: sharded(replicas) for replicas in (1, 2, 4, 64)}
INNER, AVERAGERS = optax.sgd(0.1), [wavg.averager(wavg.uniform()), wavg.averager(wavg.softmax("loss", 0.5))]
GIVEN = ["task", "data", "averager", "inner", "local_steps", "batch_size", "seed", "samples", "dtype", "smoothing"]
GIVEN += ["faults", "opt_state", "stats", "drift", "devices", "replica_map", "resident", "workdir", "name", "resume"]
GIVEN += ["checkpoint_every", "test_every", "facts", "settings", "on_round", "every", "fragments", "wire"]
GIVEN += [
    "scoring",
    "at_sync",
    "layout",
    "store",
    "train.x",
    "train.y",
    "heldout.x",
    "shards",
    "classes",
]


@st.composite
def fits(draw):
    """Sizes of a fit, an argument and the junk it gets, and the form that arrays have."""
    sizes = {
        "replicas": draw(st.sampled_from([2, 4, 1, 64])),
        "local_steps": draw(st.sampled_from([1, 2])),
        "batch_size": draw(st.sampled_from([1, 3])),
        "averager": draw(st.sampled_from([0, 1])),
    }
    wrong = draw(st.sampled_from(GIVEN)) if draw(st.integers(0, 3)) else None
    return sizes, wrong, draw(JUNK), draw(st.sampled_from([form for form in FORMS if form != "jax"]))


def of_form(given, form):
    """The sharded data with all arrays in another form."""

    def split(part):
        return data.Split(*map(FORMS[form], part))

    shards = tuple(map(FORMS[form], given.shards))
    return given._replace(train=split(given.train), heldout=split(given.heldout), shards=shards)


PLAIN = {}


def run(sizes, sets, **others):
    """A fit of one round."""
    given = {"task": TASK, "data": sets, "averager": AVERAGERS[sizes["averager"]], "inner": INNER, "devices": 1}
    given |= {name: sizes[name] for name in ("local_steps", "batch_size")} | {"rounds": 1, "replica_map": "vmap"}
    return train(**(given | others))


def replaced(sets, where, junk):
    """The sharded data with junk in one place."""
    name, _, part = where.partition(".")
    return sets._replace(**{name: getattr(sets, name)._replace(**{part: junk}) if part else junk})


def test_fits(cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def body(value):
        sizes, wrong, junk, form = value
        sets = of_form(DATA[sizes["replicas"]], form)
        arrays = dict(enumerate([*sets.train, *sets.heldout, *sets.shards]))
        before = kept(arrays)
        if wrong is None:
            found = leaves(run(sizes, sets))
            key = repr(sizes)
            if key not in PLAIN:
                PLAIN[key] = leaves(run(sizes, DATA[sizes["replicas"]]))
            for x, y in zip(found, PLAIN[key], strict=True):
                np.testing.assert_array_equal(x, y)
        elif wrong.partition(".")[0] in data.ShardedData._fields:
            run(sizes, replaced(sets, wrong, junk))
        else:
            run(sizes, sets, **{wrong: junk})
        unchanged(arrays, before)

    with cases("settings: fit") as tried:
        tried.draw(fits(), body)
    assert min(tried.counts["ran"], tried.counts["refused"]) > 0
