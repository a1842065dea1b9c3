"""`fast` changes no numbers: inside every kind of program, under every transformation, and where it does nothing."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from wavg_jax.base import Batch
from wavg_jax.models import CNN, Airbench, ResNet, classifier, fast, from_linen, from_nnx, rewrite, whitening

SHAPE = (8, 8, 1)
STOCK = "reduce_window", "select_and_scatter"


def block(params, x):
    """A network's usual piece, [B, H, W, C] -> [B, H/2, W/2, C]."""
    y = lax.conv_general_dilated(x, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return nn.max_pool(jnp.tanh(y), (2, 2), (2, 2))


def many(params, x, times=2):
    """Blocks that keep the size of their inputs."""
    return x + jnp.repeat(jnp.repeat(block(params, x), 2, 1), 2, 2)


@jax.custom_jvp
def with_jvp(params, x):
    return block(params, x)


@with_jvp.defjvp
def _(primals, tangents):
    y, slope = jax.jvp(block, primals, tangents)
    return y, 2 * slope


@jax.custom_vjp
def with_vjp(params, x):
    return block(params, x)


with_vjp.defvjp(
    lambda params, x: (block(params, x), (params, x)),
    lambda kept, slope: jax.vjp(block, *kept)[1](3 * slope),
)


def penalised(params, x):
    """A loss with a gradient inside, as in adversarial training."""
    return block(params, x).sum() + jnp.square(jax.grad(lambda x: block(params, x).sum())(x)).sum()


PROGRAMS = {
    "plain": lambda p, x: block(p, x),
    "jit": lambda p, x: jax.jit(block)(p, x),
    "nested jit": lambda p, x: jax.jit(lambda p, x: jax.jit(block)(p, x) + 1)(p, x),
    "remat": lambda p, x: jax.checkpoint(block)(p, x),
    "remat that keeps products": lambda p, x: jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)(p, x),
    "scan": lambda p, x: lax.scan(lambda x, _: (many(p, x), x.sum()), x, length=2),
    "scan of remat": lambda p, x: lax.scan(lambda x, _: (jax.checkpoint(many)(p, x), None), x, length=2)[0],
    "fori": lambda p, x: lax.fori_loop(0, 2, lambda _, x: many(p, x), x),
    "cond": lambda p, x: lax.cond(x.sum() > 0, block, lambda p, x: 2 * block(p, x), p, x),
    "switch": lambda p, x: lax.switch(1, [lambda p, x: block(p, x), lambda p, x: block(p, -x)], p, x),
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "vmap over kernels": lambda p, x: jax.vmap(block, (0, None))(jnp.stack([p, 2 * p]), x),
    "vmap over images": lambda p, x: jax.vmap(lambda one: block(p, one[None]))(x),
    "a gradient inside": penalised,
    "closed over": lambda p, x: jax.jit(lambda x: block(p, x))(x),
}
rng = np.random.default_rng(0)
PARAMS = jnp.asarray(rng.normal(size=(3, 3, 2, 2)), jnp.float32)
X = jnp.asarray(rng.normal(size=(3, 8, 8, 2)), jnp.float32)


def objective(program, p, x):
    return sum(jnp.cos(leaf).sum() for leaf in jax.tree.leaves(program(p, x)))


def gradient_of(name):
    return jax.value_and_grad(functools.partial(objective, PROGRAMS[name]), (0, 1))


def assert_close(ours, theirs, **tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-4} | tolerance))


@pytest.fixture(scope="module")
def computed():
    """Values and gradients of all programs, with forms and without, in one program."""
    run = jax.jit(
        lambda p, x: {
            name: [(one(p, x), two(p, x)) for one, two in ((program, gradient_of(name)), *[_fast(name)])]
            for name, program in PROGRAMS.items()
        }
    )
    return run(PARAMS, X)


def _fast(name):
    return fast(PROGRAMS[name]), fast(gradient_of(name))


@pytest.mark.parametrize("name", PROGRAMS)
def test_value_and_gradient_are_those_of_the_stock_program(computed, name):
    theirs, ours = computed[name]
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_stock_is_left_in_value_and_gradient(name):
    for function in _fast(name):
        program = str(jax.make_jaxpr(function)(PARAMS, X))
        assert not any(word in program for word in STOCK)


