"""The forms of max-pooling give what lax gives, in value and in gradient, also where windows overlap or do not fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavg_jax.models.rewrite import fast

# Name: sizes, window, strides, padding.
CASES = {
    "blocks": ((8, 8), (2, 2), (2, 2), "VALID"),
    "blocks that leave some over": ((9, 11), (2, 2), (2, 2), "VALID"),
    "blocks that leave some over, padded": ((9, 11), (3, 3), (3, 3), "SAME"),
    "overlapping": ((9, 11), (3, 3), (2, 2), "VALID"),
    "overlapping, padded": ((8, 11), (3, 3), (2, 2), "SAME"),
    "every place": ((6, 7), (3, 2), (1, 1), "SAME"),
    "wide apart": ((9, 11), (2, 1), (3, 4), "VALID"),
    "odd padding": ((9, 8), (3, 3), (2, 1), ((0, 2), (2, 0))),
    "one pixel": ((5, 4), (1, 1), (1, 1), "VALID"),
    "the whole image": ((6, 5), (6, 5), (1, 1), "VALID"),
}


def gradients(case, ours):
    _, window, strides, padding = case

    def objective(x):
        y = nn.max_pool(x, window, strides, padding)
        return jnp.cos(y + jnp.arange(y.shape[-1], dtype=y.dtype).reshape(1, 1, 1, -1)).sum(), y

    both = jax.value_and_grad(objective, has_aux=True)
    return fast(both) if ours else both


@pytest.fixture(scope="module")
def computed():
    rng = np.random.default_rng(0)
    # Whole numbers, of which many are equal: the first maximum must get the slope.
    inputs = {name: jnp.asarray(rng.integers(0, 4, (2, *sizes, 3)), jnp.float32) for name, (sizes, *_) in CASES.items()}
    run = jax.jit(lambda inputs: {name: [gradients(CASES[name], o)(x) for o in (1, 0)] for name, x in inputs.items()})
    return run(inputs)


@pytest.mark.parametrize("name", CASES)
def test_a_form_matches_lax_in_value_and_gradient(computed, name):
    (((_, y), slope), ((_, stock_y), stock_slope)) = computed[name]
    np.testing.assert_array_equal(y, stock_y)
    np.testing.assert_allclose(slope, stock_slope, atol=1e-5)


@pytest.mark.parametrize("name", ["blocks", "overlapping"])
def test_no_stock_pooling_is_left(name):
    program = str(jax.make_jaxpr(gradients(CASES[name], True))(jnp.ones((2, *CASES[name][0], 3))))
    assert "reduce_window" not in program
    assert "select_and_scatter" not in program


def test_under_vmap_and_without_batch_axis():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 6, 2)), jnp.float32)
    ours, theirs = (jax.vmap(gradients(CASES["overlapping"], which)) for which in (True, False))
    np.testing.assert_allclose(ours(x[:, None])[1], theirs(x[:, None])[1], atol=1e-6)
    pool = fast(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    np.testing.assert_array_equal(pool(x[0]), nn.max_pool(x[0], (2, 2), (2, 2)))


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (3, 9, 8)], ids=["a batch", "one image"])
def test_channels_first_and_overlapping(shape):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 4, shape), jnp.float32)
    window, strides = ((1,) * (len(shape) - 2) + (size, size) for size in (3, 2))

    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "SAME")

    slope = jax.grad(lambda x: jnp.cos(pool(x + x)).sum())
    np.testing.assert_array_equal(fast(pool)(x), pool(x))
    np.testing.assert_allclose(fast(slope)(x), slope(x), atol=1e-5)


def test_minima_and_wide_windows_are_left_alone():
    x = jnp.ones((1, 70, 4, 1))
    for stock in (
        lambda x: nn.max_pool(x, (70, 1), (1, 1)),
        lambda x: nn.pool(x, jnp.inf, jax.lax.min, (2, 2), (2, 2), "VALID"),
    ):
        assert str(jax.make_jaxpr(fast(stock))(x)) == str(jax.make_jaxpr(stock)(x))


def test_keeps_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.bfloat16)
    ours, theirs = (gradients(CASES["blocks"], which)(x)[1] for which in (True, False))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))
