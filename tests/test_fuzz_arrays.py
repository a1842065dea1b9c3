"""Arrays and settings drawn at random, into the functions that users call: each runs or is refused with one line.

What ran has left its inputs as they were, and arrays that hold the same numbers in another form give the same.
"""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wavg_jax as wavg
from wavg_jax import data

pytestmark = pytest.mark.fuzz

NAN, INF = float("nan"), float("inf")


class Odd:
    """An object of no use."""

    def __repr__(self):
        return "Odd()"


JUNK = st.one_of(
    st.sampled_from([None, True, False, NAN, INF, -INF, 1e308, 0.5, -0.5, 1e-320, 2**31, 2**32, 2**63, 10**400, 1j]),
    st.integers(-3, 9),
    st.floats(allow_nan=False, width=16),
    st.sampled_from(["", "x", "digits", "1", "a/b", "\0", "\ud800", "é" * 300, b"", b"\xff"]),
    st.sampled_from(
        [[], (), {}, set(), [[]], [1, [2]], [None], ["a"], {"a": 1}, range(3), slice(2), ..., len, Odd, int]
    ),
    st.builds(Odd),
    st.sampled_from([np.float32, np.int64, np.uint8, np.bool_, np.complex64]).map(lambda kind: kind(1)),
    st.sampled_from(["f4", "f8", "i8", "u8", "?", "c8", "M8[s]", "S3", "U3", "O", "V4", "f4,i4"]).flatmap(
        lambda dtype: st.sampled_from([(), (0,), (3,), (3, 2), (2, 0), (1, 1, 1, 1)]).map(
            lambda shape: np.zeros(shape, dtype)
        )
    ),
    st.sampled_from([(3,), (3, 4), (0,)]).map(jnp.zeros),
)
"""Values that few arguments allow."""
HUGE = st.sampled_from(["f4", "u1", "i8"]).flatmap(
    lambda dtype: st.sampled_from([(2**40,), (2**40, 4), (2**38, 2**20)]).map(
        lambda shape: np.broadcast_to(np.zeros((), dtype), shape)
    )
)
"""Arrays of terabytes that take no memory."""
WHOLE = {"labels", "tokens", "text", "dataset", "split", "x_train", "y_train", "x_test", "y_test"}
"""Arguments that are read as one array, and never value by value."""


@st.composite
def calls(draw, good, wrong=0.5):
    """Arguments `{name: value}`, of which often one or two are junk, or left out where they have no strategy."""
    given = {name: draw(strategy) for name, strategy in good.items()}
    if draw(st.floats(0, 1)) < wrong:
        for name in draw(st.lists(st.sampled_from(list(good)), min_size=1, max_size=2)):
            given[name] = draw(st.one_of(JUNK, HUGE) if name in WHOLE else JUNK)
    return given


# Forms of an array.


def _masked(array):
    return np.ma.masked_array(array, np.zeros(array.shape, bool))


FORMS = {
    "itself": lambda a: a,
    "fortran": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=0)[::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "turned": lambda a: np.ascontiguousarray(a.T).T,
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
    "other bytes": lambda a: a.astype(a.dtype.newbyteorder()),
    "jax": jnp.asarray,
    "no mask": _masked,
    "whole view": lambda a: np.broadcast_to(a, a.shape),
}
"""An array -> the same numbers of the same type, otherwise."""


def _unlike(array):
    """The same numbers as lists; their type is that of Python's numbers."""
    return array.tolist()


@st.composite
def inputs(draw, samples):
    """Inputs [N, ...] of any type and value, few of them wrong."""
    shape = (samples, *draw(st.sampled_from([(2,), (1,), (3, 3), (4, 4, 1), (2, 2, 3), (2, 1, 1, 2)])))
    dtype = draw(st.sampled_from(["f4", "u1", "f8", "f2", "i4", "i8", "?", "u8", "i2", "g"]))
    array = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 9, shape).astype(dtype)
    if array.dtype.kind == "f" and draw(st.integers(0, 9)) == 0:
        array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from([NAN, INF, -INF, 6e4]))
    return array


