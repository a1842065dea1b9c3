"""Arrays in: what is accepted, what is refused and how, and the held-out split."""

import io

import numpy as np
import pytest

from wavg_jax.base import DataError, SettingsError, WavgWarning
from wavg_jax.data import Split, from_arrays, from_npz, hold_out, load

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("given", "kept"),
    [("uint8", "uint8"), ("float64", "float32"), ("float16", "float32"), ("int64", "float32"), ("bool", "float32")],
)
def test_input_types(given, kept):
    data = from_arrays(X.astype(given), Y, X[:1].astype(given), Y[:1])
    assert data.train.x.dtype == data.test.x.dtype == kept
    np.testing.assert_array_equal(data.train.x, X.astype(given).astype(kept))


@pytest.mark.parametrize("labels", [Y, Y.astype(np.uint8), Y.astype(np.uint64), Y.tolist()])
def test_integer_labels_become_int32(labels):
    data = from_arrays(X, labels, X[:1], [0], name="mine")
    assert data.train.y.dtype == np.int32
    assert data.train.y.tolist() == Y.tolist()
    assert (data.name, data.classes) == ("mine", 3)


def spoilt(x, index, value):
    x = x.copy()
    x[index] = value
    return x


NAN = spoilt(spoilt(X, (2, 1), np.nan), (5, 3), np.inf)
REFUSED = {
    "lengths": ({"y_train": Y[:5]}, "6 train inputs but 5 targets"),
    "test lengths": ({"y_test": Y[:2]}, "1 test inputs but 2 targets"),
    "empty": ({"x_train": X[:0], "y_train": Y[:0]}, r"train inputs have shape \(0, 4\).*at least one"),
    "empty test": ({"x_test": X[:0], "y_test": Y[:0]}, r"test inputs have shape \(0, 4\)"),
    "no feature axis": ({"x_train": X[:, 0]}, r"shape \(6,\)"),
    "nan": ({"x_train": NAN}, r"2 values that are NaN or infinite.*first at index \[2, 1\]"),
    "overflow": ({"x_train": X.astype(float) * 1e38}, "infinite in float32"),
    "test nan": ({"x_test": NAN[2:3]}, r"test inputs hold 1 values.*\[0, 1\]"),
    "text": ({"x_train": X.astype(str)}, "inputs are of type <U"),
    "one-hot": ({"y_train": np.eye(6)}, r"a test target is int32\(\), a training target float32\(6,\)"),
    "half a label": ({"y_train": Y + 0.5}, "a test target is int32.*a training target float32"),
    "nan target": ({"y_train": [0, 1, np.nan, 0, 1, 2]}, r"1 values that are NaN.*first at index \[2\]"),
    "floats of classes": (
        {"y_train": Y + 0.5, "y_test": [0.5], "classes": 3},
        "float targets have no .*leave out classes=",
    ),
    "one target": ({"y_train": 3}, r"train targets have shape \(\): give one per sample"),
    "no targets": ({"y_train": np.zeros((6, 0))}, r"train targets have shape \(6, 0\)"),
    "huge label": ({"y_train": Y + 2**40}, "6 numbers beyond int32, the first at index .0.: number them from 0"),
    "text label": ({"y_train": list("abcdef")}, "targets are of type <U1"),
    "negative label": ({"y_train": Y - 1}, r"2 train labels are not in \[0, 2\), the first at index 0 is -1"),
    "label too large": ({"classes": 2}, r"2 train labels are not in \[0, 2\), the first at index 2 is 2"),
    "test label too large": ({"y_test": [3], "classes": 3}, r"1 test labels are not in \[0, 3\)"),
    "sample shape": ({"x_test": X[:1, :3]}, r"test sample is float32\(3,\), a training sample float32\(4,\)"),
    "label of a billion": ({"y_train": spoilt(Y, 0, 10**9)}, "largest label is 1000000000, but no .* label 3: fix"),
    "gap in the labels": ({"y_train": Y * 2}, "largest label is 4, but no training sample has label 1"),
    "a billion classes": (
        {"classes": 1e9},
        "1000000000 classes for 6 .*set classes= to 1000006 or less",
    ),
    "one class": ({"y_train": Y * 0}, "1 classes for 6 training samples: give labels of at least 2"),
    "one class said": ({"y_train": Y * 0, "classes": 1}, "1 classes"),
    "no classes": ({"classes": 0}, "0 classes"),
    "classes in words": (
        {"classes": "three"},
        "classes='three' is no number .*set classes= to a whole",
    ),
    "half a class": ({"classes": 3.5}, "classes=3.5 is no number"),
    "infinite classes": ({"classes": np.inf}, "classes=inf .*a whole number"),
    "classes by name": ({"classes": ["a", "b", "c"]}, "classes=.'a', 'b', 'c'. .*a whole number"),
    "ragged inputs": (
        {"x_train": [[1.0], [1.0, 2.0]]},
        "train inputs do not form .*every sample the same shape",
    ),
    "ragged labels": ({"y_train": [[1], [1, 2]]}, "train targets do not form an array"),
    "sample type": ({"x_test": X[:1].astype(np.uint8)}, "give both the same shape and type"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changed, message = REFUSED[case]
    arguments = {"x_train": X, "y_train": Y, "x_test": X[:1], "y_test": Y[:1]} | changed
    with pytest.raises(DataError, match=message) as caught:
        from_arrays(**arguments)
    assert "\n" not in str(caught.value)


def test_classes_may_exceed_those_that_occur_and_a_single_label_warns():
    assert from_arrays(X, Y, X[:1], [0], classes=1000).classes == 1000
    with pytest.warns(WavgWarning, match="mine: every training sample has label 2, so there is nothing") as caught:
        assert from_arrays(X, Y * 0 + 2, X[:1], [0], classes=3, name="mine").classes == 3
    assert caught[0].filename == __file__


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 3)])
def test_floating_targets_of_any_shape_are_regression(shape, tmp_path):
    y = np.linspace(-1, 1, np.prod(shape)).reshape(shape)
    np.savez(tmp_path / "mine.npz", x_train=X, y_train=y, x_test=X[:1], y_test=y[:1])
    for data in (from_arrays(X, y, X[:1], y[:1], name="mine"), from_npz(tmp_path / "mine.npz")):
        assert (data.name, data.classes, data.train.y.dtype) == ("mine", None, np.float32)
        np.testing.assert_array_equal(data.train.y, y.astype(np.float32))
    left, held = hold_out(data.train, 2, seed=0)
    assert (left.y.shape, held.y.shape) == ((4, *shape[1:]), (2, *shape[1:]))


