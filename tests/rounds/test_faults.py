"""What liars send: numbers worked by hand, on one device and several, and where they cannot be simulated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import INNER, TASK, run
from small import sharded

import wavg_jax as wavg
from wavg_jax.devices.placement import place, single
from wavg_jax.rounds.faults import distort, little_is_enough, simulate
from wavg_jax.weighting import robust

APART = wavg.averager(wavg.softmax("loss", 0.5), pull=0.0)
START = {"w": jnp.array([[1.0, 1.0]]), "b": jnp.array([0.0])}  # [1, ...]: all start there
OWN = {
    "w": jnp.array([[9.0, 9.0], [3.0, 1.0], [3.0, 4.0], [6.0, 7.0], [8.0, 8.0]]),
    "b": jnp.array([5.0, 1.0, 2.0, 3.0, 5.0]),
}
ALL = jnp.ones(5, bool)
KEYS = jax.random.split(jax.random.key(0), 5)


def sent(own=OWN, alive=ALL, rng=KEYS, where=None, **factors):
    """What replicas 0 and 4 of 5 send."""
    faults = simulate(5, **{name: dict.fromkeys((0, 4), factor) for name, factor in factors.items()})
    return distort(faults, where or single(), own, START, alive, rng)


def test_a_little_is_enough_sends_the_mean_of_the_honest_less_z_of_their_deviations():
    told = sent(sent=0, mean=1, deviation=-0.5)
    # Of replicas 1 to 3: means (12 / 3, 12 / 3) and 2; variances (1 + 1 + 4) / 3, (9 + 0 + 9) / 3, (1 + 0 + 1) / 3.
    for k in (0, 4):
        np.testing.assert_allclose(told["w"][k], [4 - 0.5 * np.sqrt(2), 4 - 0.5 * np.sqrt(6)], rtol=1e-6)
        np.testing.assert_allclose(told["b"][k], 2 - 0.5 * np.sqrt(2 / 3), rtol=1e-6)
    for name in OWN:
        np.testing.assert_array_equal(told[name][1:4], OWN[name][1:4])


def test_where_nobody_is_honest_there_is_nobody_to_imitate():
    told = sent(alive=jnp.array([True, False, False, False, True]), sent=0, mean=1, deviation=-0.5)
    for k in (0, 4):
        np.testing.assert_array_equal(told["w"][k], START["w"][0])
        np.testing.assert_array_equal(told["b"][k], START["b"][0])


def test_z_is_the_papers():
    # n = 50, m = 24: s = 26 - 24 = 2 and phi(z) = (50 - 24 - 2) / (50 - 24) = 24 / 26.
    assert little_is_enough(50, 24) == pytest.approx(1.4261, abs=1e-4)
    assert little_is_enough(8, 3) == pytest.approx(0.2533, abs=1e-4)  # s = 5 - 3 = 2: 3 / 5
    assert little_is_enough(8, 1) < 0  # s = 4: 3 / 7
    for n, m in ((8, 5), (8, 0), (2, 1)):
        with pytest.raises(wavg.SettingsError, match="little_is_enough"):
            little_is_enough(n, m)


def test_factors_add_up():
    told = sent(sent=2, mean=-1, deviation=1)  # from (1, 1): 2 * 8 - 3 + sqrt(2), 2 * 8 - 3 + sqrt(6)
    np.testing.assert_allclose(told["w"][0], [14 + np.sqrt(2), 14 + np.sqrt(6)], rtol=1e-6)
    np.testing.assert_allclose(told["b"][4], 2 * 5 - 2 + np.sqrt(2 / 3), rtol=1e-6)


def test_the_dead_and_other_liars_are_not_among_the_honest():
    broken = {name: x.at[2].set(jnp.nan) for name, x in OWN.items()}
    told = sent(broken, ALL.at[2].set(False), sent=0, mean=1, deviation=1)
    np.testing.assert_allclose(told["w"][0], [4.5 + 1.5, 4 + 3], rtol=1e-6)  # of (3, 1) and (6, 7)
    assert np.isnan(told["w"][2]).all()


def test_noise_is_normal_and_differs_between_replicas_tensors_and_rounds():
    own = {"w": jnp.zeros((5, 2000)), "b": jnp.zeros((5, 2000))}
    start = jax.tree.map(lambda x: x[:1] + 1, own)
    faults = simulate(5, sent={0: 0, 4: 0}, noise={0: 3.0, 4: 3.0})
    told = distort(faults, single(), own, start, ALL, KEYS)
    again = distort(faults, single(), own, start, ALL, jax.random.split(jax.random.key(1), 5))
    draws = np.stack([told["w"][0], told["w"][4], told["b"][0], told["b"][4], again["w"][0], again["b"][4]])
    np.testing.assert_allclose(draws.mean(axis=1), 1, atol=0.3)
    np.testing.assert_allclose(draws.std(axis=1), 3, rtol=0.1)
    assert np.abs(np.corrcoef(draws) - np.eye(6)).max() < 0.1
    np.testing.assert_array_equal(told["w"][1:4], 0)


def test_narrow_parameters_keep_their_dtype():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), OWN)
    told = sent(narrow, sent=0, mean=1, deviation=1, noise=0.1)
    assert {x.dtype for x in told.values()} == {jnp.dtype(jnp.bfloat16)}


LIES = {
    "little": {"sent": {1: 0.0, 3: 0.0}, "mean": {1: 1.0, 3: 1.0}, "deviation": {1: -1.5, 3: -1.5}},
    "random": {"sent": {1: 0.0, 3: 0.0}, "noise": {1: 1.0, 3: 1.0}},
}


@pytest.mark.parametrize("lie", LIES)
def test_liars_are_the_same_on_one_device_and_several_however_mapped(lie):
    faults = simulate(4, **LIES[lie])
    for averager in (APART, wavg.averager(wavg.uniform()), wavg.averager(robust.multi_krum(1, keep=2))):
        one = run(sharded(4), averager, rounds=2, faults=faults)
        for options in ({"devices": 4}, {"devices": 2}, {"replica_map": "map"}):
            other = run(sharded(4), averager, rounds=2, faults=faults, **options)
            close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
            jax.tree.map(close, one.params, other.params)
            close(one.rows[-1]["weights"], other.rows[-1]["weights"])
        honest = run(sharded(4), averager, rounds=2)
        assert not np.allclose(one.params["w"], honest.params["w"], atol=1e-3)


def test_a_round_blends_and_scores_what_the_colluding_send():
    plain = run(sharded(4), wavg.averager(wavg.uniform(), pull=0.0), rounds=1)
    liars = run(sharded(4), APART, rounds=1, faults=simulate(4, **LIES["little"]))
    own = jax.tree.map(np.asarray, liars.state.replicas.params)
    jax.tree.map(  # the liars themselves train on from the truth
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), own, plain.state.replicas.params
    )
    told = {name: x[[0, 2]].mean(axis=0) - 1.5 * x[[0, 2]].std(axis=0) for name, x in own.items()}
    weights = np.array(liars.rows[1]["weights"])
    for name, x in own.items():
        both = [told[name] if k in (1, 3) else x[k] for k in range(4)]
        np.testing.assert_allclose(liars.params[name], np.tensordot(weights, np.stack(both), 1), rtol=1e-4, atol=1e-6)
    assert liars.rows[1]["scores"]["loss"][1] == pytest.approx(liars.rows[1]["scores"]["loss"][3])
    assert weights[1] == pytest.approx(weights[3])


def test_colluding_needs_all_replicas_in_one_program():
    for factors in ({"mean": {0: 1.0}}, {"deviation": {0: 1.0}}, {"noise": {0: 1.0}}):
        faults = simulate(4, **factors)
        with pytest.raises(wavg.SettingsError, match="mean=, deviation= or noise= need all replicas at once"):
            wavg.make_rounds(TASK, APART, INNER, at_sync=wavg.AtSync(fragments=2), faults=faults)
        with pytest.raises(wavg.SettingsError, match="which workers never have"):
            wavg.elastic.fit(
                TASK, sharded(4), APART, inner=optax.sgd(0.1), local_steps=2, rounds=1, batch_size=8, faults=faults
            )


def test_several_devices_compute_the_statistics_in_place():
    faults = simulate(4, **LIES["little"])
    own = {name: jnp.repeat(x, 2, axis=0)[:4] for name, x in OWN.items()}
    whole = distort(faults, single(), own, START, jnp.ones(4, bool), KEYS[:4])
    where = place(4, 4)
    spread = jax.device_put((own, jnp.ones(4, bool), KEYS[:4]), where.stacked)
    start = jax.device_put(START, where.shared)
    told = jax.jit(lambda x, alive, rng, start: distort(faults, where, x, start, alive, rng))(*spread, start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, told)
