"""What travels between devices in a round, read from the compiled program and counted on paper."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax import tree
from wavg_jax.base import Batch
from wavg_jax.devices import placement
from wavg_jax.devices.network import WIRES
from wavg_jax.rounds import wire
from wavg_jax.training.batches import make_work, put_shared
from wavg_jax.training.phases import local_phase
from wavg_jax.training.programs import programs_of
from wavg_jax.training.recipe import make_recipe
from wavg_jax.training.run import exchanged

K = 8
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
COLLECTIVE = re.compile(
    r"= (?P<shapes>\(?[^=]*?\)?) (?P<kind>all-\w+(?:-all)?|reduce-scatter|collective-permute)(?:-start)?\("
)


def collectives(text):
    """[(kind, bytes of its result)] of a compiled program; a result of several arrays is one exchange."""
    found = []
    for match in COLLECTIVE.finditer(re.sub(r"/\*.*?\*/", "", text)):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", match["shapes"])
        sizes = [BYTES[name] * int(np.prod([int(n) for n in dims.split(",") if n])) for name, dims in shapes]
        found.append((match["kind"], sum(sizes)))
    return found


def compiled_round(weighting, how="float32", devices=K, drift=None):
    source = sharded(replicas=K)
    options = {"at_sync": wavg.AtSync(wire=how, drift=drift), "layout": wavg.Layout(devices=devices)}
    recipe = make_recipe(regression(), source, wavg.averager(weighting), optax.sgd(0.1), **options)
    assert len(recipe.placement.devices) == devices
    program = programs_of(recipe, K)
    state = program.init(jax.random.key(0))
    work = make_work(recipe, source, seed=0, first_step=0, longest=4, batch_size=4)
    shared = put_shared(recipe, source)
    text = program.run.lower(state, work, shared, None).compile().as_text()
    return recipe, state, work, shared, text


@pytest.mark.parametrize("weighting", [wavg.uniform(), wavg.softmax("loss", 1.0)])
def test_a_weighting_by_scores_sends_the_parameters_once_in_one_all_reduce(weighting):
    _, state, _, _, text = compiled_round(weighting)
    size = tree.nbytes(state.params)
    found = collectives(text)
    assert [kind for kind, _ in found].count("all-reduce") == 2  # the parameters, and the statistics of the test task
    assert ("all-reduce", size) in found
    others = [nbytes for kind, nbytes in found if (kind, nbytes) != ("all-reduce", size)]
    assert sum(others) < 40 * K + tree.nbytes(state.mutable)  # scores: a few numbers for each replica
    assert [kind for kind, _ in found].count("all-gather") == 1
    assert len(found) == 3


@pytest.mark.parametrize("how", wire.FORMATS)
@pytest.mark.parametrize("weighting", [wavg.learned(), wavg.robust.krum(1), wavg.inverse("distance"), wavg.uniform()])
def test_all_replicas_travel_once_in_the_format_of_the_wire(weighting, how):
    if how == "float32" and not weighting.reads_replicas and weighting.needs != ("distance",):
        pytest.skip("sends one weighted sum instead: the test above")
    _, state, _, _, text = compiled_round(weighting, how)
    gathers = [nbytes for kind, nbytes in collectives(text) if kind == "all-gather"]
    numbers = tree.count(state.params)
    if how == "int8":
        numbers = -(-numbers // wire.BLOCK) * wire.BLOCK
    parameters = K * numbers * WIRES[how]
    small = K * (tree.nbytes(state.mutable) + 40)
    assert parameters <= sum(gathers) <= parameters + small
    assert len(gathers) == 1
    reduced = [nbytes for kind, nbytes in collectives(text) if kind == "all-reduce"]
    assert not reduced or max(reduced) <= 4 * K + 160  # a search's metrics and slope of weights


def test_control_variates_travel_once_more_and_a_proximal_term_sends_nothing():
    _, state, _, _, plain = compiled_round(wavg.uniform())
    *_, near = compiled_round(wavg.uniform(), drift=wavg.drift.fedprox(0.1))
    *_, controlled = compiled_round(wavg.uniform(), drift=wavg.drift.scaffold(0.1))
    assert sorted(collectives(near)) == sorted(collectives(plain))
    assert sorted(collectives(controlled)) == sorted([*collectives(plain), ("all-reduce", tree.nbytes(state.params))])


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize(
    ("weighting", "how"),
    [(wavg.softmax("loss", 1.0), "float32"), (wavg.uniform(), "int8"), (wavg.learned(), "float32")],
)
def test_with_several_replicas_a_device_a_sum_stays_one_tree_and_a_gather_grows_with_all(weighting, how, devices):
    recipe, state, _, _, text = compiled_round(weighting, how, devices)
    found = collectives(text)
    gathers = [nbytes for kind, nbytes in found if kind == "all-gather"]
    assert len(gathers) == 1
    gathered, summed = exchanged(recipe, state)
    if how == "float32" and not weighting.reads_replicas:
        assert ("all-reduce", tree.nbytes(state.params)) in found
        assert summed == tree.count(state.params)
        assert sum(gathers) < 40 * K
    else:
        numbers = tree.count(state.params) if how == "float32" else wire.BLOCK
        assert K * numbers * WIRES[how] <= sum(gathers) <= K * (numbers * WIRES[how] + tree.nbytes(state.mutable) + 40)
        assert gathered == int(np.ceil(K // devices * tree.count(state.params) * WIRES[how] / 4))


def test_a_change_that_was_not_blended_in_leaves_nothing_to_send():
    def explode(updates, state, params=None):  # in the second round
        return jax.tree.map(lambda u: jnp.where(state == 1, jnp.inf, -u), updates), state + 1

    outer = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), explode)
    averager = wavg.averager(wavg.uniform(), outer=optax.chain(outer, optax.scale(-1.0)))
    rounds = wavg.make_rounds(regression(), averager, optax.sgd(0.1), at_sync=wavg.AtSync(wire="int8"))
    x = jax.random.normal(jax.random.key(1), (2, 3, 8, 4))
    step, states = jax.jit(rounds.step), [rounds.init(jax.random.key(0), replicas=2)]
    for _ in range(2):
        state, log = step(states[-1], Batch(x, jnp.zeros(x.shape[:-1], jnp.int32)))
        states.append(state)
    assert not log.weights.any()
    assert states[1].replicas.residual.any()
    np.testing.assert_array_equal(states[2].replicas.residual, states[1].replicas.residual)


def test_the_local_phase_sends_nothing():
    recipe, state, work, shared, text = compiled_round(wavg.learned())
    assert collectives(text)  # the parser sees what there is
    local = jax.jit(local_phase(recipe)).lower(state.replicas, work, shared).compile().as_text()
    assert collectives(local) == []
    plain = compiled_round(wavg.uniform())[-1]  # in a whole round no loop holds one but a search's
    loops = set(re.findall(r"body=%?([\w.-]+)", plain))
    assert loops
    for name in loops:
        body = re.search(rf"(?ms)^%?{re.escape(name)} [^\n]*\{{\n(.*?)^\}}", plain)
        assert body
        assert collectives(body[1]) == []


def test_sync_sends_the_gradient_at_every_step_and_nothing_else():
    source = wavg.data.pool(sharded(replicas=K))
    recipe = make_recipe(
        regression(), source, wavg.averager(wavg.uniform()), optax.sgd(0.1), layout=wavg.Layout(devices=4)
    )
    program = programs_of(recipe, 1)
    state = program.init(jax.random.key(0))
    work = make_work(recipe, source, seed=0, first_step=0, longest=4, batch_size=16)
    text = program.run.lower(state, work, put_shared(recipe, source), None).compile().as_text()
    found = collectives(text)
    assert {kind for kind, _ in found} <= {"all-reduce"}
    gradient = tree.nbytes(state.params)
    assert gradient <= sum(nbytes for _, nbytes in found) <= gradient + tree.nbytes(state.mutable) + 16


def test_a_gather_is_exact_for_every_kind_of_number():
    where = placement.place(K)
    keys = jax.random.split(jax.random.key(1), K)
    stacked = {
        "nan": jnp.array([np.nan, -0.0, np.inf, 1e-45, *range(4)], jnp.float32),
        "half": jnp.arange(2 * K, dtype=jnp.bfloat16).reshape(K, 2),
        "small": jnp.arange(-K, K, dtype=jnp.int8).reshape(K, 2),
        "flags": jnp.arange(K) % 3 == 0,
        "counts": jnp.arange(K, dtype=jnp.int32),
        "keys": keys,
        "nothing": jnp.zeros((K, 0)),
    }
    spread = jax.device_put(stacked, where.stacked)
    gathered = jax.jit(where.gather)(spread)
    for name, x in gathered.items():
        assert x.sharding.is_fully_replicated
        assert x.dtype == stacked[name].dtype
        same = jax.random.key_data if name == "keys" else np.asarray
        a, b = (np.asarray(same(y)) for y in (x, stacked[name]))
        assert a.tobytes() == b.tobytes()


def test_the_slope_of_a_shared_sum_is_that_of_the_whole():
    """In the size of the weights, and of the parameters where somebody differentiates with respect to them."""
    where = placement.place(K)
    samples = jnp.linspace(-1.0, 1.0, 2 * K + 3)  # does not divide
    stacked = jnp.linspace(0.5, 2.0, K)

    def loss(weights, over):
        def sums(weights, samples):
            return jnp.tanh(samples * (weights * stacked).sum()).sum() + (weights**2).sum() * samples.shape[0]

        return over(sums)(weights, samples)

    weights = jnp.full(K, 1 / K)
    alone = jax.value_and_grad(functools.partial(loss, over=lambda f: f))(weights)
    shared = where.together(jax.value_and_grad(functools.partial(loss, over=where.over_samples)))(weights)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), shared, alone)


def test_a_weighting_that_differentiates_by_itself_gets_the_whole_slope():
    """One of the user's own that calls `evaluate` on parameters that no blend made."""
    seen = {}

    def update(stacked, state, params, *, alive, evaluate, **_):
        weights = jnp.where(alive, 1 / K, 0.0).astype(jnp.float32)
        slope = jax.grad(lambda p: evaluate(p, weights)["loss"])(params)
        size = optax.tree.norm(slope)
        return weights * size / size, size

    own = wavg.Weighting(lambda params, replicas: jnp.float32(0), update, ("evaluate",))
    for devices in (1, K):
        source = sharded(replicas=K)
        layout = wavg.Layout(devices=devices, replica_map="vmap")
        options = {"inner": optax.sgd(0.1), "local_steps": 2, "rounds": 1, "batch_size": 4, "progress": False}
        result = wavg.fit(regression(), source, wavg.averager(own), layout=layout, **options)
        seen[devices] = float(result.state.averager.weighting)
    np.testing.assert_allclose(seen[1], seen[K], rtol=1e-5)