TEXT = np.array([[0, 3, 1, 2], [4, 3, 0, 1]])


def text(dtype=np.int64, **options):
    x, y = TEXT[:, :-1].astype(dtype), TEXT[:, 1:].astype(dtype)
    return from_arrays(x, y, x[:1], y[:1], **options)


@pytest.mark.parametrize(
    ("given", "kept"), [("uint8", "uint8"), ("uint16", "uint16"), ("int64", "int32"), ("uint32", "int32")]
)
def test_tokens_stay_integers_and_the_largest_of_inputs_and_targets_sizes_the_vocabulary(given, kept):
    data = text(given)
    assert (data.train.x.dtype, data.test.x.dtype, data.train.y.dtype) == (kept, kept, np.int32)
    assert data.classes == 5  # no target is 4
    np.testing.assert_array_equal(data.train.x, TEXT[:, :-1])
    np.testing.assert_array_equal(data.train.y, TEXT[:, 1:])
    assert text(given, classes=9).classes == 9


def test_an_npz_file_of_tokens_may_give_the_vocabulary(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=TEXT, y_train=TEXT, x_test=TEXT[:1], y_test=TEXT[:1], classes=7)
    data = from_npz(tmp_path / "mine.npz")
    assert (data.classes, data.train.x.dtype) == (7, np.int32)


def test_tokens_beyond_the_vocabulary_are_refused_and_their_place_is_named():
    with pytest.raises(
        DataError, match=r"arrays: 1 train input tokens are not in \[0, 4\), the first at index 1, 0 is 4"
    ):
        text(classes=4)
    with pytest.raises(DataError, match=r"2 train labels are not in \[0, 3\), the first at index 0, 0 is 3"):
        text(classes=3)


def test_images_beside_a_label_for_every_pixel_stay_images():
    x = np.zeros((3, 2, 2), np.uint8)
    data = from_arrays(x, x + 1, x, x)
    assert (data.train.x.dtype, data.classes, data.train.y.shape) == (np.uint8, 2, (3, 2, 2))


def test_npz_round_trip(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=X, y_train=Y, x_test=X[:1], y_test=Y[:1])
    data = from_npz(tmp_path / "mine.npz")
    assert (data.name, data.classes) == ("mine", 3)
    np.testing.assert_array_equal(data.train.x, X)


