"""fit()'s options beside the averager: H over time, smoothing, subsets for scoring, faults, pulls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import train
from small import initial, regression, sharded

import wavg_jax as wavg
from wavg_jax.averaging import pull, smoothing
from wavg_jax.rounds.faults import simulate
from wavg_jax.training import schedule

TASK = regression()
INNER = optax.sgd(0.1, momentum=0.9)
WEIGHTED = wavg.averager(wavg.softmax("loss", 0.5))
APART = wavg.averager(wavg.uniform(), pull=0.0)
"""Leaves the replicas as they are, so that what each has done can be seen."""
SKIP = ("seconds", "elapsed", "confusion", "peak_memory")
"""Clocks, and what the last round of each part has."""


def run(averager=WEIGHTED, source=None, inner=INNER, **options):
    defaults = {"local_steps": 4, "rounds": 3, "batch_size": 8, "devices": 1}
    return train(TASK, source or sharded(), averager, inner=inner, **(defaults | options))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    """What two programs make of the same arithmetic is rounded in two ways."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.optimized
def test_a_fixed_schedule_is_a_fixed_number():
    assert_same(run(local_steps=schedule.fixed(4)).params, run(local_steps=4).params)


def test_h_changes_from_round_to_round_without_recompiling(compilations):
    at_round = []
    rows = run(
        local_steps=schedule.linear(1, 6, 3), rounds=4, on_round=lambda row: at_round.append(len(compilations))
    ).rows[1:]
    steps = [row["local_steps"] for row in rows]
    assert steps[0] == 1
    assert steps[-1] == 6
    assert [row["samples"] for row in rows] == (np.cumsum(steps) * 4 * 8).tolist()
    assert at_round[0] > 0
    assert at_round == [at_round[0]] * 4


def test_rounds_of_different_length_read_one_stream_of_samples():
    # H of 1 then 3 with one replica and no outer step is H of 4.
    source = sharded(replicas=1)
    first_one = schedule.Schedule(3, lambda past: 1 if past.round == 0 else 3)
    avg = wavg.averager(wavg.uniform())
    assert_close(
        run(avg, source, local_steps=first_one, rounds=2).params, run(avg, source, local_steps=4, rounds=1).params
    )


@pytest.mark.slow
@pytest.mark.optimized
def test_a_schedule_that_looks_at_losses_resumes_bit_for_bit(tmp_path):
    eager = schedule.Schedule(6, lambda past: 6 if not past.losses or past.losses[-1] > 0.6 else 2 + past.steps % 3)
    whole = run(local_steps=eager, rounds=5)
    run(local_steps=eager, rounds=3, workdir=tmp_path, checkpoint_every=2)
    rest = run(local_steps=eager, rounds=5, workdir=tmp_path, checkpoint_every=2, resume=True)
    assert_same(whole.params, rest.params)
    for a, b in zip(whole.rows[1:], rest.rows[1:], strict=True):
        assert {k: v for k, v in a.items() if k not in SKIP} == {k: v for k, v in b.items() if k not in SKIP}
    assert len({row["local_steps"] for row in whole.rows[1:]}) > 1


@pytest.mark.parametrize("devices", [1, 4])
def test_a_straggler_does_part_of_the_steps_and_the_others_all(devices):
    slow = run(APART, rounds=1, faults=simulate(4, speed={1: 0.5}), devices=devices)
    full, half = run(APART, rounds=1), run(APART, rounds=1, local_steps=2)
    for k, expected in ((0, full), (1, half), (2, full)):
        got = jax.tree.map(lambda x, k=k: np.asarray(x[k]), slow.state.replicas.params)
        want = jax.tree.map(lambda x, k=k: np.asarray(x[k]), expected.state.replicas.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)
    assert slow.rows[1]["samples"] == (4 + 2 + 4 + 4) * 8