@st.composite
def targets(draw, samples):
    """Targets [N, ...]: labels, tokens or numbers, few of them wrong."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    match draw(st.sampled_from(["labels", "labels", "labels", "numbers", "tokens"])):
        case "labels":
            array = (np.arange(samples) % 3).astype(draw(st.sampled_from(["i4", "i8", "u1", "u8", "i1", "?"])))
        case "numbers":
            shape = (samples, *draw(st.sampled_from([(), (2,), (1, 2)])))
            array = rng.normal(size=shape).astype(draw(st.sampled_from(["f4", "f8", "f2"])))
        case "tokens":
            array = rng.integers(0, 9, (samples, 3)).astype(draw(st.sampled_from(["u1", "u2", "i4", "i8"])))
    if draw(st.integers(0, 9)) == 0:
        with np.errstate(all="ignore"):
            odd = np.asarray(draw(st.sampled_from([-1, 250, 10**6, 2**31, 2**62, NAN, INF]))).astype(array.dtype)
        array.flat[draw(st.integers(0, array.size - 1))] = odd
    return array


@st.composite
def splits(draw):
    """`(x, y)` of some samples, seldom of different numbers."""
    samples = draw(st.sampled_from([3, 3, 5, 8, 1]))
    return draw(inputs(samples)), draw(targets(samples if draw(st.integers(0, 19)) else samples + 1))


@st.composite
def whole(draw):
    """Arguments of `from_arrays`, as plain arrays, and names of the forms to give them in."""
    x, y = draw(splits())
    test = (x[:2], y[:2]) if draw(st.integers(0, 9)) else draw(splits())
    given = dict(zip(("x_train", "y_train", "x_test", "y_test"), (x, y, *test), strict=True))
    given["classes"] = draw(st.sampled_from([None, None, None, 3, 9, 10.0, np.int64(4), 256, 1, 0, -1, 10**9, NAN]))
    forms = {name: draw(st.sampled_from([*FORMS, "list"])) for name in list(given)[:4]}
    if draw(st.integers(0, 3)) == 0:
        given[draw(st.sampled_from(list(given)))] = draw(st.one_of(JUNK, HUGE))
    return given, forms


def outcome(function, *arguments, **given):
    """What a call gives: (the result, None) or (None, what it says)."""
    try:
        return function(*arguments, **given), None
    except wavg.WavgError as error:
        return None, error


def same(a, b):
    """Asserts that two results are equal to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def is_small(value):
    return getattr(value, "size", 0) < 10**6


def kept(given):
    """A copy of the arguments that are arrays."""
    return {name: np.array(value) for name, value in given.items() if isinstance(value, np.ndarray) and is_small(value)}


def unchanged(given, before):
    """Asserts that arrays are what they were."""
    for name, array in before.items():
        assert given[name].dtype == array.dtype
        assert np.asarray(given[name]).tobytes() == array.tobytes(), f"{name} was changed"


def formed(given, forms):
    """The arguments with their arrays in other forms."""
    made = {}
    for name, value in given.items():
        form = forms.get(name, "itself")
        fits = type(value) is np.ndarray and is_small(value) and value.dtype.kind in "fiub"
        if form == "jax" and fits and (value.dtype.itemsize > 4 or not value.size):
            fits = False  # JAX would narrow it
        made[name] = FORMS[form](value) if fits and form in FORMS else value
    return made


def warned(function):
    """The function; that all labels are equal is worth a warning, which is no error here."""

    def call(*arguments, **given):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            return function(*arguments, **given)

    return call


def test_a_data_set_of_any_arrays(cases):
    make = warned(data.from_arrays)

    def body(value):
        given, forms = value
        before = kept(given)
        plain, refused = outcome(make, **given)
        unchanged(given, before)
        others = formed(given, forms)
        other, also = outcome(make, **others)
        assert type(refused) is type(also), f"{forms}: {refused} but {also}"
        if refused is not None:
            raise refused
        same(plain[1:3], other[1:3])
        assert plain[3:] == other[3:]
        for split in plain[1:3]:
            for part in split:
                assert part.dtype.isnative
                assert np.isfinite(part).all()

    with cases("arrays: from_arrays", 4) as tried:
        tried.draw(whole(), body)
    assert min(tried.counts["ran"], tried.counts["refused"]) > 0


# Functions of the data, each with the values that it is made for.

SMALL = st.sampled_from([0, 1, 2, 3, 8, 64, 100])
SEED = st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**64])
LABELS = st.sampled_from([3, 9, 64]).map(lambda n: np.arange(n) % 3)
SPLIT = splits().map(lambda pair: data.Split(*pair))
DATASET = st.sampled_from([(9, 4), (9, 2, 2, 1), (64, 3)]).map(
    lambda shape: data.from_arrays(np.ones(shape), np.arange(shape[0]) % 3, np.ones((3, *shape[1:])), [0, 1, 2])
)
SHARDS = st.sampled_from([(9, 1), (9, 3), (64, 64), (64, 5)]).map(lambda pair: data.iid(*pair, 0))


