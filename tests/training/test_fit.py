"""fit(): one compilation, donated buffers, what reaches the weights, dead replicas, placement, policies, bad input."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import INNER, TASK, WEIGHTED, leaves, run
from small import blobs, initial, sharded

import wavg_jax as wavg
from wavg_jax import data, models
from wavg_jax.rounds import policy
from wavg_jax.training.batches import make_work, put_shared
from wavg_jax.training.programs import programs_of
from wavg_jax.training.recipe import make_recipe


def test_it_learns_and_says_what_happened():
    result = run(sharded(), rounds=10)
    first, *rows = result.rows
    assert (first["kind"], first["replicas"], first["parameters"], first["shard_sizes"]) == ("run", 4, 15, [60] * 4)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["started"])
    assert first["class_names"] is None
    assert first["bytes_per_round"] == 2 * 4 * (15 + 1) * 4  # up and down, 4 replicas, 15 parameters and 1 statistic
    assert [row["round"] for row in rows] == list(range(1, 11))
    assert [row["samples"] for row in rows] == [4 * 4 * 8 * r for r in range(1, 11)]
    assert rows[-1]["test_loss"] < rows[0]["test_loss"]
    assert rows[-1]["test_accuracy"] > 0.7
    for row in rows:
        np.testing.assert_allclose(sum(row["weights"]), 1, rtol=1e-6)
        np.testing.assert_allclose(row["effective_replicas"], 1 / np.square(row["weights"]).sum(), rtol=1e-5)
        assert set(row["scores"]) == {"loss"}
        assert row["alive"] == [True] * 4
    assert "confusion" not in rows[0]
    assert np.sum(rows[-1]["confusion"]) == 60
    assert np.trace(rows[-1]["confusion"]) / 60 == pytest.approx(rows[-1]["test_accuracy"], rel=1e-6)


def test_a_run_compiles_nothing_after_its_first_round(compilations):
    at_round = []
    run(sharded(), rounds=4, inner=optax.sgd(0.1), on_round=lambda row: at_round.append(len(compilations)))
    run(sharded(seed=1), rounds=4, seed=1)
    assert at_round[0] > 0  # the listener works: something was compiled before
    assert at_round == [at_round[0]] * 4


def test_two_seeds_share_one_compiled_program():
    results = [run(sharded(seed=seed), seed=seed) for seed in (0, 1)]
    assert results[0].rows[0]["compile_seconds"] == results[1].rows[0]["compile_seconds"]
    assert results[0].rows[1]["train_loss"] != results[1].rows[1]["train_loss"]


def test_the_state_is_donated():
    source = sharded()
    recipe = make_recipe(TASK, source, WEIGHTED, INNER, layout=wavg.Layout(devices=1))
    program = programs_of(recipe, 4)
    state = program.init(jax.random.key(0))
    shared = put_shared(recipe, source)
    work = make_work(recipe, source, seed=0, first_step=0, longest=4, batch_size=8, steps=4)
    after, *_ = program.run(state, work, shared)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert int(after.round) == 1


WEIGHTINGS = [wavg.proportional("accuracy"), wavg.softmax("loss", 0.5), wavg.inverse("loss"), wavg.inverse("grad_norm")]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=["accuracy", "softmax", "inverse", "grad_norm"])
def test_the_test_split_cannot_reach_the_weights(weighting):
    honest = sharded(noisy=(0, 1))
    lied_to = honest._replace(test=honest.test._replace(x=honest.test.x[::-1] * 2, y=np.zeros_like(honest.test.y)))
    results = [run(source, wavg.averager(weighting)) for source in (honest, lied_to)]
    for a, b in zip(leaves(results[0]), leaves(results[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(results[0].rows[1:], results[1].rows[1:], strict=True):
        assert (a["weights"], a["scores"], a["train_loss"]) == (b["weights"], b["scores"], b["train_loss"])
        assert a["test_accuracy"] != b["test_accuracy"]


def test_held_out_samples_are_never_trained_on_and_do_reach_the_weights():
    honest = sharded(noisy=(0, 1))
    other = honest._replace(heldout=honest.heldout._replace(y=(honest.heldout.y + 1) % 3))
    rows = [run(source, rounds=1).rows[1] for source in (honest, other)]
    assert rows[0]["train_loss"] == rows[1]["train_loss"]
    assert rows[0]["weights"] != rows[1]["weights"]


def test_noisy_shards_weigh_less():
    rows = run(sharded(noisy=(1,)), rounds=6, local_steps=20).rows[1:]
    assert np.mean([row["weights"][1] for row in rows]) < 0.8 * 0.25


@pytest.mark.parametrize(("replicas", "wire"), [(8, "float32"), (16, "float32"), (16, "int8")])
def test_eight_devices_give_the_numbers_of_one(replicas, wire):
    averager = wavg.averager(wavg.softmax("loss", 0.5), outer=wavg.outer.nesterov(0.7, 0.5))
    results = [run(sharded(replicas=replicas), averager, wire=wire)]
    wide = pytest.warns(wavg.WavgWarning, match="wire='int8' sends 2.03 times the bytes of wire='float32': it gathers")
    with wide if wire == "int8" else contextlib.nullcontext():
        results.append(run(sharded(replicas=replicas), averager, devices=8, wire=wire))
    for a, b in zip(*map(leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    assert results[0].rows[0]["data_crc"] == results[1].rows[0]["data_crc"]
    for a, b in zip(results[0].rows[1:], results[1].rows[1:], strict=True):
        np.testing.assert_allclose(a["weights"], b["weights"], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(a["test_loss"], b["test_loss"], rtol=2e-5)
    assert len(jax.tree.leaves(results[1].state.replicas.params)[0].sharding.device_set) == 8


def test_a_replica_that_diverges_has_no_part_in_the_blend_and_restarts():
    source = sharded()
    x = source.train.x.copy()
    x[source.shards[2]] = 3e38  # overflows in the first step
    source = source._replace(train=source.train._replace(x=x), prepare=lambda x: x)
    with pytest.warns(wavg.WavgWarning, match="replica 2"):
        result = run(source, wavg.averager(wavg.uniform()))
    for row in result.rows[1:]:
        assert row["alive"] == [True, True, False, True]
        np.testing.assert_allclose(row["weights"], [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)
        assert np.isfinite(row["train_loss"])
    assert all(np.isfinite(x).all() for x in leaves(result) if x.dtype.kind == "f")


def test_a_replica_whose_optimizer_state_alone_overflows_is_dead_for_the_round_and_restarts():
    def update(gradient, largest, params=None):
        step = jax.tree.map(lambda g: -1e-6 * g, gradient)
        return step, jnp.maximum(largest, 1e35 * jnp.abs(gradient["w"]).max())

    source = sharded()
    x = source.train.x.copy()
    x[source.shards[2]] = 1e5  # a gradient of this size alone makes the state infinite
    source = source._replace(train=source.train._replace(x=x), prepare=lambda x: x)
    inner = optax.GradientTransformation(lambda params: jnp.zeros(()), update)
    with pytest.warns(wavg.WavgWarning, match="replica 2 is not finite"):
        result = run(source, wavg.averager(wavg.uniform(), pull=0.0), inner=inner, rounds=1, local_steps=1)
    assert result.rows[1]["alive"] == [True, True, False, True]
    np.testing.assert_allclose(result.rows[1]["weights"], [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)
    largest = np.asarray(result.state.replicas.opt_state)
    assert largest[2] == 0
    assert (largest[[0, 1, 3]] > 0).all()
    np.testing.assert_array_equal(result.state.replicas.params["w"][2], result.params["w"])


def test_a_constant_that_is_infinite_is_not_held_against_the_replicas():
    def init(rng):
        params, mutable = TASK.init(rng)
        return params, mutable | {"mask": jnp.array([-jnp.inf, 0.0])}

    def loss(params, mutable, batch, rng):
        value, (changed, measured) = TASK.loss(params, {"seen": mutable["seen"]}, batch, rng)
        return value, (changed | {"mask": mutable["mask"]}, measured)

    task = TASK._replace(init=init, loss=loss, predict=lambda p, m, x: TASK.predict(p, {"seen": m["seen"]}, x))
    result = run(sharded(), task=task)
    assert result.rows[-1]["alive"] == [True] * 4
    assert result.mutable["mask"].tolist() == [-np.inf, 0.0]
    assert result.rows[-1]["test_loss"] < result.rows[1]["test_loss"]


def test_a_reduction_of_one_s_own_works_on_one_device_and_on_eight():
    def doubled(stacked, weights, *, sum_over=None):
        return jax.tree.map(lambda x: 2 * x, wavg.weighted_mean(stacked, weights, sum_over=sum_over))

    averager = wavg.averager(wavg.uniform(), reduce=doubled)
    results = [run(sharded(replicas=8), averager, devices=devices, rounds=1) for devices in (1, 8)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), results[0].params, results[1].params)


def test_when_every_replica_diverges_the_parameters_stay():
    source = sharded()
    broken = source._replace(train=source.train._replace(x=np.full_like(source.train.x, 3e38)), prepare=lambda x: x)
    with pytest.warns(wavg.WavgWarning, match="round 1"), pytest.raises(wavg.Diverged) as raised:
        run(broken)
    result = raised.value.result
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), result.params, initial(TASK)[0])
    assert result.rows[-1]["weights"] == [0] * 4
    assert result.rows[-1]["train_loss"] is None


@pytest.mark.parametrize("k", [1, 4])
def test_pooled_and_sharded_see_the_same_budget(k):
    source = sharded() if k == 4 else data.pool(sharded())
    assert run(source, wavg.averager(wavg.uniform()), local_steps=16 // k).rows[-1]["samples"] == 3 * 16 * 8


def momentum(result):
    return np.asarray(result.state.replicas.opt_state[0].trace["w"])


@pytest.mark.parametrize("how", ["keep", "average", "reset"])
def test_policies_for_the_inner_optimizers_state(how):
    result = run(sharded(), wavg.averager(wavg.uniform()), opt_state=getattr(policy, how))
    trace = momentum(result)
    assert (np.ptp(trace, axis=0).max() > 1e-3) == (how == "keep")
    assert (np.abs(trace).max() == 0) == (how == "reset")


def test_averaged_optimizer_state_is_the_weighted_mean_and_is_paid_for():
    rows = {how: run(sharded(), rounds=1, local_steps=2, opt_state=getattr(policy, how)) for how in ("keep", "average")}
    weights = np.array(rows["keep"].rows[1]["weights"])
    expected = np.tensordot(weights, momentum(rows["keep"]), 1)
    np.testing.assert_allclose(momentum(rows["average"])[0], expected, rtol=1e-5, atol=1e-7)
    sent = {how: result.rows[0]["bytes_per_round"] for how, result in rows.items()}
    assert sent["average"] - sent["keep"] == 2 * 4 * 15 * 4


def test_the_cost_of_averaging_is_known_however_the_policy_is_wrapped_and_without_a_state_made_for_it():
    made = []

    def init(params):
        made.append(isinstance(params["w"], jax.core.Tracer))
        return INNER.init(params)

    def wrapped(stacked, sync):
        return policy.average(stacked, sync)

    options = {"inner": optax.GradientTransformation(init, INNER.update), "rounds": 1, "local_steps": 2}
    average, keep = (run(sharded(), opt_state=how, **options).rows[0] for how in (wrapped, policy.keep))
    assert average["bytes_per_round"] - keep["bytes_per_round"] == 2 * 4 * 15 * 4
    assert all(made)


@pytest.mark.parametrize(
    ("how", "replicas_saw", "global_saw"),
    [(policy.keep, 12, 12), (policy.average, 12, 12), (policy.reset, 0, 4), (policy.reestimate(2), 3 * (4 + 2), 18)],
    ids=["keep", "average", "reset", "reestimate"],
)
def test_policies_for_statistics(how, replicas_saw, global_saw):
    # The task's statistic counts training batches: 3 rounds of 4 steps, and 2 more a round when re-estimated.
    result = run(sharded(), stats=how)
    np.testing.assert_allclose(result.state.replicas.mutable["seen"], [replicas_saw] * 4, rtol=1e-6)
    np.testing.assert_allclose(result.mutable["seen"], global_saw, rtol=1e-6)


def test_re_estimated_batchnorm_statistics_are_those_of_the_blended_network():
    # Inputs of mean 5: after many batches at momentum 0.5 the running mean must be the data's, under every policy but
    # reset, and re-estimating from the initial statistics must get there within the round.
    rng = np.random.default_rng(0)
    x = rng.normal(5.0, 2.0, size=(200, 3)).astype(np.float32)
    dataset = data.from_arrays(x, rng.integers(0, 2, 200), x[:20], rng.integers(0, 2, 20), classes=2)
    source = data.shard(dataset, lambda split, seed: data.iid(len(split.y), 2, seed), heldout=10, seed=0)
    source = source._replace(prepare=lambda x: x)

    from flax import linen as nn

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))

    task = models.from_linen(Normed(), (3,))
    result = run(source, task=task, local_steps=8, stats=policy.reestimate(8), batch_size=32)
    (mean,) = jax.tree.leaves(
        jax.tree.map(lambda s: s["mean"], result.mutable["batch_stats"], is_leaf=lambda s: "mean" in s)
    )
    np.testing.assert_allclose(mean, x.mean(axis=0), atol=0.5)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_differs_between_replicas_and_is_the_same_from_run_to_run(rate):
    # One sample over and over, whose order cannot matter, so that only their keys can make the replicas differ.
    source = sharded(replicas=2)
    same = np.zeros(len(source.train.y), int)
    source = source._replace(train=data.Split(source.train.x[same], source.train.y[same]))
    task = models.from_linen(models.MLP(hidden=(16,), classes=3, dropout=rate), (4,))
    results = [run(source, wavg.averager(wavg.uniform()), task, local_steps=1, rounds=1) for _ in range(2)]
    for a, b in zip(leaves(results[0]), leaves(results[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    gradients = jax.tree.leaves(results[0].state.replicas.opt_state[0].trace)
    spread = max(np.ptp(np.asarray(g), axis=0).max() for g in gradients)
    assert spread > 1e-3 if rate else spread < 1e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"local_steps": -1}, "local_steps is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 61}, "batch_size"),
        ({"resume": True}, "workdir="),
        ({"devices": 3}, "devices"),
        ({"task": models.from_linen(models.MLP(hidden=(4,), classes=7), (4,))}, "7"),
        ({"averager": wavg.averager(wavg.softmax("cosine", higher_is_better=True))}, "'cosine'"),
        ({"sharded_data": sharded(heldout=0)}, "heldout="),
        ({"opt_state": policy.reestimate(2)}, "keep, average or reset"),
        ({"stats": policy.reestimate(5)}, "local_steps="),
        ({"seed": 2**32}, "seed is"),
    ],
)
def test_bad_settings_are_one_clear_line_before_anything_is_written(options, says, tmp_path):
    with pytest.raises(wavg.SettingsError, match=says) as raised:
        run(**({"sharded_data": sharded(), "workdir": None if "resume" in options else tmp_path / "run"} | options))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_more_replicas_than_samples_is_refused():
    with pytest.raises(wavg.SettingsError, match="replicas"):
        sharded(replicas=1000)


def test_blobs_are_what_the_other_tests_think():
    assert blobs().classes == 3
    assert jnp.asarray(blobs().train.x).dtype == jnp.float32
