"""Misuse of the public functions: one clear line that names the argument, before anything is compiled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from runs import train
from small import blobs, regression, sharded

import wavg_jax as wavg
from wavg_jax import arguments, models
from wavg_jax.averaging import outer, pull, smoothing, transforms
from wavg_jax.data import iid, round_indices
from wavg_jax.rounds import faults
from wavg_jax.training import schedule
from wavg_jax.weighting import robust, search, wrappers

NAN, INF = float("nan"), float("inf")
TASK, DATA, PLAIN, INNER = regression(), sharded(), wavg.averager(wavg.uniform()), optax.sgd(0.1)
LISTS = DATA._replace(shards=[shard.tolist() for shard in DATA.shards])
FRACTIONS = DATA._replace(shards=tuple(shard.astype(np.float32) for shard in DATA.shards))
COUNTS = (None, "3", 2.5, -1, 0, True, [3], np.float32(2), NAN)
NO_FUNCTION = (3, "keep", [len])


class Module(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x)


FIT = {
    "task": (None, Module(), Module, TASK.loss, PLAIN, "mlp"),
    "data": (None, blobs(), DATA.train, [DATA], "digits", LISTS, FRACTIONS, DATA._replace(shards=())),
    "averager": (None, wavg.uniform(), wavg.averager, INNER, "mean", wavg.Averager),
    "inner": (None, 0.1, "sgd", optax.sgd, PLAIN, wavg.uniform()),
    "local_steps": (*COUNTS, wavg.schedule.fixed),
    "rounds": COUNTS,
    "batch_size": COUNTS,
    "seed": (None, "3", 2.5, -1, True, 2**32, jax.random.key(0)),
    "samples": COUNTS[1:],
    "dtype": ("half a byte", 3, jnp.int32, object()),
    "smoothing": (0.9, "ema", optax.ema, PLAIN),
    "faults": (0.5, {0: 0.5}, [1.0] * 4),
    "opt_state": (None, *NO_FUNCTION, wavg.policy.reestimate),
    "stats": (None, *NO_FUNCTION, wavg.policy.reestimate),
    "drift": (0.1, "fedprox", wavg.drift.fedprox, optax.sgd(0.1)),
    "devices": COUNTS[1:],
    "replica_map": (None, 3, "pmap", ["vmap"]),
    "resident": ("yes", 1, 0.5),
    "workdir": (3, True, ["runs"]),
    "name": (None, 3, ""),
    "checkpoint_every": COUNTS,
    "test_every": COUNTS,
    "resume": (None, "yes", 1),
    "facts": (3, "a", [("a", 1)], {"x": object()}, {"x": [{"y": {1}}]}, {("x",): 1}),
    "settings": (3, "a", [("a", 1)], {"x": object()}, {"x": 1j}),
    "on_round": (3, "keep", [3]),
    "progress": (None, "yes", 3),
    "chunk": COUNTS,
    "scoring": (None, 256, {"samples": 256}, wavg.Layout()),
    "at_sync": (None, wavg.policy.keep, wavg.Scoring()),
    "layout": (None, "vmap", 2),
    "store": (None, "runs", {"name": "a"}),
}


def fit(**given):
    arguments = {"task": TASK, "data": DATA, "averager": PLAIN, "inner": INNER, "rounds": 1, "on_round": print} | given
    return train(**arguments)


def one(function, name, *values, **others):
    """Calls of a function with one argument wrong: (how it reads, the call, the argument)."""
    # Not repr, which holds addresses: the processes of the tests must agree on the names.
    return [
        (
            f"{function.__name__}({name}={arguments.shown(value)})",
            lambda v=value: function(**others, **{name: v}),
            name,
        )
        for value in values
    ]


OTHERS = [
    *one(wavg.averager, "weighting", None, "learned", wavg.learned, PLAIN, INNER, 0.5),
    *one(wavg.averager, "outer", 0.7, "nesterov", outer.nesterov, wavg.uniform(), weighting=wavg.uniform()),
    *one(wavg.averager, "reduce", None, *NO_FUNCTION, weighting=wavg.uniform()),
    *one(wavg.averager, "pull", None, "1", -0.1, 1.1, NAN, True, weighting=wavg.uniform()),
    *one(pull.scheduled, "factor", None, 0.5, [len]),
    *one(pull.scheduled, "toward", None, 0.5, factor=len),
    *one(wavg.averager, "transform", *NO_FUNCTION, weighting=wavg.uniform()),
    *one(wavg.averager, "deltas", None, 1, "yes", weighting=wavg.uniform()),
    *one(schedule.fixed, "local_steps", *COUNTS),
    *one(schedule.post_local, "after", None, "3", 2.5, -1, True, local_steps=2),
    *one(schedule.linear, "rounds", *COUNTS, first=1, last=2),
    *one(schedule.qsr, "alpha", None, "1", 0, -1, NAN, INF, True, learning_rate=0.1, least=1, longest=2),
    *one(schedule.qsr, "learning_rate", None, "1", 0, -1, NAN, INF, True, alpha=0.1, least=1, longest=2),
    *one(schedule.adacomm, "every", *COUNTS, first=2),
    *one(smoothing.ema, "decay", None, "0.9", 0, 1, -0.5, NAN, True),
    *one(smoothing.swa, "start", None, "1", 1.5, -1, True),
    *one(smoothing.swa, "every", *COUNTS),
    *one(smoothing.lawa, "window", *COUNTS),
    *one(faults.simulate, "replicas", *COUNTS),
    *one(faults.simulate, "speed", 0.5, [0.5], {9: 0.5}, {"a": 0.5}, {0: 0}, {0: 2}, {0: NAN}, {0: "x"}, replicas=4),
    *one(faults.simulate, "sent", {0: INF}, {0: None}, {0: True}, replicas=4),
    *one(faults.simulate, "deviation", 0.5, {4: 1.0}, {0: NAN}, {0: "x"}, replicas=4),
    *one(faults.little_is_enough, "replicas", *COUNTS, 2, liars=1),
    *one(faults.little_is_enough, "liars", *COUNTS, 5, replicas=8),
    *one(wavg.policy.reestimate, "steps", *COUNTS),
    *one(search.learned, "steps", *COUNTS),
    *one(search.learned, "learning_rate", "1", NAN, True),
    *one(search.learned, "optimizer", 0.5, optax.sgd),
    *one(wavg.softmax, "temperature", None, "a", 0, NAN, True),
    *one(wavg.proportional, "power", None, "x", 0, -1, INF),
    *one(wavg.proportional, "chance", None, "x", NAN),
    *one(wavg.fisher_merging, "floor", None, "x", -1, INF),
    *one(wrappers.uniform_floor, "floor", None, "x", -0.1, 1.1, NAN, weighting=wavg.uniform()),
    *one(wrappers.momentum, "decay", None, "x", -0.1, 1, NAN, weighting=wavg.uniform()),
    *one(wrappers.smooth_signals, "decay", None, "x", -0.1, 1, NAN, weighting=wavg.uniform()),
    *one(wrappers.shortlist, "keep", *COUNTS, weighting=wavg.uniform()),
    *one(robust.geometric_median, "smoothing", None, "x", 0, INF),
    *one(robust.clip_deltas, "max_norm", "x", 0, NAN),
    *one(robust.mean_around_median, "byzantine", None, "3", 2.5, -1, True),
    *one(robust.bulyan, "byzantine", None, "3", 2.5, -1, True),
    *one(wavg.pseudo_gradient_penalty, "temperature", None, "a", 0, NAN, True),
    *one(wavg.pseudo_gradient_penalty, "threshold", None, "a", 0, INF),
    *one(wavg.pseudo_gradient_penalty, "rate", None, "a", 0, 1.1, NAN),
    *one(wavg.pseudo_gradient_penalty, "warmup", *COUNTS),
    *one(transforms.trim_deltas, "density", None, "a", 0, 1.1, NAN),
    *one(transforms.drop_deltas, "rate", None, "a", -0.1, 1, NAN),
    *one(transforms.drop_deltas, "seed", None, "3", 2.5, -1, True, 2**32, rate=0.5),
    *one(robust.trimmed_mean, "trim", None, "3", 2.5, -1, True),
    *one(wavg.drift.fedprox, "mu", None, "x", -0.1, INF, True),
    *one(wavg.drift.scaffold, "learning_rate", None, "x", 0, -0.1, NAN, len),
    *one(wavg.replicate, "replicas", *COUNTS, tree={"w": jnp.ones(2)}),
    *one(outer.nesterov, "learning_rate", None, "1", NAN, INF, True, [1]),
    *one(outer.fedavgm, "momentum", None, "1", NAN, -0.1, 1.0, 1.1),
    *one(outer.lookahead, "alpha", None, NAN, "1"),
    *one(outer.bmuf, "momentum", None, NAN, 2),
    *one(outer.fedadam, "b1", None, NAN, 1.0),
    *one(outer.fedadam, "b2", None, NAN, 1.0, 2),
    *one(outer.fedadam, "tau", None, "x", NAN, -1.0, 0, len),
    *one(outer.fedyogi, "learning_rate", None, "1", NAN),
    *one(outer.fedyogi, "b2", None, NAN, 1.0, 2),
    *one(outer.fedadagrad, "tau", None, "x", NAN, -1.0, 0, len),
    *one(outer.delayed, "outer", None, 0.5, optax.sgd, PLAIN),
    *one(models.from_linen, "module", None, Module, 3, nnx.Module, input_shape=(4,)),
    *one(models.from_linen, "input_shape", None, 4, (4.0,), (0,), "4", module=Module()),
    *one(models.from_linen, "make", None, "classifier", module=Module(), input_shape=(4,)),
    *one(models.from_nnx, "make_module", None, 3, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), input_shape=(4,)),
    *one(models.from_nnx, "input_shape", None, 4, make_module=lambda rngs: nnx.Linear(2, 2, rngs=rngs)),
    *one(models.classifier, "init", None, 3, apply=len),
    *one(models.language_model, "apply", None, 3, init=len),
]
CASES = [case for name, values in FIT.items() for case in one(fit, name, *values)] + OTHERS


@pytest.mark.parametrize(("call", "name"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_misuse_is_one_clear_line_that_names_the_argument(call, name):
    with pytest.raises(wavg.SettingsError) as raised:
        call()
    said = str(raised.value)
    assert name in said
    assert "\n" not in said
    assert len(said) < 300


@pytest.mark.parametrize("value", [16, 0.5, ("a",), (0,), None])
def test_a_network_of_impossible_widths_is_refused_when_it_is_traced(value):
    with pytest.raises(wavg.SettingsError, match="hidden"):
        jax.eval_shape(models.from_linen(models.MLP(hidden=value), (4,)).init, jax.random.key(0))


@pytest.mark.parametrize("factor", [None, "1", NAN, True])
def test_pulls_are_numbers(factor):
    for make in (pull.toward_new, pull.toward_old):
        with pytest.raises(wavg.SettingsError, match="pull"):
            make(factor)


class Duck:
    """An inner optimizer that is not optax's class, but has its two functions."""

    init, update = staticmethod(INNER.init), staticmethod(INNER.update)


