"""Averages of checkpoint files, against the same arithmetic by hand and against all checkpoints at once."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax import average_checkpoints, robust
from wavg_jax.base import DataError, SettingsError, WavgWarning
from wavg_jax.soups import average

FIRST = {
    "w": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
    "half": np.array([1.0, 3.0], ml_dtypes.bfloat16),
    "wide": np.array([1 / 3]),
    "ids": np.arange(3),
    "mask": np.array([0.0, -np.inf], np.float32),
}
SECOND = FIRST | {"w": FIRST["w"] + 4, "half": np.array([1.0078125, 5.0], ml_dtypes.bfloat16), "wide": np.array([2.0])}


@pytest.fixture
def files(tmp_path):
    """Writes checkpoints a, b, c, ..., and returns their paths."""

    def write(*checkpoints, metadata=None):
        paths = [tmp_path / f"{letter}.safetensors" for letter in "abcdefgh"[: len(checkpoints)]]
        for path, tensors in zip(paths, checkpoints, strict=True):
            safetensors.numpy.save_file(tensors, path, metadata)
        return paths

    return write


def averaged(tmp_path, paths, *arguments, **options):
    soup = average_checkpoints(paths, tmp_path / "out.safetensors", *arguments, **options)
    return soup, safetensors.numpy.load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize("stream", [True, False])
def test_the_mean_keeps_dtypes_metadata_and_what_all_share(files, tmp_path, stream):
    soup, found = averaged(tmp_path, files(FIRST, SECOND, metadata={"format": "pt"}), stream=stream)
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in FIRST.items()}
    np.testing.assert_array_equal(found["w"], FIRST["w"] + 2)
    # 1.00390625 needs 8 bits; bfloat16 rounds it to even. Added up in bfloat16, 1 + 1.0078125 would be 2.
    np.testing.assert_array_equal(found["half"].astype(np.float32), [1.0, 4.0])
    np.testing.assert_allclose(found["wide"], (1 / 3 + 2) / 2, rtol=1e-15)
    np.testing.assert_array_equal(found["ids"], FIRST["ids"])
    np.testing.assert_array_equal(found["mask"], FIRST["mask"])
    with safetensors.safe_open(tmp_path / "out.safetensors", framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert (soup.averaged, soup.kept, soup.weights.tolist(), soup.quality) == (3, 2, [0.5, 0.5], {})


def test_sums_of_bfloat16_are_float32(files, tmp_path):
    """64.75 rounds to 65 in bfloat16, and 64 + 0.25 to 64: added up there, the mean would be 64."""
    paths = files(*({"x": np.array([value], ml_dtypes.bfloat16)} for value in (256, 1, 1, 1)))
    _, found = averaged(tmp_path, paths)
    assert float(found["x"][0]) == 65


def test_given_weights(files, tmp_path):
    rule = wavg.proportional("share", higher_is_better=True)
    soup, found = averaged(tmp_path, files(FIRST, SECOND), rule, signals={"share": [3, 1]})
    np.testing.assert_array_equal(found["w"], FIRST["w"] + 1)
    assert soup.weights.tolist() == [0.75, 0.25]
    assert soup.scores["share"].tolist() == [3, 1]


def test_model_stock_is_anchored_at_the_base(files, tmp_path):
    """Two orthogonal changes share nothing; changes at 60 degrees have t = 2 * 0.5 / 1.5 of their mean."""
    base = {"right": np.ones(2, np.float32), "sixty": np.zeros(2, np.float32)}
    one = {"right": base["right"] + np.float32([3, 0]), "sixty": np.float32([2, 0])}
    two = {"right": base["right"] + np.float32([0, 3]), "sixty": np.float32([1, np.sqrt(3)])}
    *paths, start = files(one, two, base)
    for stream in (True, False):
        _, found = averaged(tmp_path, paths, base=start, reduce=wavg.model_stock, deltas=True, stream=stream)
        np.testing.assert_allclose(found["right"], base["right"], atol=1e-6)
        np.testing.assert_allclose(found["sixty"], np.float32([1.5, np.sqrt(3) / 2]) * 2 / 3, rtol=1e-5)
    with pytest.raises(SettingsError, match="give base="):
        averaged(tmp_path, paths, reduce=wavg.model_stock, deltas=True)


def test_a_broken_checkpoint_has_weight_0_in_every_tensor(files, tmp_path):
    third = SECOND | {"half": np.array([np.nan, 0], ml_dtypes.bfloat16)}
    paths = files(FIRST, SECOND, third)
    with pytest.warns(WavgWarning, match=r"c\.safetensors holds NaNs or infinities and has weight 0"):
        soup, found = averaged(tmp_path, paths)
    assert soup.weights.tolist() == [0.5, 0.5, 0.0]
    np.testing.assert_array_equal(found["w"], FIRST["w"] + 2)
    with pytest.raises(DataError, match="all 2 checkpoints"):
        averaged(tmp_path, files(third, third | {"half": third["half"][::-1].copy()}))


def test_integers_that_differ_come_from_the_first_with_a_warning(files, tmp_path):
    with pytest.warns(WavgWarning, match=r"1 tensors are no floating-point .* 'ids': taken from .*a\.safetensors"):
        _, found = averaged(tmp_path, files(FIRST, SECOND | {"ids": np.arange(3) + 1}))
    np.testing.assert_array_equal(found["ids"], FIRST["ids"])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"w": np.ones((2, 3), np.float32)}, r"'w' is float32\[2, 2\] in .*a\.\w+, but float32\[2, 3\] in .*b\.\w+"),
        ({"w": np.ones((2, 2), np.float16)}, r"float16\[2, 2\] in .*: save all checkpoints in one dtype"),
        ({"more": np.ones(1)}, r"only .*b\.safetensors has 'more', float64\[1\]\. Average checkpoints of the same"),
        ({"w": None, "ids": None}, r"only .*a\.safetensors has 'ids', int64\[3\] and 1 more"),
    ],
)
def test_checkpoints_of_different_networks_are_refused_in_one_line(files, tmp_path, other, says):
    second = {name: x for name, x in (SECOND | other).items() if x is not None}
    with pytest.raises(DataError, match=says) as raised:
        averaged(tmp_path, files(FIRST, second))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_cannot_be_averaged_is_refused(files, tmp_path):
    paths = files(FIRST, SECOND)
    with pytest.raises(SettingsError, match="give two or more"):
        averaged(tmp_path, paths[:1])
    with pytest.raises(SettingsError, match="reads 'loss', which files do not tell: give task= and data="):
        averaged(tmp_path, paths, wavg.softmax("loss"))
    with pytest.raises(SettingsError, match="go together"):
        averaged(tmp_path, paths, task=regression())
    with pytest.raises(DataError, match=r"the task's network has a tensor 'b' of shape \[3\]; .*have none, but 'half'"):
        averaged(tmp_path, paths, task=regression(), data=sharded())


@pytest.fixture
def networks(files):
    """Four checkpoints of one task: of good, bad, broken-in-one-row and worst parameters."""
    task = regression()
    data = sharded()
    x, y = data.prepare(jnp.asarray(data.train.x)), jax.nn.one_hot(data.train.y, 3)
    w, *_ = np.linalg.lstsq(np.asarray(x), np.asarray(y) * 4, rcond=None)
    rng = np.random.default_rng(0)
    made = [
        {"w": (w + noise * rng.normal(size=w.shape)).astype(np.float32), "b": np.zeros(3, np.float32)}
        for noise in (0.1, 0.3, 1.0, 6.0)
    ]
    for k, tensors in enumerate(made):
        tensors |= {"seen": np.float32([k]).reshape(()), "unused": np.float32([k])}
    return files(*made), task, data


RULES = {
    "softmax": (lambda: wavg.softmax("loss"), True),
    "fisher": (wavg.fisher_merging, True),
    "greedy": (lambda: wavg.greedy_soup("loss"), False),
    "learned": (wavg.learned, False),
    "pool": (wavg.opinion_pool, False),
    "median": (robust.coordinate_median, False),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_gives_what_the_averager_gives_on_the_stacked_networks(networks, tmp_path, rule):
    paths, task, data = networks
    make, streams = RULES[rule]
    soup, found = averaged(tmp_path, paths, make(), task=task, data=data)
    assert soup.weights.sum() == pytest.approx(1, abs=1e-5)
    assert soup.quality["accuracy"].shape == (5,)
    if streams:
        together, same = averaged(tmp_path, paths, make(), task=task, data=data, stream=False)
        for name in found:
            np.testing.assert_allclose(found[name], same[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(soup.weights, together.weights, atol=1e-5)
    if rule not in ("median", "fisher"):
        assert soup.weights[0] > soup.weights[3]
    if rule in ("greedy", "learned", "pool"):
        assert soup.quality["loss"][4] < soup.quality["loss"][3]
    if rule == "greedy":  # by hand: best first, and a member stays if the mean is no worse
        stack = {name: np.stack([safetensors.numpy.load_file(path)[name] for path in paths]) for name in ("w", "b")}
        weights = np.asarray(soup.weights)
        np.testing.assert_allclose(found["w"], np.tensordot(weights, stack["w"], 1), rtol=1e-5)
        assert set(np.round(weights * (weights > 0).sum(), 5)) <= {0.0, 1.0}


def test_streaming_needs_the_memory_of_one_tensor_of_all(files, tmp_path, monkeypatch):
    """Eight tensors of 1 MB in each of four files: all together are 32 MB, one of all is 4."""
    rng = np.random.default_rng(0)
    paths = files(*({f"w{n}": rng.normal(size=2**18).astype(np.float32) for n in range(8)} for _ in range(4)))
    held, stacked = [], average.stacked

    def watched(*arguments):
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return stacked(*arguments)

    monkeypatch.setattr(average, "stacked", watched)
    tracemalloc.start()
    averaged(tmp_path, paths)
    numpys, before, streamed = tracemalloc.get_traced_memory()[1], held[0], max(held)
    tracemalloc.stop()
    held.clear()
    averaged(tmp_path, paths, stream=False)
    assert streamed - before < 8e6
    assert numpys < 32e6  # the result's 8 MB are read again by the test
    assert max(held) - before > 7 * 4e6


def test_weights_of_float64_sum_to_1_there(files, tmp_path):
    """A third in float32, three times, is 1.00000003."""
    paths = files(*({"w": np.array([1 + k * 1e-12])} for k in range(3)))
    for options in ({}, {"stream": False}):
        _, found = averaged(tmp_path, paths, **options)
        np.testing.assert_allclose(found["w"], [1 + 1e-12], rtol=1e-15)


def test_what_is_given_in_vain_is_refused(files, tmp_path):
    paths = files(FIRST, SECOND)
    with pytest.raises(SettingsError, match="'share', which the weighting does not read; it reads none"):
        averaged(tmp_path, paths, signals={"share": [3, 1]})
    rule = wavg.proportional("share", higher_is_better=True)
    with pytest.raises(SettingsError, match="signals are no numbers"):
        averaged(tmp_path, paths, rule, signals={"share": ["a", "b"]})
    with pytest.raises(SettingsError, match="is one of the checkpoints"):
        average_checkpoints(paths, paths[0])


def test_where_nothing_can_be_written_is_one_clear_error(files):
    with pytest.raises(wavg.WorkdirError, match=r"/proc/soup.safetensors cannot be written"):
        average_checkpoints(files(FIRST, SECOND), "/proc/soup.safetensors")


def test_scores_need_held_out_samples(networks, tmp_path):
    paths, task, shards = networks
    empty = shards._replace(heldout=wavg.data.Split(shards.heldout.x[:0], shards.heldout.y[:0]))
    with pytest.raises(SettingsError, match="no samples are held out"):
        averaged(tmp_path, paths, wavg.softmax("loss"), task=task, data=empty)