def test_a_while_loop_runs_forwards():
    def until(p, x):
        def more(carry):
            return (carry[0] < 3) & (block(p, carry[1]).sum() < 1e6)

        return lax.while_loop(more, lambda carry: (carry[0] + 1, many(p, carry[1])), (0, x))

    assert_close(jax.jit(fast(until))(PARAMS, X), jax.jit(until)(PARAMS, X))
    assert not any(word in str(jax.make_jaxpr(fast(until))(PARAMS, X)) for word in STOCK)


def test_whatever_differentiates_the_result_differentiates_the_function_as_it_is():
    stock = functools.partial(objective, PROGRAMS["plain"])
    ours = fast(stock)
    tangent = jax.tree.map(jnp.ones_like, (PARAMS, X))
    assert_close(jax.jvp(ours, (PARAMS, X), tangent), jax.jvp(stock, (PARAMS, X), tangent))
    assert_close(jax.grad(ours)(PARAMS, X), jax.grad(stock)(PARAMS, X))
    assert_close(*(jax.linearize(f, PARAMS, X)[1](*tangent) for f in (ours, stock)))
    small = PARAMS[:1, :1, :1, :1], X[:1, :2, :2, :1]
    assert_close(jax.hessian(ours)(*small), jax.hessian(stock)(*small))
    assert_close(jax.jacfwd(fast(jax.grad(stock)))(*small), jax.hessian(stock)(*small))
    assert_close(jax.jacrev(fast(jax.grad(stock)))(*small), jax.hessian(stock)(*small))


def test_what_is_closed_over_is_differentiated_too():
    def outer(p, run):
        return run(lambda x: jnp.cos(block(p, x)).sum())(X)

    assert_close(*(jax.grad(outer)(PARAMS, run) for run in (fast, lambda f: f)))


def test_one_inside_another():
    def twice(p, x):
        return fast(lambda x: jnp.cos(block(p, x)).sum())(x)

    inner = jax.value_and_grad(lambda p, x: jnp.cos(block(p, x)).sum())
    program = jax.make_jaxpr(fast(jax.value_and_grad(twice)))(PARAMS, X)
    assert not any(word in str(program) for word in STOCK)
    assert_close(fast(jax.value_and_grad(twice))(PARAMS, X), inner(PARAMS, X))


def test_other_leaves_pass_through_whatever_their_kind():
    def function(key, count, flag, x):
        y = block(PARAMS, x) * count.astype(jnp.float32) + jax.random.normal(key)
        return {"key": jax.random.split(key), "count": count + 1, "y": jnp.where(flag, y, 0), "none": None, "weak": 2.0}

    arguments = jax.random.key(0), jnp.int32(3), jnp.bool_(True), X
    ours, theirs = (jax.jit(f)(*arguments) for f in (fast(function), function))
    as_numbers = [out | {"key": jax.random.key_data(out["key"])} for out in (ours, theirs)]
    assert_close(*as_numbers)


def test_effects_happen_once(capfd):
    def function(x):
        jax.debug.print("seen")
        return block(PARAMS, x)

    run = jax.jit(fast(jax.value_and_grad(lambda x: jnp.cos(function(x)).sum())))
    jax.block_until_ready(run(X))
    jax.effects_barrier()
    assert capfd.readouterr().out == "seen\n"