def test_a_rate_multiplies_what_the_inner_optimizer_adds_and_sent_the_change_that_is_sent():
    start = np.asarray(initial(TASK)[0]["w"])
    plain = run(APART, rounds=1, local_steps=1)
    bad = run(APART, rounds=1, local_steps=1, faults=simulate(4, rate={0: 10.0}, sent={1: -1.0}))
    own, kept = (np.asarray(result.state.replicas.params["w"]) - start for result in (plain, bad))
    np.testing.assert_allclose(kept[0], 10 * own[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kept[1:], own[1:], rtol=1e-4, atol=1e-6)  # the liar itself trains on from the truth
    blend = (10 * own[0] - own[1] + own[2] + own[3]) / 4
    np.testing.assert_allclose(bad.params["w"] - start, blend, rtol=1e-4, atol=1e-6)


def test_scores_are_of_what_a_replica_sends():
    source = sharded()
    apart = wavg.averager(wavg.softmax("loss", 0.5), pull=0.0)
    lying = run(apart, source, rounds=1, faults=simulate(4, sent={1: -2.0}))
    start, own = initial(TASK)[0], lying.state.replicas.params
    sent = jax.tree.map(np.array, own)
    for name, s in start.items():
        sent[name][1] = s - 2 * (own[name][1] - s)
    logits = np.asarray(source.prepare(source.heldout.x)) @ sent["w"] + sent["b"][:, None]
    losses = -np.asarray(jax.nn.log_softmax(logits))[:, np.arange(len(source.heldout.y)), source.heldout.y].mean(axis=1)
    np.testing.assert_allclose(lying.rows[1]["scores"]["loss"], losses, rtol=1e-4)
    assert np.argmax(losses) == 1  # what it keeps to itself is as good as the others'
    assert np.argmin(lying.rows[1]["weights"]) == 1


def test_faults_are_of_as_many_replicas_as_there_are():
    with pytest.raises(wavg.SettingsError, match="faults= are of 3 replicas, there are 4"):
        run(faults=simulate(3))
    for bad in ({"speed": {0: 0.0}}, {"speed": {0: 1.5}}, {"rate": {0: float("nan")}}, {"sent": {4: 1.0}}):
        with pytest.raises(wavg.SettingsError, match="simulate"):
            simulate(4, **bad)


def test_signals_of_work_reach_the_weights():
    rows = run(wavg.averager(wavg.proportional("steps")), rounds=1, faults=simulate(4, speed={0: 0.25})).rows
    np.testing.assert_allclose(rows[1]["weights"], [1 / 13, 4 / 13, 4 / 13, 4 / 13], rtol=1e-6)
    np.testing.assert_allclose(run(wavg.averager(wavg.proportional("samples"))).rows[1]["weights"], [0.25] * 4)


def test_a_subset_of_the_held_out_split_is_scored_another_one_each_round():
    still = {"inner": optax.sgd(0.0), "rounds": 3, "samples": 10}  # nothing moves, so scores differ by samples
    scores = [row["scores"]["loss"][0] for row in run(**still).rows[1:]]
    assert scores[0] != scores[1]
    assert scores[0] == scores[2]  # 20 samples are held out: two subsets
    whole = run(inner=optax.sgd(0.0), rounds=1).rows[1]["scores"]["loss"][0]
    np.testing.assert_allclose(np.mean(scores[:2]), whole, rtol=1e-5)
    with pytest.raises(wavg.SettingsError, match="Scoring: samples is 0"):
        run(samples=0)


def test_scores_in_bfloat16_are_those_in_float32_but_for_rounding():
    full, half = (run(rounds=1, dtype=dtype).rows[1]["scores"]["loss"] for dtype in (None, jnp.bfloat16))
    assert full != half
    np.testing.assert_allclose(full, half, rtol=2e-2)


def test_the_average_of_the_global_parameters_is_evaluated_and_returned():
    after = [run(rounds=r).params["w"] for r in (1, 2, 3)]
    smooth = run(smoothing=smoothing.swa())
    np.testing.assert_allclose(smooth.params["w"], np.mean(after, axis=0), rtol=1e-5, atol=1e-6)
    assert_close(smooth.state.params["w"], after[-1])  # training goes on as without
    assert smooth.rows[3]["test_loss"] != run().rows[3]["test_loss"]
    # The regression counts its training steps; the average's count goes on for 4 batches, all a round has.
    np.testing.assert_allclose(smooth.mutable["seen"], 3 * 4 + 4, rtol=1e-6)
    np.testing.assert_allclose(smooth.state.mutable["seen"], 3 * 4, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.optimized
def test_smoothing_resumes_bit_for_bit(tmp_path):
    options = {"smoothing": smoothing.ema(0.5), "rounds": 4}
    whole = run(**options)
    run(**options | {"rounds": 2}, workdir=tmp_path)
    assert_same(whole.params, run(**options, workdir=tmp_path, resume=True).params)


def test_the_test_split_may_be_evaluated_now_and_then():
    rows = run(rounds=5, test_every=2).rows[1:]
    assert [row["test_accuracy"] is None for row in rows] == [True, False, True, False, False]
    assert "confusion" in rows[-1]
    assert rows[-1]["test_accuracy"] == run(rounds=5).rows[-1]["test_accuracy"]


def test_pulled_replicas_stay_apart_and_the_centre_moves():
    elastic = wavg.averager(wavg.uniform(), pull=pull.toward_old(0.1), outer=optax.sgd(0.4))
    state = run(elastic).state
    assert float(jnp.ptp(state.replicas.params["w"], axis=0).max()) > 1e-3
    assert float(jnp.abs(state.params["w"] - initial(TASK)[0]["w"]).max()) > 1e-3


@pytest.mark.parametrize("devices", [1, 4])
def test_the_distance_to_the_mean_is_measured(devices):
    near = wavg.averager(wavg.inverse("distance"), pull=0.0)
    result = run(near, rounds=1, devices=devices)
    stacked = jax.tree.map(np.asarray, result.state.replicas.params)
    away = [np.sqrt(sum(np.square(x[k] - x.mean(axis=0)).sum() for x in jax.tree.leaves(stacked))) for k in range(4)]
    np.testing.assert_allclose(result.rows[1]["scores"]["distance"], away, rtol=1e-5)


def test_the_last_row_has_what_the_caller_makes_of_the_network(tmp_path):
    seen = []

    def note(params, mutable):
        seen.append((params, mutable))
        return {"note": "done", "round": -1}  # an entry of the row's own stays

    store = wavg.Store(at_end=note)
    result = run(store=store, workdir=tmp_path)
    assert [row.get("note") for row in result.rows] == [None, None, None, "done"]
    assert [row["round"] for row in result.rows[1:]] == [1, 2, 3]
    ((params, mutable),) = seen
    for got, expected in zip(
        jax.tree.leaves((params, mutable)), jax.tree.leaves((result.params, result.mutable)), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    early = run(store=store, on_round=lambda row: row["round"] == 2)
    assert [row.get("note") for row in early.rows] == [None, None, "done"]
    assert early.rows[-1]["stopped_early"]
    with pytest.raises(wavg.SettingsError, match="at_end"):
        run(store=wavg.Store(at_end="note"))