def archive(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def one_array():
    buffer = io.BytesIO()
    np.save(buffer, X)
    return buffer.getvalue()


WHOLE = {"x_train": X, "y_train": Y, "x_test": X[:1], "y_test": Y[:1]}


def test_an_npz_file_may_give_the_number_of_classes(tmp_path):
    for number in (np.array(7), np.array([7.0])):
        np.savez(tmp_path / "mine.npz", **WHOLE, classes=number)
        assert from_npz(tmp_path / "mine.npz").classes == 7


@pytest.mark.parametrize("path", [None, 7, b"mine.npz"])
def test_anything_but_a_path_is_refused(path):
    for read in (from_npz, load):
        with pytest.raises(SettingsError, match="give a name or path"):
            read(path)


OBJECTS = dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), np.array([{}]))
NOT_NPZ = {
    "text": (b"hello", "cannot be read as an npz file"),
    "empty": (b"", "cannot be read as an npz file"),
    "one array": (one_array(), "cannot be read as an npz file"),
    "truncated": (archive(x_train=X)[:-100], "cannot be read as an npz file"),
    "objects": (archive(**OBJECTS), "cannot be read as an npz file"),
    "lacks arrays": (archive(x_train=X, y_train=Y), "lacks x_test, y_test: write x_train, y_train, x_test, y_test"),
    "a billion classes": (archive(**WHOLE, classes=10**9), "1000000000 classes for 6"),
    "half a class": (archive(**WHOLE, classes=3.5), "classes=.*3.5"),
    "two numbers of classes": (archive(**WHOLE, classes=[3, 4]), "number of classes"),
    "refused": (archive(x_train=X, y_train=Y[1:], x_test=X, y_test=Y), "mine: 6 train inputs but 5 targets"),
}


@pytest.mark.parametrize("case", NOT_NPZ)
def test_npz_refused(case, tmp_path):
    content, message = NOT_NPZ[case]
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        from_npz(tmp_path / "mine.npz")
    assert "\n" not in str(caught.value)


def test_an_npz_path_without_a_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*none.npz: set dataset= to the path"):
        from_npz(tmp_path / "none.npz")
    with pytest.raises(DataError, match="cannot be read as an npz file"):
        from_npz(tmp_path)


def test_hold_out_splits_without_loss_and_repeats():
    split = Split(np.arange(50, dtype=np.float32)[:, None], np.arange(50, dtype=np.int32))
    train, held = hold_out(split, 20, seed=3)
    assert (len(train.y), len(held.y)) == (30, 20)
    assert sorted([*train.y, *held.y]) == list(range(50))
    np.testing.assert_array_equal(held.x[:, 0], held.y)
    np.testing.assert_array_equal(hold_out(split, 20, seed=3)[1].y, held.y)
    assert set(hold_out(split, 20, seed=4)[1].y) != set(held.y)
    assert held.y.tolist() != list(range(20))


def test_more_held_out_samples_keep_the_first_ones():
    split = Split(np.zeros((50, 1), np.float32), np.arange(50, dtype=np.int32))
    assert set(hold_out(split, 10, seed=0)[1].y) < set(hold_out(split, 20, seed=0)[1].y)


def test_holding_out_nothing_keeps_everything():
    split = Split(X, Y.astype(np.int32))
    train, held = hold_out(split, 0, seed=0)
    assert (len(train.y), held.x.shape) == (6, (0, 4))


@pytest.mark.parametrize(
    ("n", "seed", "message"),
    [
        (6, 0, "heldout=6 leaves nothing of 6 .*set heldout= between 0 and 5"),
        (-1, 0, "^heldout is -1; it must be a whole number, 0 or more"),
        (2, -1, "^seed is -1"),
        (2.5, 0, "heldout is 2.5; it must be a whole number"),
        (None, 0, "heldout is None"),
        (2, 0.5, "seed is 0.5"),
        (2, None, "seed is None"),
    ],
)
def test_hold_out_refused(n, seed, message):
    with pytest.raises(SettingsError, match=message):
        hold_out(Split(X, Y.astype(np.int32)), n, seed)


def test_hold_out_of_a_whole_data_set_is_refused():
    with pytest.raises(SettingsError, match=r"the samples are a Dataset: give a data\.Split, such as dataset\.train"):
        hold_out(from_arrays(X, Y, X[:1], [0]), 2, 0)
