"""Elastic runs: without faults they are runs of `fit`, and with faults they go on."""

import os
import signal

import breaking
import jax
import numpy as np
import optax
import pytest
from breaking import Hook, wait_for
from runs import INNER, TASK, WEIGHTED, without_clocks
from small import sharded

import wavg_jax as wavg
from wavg_jax import elastic
from wavg_jax.elastic import Workers, fixed, wait_for_all
from wavg_jax.training.batches import make_work, put_shared
from wavg_jax.training.programs import programs_of
from wavg_jax.training.recipe import make_recipe, rounds_of

DATA = sharded(4)
pytestmark = pytest.mark.usefixtures("cluster")
quietly = pytest.mark.filterwarnings("ignore::wavg_jax.WavgWarning")
SETTINGS = {"inner": INNER, "local_steps": 4, "rounds": 4, "batch_size": 8, "progress": False}


@pytest.fixture(scope="module")
def cluster():
    """One cluster for all tests: starting it takes longer than most of them."""
    from wavg_jax.elastic.cluster import connected

    with connected(None) as ray:
        ray.cloudpickle.register_pickle_by_value(breaking)  # workers do not know this folder
        yield ray


def train(workers, task=TASK, averager=WEIGHTED, data=DATA, **settings):
    return elastic.fit(task, data, averager, workers=workers, **(SETTINGS | settings))


def alone(task=TASK, averager=WEIGHTED, data=DATA, **settings):
    """The same run in this process."""
    layout = wavg.Layout(1, "map")
    return wavg.fit(task, data, averager, layout=layout, **(SETTINGS | settings))


def alike(a, b):
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(a.rows[1:], b.rows[1:], strict=True):
        assert ours["samples"] == theirs["samples"]
        assert ours["round"] == theirs["round"]
        np.testing.assert_allclose(ours["weights"], theirs["weights"], rtol=1e-3, atol=1e-4)


def rounds(result):
    """The rows of rounds; who is missing in one took no part in it."""
    found = [row for row in result.rows if row["kind"] == "round"]
    for row in found:
        assert not any(row["alive"][int(k)] or row["weights"][int(k)] for k in row.get("missing", ()))
    return found


def missing(result):
    """{round: {replica: why}} of the rounds that missed somebody."""
    return {row["round"]: row["missing"] for row in rounds(result) if row["missing"]}


def was(result, worker):
    return [entry["was"] for row in rounds(result) for entry in row["workers"] if entry["worker"] == worker]


@pytest.mark.slow
def test_without_faults_it_is_the_run_of_fit():
    options = {
        "averager": wavg.averager(wavg.opinion_pool(), outer=wavg.outer.nesterov(0.7, 0.9)),
        "at_sync": wavg.AtSync(opt_state=wavg.policy.average, smoothing=wavg.smoothing.swa()),
        "local_steps": wavg.schedule.linear(2, 4, rounds=4),
    }
    result = train(Workers(2), **options)
    alike(result, alone(**options))
    assert not missing(result)
    assert was(result, 0) == was(result, 1) == ["computed"] * 4
    assert [entry["replicas"] for entry in rounds(result)[0]["workers"]] == [[0, 1], [2, 3]]
    assert result.rows[0]["elastic"]["workers"] == 2


@pytest.mark.slow
def test_control_variates_and_simulated_faults_travel():
    options = {
        "at_sync": wavg.AtSync(drift=wavg.drift.scaffold(0.1)),
        "faults": wavg.faults.simulate(4, speed={1: 0.5}, sent={2: -1.0}),
        "inner": optax.sgd(0.1),
        "averager": wavg.averager(wavg.uniform()),
        "rounds": 3,
    }
    alike(train(Workers(2), **options), alone(**options))


@pytest.mark.slow
def test_workers_are_added_and_removed_while_the_run_goes_on():
    sizes = {1: 2, 2: 3, 3: 3, 4: 1}
    result = train(Workers(sizes.__getitem__))
    alike(result, alone())
    dealt = [{entry["worker"]: entry["replicas"] for entry in row["workers"]} for row in rounds(result)]
    assert dealt[0] == {0: [0, 1], 1: [2, 3]}
    assert dealt[1] == dealt[2] == {0: [0, 1], 1: [2], 2: [3]}
    assert dealt[3] == {0: [0, 1, 2, 3]}


