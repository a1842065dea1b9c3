"""The forms of convolution give what lax gives, in value and in gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from wavg_jax.models import conv
from wavg_jax.models.rewrite import fast

NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
# Name: shapes of inputs and kernels, and what differs from strides 1, "SAME" and NHWC.
CASES = {
    "same": ((2, 9, 11, 3), (3, 3, 3, 4), {}),
    "valid": ((2, 8, 8, 3), (3, 3, 3, 4), {"padding": "VALID"}),
    "stride 2, odd": ((2, 9, 11, 3), (3, 3, 3, 4), {"window_strides": (2, 2)}),
    "stride 2, even": ((2, 8, 8, 3), (3, 3, 3, 4), {"window_strides": (2, 2)}),
    "valid, stride 2": ((2, 9, 8, 3), (3, 3, 3, 4), {"window_strides": (2, 2), "padding": "VALID"}),
    "same_lower, stride 2": ((2, 8, 8, 3), (3, 3, 3, 4), {"window_strides": (2, 2), "padding": "SAME_LOWER"}),
    "even and long windows": ((2, 9, 11, 3), (5, 2, 3, 4), {}),
    "1x1": ((2, 8, 8, 3), (1, 1, 3, 4), {}),
    "1x1, stride 2": ((2, 9, 8, 3), (1, 1, 3, 4), {"window_strides": (2, 2)}),
    "mixed strides": ((2, 9, 11, 3), (3, 2, 3, 4), {"window_strides": (1, 3)}),
    "explicit padding": ((2, 8, 9, 3), (3, 3, 3, 4), {"window_strides": (2, 1), "padding": ((0, 2), (1, 3))}),
    "negative padding": ((2, 8, 9, 3), (3, 3, 3, 4), {"padding": ((-1, 0), (1, -2))}),
    "stride past the end": ((2, 8, 9, 3), (3, 3, 3, 4), {"window_strides": (20, 20), "padding": "VALID"}),
    "window of the image": ((2, 7, 7, 3), (7, 7, 3, 4), {"padding": "VALID"}),
    "dilated": ((2, 9, 11, 3), (3, 3, 3, 4), {"rhs_dilation": (2, 3)}),
    "dilated, strides": ((2, 13, 11, 3), (3, 2, 3, 4), {"rhs_dilation": (2, 3), "window_strides": (2, 2)}),
    "transposed": ((2, 5, 6, 3), (3, 3, 3, 4), {"lhs_dilation": (2, 3), "padding": ((2, 1), (0, 3))}),
    "channels first": ((2, 3, 9, 11), (4, 3, 3, 3), {"dimension_numbers": NCHW, "window_strides": (2, 1)}),
    "odd layout": ((9, 3, 2, 11), (4, 3, 3, 3), {"dimension_numbers": ("HCNW", "OHWI", "WNHC")}),
    "one axis": ((2, 9, 3), (3, 3, 4), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
    "three axes": ((2, 5, 6, 7, 3), (3, 2, 3, 3, 4), {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}),
    "depthwise": ((2, 9, 11, 4), (3, 3, 1, 4), {"feature_group_count": 4}),
    "depthwise, two each": ((2, 9, 11, 4), (3, 3, 1, 8), {"feature_group_count": 4}),
    "depthwise, strides": (
        (2, 9, 11, 4),
        (3, 3, 1, 4),
        {"feature_group_count": 4, "window_strides": (2, 1), "rhs_dilation": (1, 2)},
    ),
    "depthwise, channels first": (
        (2, 4, 9, 11),
        (4, 1, 3, 3),
        {"feature_group_count": 4, "dimension_numbers": NCHW, "window_strides": (2, 2)},
    ),
    "two groups": ((2, 9, 11, 12), (3, 3, 6, 8), {"feature_group_count": 2}),
    "two groups, channels first": (
        (2, 12, 9, 11),
        (8, 6, 3, 3),
        {"feature_group_count": 2, "dimension_numbers": NCHW, "window_strides": (2, 2)},
    ),
    "small groups": ((2, 9, 11, 12), (3, 3, 3, 8), {"feature_group_count": 4}),
    "groups of batches": ((6, 9, 11, 5), (3, 3, 5, 8), {"batch_group_count": 2}),
}
LEFT_ALONE = {
    "whole numbers": (jnp.ones((2, 8, 8, 3), jnp.int32), jnp.ones((3, 3, 3, 4), jnp.int32)),
    "complex numbers": (jnp.ones((2, 8, 8, 3), jnp.complex64), jnp.ones((3, 3, 3, 4), jnp.complex64)),
    "no images": (jnp.ones((0, 8, 8, 3)), jnp.ones((3, 3, 3, 4))),
    "no output": (jnp.ones((2, 8, 8, 3)), jnp.ones((9, 9, 3, 4))),
}


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gradients(ours, options):
    """`(x, kernel) -> value and gradients`, by the forms or by lax."""

    def objective(x, kernel):
        whole = {"dimension_numbers": NHWC, "window_strides": (1,) * (x.ndim - 2), "padding": "SAME"} | options
        y = lax.conv_general_dilated(x, kernel, **whole)
        return jnp.cos(y).sum(), y  # a cosine, so that the gradient differs from one output to the next

    both = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    return fast(both) if ours else both


@pytest.fixture(scope="module")
def computed():
    """All cases by the forms and by lax, alone and mapped, in one program: compiling each alone takes far longer."""
    arrays = {name: (random(0, *x), random(1, *kernel)) for name, (x, kernel, _) in CASES.items()}

    def run(arrays):
        found = {}
        for name, (*_, options) in CASES.items():
            alone, pairs = arrays[name], [jnp.stack([a, 2 * a + 1]) for a in arrays[name]]
            call = [gradients(ours, options) for ours in (True, False)]
            found[name] = [(one(*alone), jax.vmap(one)(*pairs)) for one in call]
        return found

    return jax.jit(run)(arrays)


@pytest.mark.parametrize("name", CASES)
def test_a_form_matches_lax_in_value_and_gradients_alone_and_mapped(computed, name):
    for ours, theirs in zip(*map(jax.tree.leaves, computed[name]), strict=True):
        assert (ours.shape, ours.dtype, ours.weak_type) == (theirs.shape, theirs.dtype, theirs.weak_type)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_under_vmap_over_kernels_there_is_no_grouped_convolution():
    x, kernels = random(0, 4, 2, 9, 11, 3), random(1, 4, 3, 3, 3, 5)
    program = str(jax.make_jaxpr(jax.vmap(gradients(True, {})))(x, kernels))
    assert "feature_group_count=1" in program
    assert "feature_group_count=4" not in program


def test_the_gradient_of_a_depthwise_kernel_has_no_convolution_at_all():
    x, kernel, options = CASES["depthwise"]
    program = str(jax.make_jaxpr(gradients(True, options))(random(0, *x), random(1, *kernel)))
    assert "conv_general_dilated" not in program


def test_the_kernel_gradient_does_not_depend_on_how_many_images_are_taken_at_a_time(monkeypatch):
    x, slope = random(0, 6, 8, 8, 3), random(2, 6, 8, 8, 4)
    geometry = conv.Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), None, jnp.float32)
    together = conv._over_patches(x, slope, (3, 3), geometry)
    monkeypatch.setattr(conv, "_CACHED", 2 * 8 * 8 * 27 * 4)
    np.testing.assert_allclose(conv._over_patches(x, slope, (3, 3), geometry), together, atol=1e-4)
    assert "length=3" in str(jax.make_jaxpr(lambda: conv._over_patches(x, slope, (3, 3), geometry))())


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_the_rest_is_left_alone(name):
    x, kernel = LEFT_ALONE[name]
    stock = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=NHWC)
    assert str(jax.make_jaxpr(fast(stock))(x, kernel)) == str(jax.make_jaxpr(stock)(x, kernel))
    np.testing.assert_array_equal(fast(stock)(x, kernel), stock(x, kernel))


@pytest.mark.parametrize("groups", [1, 4])
def test_keeps_bfloat16(groups):
    x, kernel = (a.astype(jnp.bfloat16) for a in (random(0, 2, 9, 8, 4), random(1, 3, 3, 4 // groups, 4)))
    (ours, theirs) = (gradients(which, {"feature_group_count": groups})(x, kernel) for which in (True, False))
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.05, atol=0.1)


def test_the_sums_dtype_is_the_callers():
    x, kernel = (a.astype(jnp.bfloat16) for a in (random(0, 2, 9, 8, 3), random(1, 3, 3, 3, 4)))
    for wanted in (jnp.float32, jnp.bfloat16):
        y = jax.eval_shape(
            fast(lambda x, k, wanted=wanted: lax.conv(x, k, (1, 1), "SAME", preferred_element_type=wanted)),
            x.transpose(0, 3, 1, 2),
            kernel.transpose(3, 2, 0, 1),
        )
        assert y.dtype == wanted
