"""The feed: every epoch shows every sample once, and every round is a pure function of its arguments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavg_jax.base import SettingsError
from wavg_jax.data import round_indices

SHARDS = (np.arange(0, 10), np.arange(10, 17), np.arange(17, 40))


def streams(shards, rounds, **kwargs):
    """The samples that each replica reads over the rounds, [K, rounds * H * B]."""
    taken = [
        round_indices(shards, first_step=r * kwargs["local_steps"], **kwargs).reshape(len(shards), -1) for r in rounds
    ]
    return np.concatenate(taken, axis=1)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    local_steps=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_no_sample_is_lost_or_doubled_within_an_epoch(sizes, local_steps, seed, data):
    batch_size = data.draw(st.integers(1, min(sizes)))
    starts = np.cumsum([0, *sizes])
    shards = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    rounds = range(data.draw(st.integers(1, 6)))
    kwargs = {"seed": seed, "local_steps": local_steps, "batch_size": batch_size}
    for shard, stream in zip(shards, streams(shards, rounds, **kwargs), strict=True):
        whole = len(stream) // len(shard)
        for epoch in range(whole):
            shown = stream[epoch * len(shard) : (epoch + 1) * len(shard)]
            assert sorted(shown) == shard.tolist()
        rest = stream[whole * len(shard) :]
        assert len(set(rest)) == len(rest)
        assert set(rest) <= set(shard)


def test_shape_type_and_repeatability():
    kwargs = {"seed": 1, "local_steps": 3, "batch_size": 5}
    late = round_indices(SHARDS, first_step=21, **kwargs)
    assert late.shape == (3, 3, 5)
    assert late.dtype == np.int32
    streams(SHARDS, range(7), **kwargs)
    np.testing.assert_array_equal(late, round_indices(SHARDS, first_step=21, **kwargs))


def test_a_stream_consists_of_the_documented_permutations():
    epochs = [np.random.default_rng(np.random.SeedSequence([4, 1, e])).permutation(SHARDS[1]) for e in (0, 1, 2)]
    # Rounds of 2 x 4 = 8 out of 7 samples: round 1 reads positions 8 to 16.
    indices = round_indices(SHARDS, seed=4, first_step=2, local_steps=2, batch_size=4)
    assert indices[1].ravel().tolist() == np.concatenate(epochs)[8:16].tolist()


def test_seed_replica_and_epoch_change_the_order():
    same = (np.arange(50), np.arange(50))
    one = round_indices(same, seed=0, first_step=0, local_steps=2, batch_size=50)
    assert one[0, 0].tolist() != one[1, 0].tolist()  # replica
    assert one[0, 0].tolist() != one[0, 1].tolist()  # epoch
    assert one.tolist() != round_indices(same, seed=1, first_step=0, local_steps=2, batch_size=50).tolist()


def test_splitting_a_round_in_two_reads_the_same_stream():
    long = streams(SHARDS, range(3), seed=0, local_steps=4, batch_size=5)
    short = streams(SHARDS, range(6), seed=0, local_steps=2, batch_size=5)
    np.testing.assert_array_equal(long, short)


def test_a_late_round_draws_no_more_permutations_than_it_reads(monkeypatch):
    drawn = []

    def counted(seed, make=np.random.default_rng):
        drawn.append(seed)
        return make(seed)

    monkeypatch.setattr(np.random, "default_rng", counted)
    round_indices([np.arange(1000)], seed=0, first_step=50_000_000, local_steps=50, batch_size=64)
    assert len(drawn) <= 50 * 64 // 1000 + 2


REFUSED = {
    "batch larger than a shard": (
        {"batch_size": 8},
        "batches of 8 do not fit shard 1, which has 7.*set batch_size= to 7",
    ),
    "no batch": ({"batch_size": 0}, "^batch_size is 0; it must be a whole number, 1 or more"),
    "no steps": ({"local_steps": 0}, "^local_steps is 0; it must be a whole number, 1 or more"),
    "negative step": ({"first_step": -1}, "first_step is -1; it must be a whole number, 0 or more"),
    "negative seed": ({"seed": -1}, "^seed is -1; it must be a whole number, 0 or more"),
    "half a step": ({"local_steps": 1.5}, "local_steps is 1.5; it must be a whole number"),
    "batch size in words": ({"batch_size": "all"}, "batch_size is 'all'"),
    "step that is not a number": ({"first_step": None}, "first_step is None"),
    "no shards": ({"shards": []}, "there are no shards"),
    "one shard bare": ({"shards": np.arange(9)}, r"shard 0 is int64 of shape \(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changed, message = REFUSED[case]
    with pytest.raises(SettingsError, match=message):
        round_indices(**{"shards": SHARDS, "seed": 0, "first_step": 0, "local_steps": 2, "batch_size": 5} | changed)


def test_shards_may_be_lists():
    sizes = {"seed": 0, "first_step": 0, "local_steps": 2, "batch_size": 5}
    lists = [shard.tolist() for shard in SHARDS]
    np.testing.assert_array_equal(round_indices(lists, **sizes), round_indices(SHARDS, **sizes))
