"""NNX modules as users write them: language models, and metrics that a module keeps for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from runs import run, train
from small import sharded

import wavg_jax as wavg
from wavg_jax.models import from_nnx, language_model

PLAIN = wavg.averager(wavg.uniform())


class Counting(nnx.Module):
    """A classifier with BatchNorm that keeps count of what it predicts, as a user's training loop reads it."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)
        self.metrics = nnx.MultiMetric(sure=nnx.metrics.Average("sure"), spread=nnx.metrics.Welford("sure"))

    def __call__(self, x: jax.Array) -> jax.Array:
        logits = self.out(self.norm(x))
        self.metrics.update(sure=jax.nn.softmax(logits).max(axis=-1))
        return logits


class Plain(Counting):
    """The same without counting."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.norm(x))


def test_metrics_of_a_module_are_neither_kept_nor_averaged_and_change_nothing(standard_promotion):
    counting, plain = (from_nnx(kind, (4,)) for kind in (Counting, Plain))
    params, mutable = counting.init(jax.random.key(0))
    assert set(mutable) == {"norm"}
    x = jnp.ones((8, 4))
    _, (after, _) = counting.loss(params, mutable, wavg.Batch(x, jnp.zeros(8, int)), jax.random.key(1))
    assert set(after) == {"norm"}
    results = [run(sharded(replicas=2), PLAIN, task, rounds=2) for task in (counting, plain)]
    for a, b in zip(jax.tree.leaves(results[0].params), jax.tree.leaves(results[1].params), strict=True):
        np.testing.assert_array_equal(a, b)


class Bigrams(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(8, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.out(self.dropout(self.embed(tokens)))


def test_a_language_model_of_nnx_trains_on_a_text_and_is_judged_by_bits_per_byte(standard_promotion):
    text = wavg.data.from_text(b"to be, or not to be: that is the question. " * 40, context=16)
    shards = wavg.data.shard(text, lambda split, seed: wavg.data.iid(len(split.y), 2, seed), heldout=8, seed=0)

    def make(init, apply):
        return language_model(init, apply, bytes_per_token=text.bytes_per_token)

    task = from_nnx(Bigrams, (16,), dtype=jnp.int32, make=make)
    learned = wavg.averager(wavg.softmax("loss", 0.2))
    result = train(task, shards, learned, inner=optax.adam(0.03), local_steps=8, rounds=3, batch_size=8, devices=1)
    first, *_, last = result.rows[1:]
    assert last["test_bits_per_byte"] < first["test_bits_per_byte"] < 8
    assert last["test_bits_per_byte"] < 4.5
