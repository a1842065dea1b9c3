"""What a run does when replicas, or all that is left of it, are not finite: it says so, and ends with what was good."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from binary import invoke
from small import initial, regression, sharded

import wavg_jax as wavg
from experiments import compare, train, tune
from wavg_jax.averaging import smoothing
from wavg_jax.storage.rows import read_rows

TASK = regression()
PLAIN = wavg.averager(wavg.uniform())
QUICK = ("--replicas=2", "--local_steps=2", "--hidden=8", "--devices=1", "--noisy=0")


def run(source, averager=PLAIN, task=TASK, **options):
    defaults = {"local_steps": 2, "rounds": 6, "batch_size": 8, "devices": 1}
    return runs.train(task, source, averager, **({"inner": optax.sgd(0.1)} | defaults | options))


def lasts(steps):
    """The task, whose loss is not finite once its statistic has counted so many steps."""

    def loss(params, mutable, batch, rng):
        value, rest = TASK.loss(params, mutable, batch, rng)
        return jax.numpy.where(mutable["seen"] < steps, value, np.nan) * value, rest

    return TASK._replace(loss=loss)


def test_a_run_whose_replicas_all_die_ends_with_the_last_good_parameters_and_a_checkpoint_of_them(tmp_path):
    task = lasts(4)
    with (
        pytest.warns(wavg.WavgWarning, match="round 3 was lost: no replica is finite") as warned,
        pytest.raises(
            wavg.Diverged, match=r"'run' diverged in rounds 3 to 4: .*lower the inner learning rate \(inner=\), or look"
        ) as raised,
    ):
        run(sharded(), task=task, workdir=tmp_path)
    assert len(warned) == 1
    assert "\n" not in str(raised.value)
    result, good = raised.value.result, run(sharded(), task=task, rounds=2)
    assert [row["alive"] for row in result.rows[1:]] == [[True] * 4] * 2 + [[False] * 4] * 2
    jax.tree.map(np.testing.assert_array_equal, result.params, good.params)
    assert read_rows(tmp_path) == result.rows
    assert [path.name for path in (tmp_path / "checkpoints" / "run").iterdir() if path.name.isdigit()] == ["4"]
    with pytest.raises(wavg.Diverged, match="rounds 3 to 5"):  # it goes on, with other data
        run(sharded(), task=task, workdir=tmp_path, resume=True)


def test_lost_rounds_end_a_run_alike_whether_or_not_rounds_overlap():
    for options in ({}, {"test_every": 6}):
        with pytest.warns(wavg.WavgWarning, match="round 3"), pytest.raises(wavg.Diverged) as raised:
            run(sharded(), task=lasts(4), **options)
        rows = raised.value.result.rows
        assert [row["round"] for row in rows[1:]] == [1, 2, 3, 4]
        assert rows[-1]["test_accuracy"] is not None


def test_a_lost_last_round_is_not_passed_over_in_silence():
    with pytest.raises(wavg.Diverged, match=r"in round 3: .*after round 2"):
        run(sharded(), task=lasts(4), rounds=3)


@pytest.mark.optimized
def test_one_lost_round_is_survived_alike_whether_or_not_rounds_overlap():
    def rate(count):  # in round 3 alone
        return jax.numpy.where((count >= 4) & (count < 6), np.nan, 1.0)

    ends = []
    for options in ({"smoothing": smoothing.swa()}, {"smoothing": smoothing.swa(), "test_every": 6}):
        inner = optax.chain(optax.sgd(0.1), optax.scale_by_schedule(rate))
        with pytest.warns(wavg.WavgWarning, match="round 3 was lost") as warned:
            ends.append(run(sharded(), inner=inner, **options))
        assert len(warned) == 1
        assert [any(row["weights"]) for row in ends[-1].rows[1:]] == [True, True, False, True, True, True]
        assert int(ends[-1].state.smoothed.state.averaged) == 5  # the lost round is not in the mean
    jax.tree.map(np.testing.assert_array_equal, ends[0].params, ends[1].params)


def test_after_a_refused_outer_step_all_restart_from_what_there_was_with_fresh_moments():
    def update(updates, count, params=None):  # in round 3 alone
        return jax.tree.map(lambda g: jnp.where(count == 2, jnp.inf, -1) * g, updates), count + 1

    outer = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    averager, inner = wavg.averager(wavg.uniform(), outer=outer), optax.sgd(0.1, momentum=0.9)
    options = {"inner": inner, "smoothing": smoothing.swa()}
    before = run(sharded(), averager, rounds=2, **options).state
    with pytest.raises(wavg.Diverged) as raised:
        run(sharded(), averager, rounds=3, **options)
    after = raised.value.result.state
    assert raised.value.result.rows[-1]["alive"] == [True] * 4
    for old, new in zip(before[:2] + before[3:4] + before[5:], after[:2] + after[3:4] + after[5:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, new, old)
    jax.tree.map(np.testing.assert_array_equal, after.replicas.params, wavg.replicate(before.params, 4))
    assert any(x.any() for x in jax.tree.leaves(before.replicas.opt_state))
    assert not any(x.any() for x in jax.tree.leaves(after.replicas.opt_state))


OVERFLOW = optax.chain(optax.scale(1e30), optax.scale(1e30))


@pytest.mark.parametrize("outer", [optax.sgd(float("nan")), OVERFLOW], ids=["nan", "overflow"])
def test_an_outer_step_that_is_not_finite_is_not_taken_and_ends_the_run(outer):
    with (
        pytest.warns(wavg.WavgWarning, match="outer step is not finite"),
        pytest.raises(wavg.Diverged, match=r"outer step is not finite.*outer=") as raised,
    ):
        run(sharded(), wavg.averager(wavg.uniform(), outer=outer))
    assert len(raised.value.result.rows) == 3
    assert raised.value.result.rows[-1]["alive"] == [True] * 4
    start = initial(TASK)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), raised.value.result.params, start)


def test_an_averager_of_one_s_own_loop_keeps_parameters_and_state_where_the_outer_step_overflows():
    averager = wavg.averager(wavg.uniform(), outer=wavg.outer.nesterov(3e38))
    params = {"w": np.float32([1, 2])}
    state = averager.init(params, 2)
    new, after, weights = averager.update({"w": np.float32([[5, 6], [7, 8]])}, state, params)
    assert new["w"].tolist() == [1, 2]
    assert weights.tolist() == [0, 0]
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(
    ("outer", "start", "far"),
    [(wavg.outer.fedadam(0.1), 0.0, 1e20), (wavg.outer.delayed(optax.sgd(1.0)), -3e38, 3e38)],
    ids=["a squared gradient overflows", "what is held back overflows"],
)
def test_a_step_that_would_leave_the_outer_state_infinite_is_not_taken(outer, start, far):
    averager = wavg.averager(wavg.uniform(), outer=outer)
    params = {"w": np.float32([start, 2])}
    state = averager.init(params, 2)
    new, after, weights = averager.update({"w": np.float32([[far, 5], [far, 7]])}, state, params)
    jax.tree.map(np.testing.assert_array_equal, (new, after), (params, state))
    assert weights.tolist() == [0, 0]


def test_what_was_infinite_in_the_outer_state_before_is_not_held_against_a_step():
    bound = optax.GradientTransformation(
        lambda params: {"mask": jnp.float32([-np.inf, 0])}, lambda u, s, p=None: (u, s)
    )
    averager = wavg.averager(wavg.uniform(), outer=optax.chain(bound, optax.sgd(1.0)))
    params = {"w": np.float32([1, 2])}
    new, _, weights = averager.update({"w": np.float32([[5, 6], [7, 8]])}, averager.init(params, 2), params)
    np.testing.assert_allclose(new["w"], [6, 7], rtol=1e-6)
    np.testing.assert_allclose(weights, [0.5, 0.5])


def test_a_replica_that_dies_is_told_of_once(recwarn):
    source = sharded()
    x = source.train.x.copy()
    x[source.shards[2]] = 3e38  # overflows in the first step
    broken = source._replace(train=source.train._replace(x=x), prepare=lambda x: x)
    with pytest.warns(wavg.WavgWarning, match="replica 2 is not finite in round 1 and has no weight") as caught:
        run(broken, rounds=3)
    assert len(caught) == 1


@pytest.mark.parametrize("binary", [train, compare], ids=["train", "compare"])
def test_the_binaries_end_with_one_line_that_names_the_run_and_exit_code_2(binary, tmp_path, capfd):
    arguments = (*QUICK, "--rounds=3", "--lr_weighted=1e30", f"--workdir={tmp_path}")
    with pytest.warns(wavg.WavgWarning, match="round 1 was lost"):
        assert invoke(binary.main, *arguments, *(["--arms=weighted"] if binary is compare else [])) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: 'weighted-seed0' diverged in rounds 1 to 2")
    assert "lower the inner learning rate (--lr_weighted), or look" in line
    assert str(tmp_path) in line
    assert len(read_rows(tmp_path)) == 3
    assert (tmp_path / "report.html").exists()  # of what there is


def test_replicas_that_die_after_a_huge_outer_step_may_do_so_by_either_rate(tmp_path, capfd):
    huge = ("--outer=nesterov", "--outer_lr=1e38", "--rounds=3")  # finite, but nothing survives the next round
    with pytest.warns(wavg.WavgWarning, match="round 2 was lost: no replica is finite"):
        assert invoke(train.main, *QUICK, *huge, f"--workdir={tmp_path}") == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "inner learning rate (--lr_weighted) or the outer one (--outer_lr), or look" in line


@pytest.mark.parametrize("flag", ["outer_lr", "lr_plain", "temperature", "alpha", "pull", "target_accuracy"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_no_flag_takes_a_number_that_is_not_finite(flag, value, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(train.main, "--outer=nesterov", f"--{flag}={value}") == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert f"--{flag}={value}" in line
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_diverges_is_not_chosen_and_does_not_end_the_tuning(capfd):
    assert invoke(tune.main, *QUICK, "--rounds=1", "--rates=1e30,0.1", "--tune=plain", "--tuning_seeds=7") == 0
    said = capfd.readouterr().out
    assert "diverged" in said
    assert "--lr_plain=0.1" in said
    assert invoke(tune.main, *QUICK, "--rounds=1", "--rates=1e30", "--tune=plain", "--tuning_seeds=7") == 2
    assert "at every rate" in capfd.readouterr().err


def test_so_many_replicas_that_compiling_takes_minutes_are_warned_of_before_it_begins():
    many = sharded(replicas=257, heldout=0)
    with (
        pytest.warns(wavg.WavgWarning, match=r"257 replicas.*minutes"),
        pytest.raises(wavg.SettingsError, match="batches of 8"),  # so that the test need not wait
    ):
        run(many)
