"""How the program of a sync grows with tensors and replicas; what it costs to compile grows with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wavg_jax as wavg
from wavg_jax.averaging import reduce


def program(tensors, replicas=2):
    """The lowered sync: blend and restart of replicas with some equal tensors."""
    avg = wavg.averager(wavg.uniform())
    params = {f"layer_{i}": jnp.zeros((3, 5)) for i in range(tensors)}
    state = avg.init(params, replicas)

    def sync(stacked, params):
        new, _, weights = avg.update(stacked, state, params)
        return new, weights, avg.restart(stacked, params, new)

    return jax.jit(sync).lower(wavg.replicate(params, replicas), params)


@pytest.mark.optimized
def test_a_tensor_adds_as_much_to_a_compiled_sync_however_many_there_are():
    few, some, many = (program(n).compile().as_text().count("\n") for n in (8, 16, 64))
    assert many - some < 1.25 * 6 * (some - few)  # 48 more tensors, 8 more


def test_a_sum_of_many_replicas_is_no_longer_than_that_of_some():
    lines = [program(2, replicas).as_text().count("\n") for replicas in (64, 128, 255)]
    assert max(lines[1:]) <= lines[0]


@pytest.mark.optimized
@pytest.mark.parametrize("replicas", [65, 80, 96])
def test_a_sum_in_blocks_has_the_bits_of_one_written_out(replicas, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(replicas, 7, 3)).astype(np.float32)
    w = rng.random(replicas).astype(np.float32)
    w[[1, 17, replicas - 1]], x[17] = 0, np.nan
    blocks = jax.jit(lambda x, w: wavg.weighted_mean(x, w))(x, w)
    monkeypatch.setattr(reduce, "_UNROLLED", replicas)
    np.testing.assert_array_equal(blocks, jax.jit(lambda x, w: wavg.weighted_mean(x, w))(x, w))
    each = rng.random(x.shape).astype(np.float32)  # weights of elements
    each[17] = 0
    whole = jax.jit(lambda x, w: wavg.weighted_mean(x, w))(x, each)
    monkeypatch.undo()
    np.testing.assert_array_equal(jax.jit(lambda x, w: wavg.weighted_mean(x, w))(x, each), whole)