def test_pmap_by_hand_gives_the_same_round():
    """`jax.pmap`, the older way to run one replica per device, written out for one round of plain averaging."""
    source = sharded(replicas=K)
    task, inner = regression(), optax.sgd(0.1)
    where = placement.place(K)
    rounds = wavg.make_rounds(task, wavg.averager(wavg.uniform()), inner, placement=where, prepare=source.prepare)
    state = rounds.init(jax.random.key(0), K)
    rng = np.random.default_rng(0)
    x = np.asarray(source.prepare(source.train.x))
    i = rng.integers(len(x), size=(K, 3, 4))
    batches = Batch(jnp.asarray(x[i]), jnp.asarray(source.train.y[i], jnp.int32))

    def one(params, mutable, rng, batches):
        opt_state = inner.init(params)
        for h in range(3):
            rng, _, loss_rng = jax.random.split(rng, 3)
            batch = jax.tree.map(lambda a, h=h: a[h], batches)
            gradient, (mutable, _) = jax.grad(task.loss, has_aux=True)(params, mutable, batch, loss_rng)
            updates, opt_state = inner.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
        return jax.lax.pmean(params, "replicas")

    by_hand = jax.pmap(one, axis_name="replicas")(
        state.replicas.params, state.replicas.mutable, state.replicas.rng, batches
    )
    new, _ = jax.jit(rounds.step)(state, batches)
    for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-5, atol=1e-6)
