"""fit() with real networks: BatchNorm and augmentation in a CNN, an NNX module with dropout, uint8 images."""

import numpy as np
import optax
import pytest
from runs import train

import wavg_jax as wavg
from wavg_jax import data, models
from wavg_jax.rounds import policy


def digits(replicas=2, augment=None):
    def partition(split, seed):
        return data.iid(len(split.y), replicas, seed)

    return data.shard(data.digits(), partition, heldout=100, seed=0, augment=augment)


def trained(task, source, **options):
    defaults = {"local_steps": 30, "rounds": 2, "batch_size": 32, "devices": 1}
    averager = wavg.averager(wavg.proportional("accuracy"))
    inner = optax.sgd(0.05, momentum=0.9)
    return train(task, source, averager, inner=inner, **(defaults | options))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stats", [policy.average, policy.keep, policy.reestimate(8)], ids=["average", "keep", "reestimate"]
)
def test_a_cnn_with_batchnorm_and_augmentation_learns(stats):
    source = digits(augment=lambda rng, x: data.crop_flip(rng, x, padding=1))
    task = models.from_linen(models.CNN(classes=10, batch_norm=True, dropout=0.1), (8, 8, 1))
    result = trained(task, source, stats=stats)
    assert result.rows[-1]["test_accuracy"] > 0.5
    moved = [np.abs(np.asarray(x)).max() for x in (result.mutable["batch_stats"]["BatchNorm_0"]["mean"],)]
    assert min(moved) > 0


@pytest.mark.slow
def test_an_nnx_module_with_dropout_learns():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(64, 64, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.last = nnx.Linear(64, 10, rngs=rngs)

        def __call__(self, x):
            x = x.reshape(x.shape[0], -1)
            return self.last(self.dropout(nnx.relu(self.first(x))))

    result = trained(models.from_nnx(Net, (8, 8, 1)), digits())
    assert result.rows[-1]["test_accuracy"] > 0.8


def test_augmentation_has_a_key_per_replica_and_step():
    seen = []

    def augment(rng, x):
        import jax

        jax.debug.callback(lambda key: seen.append(tuple(np.asarray(key).tolist())), jax.random.key_data(rng))
        return x

    task = models.from_linen(models.MLP(hidden=(8,), classes=10), (8, 8, 1))
    trained(task, digits(augment=augment), local_steps=3, rounds=2)
    assert len(seen) == len(set(seen)) == 2 * 3 * 2
