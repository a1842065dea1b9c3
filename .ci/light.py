"""What a bare `pip install wavg-jax` can do: everything but folders, bars and reports."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wavg_jax as wavg

assert importlib.util.find_spec("filelock") is None, "this is for an environment without the extras"

K, H = 2, 2
digits = wavg.data.load("digits")
x, y = digits.train.x[:200].astype("float32") / 16, digits.train.y[:200]
held_out = wavg.Batch(x[:40], y[:40])
task = wavg.models.from_linen(wavg.models.MLP(hidden=(4,), classes=10), (8, 8, 1))

averager = wavg.averager(wavg.softmax("loss", 0.2), outer=wavg.outer.nesterov(0.7, 0.5))
params = jnp.zeros(3)
state = averager.init(params, K)
for _ in range(2):
    stacked = wavg.replicate(params, K) + jnp.arange(K)[:, None]
    params, state, weights = averager.update(stacked, state, params, loss=jnp.array([1.0, 2.0]))
assert weights[0] > weights[1], weights

rounds = wavg.make_rounds(task, averager, optax.sgd(0.1))
i = np.random.default_rng(0).integers(40, len(y), (K, H, 8))
_, log = jax.jit(rounds.step)(rounds.init(jax.random.key(0), replicas=K), wavg.Batch(x[i], y[i]), held_out)
assert jnp.isclose(log.weights.sum(), 1), log

shards = wavg.data.shard(digits, lambda split, seed: wavg.data.iid(len(split.y), K, seed), heldout=40, seed=0)
options = {"inner": optax.sgd(0.1), "local_steps": H, "rounds": 2, "layout": wavg.Layout(replica_map="map")}
result = wavg.fit(task, shards, averager, **options)
assert np.isfinite(result.rows[-1]["test_loss"]), result.rows


def refused(call) -> str:
    """The one line with which a call says that an extra is missing."""
    said = "nothing is missing"
    try:
        call()
    except wavg.MissingExtra as error:
        said = str(error)
    assert "\n" not in said, said
    return said


assert refused(lambda: wavg.fit(task, shards, averager, workdir="never", **options)) == (
    "workdir= needs filelock, which is not installed: pip install 'wavg-jax[run]'"
)
if importlib.util.find_spec("tensorflow_datasets") is None:
    assert "pip install 'wavg-jax[tfds]'" in refused(lambda: wavg.data.load("mnist"))
heavy = ("matplotlib", "orbax.checkpoint", "scipy.stats", "tensorflow_datasets")
assert not any(sys.modules.get(name) for name in heavy), [name for name in heavy if name in sys.modules]