def test_names_of_layers_stay_in_the_program():
    task = from_linen(CNN(3), SHAPE)
    params, mutable = task.init(jax.random.key(0))
    text = jax.jit(fast(task.predict)).lower(params, mutable, jnp.ones((2, *SHAPE))).as_text(debug_info=True)
    assert "CNN/Conv_1" in text


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_other_backends_run_the_function_as_it_is(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    program = str(jax.make_jaxpr(fast(block))(PARAMS, X))
    assert "reduce_window" in program


def test_it_can_be_switched_off():
    assert fast(block, on=False) is block


def test_without_convolution_and_pooling_nothing_changes():
    def function(x):
        return jax.nn.softmax(x @ x.T)

    assert str(jax.make_jaxpr(fast(function))(jnp.ones((3, 3)))) == str(jax.make_jaxpr(function)(jnp.ones((3, 3))))


class Small(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.avg_pool(nnx.max_pool(self.norm(self.conv(x)), (2, 2), (2, 2)), (2, 2), (2, 2))
        return self.out(x.mean((1, 2)))


def _by_hand():
    def init(rng):
        one, two = jax.random.split(rng)
        return {"conv": jax.random.normal(one, (4, 1, 3, 3)), "out": jax.random.normal(two, (4, 3))}, {}

    def apply(params, mutable, x, *, train, rng):
        x = x.transpose(0, 3, 1, 2)
        x = jnp.tanh(lax.conv_general_dilated(x, params["conv"], (2, 2), "SAME", rhs_dilation=(2, 2)))
        return x.mean((2, 3)) @ params["out"], mutable

    return classifier(init, apply)


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(4, (3, 3))(x)
        y = nn.Conv(4, (3, 3), feature_group_count=4)(x)
        y = nn.BatchNorm(use_running_average=not train)(y)
        return nn.Dense(3)(nn.avg_pool(nn.relu(x + y), (2, 2), (2, 2)).mean((1, 2)))


TASKS = {
    "cnn": lambda: from_linen(CNN(3, batch_norm=True, dropout=0.5), SHAPE),
    "resnet": lambda: from_linen(ResNet(3, blocks=1, width=4), SHAPE),
    "airbench": lambda: from_linen(Airbench(whitening(rng.normal(size=(9, *SHAPE))), (4, 8), 3), SHAPE),
    "nnx": lambda: from_nnx(Small, SHAPE),
    "by hand, channels first": _by_hand,
    "depthwise": lambda: from_linen(Separable(), SHAPE),
}


@pytest.mark.usefixtures("standard_promotion")  # flax's avg_pool divides by a whole number
@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_the_same_gradient_alone_and_mapped_over_replicas(name):
    task = TASKS[name]()
    params, mutable = jax.jit(task.init)(jax.random.key(0))
    batch = Batch(jnp.asarray(rng.normal(size=(6, *SHAPE)), jnp.float32), jnp.arange(6) % 3)
    stacked = jax.tree.map(lambda p: jnp.stack([p, p * jnp.asarray(1.5, p.dtype)]), params)

    def both(function):
        alone = function(params, mutable, batch, jax.random.key(1))
        return alone, jax.vmap(lambda p: function(p, mutable, batch, jax.random.key(1)))(stacked)

    gradient = jax.value_and_grad(task.loss, has_aux=True)
    ours, theirs = jax.jit(lambda: (both(fast(gradient)), both(gradient)))()
    assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_rounds_use_the_forms_unless_the_task_says_otherwise(monkeypatch):
    import optax

    import wavg_jax as wavg

    used = []
    call = rewrite._FORMS[rewrite.primitives.select_and_scatter_add_p]
    counted = call._replace(call=lambda *args, **params: used.append(1) or call.call(*args, **params))
    monkeypatch.setitem(rewrite._FORMS, rewrite.primitives.select_and_scatter_add_p, counted)
    x, y = jnp.ones((2, 1, 4, *SHAPE)), jnp.zeros((2, 1, 4), jnp.int32)
    for on in (True, False):
        task = from_linen(CNN(3), SHAPE)._replace(cpu_forms=on)
        rounds = wavg.make_rounds(task, wavg.averager(wavg.learned(steps=1)), optax.sgd(0.1))
        state = jax.eval_shape(lambda rounds=rounds: rounds.init(jax.random.key(0), replicas=2))
        used.clear()
        jax.eval_shape(rounds.step, state, Batch(x, y), Batch(x[0, 0], y[0, 0]))
        assert bool(used) == on
        assert len(used) in (0, 4)  # two layers, in the local steps and in the search


def test_gradients_are_rewritten_inside_shard_map_too():
    """There a gradient's convolutions name a layout, of the mesh whose axes are mapped, that lays nothing out."""
    grid = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("r",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(kernel, x):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).var()

    def own(kernel, x):
        return jax.lax.fori_loop(0, 2, lambda i, k: k - fast(jax.grad(loss))(k, x[0]), kernel)[None]

    spec = jax.sharding.PartitionSpec
    mapped = jax.shard_map(own, mesh=grid, in_specs=(spec(), spec("r")), out_specs=spec("r"), check_vma=False)
    x = jnp.ones((2, 4, 6, 6, 3)).at[:, :, 2].set(3.0)
    text = str(jax.make_jaxpr(jax.jit(mapped))(jnp.ones((3, 3, 3, 5)), x))
    kinds = re.findall(r"lhs_spec=\((\d), (\d)", text)
    assert kinds
    assert set(kinds) == {("0", "3")}  # forward convolutions alone: a kernel's gradient has channels for its batch
    np.testing.assert_allclose(mapped(jnp.ones((3, 3, 3, 5)), x)[0], own(jnp.ones((3, 3, 3, 5)), x[:1])[0], rtol=1e-4)
