"""Networks over many samples: the logits that a round keeps, and their labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax import models
from wavg_jax.base import Batch, Task
from wavg_jax.rounds import forward
from wavg_jax.rounds.forward import Forward, labels, metrics, metrics_and_logits

TASK = regression()
SOURCE = sharded()
SPLIT = Batch(jnp.asarray(SOURCE.heldout.x), jnp.asarray(SOURCE.heldout.y, jnp.int32))


@pytest.mark.parametrize("chunk", [7, 20, 1000])
def test_logits_are_those_of_every_sample_in_order_whatever_the_chunk(chunk):
    network, over = TASK.init(jax.random.key(3)), Forward(TASK, SOURCE.prepare, None, chunk)
    found, logits = jax.jit(lambda network: metrics_and_logits(over, *network, SPLIT))(network)
    np.testing.assert_allclose(logits, TASK.predict(*network, SOURCE.prepare(SPLIT.x)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(labels(over, SPLIT, 3), SPLIT.y)
    for name, value in metrics(over, *network, SPLIT).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def say_positions(x, classes):
    """Logits that tell sample and position: x [N, T] -> [N, T, C]."""
    return jnp.broadcast_to(x[..., None], (*x.shape, classes))


def tokens(samples, positions):
    x = jnp.arange(samples * positions, dtype=jnp.float32).reshape(samples, positions)
    return Batch(x, jnp.asarray(x, jnp.int32))


def teller(classes):
    return Task(
        init=lambda rng: ({}, {}),
        loss=None,
        predict=lambda params, mutable, x: say_positions(x, classes),
        measure=lambda logits, batch: {"loss": logits.sum()},
    )


@pytest.mark.parametrize(
    ("limit", "chunk", "kept"),
    [
        (1000, 100, [list(range(4))] * 6),  # 6 samples of 4 positions: all of them
        (12 * 5, 100, [[0, 2], [3, 1], [2, 0], [1, 3], [0, 2], [3, 1]]),  # 12 of 24: two of each sample, others in each
        (3 * 5, 100, [[0], [], [2], [], [0], []]),  # fewer than samples: one of every second one
        (3 * 5, 3, [[0], [], [2]] * 2),  # of every chunk
    ],
)
def test_where_there_are_too_many_logits_some_positions_stand_for_all(limit, chunk, kept, monkeypatch):
    monkeypatch.setattr(forward, "LOGITS", limit)
    monkeypatch.setattr(forward, "FEWEST", 1)
    split, over = tokens(6, 4), Forward(teller(5), chunk=chunk)
    _, logits = metrics_and_logits(over, {}, {}, split)
    numbers = [4 * sample + position for sample, some in enumerate(kept) for position in some]
    assert logits[:, 0].tolist() == numbers
    assert labels(over, split, 5).tolist() == numbers  # of the same positions


def test_a_large_vocabulary_keeps_a_few_positions():
    split, over = tokens(100, 8), Forward(teller(32000), chunk=50)
    shape = jax.eval_shape(lambda: metrics_and_logits(over, {}, {}, split)[1]).shape
    assert shape == (forward.FEWEST - 14, 32000)  # every second sample of 100
    assert set((labels(over, split, 32000) % 8).tolist()) == {0, 2, 4, 6}  # not the first position of each


def test_a_pass_predicts_no_more_than_fits_whatever_the_vocabulary():
    held, network = tokens(100, 64), ({}, {})
    few, many = (forward.together(Forward(teller(classes)), *network, held) for classes in (256, 32_000))
    assert (few, many) == (128, 1)
    assert forward.together(Forward(teller(256), chunk=5), *network, held) == 5


VOCABULARY = 32_000


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["loss", "learned", "gradient", "pool", "diagnosis"])
def test_a_scored_round_of_a_large_vocabulary_needs_the_memory_of_its_local_steps(rule):
    """The compiler's plan: a round that scores 256 windows, beside one that scores none; batches are of 16 windows."""
    weighting = {
        "loss": wavg.softmax("loss"),
        "learned": wavg.learned(steps=1),
        "gradient": wavg.inverse("grad_norm"),
        "pool": wavg.opinion_pool(),
        "diagnosis": wavg.uniform(),
    }
    assert peak(weighting[rule], diagnose=rule == "diagnosis") < 1.1 * peak(wavg.uniform())


def peak(weighting, diagnose=False):
    """Bytes that a round of two replicas holds at most."""
    network = models.Transformer(vocabulary=VOCABULARY, layers=1, heads=2, width=16, length=16, rotary=True)
    task = models.from_linen(network, (16,), dtype=jnp.int32, make=models.language_model)
    options = {"placement": wavg.place(2, 1, "map"), "scoring": wavg.Scoring(diagnose=diagnose)}
    rounds = wavg.make_rounds(task, wavg.averager(weighting), optax.sgd(0.1), **options)
    state = jax.eval_shape(lambda rng: rounds.init(rng, replicas=2), jax.random.key(0))
    samples = {shape: jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 2, 16, 16), (256, 16))}
    given = [Batch(x, x) for x in samples.values()]
    plan = jax.jit(rounds.step, donate_argnums=0).lower(state, *given).compile().memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return held + plan.temp_size_in_bytes