@quietly
def test_broken_replies_are_refused_and_the_run_goes_on(tmp_path):
    kinds = {
        2: ("raise", "its worker failed: RuntimeError: no luck"),
        3: ("not finite", "its numbers are not finite"),
        4: ("far", "its change is"),
        5: ("shape", "its worker sent an array of shape (1, 3) for (2, 3)"),
        6: ("dtype", "its worker sent an array of dtype float64 for float32"),
        7: ("tree", "its worker sent another tree"),
        8: ("nothing", "its worker sent no reply but a NoneType"),
        9: ("earlier", "its worker answered another order"),
        10: ("huge", "its worker sent 8,"),
        11: ("odd", "its worker answered another order"),
    }
    # Workers take turns, since one that is useless three times in a row is started anew.
    plan = {(round % 2, round): kind for round, (kind, _) in kinds.items()}
    result = train(Workers(2, deadline=wait_for_all, hook=Hook(plan, str(tmp_path))), rounds=12)
    for row in rounds(result):
        number = row["round"]
        own = [0, 1] if number % 2 == 0 else [2, 3]
        dead = own if number in kinds else []
        assert [k for k, alive in enumerate(row["alive"]) if not alive] == dead, number
        kind, why = kinds.get(number, ("", None))
        assert set(row["missing"]) == ({str(k) for k in dead} if why else set()), kind
        for told in row["missing"].values():
            assert told.startswith(why), kind
    assert rounds(result)[-1]["test_accuracy"] >= rounds(alone(rounds=12))[-1]["test_accuracy"] - 0.1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.params))


@pytest.mark.slow
def test_a_quorum_waits_for_killed_workers_and_no_round_is_lost_or_counted_twice(tmp_path):
    hook = Hook({(0, 2): "kill", (1, 3): "kill on the way"}, str(tmp_path))
    result = train(Workers(2, min_replicas=4, hook=hook), workdir=tmp_path / "run")
    alike(result, alone())
    assert not missing(result)
    assert (tmp_path / "train-0-2-again").exists()


@pytest.mark.slow
def test_without_a_quorum_the_round_goes_on_and_the_killed_worker_comes_back(tmp_path):
    hook = Hook({(1, 2): "kill"}, str(tmp_path / "met"))
    (tmp_path / "met").mkdir()

    def until_it_is_back(row):
        if row["round"] == 4:
            wait_for(tmp_path / "met" / "ready-1-0-again")

    with pytest.warns(wavg.WavgWarning, match="round 2 is without replicas 2, 3 of worker 1: its worker died"):
        result = train(Workers(2, deadline=wait_for_all, hook=hook), rounds=60, on_round=until_it_is_back)
    assert set(missing(result)[2]) == {"2", "3"}
    assert missing(result)[2]["2"] == "its worker died"
    assert rounds(result)[1]["weights"][2:] == [0, 0]
    lane = was(result, 1)
    assert lane[1] == "failed"
    assert lane[2] == "away"
    assert "computed" in lane[4:]
    assert [row["round"] for row in rounds(result)] == list(range(1, 61))


@pytest.mark.slow
def test_a_worker_that_dies_between_two_orders_is_waited_for(tmp_path):
    def kill(row):
        if row["round"] == 2:
            os.kill(int((tmp_path / "hold-0-0").read_text()), signal.SIGKILL)

    result = train(Workers(2, min_replicas=4, hook=Hook({}, str(tmp_path))), on_round=kill)
    alike(result, alone())
    assert not missing(result)
    assert (tmp_path / "hold-0-0-again").exists()


