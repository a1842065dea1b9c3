"""--inner names any optax optimizer without running code; clipping, warm-up and decay by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.setup import app, arms
from experiments.setup.optimizers import Course, make_inner, parse
from wavg_jax.base import SettingsError

WEIGHTS = {"w": jnp.arange(4.0).reshape(2, 2)}
GRADIENTS = {"w": jnp.full((2, 2), 10.0)}
pytestmark = pytest.mark.usefixtures("standard_promotion")


def moves(inner, steps=1):
    """The updates of a few steps on a constant gradient [steps]."""
    state, found = inner.init(WEIGHTS), []
    for _ in range(steps):
        update, state = inner.update(GRADIENTS, state, WEIGHTS)
        found.append(float(update["w"][0, 1]))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sgd", optax.sgd(0.1)),
        ("momentum", optax.sgd(0.1, momentum=0.9)),
        ("sgd(momentum=0.5, nesterov=True)", optax.sgd(0.1, momentum=0.5, nesterov=True)),
        ("adam", optax.adam(0.1)),
        (" adamw(weight_decay=0.1) ", optax.adamw(0.1, weight_decay=0.1)),
        ("lion", optax.lion(0.1)),
        ("rprop(eta_plus=1.5)", optax.rprop(0.1, eta_plus=1.5)),
        ("contrib.muon", optax.contrib.muon(0.1)),
    ],
)
def test_a_name_with_arguments_is_that_optimizer_of_optax(text, expected):
    np.testing.assert_allclose(moves(make_inner(text, 0.1), 3), moves(expected, 3), rtol=1e-6)
    assert make_inner(text, 0.1) is make_inner(text, 0.1), "runs share programs only if they get the same object"


@pytest.mark.parametrize(
    "text",
    [
        *("", "adamw(", "adamw(0.1)", "adamw(**{'b1': 0.5})", "adamw(learning_rate=1.0)", "adamw(b1=__import__('os'))"),
        *("adam; sgd", "[adam]", "adam()()", "(lambda: 0)()", "adamw(b1=open('x'))"),
    ],
)
def test_what_is_no_call_with_plain_values_is_refused_and_nothing_is_run(text):
    with pytest.raises(SettingsError, match=r"--inner=.*give an optimizer of optax|--inner=.*cannot be"):
        make_inner(text, 0.1)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("adamwww", "optax has no optimizer of that name"),
        ("contrib._muon", "no optimizer of that name"),
        ("jax.devices", "no optimizer of that name"),
        ("clip_by_global_norm(max_norm=1.0)", "no optimizer of that name"),
        ("adam(beta=0.5)", "cannot be an inner optimizer.*beta"),
        ("polyak_sgd", "no optimizer of that name|cannot be an inner optimizer"),
    ],
)
def test_other_names_and_arguments_are_refused_in_one_line(text, match):
    with pytest.raises(SettingsError, match=match) as raised:
        make_inner(text, 0.1)
    assert "\n" not in str(raised.value)


def test_parsing_keeps_plain_values():
    assert parse("contrib.prodigy(betas=(0.9, 0.99), weight_decay=-1e-3)") == (
        "contrib.prodigy",
        {"betas": (0.9, 0.99), "weight_decay": -1e-3},
    )


def test_a_gradient_is_clipped_to_its_global_norm():
    # Four numbers of 10 have the norm 20; clipped to 1 they are 0.5 each.
    np.testing.assert_allclose(moves(make_inner("sgd", 0.1, Course(clip=1.0))), [-0.05], rtol=1e-6)
    np.testing.assert_allclose(moves(make_inner("sgd", 0.1, Course(clip=50.0))), [-1.0], rtol=1e-6)


def test_the_rate_rises_in_a_line_and_falls_by_half_a_cosine():
    course = Course(warmup=2, decay="cosine", steps=6)
    # 0 and half the peak, then (1 + cos(pi t / 4)) / 2 of it for t = 0, 1, 2, 3.
    shares = [0.0, 0.5, *(0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)))]
    np.testing.assert_allclose(moves(make_inner("sgd", 0.1, course), 6), -np.array(shares), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(moves(make_inner("sgd", 0.1, Course(warmup=2)), 4), [0, -0.5, -1, -1], rtol=1e-6)
    with pytest.raises(SettingsError, match="cannot be an inner optimizer with these flags"):
        make_inner("rprop", 0.1, course)


def test_the_rate_falls_in_a_line_to_zero_after_the_last_step():
    course = Course(warmup=2, decay="linear", steps=6)
    np.testing.assert_allclose(
        moves(make_inner("sgd", 0.1, course), 7), [0, -0.5, -1, -0.75, -0.5, -0.25, 0], rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(moves(make_inner("sgd", 0.1, Course(decay="linear", steps=2)), 2), [-1, -0.5], rtol=1e-6)


def test_airbench_is_nesterov_with_l2_decay_and_fast_batchnorm_biases():
    """By hand, as PyTorch's SGD with groups: rate and decay of a BatchNorm bias are 64 times and a 64th."""
    weights = {"BatchNorm_0": {"bias": jnp.ones(2)}, "Dense_0": {"bias": jnp.ones(2), "kernel": jnp.full((2, 2), 2.0)}}
    inner = make_inner("airbench(weight_decay=0.01)", 0.1)
    state, given = inner.init(weights), jax.tree.map(jnp.ones_like, weights)
    buffers = {}
    for _ in range(3):
        updates, state = inner.update(given, state, weights)
        for layer, name, scale in (("BatchNorm_0", "bias", 64), ("Dense_0", "bias", 1), ("Dense_0", "kernel", 1)):
            weight = np.asarray(weights[layer][name])
            gradient = 1 + 0.01 / scale * weight
            buffers[layer, name] = 0.85 * buffers.get((layer, name), 0) + gradient
            expected = -0.1 * scale * (gradient + 0.85 * buffers[layer, name])
            np.testing.assert_allclose(updates[layer][name], expected, rtol=1e-5)
        weights = optax.apply_updates(weights, updates)


@pytest.fixture
def parsed():
    def give(*arguments):
        app.parse(["compare", *arguments])
        return flags.FLAGS

    with flagsaver.flagsaver():
        yield give


def test_all_arms_go_through_the_schedule_over_the_same_samples(parsed):
    parsed("--replicas=4", "--local_steps=5", "--rounds=6", "--warmup=10", "--decay=cosine", "--clip=2")
    courses = {name: arms._course(name) for name in ("sequential", "sync", "plain", "accumulate")}
    assert courses == {
        "sequential": Course(2.0, 40, "cosine", 120),
        "sync": Course(2.0, 10, "cosine", 30),
        "plain": Course(2.0, 10, "cosine", 30),
        "accumulate": Course(2.0, 2, "cosine", 6),
    }


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--warmup=5", "--opt_state_at_sync=reset"], "starts --warmup and --decay again"),
        (["--warmup=200"], "--warmup=200 is no less than all local steps"),
        (["--decay=cosine", "--drift=scaffold"], "steps of a constant rate"),
        (["--inner=adamm"], "no optimizer of that name"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(parsed, arguments, match):
    parsed(*arguments)
    with pytest.raises(SettingsError, match=match):
        arms.make_arms(("plain",))


def test_by_default_nothing_changes(parsed):
    assert arms._course("plain") == Course()
    (arm,) = arms.make_arms(("plain",))
    assert arm.inner is make_inner("sgd", 0.4)
    assert jax.tree.leaves(arm.inner.init(WEIGHTS)) == []
