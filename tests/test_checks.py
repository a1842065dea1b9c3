"""What does not fit together is refused while it is traced, by one line that names the leaf and the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wavg_jax as wavg
from wavg_jax.devices.placement import on

K = 4
PARAMS = {"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}, "scale": jnp.ones(())}
STACKED = wavg.replicate(PARAMS, K)
SQUARE = {"kernel": jnp.ones((4, 8))}  # unstacked, its first axis might pass for that of 4 replicas
AVG = wavg.averager(wavg.uniform())


def update(stacked=STACKED, params=PARAMS, avg=AVG, state=None, **more):
    return avg.update(stacked, avg.init(params, K) if state is None else state, params, **more)


def weighted_by(weights):
    """An averager whose weighting returns these weights."""
    return returning((weights, ()))


def returning(result):
    """An averager whose weighting returns this from its update."""
    return wavg.averager(wavg.Weighting(lambda params, replicas: (), lambda *args, **more: result))


def pulling(pull):
    return wavg.averager(wavg.uniform(), pull=pull)


MOMENTUM = wavg.averager(wavg.momentum(wavg.uniform(), 0.5))
NESTEROV = wavg.averager(wavg.uniform(), outer=wavg.outer.nesterov())

REFUSED = {
    "not replicated": (
        lambda: update(SQUARE, SQUARE),
        r"stacked\['kernel'\] has shape \(4, 8\); with params\['kernel'\] of shape \(4, 8\) it must be \[K, 4, 8\]"
        r".*wavg\.replicate\(params, K\)",
    ),
    "one leaf not replicated": (
        lambda: update(STACKED | {"scale": jnp.ones(())}),
        r"stacked\['scale'\] has shape \(\); .* must be \[4\]",
    ),
    "two numbers of replicas": (
        lambda: update(STACKED | {"scale": jnp.ones(3)}),
        r"stacked\['scale'\] has shape \(3,\); .* must be \[4\]",
    ),
    "no replicas": (lambda: update(jax.tree.map(lambda x: x[:0], STACKED)), "0 replicas.*at least 1"),
    "a leaf too few": (lambda: update({"dense": STACKED["dense"]}), r"there is no stacked\['scale'\]"),
    "a leaf too many": (lambda: update(STACKED | {"more": jnp.ones(4)}), r"stacked\['more'\] is not in params"),
    "another container": (lambda: update([jnp.ones(4)], (jnp.ones(()),)), "one is a list, the other a tuple"),
    "another dtype": (
        lambda: update(STACKED | {"scale": jnp.ones(4, jnp.bfloat16)}),
        r"stacked\['scale'\] is bfloat16, params\['scale'\] float32",
    ),
    "no array": (lambda: AVG.init({"w": 1.0}, K), r"params\['w'\] is a float; it must be an array"),
    "parameters that are whole numbers": (
        lambda: AVG.init({"w": jnp.ones(2), "n": jnp.int32(20_000_001)}, K),
        r"params\['n'\] is int32; only floating-point numbers are trained and averaged",
    ),
    "whole numbers in an update": (
        lambda: AVG.update({"n": jnp.ones(4, int)}, NESTEROV.init(SQUARE, K), {"n": jnp.int32(1)}),
        r"params\['n'\] is int32",
    ),
    "parameters that are random keys": (
        lambda: AVG.init({"key": jax.random.key(0)}, K),
        r"params\['key'\] is key<fry>",
    ),
    "no parameters": (lambda: AVG.init({}, K), "holds no arrays"),
    "init without replicas": (lambda: AVG.init(PARAMS, 0), "replicas is 0; it must be a whole number, 1 or more"),
    "one mask for all": (lambda: update(alive=jnp.ones(1, bool)), r"alive is bool of shape \(1,\).*\[4\]"),
    "a mask that is a scalar": (lambda: update(alive=True), r"alive is bool of shape \(\)"),
    "the living by number": (lambda: update(alive=jnp.array([0, 1, 2, 3])), "alive is int32"),
    "state of another averager": (lambda: update(state=NESTEROV.init(PARAMS, K)), r"state.*init\(params, replicas=4\)"),
    "state of other parameters": (
        lambda: update(avg=NESTEROV, state=NESTEROV.init(SQUARE, K)),
        "state is not a tree like this averager's state",
    ),
    "state of other replicas": (
        lambda: update(avg=MOMENTUM, state=MOMENTUM.init(PARAMS, 3)),
        r"state\.weighting\.weights has shape \(3,\) where this averager's state has \(4,\)",
    ),
    "weights of other replicas": (
        lambda: update(avg=weighted_by(jnp.ones(3) / 3)),
        r"the weights of stacked\['dense'\]\['bias'\] have shape \(3,\).*\(4,\).*\(4, 5\)",
    ),
    "weights that are a list": (lambda: update(avg=weighted_by([0.25] * 4)), "the weights, a list, are not a prefix"),
    "transform that sums up": (
        lambda: update(avg=wavg.averager(wavg.uniform(), transform=lambda stacked, params, alive: params)),
        r"transform\(...\)\['dense'\]\['bias'\] has shape",
    ),
    "a weighting that returns its weights alone": (
        lambda: update(avg=returning(jnp.full(K, 0.25))),
        r"weighting.update returns a \w+; it must return a pair, \(weights, state\)",
    ),
    "a weighting whose state grows": (
        lambda: update(avg=returning((jnp.full(K, 0.25), jnp.ones(3)))),
        "the weighting's new state is not a tree like its state",
    ),
    "a reduction that leaves the replicas": (
        lambda: update(avg=wavg.averager(wavg.uniform(), reduce=lambda stacked, weights, sum_over=None: stacked)),
        r"reduce\(...\)\['dense'\]\['bias'\] has shape \(4, 5\).*sums the replica axis away",
    ),
    "a reduction of part of the tree": (
        lambda: update(avg=wavg.averager(wavg.uniform(), reduce=lambda stacked, weights, sum_over=None: {})),
        r"there is no reduce\(...\)\['dense'\]\['bias'\]",
    ),
    "a pull to another shape": (
        lambda: pulling(lambda x, old, new: jnp.ones(3)).restart(STACKED, PARAMS, PARAMS),
        r"pull\(...\) has shape \(4, 3\) for a leaf of shape \(4, 5\)",
    ),
    "a pull to nothing": (
        lambda: pulling(lambda x, old, new: None).restart(STACKED, PARAMS, PARAMS),
        r"pull\(...\) is None",
    ),
    "a weighting's own update without the living": (
        lambda: wavg.uniform().update(STACKED, (), PARAMS),
        "alive= is missing; it must be a bool for each replica",
    ),
    "a weighting's own update with a number for the living": (
        lambda: wavg.uniform().update(STACKED, (), PARAMS, alive=True),
        r"alive is bool of shape \(\)",
    ),
    "a weighting's own update without its signal": (
        lambda: wavg.inverse("loss").update(STACKED, (), PARAMS, alive=jnp.ones(K, bool)),
        "the weighting needs the signal 'loss': pass loss=",
    ),
    "a weighting's own update without the blend": (
        lambda: wavg.learned().update(
            STACKED, wavg.learned().init(PARAMS, K), PARAMS, alive=jnp.ones(K, bool), evaluate=lambda p, w: {}
        ),
        "pass blend=, a function weights -> tree",
    ),
    "a signal in a list of another length": (
        lambda: update(avg=wavg.averager(wavg.inverse("loss")), loss=[1.0, 2.0]),
        r"the signal 'loss' has an entry of shape \(2,\)",
    ),
    "weighted_mean by too few": (lambda: wavg.weighted_mean(STACKED, jnp.ones(3)), r"have shape \(3,\)"),
    "weighted_mean by one for all": (lambda: wavg.weighted_mean(STACKED, jnp.ones(1)), r"have shape \(1,\)"),
    "norm_preserving by part of the tree": (
        lambda: wavg.norm_preserving(STACKED, {"dense": jnp.ones(4)}),
        "the weights, a dict, are not a prefix",
    ),
    "restart with what is not replicated": (lambda: AVG.restart(SQUARE, SQUARE, SQUARE), "must be .K, 4, 8.*replicate"),
    "restart of another network": (lambda: AVG.restart(STACKED, SQUARE, PARAMS), "old is not a tree like new"),
    "restart with a mask of another length": (
        lambda: AVG.restart(STACKED, PARAMS, PARAMS, alive=jnp.ones(1, bool)),
        r"alive is bool of shape \(1,\)",
    ),
    "pull with a mask of another length": (
        lambda: wavg.averager(wavg.uniform(), pull=0.5).restart(STACKED, PARAMS, PARAMS, alive=jnp.ones(1, bool)),
        r"alive is bool of shape \(1,\)",
    ),
    "replicate to nothing": (lambda: wavg.replicate(PARAMS, 0), "replicas is 0"),
    "replicate to half a replica": (lambda: wavg.replicate(PARAMS, 2.5), "replicas is 2.5; it must be a whole number"),
    "replica beyond the last": (lambda: wavg.replica(STACKED, 9), "no replica 9 of 4; they are numbered from 0 to 3"),
    "replica before the first": (lambda: wavg.replica(STACKED, -1), "no replica -1 of 4"),
    "replica by an array beyond the last": (lambda: wavg.replica(STACKED, jnp.int32(4)), "no replica 4 of 4"),
    "replica of what is not stacked": (lambda: wavg.replica(PARAMS, 0), "the leading axis of every leaf"),
    "normalise with a mask of another length": (
        lambda: wavg.normalise(jnp.ones(4), jnp.ones(1, bool)),
        r"alive is bool of shape \(1,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    call, says = REFUSED[case]
    with pytest.raises(wavg.SettingsError, match=says) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_it_is_refused_under_jit_too_while_it_is_traced():
    with pytest.raises(wavg.SettingsError, match=r"stacked\['kernel'\]"):
        jax.jit(AVG.update).lower(SQUARE, AVG.init(SQUARE, K), SQUARE)


def test_what_fits_is_taken_whatever_library_its_arrays_are_of():
    new, _, _ = update(jax.tree.map(np.asarray, STACKED), jax.tree.map(np.asarray, PARAMS), alive=[True] * K)
    jax.tree.map(np.testing.assert_array_equal, new, PARAMS)
    float64 = jax.tree.map(lambda x: np.asarray(x, np.float64), STACKED)  # float32 to JAX
    new, _, _ = jax.jit(AVG.update)(float64, AVG.init(PARAMS, K), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, new, PARAMS)
    for k in (2, np.int64(2), jnp.int32(2)):
        jax.tree.map(np.testing.assert_array_equal, wavg.replica(STACKED, k), PARAMS)
    assert jax.jit(wavg.replica)({"w": jnp.arange(4.0)}, 2)["w"] == 2


def test_each_device_may_reduce_its_own_share():
    there = on(tuple(jax.devices()[:2]))
    mean = there.reduce(wavg.weighted_mean)(*jax.device_put((STACKED, jnp.full(K, 0.25)), there.stacked))
    jax.tree.map(np.testing.assert_array_equal, mean, PARAMS)


def test_a_state_with_numbers_of_python_is_one():
    counted = wavg.Weighting(lambda params, replicas: 0, lambda s, n, p, alive, **_: (jnp.full(K, 0.25), n + 1))
    avg = wavg.averager(counted, outer=optax.sgd(1.0))
    assert int(update(avg=avg)[1].weighting) == 1


@pytest.mark.parametrize("make", [wavg.inverse, wavg.softmax, wavg.greedy_soup])
@pytest.mark.parametrize("kind", [list, tuple, np.asarray])
def test_a_signal_may_be_a_list_of_numbers(make, kind):
    avg, loss = wavg.averager(make("loss")), [0.5, 0.25, 0.5, 2.0]
    more = {"evaluate": lambda params, weights: {"loss": params["scale"]}} if "evaluate" in avg.needs else {}
    _, _, listed = update(avg=avg, loss=kind(loss), **more)
    _, _, expected = update(avg=avg, loss=jnp.array(loss), **more)
    np.testing.assert_array_equal(listed, expected)