def _texts(text, tmp):
    file = tmp / "a.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode(errors="replace"))
    return file


FUNCTIONS = {
    "iid": (data.iid, {"n": SMALL, "replicas": SMALL, "seed": SEED}),
    "contiguous": (data.contiguous, {"n": SMALL, "replicas": SMALL}),
    "interleaved": (data.interleaved, {"n": SMALL, "replicas": SMALL, "length": SMALL, "seed": SEED}),
    "sized": (
        data.sized,
        {
            "n": SMALL,
            "proportions": st.lists(st.sampled_from([1, 2.5, 1e-300, 1e300, 0, -1]), max_size=5),
            "seed": SEED,
        },
    ),
    "dirichlet": (
        data.dirichlet,
        {
            "labels": LABELS,
            "replicas": SMALL,
            "alpha": st.sampled_from([0.1, 1, 1e-300, 1e300, 100]),
            "seed": SEED,
            "min_size": SMALL,
        },
    ),
    "label_noise": (
        data.label_noise,
        {
            "labels": LABELS.map(lambda labels: np.resize(labels, 64)),
            "shards": SHARDS,
            "noisy": st.lists(st.integers(0, 2), max_size=3),
            "classes": SMALL,
            "seed": SEED,
        },
    ),
    "hold_out": (data.hold_out, {"split": SPLIT, "n": SMALL, "seed": SEED, "last": st.booleans()}),
    "windows": (data.windows, {"tokens": LABELS, "context": SMALL}),
    "from_text": (
        data.from_text,
        {
            "text": st.one_of(st.text(max_size=60), st.binary(max_size=60), st.just("a text " * 20)),
            "context": SMALL,
            "name": st.just("text"),
            "test": st.sampled_from([0, 0.05, 0.5, 0.999]),
        },
    ),
    "class_weights": (data.class_weights, {"labels": LABELS, "classes": SMALL}),
    "make_prepare": (
        data.make_prepare,
        {
            "dataset": DATASET,
            "scale": st.sampled_from([data.per_channel, data.per_feature, data.overall, None]),
        },
    ),
    "from_iterable": (
        data.from_iterable,
        {
            "train": st.sampled_from([[(np.ones((2, 2)), np.arange(2))] * 2, [(np.ones(2), 1), (np.ones(2), 0)], [{}]]),
            "test": st.sampled_from([[(np.ones((2, 2)), np.arange(2))] * 2, [(np.ones(2), 1), (np.ones(2), 0)]]),
            "batched": st.booleans(),
            "keys": st.sampled_from([(0, 1), [0, 1], ("x", "y"), (0, 5), (0,)]),
            "samples": st.sampled_from([None, 1, 3]),
        },
    ),
    "round_indices": (
        data.round_indices,
        {
            "shards": SHARDS,
            "seed": SEED,
            "first_step": st.sampled_from([0, 1, 10**6]),
            "local_steps": SMALL,
            "batch_size": SMALL,
        },
    ),
    "shard": (
        data.shard,
        {
            "dataset": DATASET,
            "partition": st.sampled_from(
                [
                    lambda split, seed: data.iid(len(split.y), 3, seed),
                    lambda split, seed: data.dirichlet(split.y, 2, 0.3, seed),
                    lambda split, seed: [[0, 1], [2]],
                    lambda split, seed: [[0, 1], [1]],
                    lambda split, seed: [[0], [10**6]],
                    lambda split, seed: [[-1], []],
                    lambda split, seed: None,
                ]
            ),
            "heldout": SMALL,
            "seed": SEED,
            "noisy": st.lists(st.integers(0, 2), max_size=3),
        },
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_of_the_data(name, cases):
    function, good = FUNCTIONS[name]
    function = warned(function)

    def body(given):
        before = kept(given)
        result = function(**given)
        if not all(map(is_small, jax.tree.leaves(result))):
            return  # targets as they were given
        unchanged(given, before)
        same(jax.tree.leaves(result), jax.tree.leaves(function(**given)))

    with cases(f"arrays: {name}", 2) as tried:
        tried.draw(calls(good), body)
    assert min(tried.counts["ran"], tried.counts["refused"]) > 0