@pytest.mark.slow
@quietly
def test_the_shards_of_a_worker_that_is_away_are_dealt_to_the_others_until_it_is_back(tmp_path):
    def until_it_is_back(row):
        if row["round"] == 4:
            wait_for(tmp_path / "ready-1-0-again")

    workers = Workers(2, away=1e-6, deadline=wait_for_all, hook=Hook({(1, 2): "kill"}, str(tmp_path)))
    result = train(workers, rounds=40, on_round=until_it_is_back)
    dealt = [{entry["worker"]: entry["replicas"] for entry in row["workers"]} for row in rounds(result)]
    assert dealt[1] == {0: [0, 1], 1: [2, 3]}
    assert dealt[2] == {0: [0, 1, 2, 3], 1: []}
    assert dealt[-1] == {0: [0, 1], 1: [2, 3]}
    assert set(missing(result)) == {2}


def late_in_round_5(tmp_path, late, then, **settings):
    """A run whose worker 0 is stopped in round 2 and goes on while worker 1 works on round 5."""
    hook = Hook({(0, 2): "stop", (1, 5): then}, str(tmp_path))
    with pytest.warns(wavg.WavgWarning, match="round 2 is without replicas 0, 1 of worker 0: its worker was late"):
        result = train(Workers(2, deadline=fixed(3.0), late=late, audit=4, hook=hook), rounds=9, **settings)
    assert {finding["wrong"] for row in rounds(result) for finding in row.get("audits", ())} == {None}
    lane = was(result, 0)
    assert lane[:4] == ["computed", "late", "away", "away"]
    assert lane[-1] == "computed"
    return result, lane


@pytest.mark.slow
def test_a_stopped_worker_is_late_and_comes_back(tmp_path):
    result, _ = late_in_round_5(tmp_path, None, "let the other go on")
    entries = [entry for row in rounds(result)[4:] for entry in row["workers"] if entry["worker"] == 0]
    assert "late, dropped" in [entry.get("after", entry["was"]) for entry in entries]


@pytest.mark.slow
def test_a_late_result_counts_less_where_that_is_asked_for(tmp_path):
    def discount(staleness):
        (tmp_path / "counted").write_text(str(staleness))
        return 0.5

    # Every round scores other samples, by which the late ones are scored too.
    settings = {"averager": wavg.averager(wavg.opinion_pool()), "scoring": wavg.Scoring(samples=8)}
    result, lane = late_in_round_5(tmp_path, discount, "let the other go on and count", **settings)
    assert (tmp_path / "counted").read_text() == "3"
    assert lane[4] == "late, counted"
    assert min(rounds(result)[4]["weights"][:2]) > 0
    assert rounds(result)[4]["missing"] == {}


@pytest.mark.slow
@quietly
def test_scores_are_checked_by_another_worker(tmp_path):
    hook = Hook({(0, 2): "lie", (1, 3): "lie about others"}, str(tmp_path))
    result = train(Workers(2, audit=4, hook=hook), averager=wavg.averager(wavg.softmax("accuracy", 0.5)))
    first, second, third, fourth = rounds(result)
    assert {finding["wrong"] for finding in first["audits"]} == {None}
    assert {finding["wrong"] for finding in second["audits"] if finding["worker"] == 0} == {0}
    assert second["weights"][:2] == [0, 0]
    assert second["missing"]["0"] == "another worker measured other scores"
    assert 1 in {finding["wrong"] for finding in third["audits"] if finding["auditor"] == 1}
    assert not third["missing"]
    assert not fourth["missing"]


@pytest.mark.slow
def test_rounds_that_are_not_scored_have_nothing_to_audit():
    result = train(Workers(2, audit=4), scoring=wavg.Scoring(every=2))
    assert [len(row.get("audits", ())) for row in rounds(result)] == [4, 0, 4, 0]
    assert {finding["wrong"] for row in rounds(result) for finding in row.get("audits", ())} == {None}
    assert not missing(result)


@pytest.mark.slow
def test_a_slow_worker_takes_as_many_steps_as_fit(tmp_path):
    plan = {(1, round): "slow" for round in range(1, 5)}
    result = train(Workers(2, fill=True, hook=Hook(plan, str(tmp_path))), local_steps=40)
    steps = np.diff([0] + [row["samples"] for row in rounds(result)]) // 8
    assert steps[0] == 160
    assert (steps[1:] < 160).all()


