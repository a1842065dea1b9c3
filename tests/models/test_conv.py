"""The CPU convolution and pooling give what lax and flax give, in value and in gradient."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from wavg_jax.base import SettingsError
from wavg_jax.models import conv
from wavg_jax.models.conv import cpu_conv, fast_conv, max_pool

LAX = lax.conv_general_dilated
NHWC = ("NHWC", "HWIO", "NHWC")
# Name: input sizes, window, strides, padding.
CASES = {
    "same": ((9, 11), (3, 3), (1, 1), "SAME"),
    "valid": ((8, 8), (3, 3), (1, 1), "VALID"),
    "same, stride 2, odd": ((9, 11), (3, 3), (2, 2), "SAME"),
    "same, stride 2, even": ((8, 8), (3, 3), (2, 2), "SAME"),
    "valid, stride 2": ((9, 8), (3, 3), (2, 2), "VALID"),
    "same_lower, stride 2": ((8, 8), (3, 3), (2, 2), "SAME_LOWER"),
    "even and long windows": ((9, 11), (5, 2), (1, 1), "SAME"),
    "1x1": ((8, 8), (1, 1), (1, 1), "SAME"),
    "1x1, stride 2": ((9, 8), (1, 1), (2, 2), "SAME"),
    "mixed strides": ((9, 11), (3, 2), (1, 3), "SAME"),
    "explicit padding": ((8, 9), (3, 3), (2, 1), ((0, 2), (1, 3))),
    "negative padding": ((8, 9), (3, 3), (1, 1), ((-1, 0), (1, -2))),
    "stride past the end": ((8, 9), (3, 3), (20, 20), "VALID"),
}
FALLBACKS = {
    "kernel dilation": {"padding": "SAME", "rhs_dilation": (2, 2)},
    "input dilation": {"padding": ((0, 0), (1, 2)), "lhs_dilation": (2, 1)},
    "result dtype": {"padding": "SAME", "preferred_element_type": jnp.float32},
    "no output": {"padding": ((0, 0), (-7, 0))},
}


def _random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _value_and_gradients(convolve, x, kernel, strides, padding):
    def objective(x, kernel):
        y = convolve(x, kernel, strides, padding, dimension_numbers=NHWC)
        # A cosine, so that the gradient differs from one output to the next.
        return jnp.cos(y).sum(), y

    (_, y), gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(x, kernel)
    return y, *gradients


@pytest.fixture(scope="module")
def computed():
    """All cases by both convolutions, in one program: compiling each alone takes far longer."""
    arrays = {name: (_random(0, 2, *size, 3), _random(1, *window, 3, 4)) for name, (size, window, *_) in CASES.items()}
    run = jax.jit(
        lambda arrays: {
            name: [_value_and_gradients(convolve, *arrays[name], *case[2:]) for convolve in (cpu_conv, LAX)]
            for name, case in CASES.items()
        }
    )
    return run(arrays)


@pytest.mark.parametrize("name", CASES)
def test_matches_lax_in_value_and_gradients(computed, name):
    ours, theirs = computed[name]
    assert ours[0].size > 0
    for what, a, b in zip(("value", "input gradient", "kernel gradient"), ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=what)


def test_under_vmap_over_kernels_there_is_no_grouped_convolution():
    x, kernels = _random(0, 4, 2, 9, 11, 3), _random(1, 4, 3, 3, 3, 5)

    def run(conv):
        return jax.vmap(lambda x, kernel: conv(x, kernel, (2, 1), "SAME", dimension_numbers=NHWC))

    np.testing.assert_allclose(run(cpu_conv)(x, kernels), run(LAX)(x, kernels), atol=2e-5)
    ours, theirs = (
        jax.grad(lambda *args, conv=conv: jnp.cos(run(conv)(*args)).sum(), (0, 1)) for conv in (cpu_conv, LAX)
    )
    program = str(jax.make_jaxpr(ours)(x, kernels))
    assert "feature_group_count=1" in program
    assert "feature_group_count=4" not in program
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), ours(x, kernels), theirs(x, kernels))


def test_the_kernel_gradient_does_not_depend_on_how_many_images_are_taken_at_a_time(monkeypatch):
    x, kernel, slope = _random(0, 6, 8, 8, 3), _random(1, 3, 3, 3, 4), _random(2, 6, 8, 8, 4)
    arguments = (x, kernel, slope, (1, 1), ((1, 1), (1, 1)), None)
    together = conv._kernel_gradient(*arguments)
    monkeypatch.setattr(conv, "_CACHED", 2 * 8 * 8 * 27 * 4)
    np.testing.assert_allclose(conv._kernel_gradient(*arguments), together, atol=1e-4)
    assert "length=3" in str(jax.make_jaxpr(lambda: conv._kernel_gradient(*arguments))())


@pytest.mark.parametrize("ndim", [1, 3])
def test_any_number_of_spatial_axes(ndim):
    names = ("NDHWC"[0] + "DHW"[:ndim] + "C", "DHW"[:ndim] + "IO", "N" + "DHW"[:ndim] + "C")
    x, kernel = _random(0, 2, *(7, 6, 5)[:ndim], 3), _random(1, *(3, 2, 3)[:ndim], 3, 4)
    y = cpu_conv(x, kernel, (2,) * ndim, "SAME", dimension_numbers=names)
    y_lax = LAX(x, kernel, (2,) * ndim, "SAME", dimension_numbers=names)
    np.testing.assert_allclose(y, y_lax, atol=2e-5)


@pytest.mark.parametrize("kwargs", FALLBACKS.values(), ids=FALLBACKS)
def test_falls_back_to_lax(kwargs):
    x, kernel = _random(0, 2, 9, 8, 3), _random(1, 3, 3, 3, 4)
    y = cpu_conv(x, kernel, (1, 1), dimension_numbers=NHWC, **kwargs)
    np.testing.assert_array_equal(y, LAX(x, kernel, (1, 1), dimension_numbers=NHWC, **kwargs))


def test_gradients_of_nothing_are_zero():
    kernel = _random(1, 3, 3, 3, 4)
    gradient = jax.grad(
        lambda kernel: cpu_conv(jnp.ones((0, 8, 8, 3)), kernel, (1, 1), "SAME", dimension_numbers=NHWC).sum()
    )
    np.testing.assert_array_equal(gradient(kernel), np.zeros_like(kernel))


def test_falls_back_for_groups_and_other_layouts():
    x, kernel = _random(0, 2, 9, 8, 4), _random(1, 3, 3, 2, 6)
    grouped = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC, "feature_group_count": 2}
    np.testing.assert_array_equal(cpu_conv(x, kernel, **grouped), LAX(x, kernel, **grouped))
    x, kernel = _random(0, 2, 4, 9, 8), _random(1, 6, 4, 3, 3)
    y = cpu_conv(x, kernel, (1, 1), "SAME")
    np.testing.assert_array_equal(y, LAX(x, kernel, (1, 1), "SAME"))


def test_keeps_bfloat16():
    x, kernel = _random(0, 2, 9, 8, 3).astype(jnp.bfloat16), _random(1, 3, 3, 3, 4).astype(jnp.bfloat16)
    y = cpu_conv(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
    y_lax = LAX(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), y_lax.astype(jnp.float32), rtol=0.02, atol=0.05)


def test_fast_conv_serves_both_kinds_of_flax_layer():
    assert fast_conv() is cpu_conv  # the tests run on CPU
    x, kernel = _random(0, 2, 9, 8, 3), _random(1, 3, 3, 3, 4)
    layer = nn.Conv(4, (3, 3), strides=2, conv_general_dilated=fast_conv())
    by_linen = layer.apply({"params": {"kernel": kernel, "bias": jnp.zeros(4)}}, x)

    nnx_layer = nnx.Conv(3, 4, (3, 3), strides=2, conv_general_dilated=fast_conv(), rngs=nnx.Rngs(0))
    nnx_layer.kernel[...] = kernel
    expected = LAX(x, kernel, (2, 2), "SAME", dimension_numbers=NHWC)
    np.testing.assert_allclose(by_linen, expected, atol=2e-5)
    np.testing.assert_allclose(nnx_layer(x), expected, atol=2e-5)


@pytest.mark.parametrize(("size", "window"), [((8, 8), 2), ((9, 11), 2), ((9, 11), 3), ((9, 11), 1)])
def test_max_pool_matches_flax_in_value_and_gradient(size, window):
    def value_and_gradient(pool, *args):
        return jax.value_and_grad(lambda x: (jnp.cos(y := pool(x, *args)).sum(), y), has_aux=True)

    stock = value_and_gradient(nn.max_pool, (window, window), (window, window))
    ours = value_and_gradient(max_pool, window)
    ((_, y), gradient), ((_, y_stock), gradient_stock) = jax.jit(lambda x: (ours(x), stock(x)))(_random(0, 2, *size, 3))
    np.testing.assert_array_equal(y, y_stock)
    np.testing.assert_allclose(gradient, gradient_stock, atol=1e-6)


def test_max_pool_shares_the_gradient_of_ties_and_keeps_its_sum():
    gradient = jax.grad(lambda x: max_pool(x).sum())(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient, np.full((1, 2, 2, 1), 0.25))


@pytest.mark.parametrize("window", [0, 5])
def test_max_pool_refuses_windows_that_do_not_fit(window):
    with pytest.raises(SettingsError, match=f"blocks of {window} x {window}"):
        max_pool(jnp.ones((1, 4, 6, 1)), window)
