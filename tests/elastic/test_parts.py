"""What an elastic run decides by, without workers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wavg_jax as wavg
from wavg_jax.base import Replicas
from wavg_jax.elastic import fixed, median_mad, polynomial, quantile, wait_for_all
from wavg_jax.elastic.arrivals import GIVES_IN, KEPT, NormBound, agree, nbytes, vet
from wavg_jax.elastic.dealing import deal
from wavg_jax.elastic.worker import form_of, from_host, to_host

INF = np.inf


def test_deadlines_by_hand():
    assert wait_for_all([1.0, 2.0]) is None
    assert fixed(3)([]) == 3.0
    past = [4.0, 1.0, 2.0, 3.0, 100.0]
    assert quantile(0.5, 3.0)(past) == 9.0
    assert quantile(1.0, 1.0)(past) == 100.0
    assert median_mad(k=3.0, factor=1.0)(past) == 6.0  # the median is 3, deviations 1, 2, 1, 0, 97: their median 1
    assert median_mad(k=0.0, factor=2.0)(past) == 6.0
    assert median_mad()([0.001] * 5) == 1.0
    assert quantile()([]) is median_mad()([]) is None


@pytest.mark.parametrize(
    "make", [lambda: fixed(0), lambda: quantile(1.5), lambda: median_mad(-1.0), lambda: polynomial(-1)]
)
def test_impossible_deadlines_are_refused(make):
    with pytest.raises(wavg.SettingsError):
        make()


def test_a_discount_falls_with_the_staleness():
    assert [polynomial(0.5)(s) for s in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("replicas", [1, 4, 7, 8])
def test_all_replicas_are_dealt_once_evenly_and_few_move(replicas):
    rng = np.random.default_rng(replicas)
    held = {0: ()}
    for step in range(30):
        dealt = deal(replicas, held)
        assert sorted(k for own in dealt.values() for k in own) == list(range(replicas))
        sizes = [len(own) for own in dealt.values()]
        assert max(sizes) - min(sizes) <= 1
        kept = sum(len(set(dealt[w]) & set(own)) for w, own in held.items())
        room = sorted(sizes, reverse=True)
        most = sum(min(len(own), n) for own, n in zip(sorted(held.values(), key=len, reverse=True), room, strict=True))
        assert kept == most
        held = dict(dealt)
        if len(held) > 1 and rng.random() < 0.4:
            held.pop(int(rng.choice(list(held))))
        else:
            held[step + 1] = ()


def test_a_replica_that_goes_too_far_is_told_from_its_peers_and_its_past():
    bound, all_of_them = NormBound(10.0), np.ones(4, bool)
    assert not bound.beyond(np.array([1.0, 2.0, 3.0, 19.0]), all_of_them).any()  # 10 times the lower median, 2, is 20
    assert bound.beyond(np.array([1.0, 2.0, 3.0, 40.0]), all_of_them).tolist() == [False, False, False, True]


def test_norms_of_one_replica_alone_are_measured_by_the_past():
    bound = NormBound(10.0)
    one = np.array([True, False])
    assert not bound.beyond(np.array([2.0, 0.0]), one).any()
    assert bound.beyond(np.array([21.0, 0.0]), one).tolist() == [True, False]
    assert bound.beyond(np.array([INF, 0.0]), one).tolist() == [True, False]
    for _ in range(KEPT):
        assert not bound.beyond(np.array([15.0, 0.0]), one).any()
    assert not bound.beyond(np.array([140.0, 0.0]), one).any()


def test_a_bound_that_refuses_everybody_gives_in():
    bound, one = NormBound(10.0), np.array([True, False])
    assert not bound.beyond(np.array([1.0, 0.0]), one).any()
    for _ in range(GIVES_IN):
        assert bound.beyond(np.array([1e6, 0.0]), one).any()
    assert not bound.beyond(np.array([1e6, 0.0]), one).any()


def test_all_replicas_may_speed_up_at_once():
    bound = NormBound(10.0)
    bound.beyond(np.full(4, 0.01), np.ones(4, bool))
    assert not bound.beyond(np.full(4, 5.0), np.ones(4, bool)).any()


def replicas_of(params, opt_state):
    return Replicas({"w": params}, {"m": opt_state}, {}, jax.random.split(jax.random.key(0), 3))


def test_vetting_by_hand():
    zero = jnp.zeros((3, 2))
    before = replicas_of(zero, jnp.array([[0.0], [jnp.inf], [0.0]]))
    after = replicas_of(jnp.array([[3.0, 4.0], [0.0, 1.0], [jnp.nan, 0.0]]), jnp.array([[0.0], [jnp.inf], [0.0]]))
    finite, norms = vet(after, jnp.zeros(3), before)
    assert finite.tolist() == [True, True, False]  # an infinity that was there before does not count
    assert norms[:2].tolist() == [5.0, 1.0]
    assert vet(after, jnp.array([jnp.nan, 0.0, 0.0]), before)[0].tolist() == [False, True, False]
    assert vet(after._replace(opt_state={"m": jnp.full((3, 1), jnp.inf)}), jnp.zeros(3), before)[0].tolist() == [
        False,
        True,
        False,
    ]


def test_trees_travel_as_arrays_with_their_keys():
    tree = {"a": jnp.ones((2, 3), jnp.bfloat16), "key": jax.random.split(jax.random.key(3), 2), "n": jnp.int32(4)}
    shapes = jax.eval_shape(lambda: tree)
    leaves = to_host(tree)
    assert [(x.shape, x.dtype) for x in leaves] == form_of(shapes)
    assert nbytes(form_of(shapes)) == 12 + 16 + 4
    back = from_host(leaves, shapes)
    assert (jax.random.key_data(back["key"]) == jax.random.key_data(tree["key"])).all()
    assert back["a"].dtype == jnp.bfloat16


def test_scores_agree_up_to_rounding_and_not_further():
    ours = [np.array(0.5, np.float32), np.array([INF, np.nan, 2.0], np.float32)]
    assert agree(ours, [x * np.float32(1.001) for x in ours])
    assert not agree(ours, [ours[0] + np.float32(0.1), ours[1]])