@pytest.mark.slow
def test_too_few_end_the_run_with_a_checkpoint(tmp_path):
    plan = {(worker, round): "raise" for worker in (0, 1) for round in (3, 4)}

    class Always(Hook):
        def __call__(self, point, worker, round, reply):
            if point == "train" and round == 3:
                raise RuntimeError("out of luck")
            return reply

    workdir = tmp_path / "run"
    workers = Workers(2, patience=8.0, hook=Always(plan, str(tmp_path)))
    for resume in (False, True):
        with pytest.raises(wavg.TooFew, match=r"round 3 waited 8 s for 1 replicas and had 0: its worker"):
            train(workers, workdir=workdir, resume=resume)
    resumed = train(Workers(2), workdir=workdir, resume=True)
    alike(resumed, alone())


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_an_error_at_once():
    def broken(point, worker, round, reply):
        raise RuntimeError("no disk here")

    with pytest.raises(wavg.SettingsError, match=r"worker 0 cannot start: .*no disk here"):
        train(Workers(1, hook=broken))


REFUSED = {
    "size=9 workers for 4 replicas": {"workers": Workers(9)},
    "size is 0": {"workers": Workers(0)},
    "audit= needs at least two workers": {"workers": Workers(1, audit=1)},
    "audit= with faults": {"workers": Workers(2, audit=1), "faults": wavg.faults.simulate(4, sent={0: -1.0})},
    "min_replicas=5 is more": {"workers": Workers(2, min_replicas=5)},
    r"size\(1\) gave 7": {"workers": Workers(lambda round: 7)},
    "workers is": {"workers": 3},
    "leave out wire= and fragments=": {"workers": Workers(2), "at_sync": wavg.AtSync(wire="int8")},
    "leave out guard=": {"workers": Workers(2), "scoring": wavg.Scoring(guard=wavg.SpikeGuard())},
    "give replica_map= alone": {"workers": Workers(2), "layout": wavg.Layout(devices=2)},
    "rounds is 0": {"workers": Workers(2), "rounds": 0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_settings_are_refused_before_anything_starts(message):
    with pytest.raises(wavg.SettingsError, match=message):
        train(**REFUSED[message])


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="momentum"):
        train(Workers(2), momentum=0.9)


@pytest.mark.slow
def test_rows_differ_from_those_of_fit_by_the_workers_alone():
    ours, theirs = train(Workers(1), rounds=1), alone(rounds=1)
    for row, other in zip(without_clocks(ours.rows), without_clocks(theirs.rows), strict=True):
        assert set(row) - set(other) == ({"elastic"} if row["kind"] == "run" else {"missing", "workers"})


def by_hand(result, averager=WEIGHTED):
    """The state to which the rounds of a run lead in this process, with the replicas dead that it missed."""
    recipe = make_recipe(TASK, DATA, averager, INNER, layout=wavg.Layout(1, "map", True))
    apart, shared = rounds_of(recipe).apart, put_shared(recipe, DATA)
    state = programs_of(recipe, 4).init(jax.random.key(0))
    locally, together = jax.jit(apart.locally), jax.jit(apart.together)
    for number, row in enumerate(rounds(result)):
        work = make_work(recipe, DATA, seed=0, first_step=4 * number, longest=4, batch_size=8)
        given = work.items, shared.held_out
        brought = locally(state.replicas, *given, state.round, state.drift, shared=shared.train)
        here = np.array([str(k) not in row["missing"] for k in range(4)])
        brought = brought._replace(alive=brought.alive & here)
        state, _ = together(state, brought, *given, shared=shared.train, sizes=shared.sizes)
    return state


@pytest.mark.slow
def test_rounds_that_miss_a_worker_are_rounds_with_its_replicas_dead(tmp_path):
    plan = {(0, 2): "raise", (1, 4): "kill", (0, 5): "shape"}
    with pytest.warns(wavg.WavgWarning):
        result = train(Workers(2, deadline=wait_for_all, hook=Hook(plan, str(tmp_path))), rounds=6)
    assert {2, 4, 5} <= set(missing(result))
    expected = by_hand(result)
    for part in ("params", "averager", "mutable"):
        for x, y in zip(*(jax.tree.leaves(getattr(s, part)) for s in (result.state, expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    for x, y in zip(*(jax.tree.leaves(s.replicas.opt_state) for s in (result.state, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