def test_numpy_s_numbers_chains_and_whatever_has_the_right_functions_are_taken():
    class Refused(Exception):
        pass

    def stop(row):
        raise Refused

    for inner in (optax.chain(optax.clip(1.0), INNER), Duck()):
        counts = {"rounds": np.int64(1), "batch_size": np.int32(4), "seed": np.uint8(3), "devices": np.int64(1)}
        with pytest.raises(Refused):
            fit(inner=inner, local_steps=np.int64(1), chunk=np.int16(30), on_round=stop, **counts)
    wavg.averager(wavg.uniform(), pull=np.float32(0.5), outer=Duck())
    outer.nesterov(optax.constant_schedule(0.7), np.float64(0.5))
    smoothing.ema(np.float32(0.5))


@pytest.mark.parametrize("three", [3, np.int8(3), np.array(3), jnp.int32(3)])
def test_whatever_is_a_whole_number_is_one_for_every_function(three):
    assert arguments.as_whole("three", three, 3) == 3
    assert wavg.replicate({"w": jnp.ones(2)}, three)["w"].shape == (3, 2)
    assert schedule.fixed(three).longest == 3
    assert len(iid(9, three, three)) == 3
    indices = round_indices([np.arange(9)], seed=three, first_step=three, local_steps=three, batch_size=three)
    assert indices.shape == (1, 3, 3)


def test_entries_that_cannot_be_written_are_refused_before_the_workdir_is_made(tmp_path):
    workdir = tmp_path / "runs"
    with pytest.raises(wavg.SettingsError, match=r"settings\['x'\] is of type object"):
        fit(settings={"x": object()}, workdir=workdir)
    assert not workdir.exists()
    assert arguments.JSON.fits([np.arange(3), {"a": (jnp.ones(2), None, np.float32(1))}])


def test_a_policy_that_was_not_called_is_told_from_one():
    with pytest.raises(wavg.SettingsError, match="call it"):
        fit(stats=wavg.policy.reestimate)
    for policy in (wavg.policy.keep, wavg.policy.reset, wavg.policy.reestimate(np.int64(2))):
        assert arguments.takes(2, "").fits(policy)
