"""The arms: what they come to in numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver

import wavg_jax as wavg
from experiments import train  # noqa: F401 - defines the flags
from experiments.setup import app, arms
from tests.runs import TASK
from tests.small import initial, sharded
from wavg_jax.data import round_indices


def test_accumulate_takes_the_step_of_one_large_batch_a_round():
    """K = 2, H = 3, B = 4: a round's step is that of SGD on the 24 samples together."""
    source, rounds = sharded(replicas=2), 3
    with flagsaver.flagsaver():
        app.parse(["train", "--replicas=2", "--local_steps=3", "--batch_size=4", "--inner=sgd", "--lr_accumulate=0.5"])
        (arm,) = arms.make_arms(("accumulate",))
    options = {"local_steps": arm.local_steps, "batch_size": arm.batch_size, "rounds": rounds, "progress": False}
    layout = wavg.Layout(devices=2, replica_map="vmap")
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps divides by an integer
        result = wavg.fit(TASK, source, arm.averager, inner=arm.inner, layout=layout, **options)
    params, mutable = initial(TASK)
    loss = jax.jit(jax.grad(lambda params, batch: TASK.loss(params, mutable, batch, jax.random.key(0))[0]))
    for number in range(rounds):
        chosen = round_indices(source.shards, seed=0, first_step=3 * number, local_steps=3, batch_size=4).reshape(-1)
        batch = wavg.Batch(source.prepare(jnp.asarray(source.train.x[chosen])), jnp.asarray(source.train.y[chosen]))
        assert len(batch.y) == 24
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, loss(params, batch))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, initial(TASK)[0])
    assert min(jax.tree.leaves(moved)) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result.params, params)


@pytest.mark.parametrize("delayed", [(), ("--delayed",)], ids=["", "delayed"])
@pytest.mark.parametrize(("name", "without"), arms.DILOCO.items())
def test_diloco_is_an_arm_with_its_outer_step(name, without, delayed):
    """The same averager as the arm that it is without the step takes with --outer=nesterov."""

    def blended(arm, *given):
        with flagsaver.flagsaver():
            app.parse(["compare", "--replicas=2", "--weighting=softmax_loss", "--lr_diloco=0.3", *delayed, *given])
            (made,) = arms.make_arms((arm,))
            assert arms.at_rates(made, arms.read_condition()).averager is made.averager
        params, stacked = jnp.ones(3), jnp.array([[0.0, 1, 2], [4, 5, 6]])
        state, moved = made.averager.init(params, 2), []
        for _ in range(3):
            params, state, weights = made.averager.update(stacked, state, params, loss=jnp.array([1.0, 2]))
            moved.append((params, weights))
        return moved

    found, expected = blended(name), blended(without, "--outer=nesterov")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not np.allclose(found[-1][0], blended(without)[-1][0])
