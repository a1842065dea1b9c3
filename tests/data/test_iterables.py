"""Data sets from real loaders of PyTorch, grain and Hugging Face, and from plain generators."""

import itertools

import numpy as np
import pytest

import wavg_jax as wavg
from wavg_jax.data import from_iterable

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (30, 6, 6), np.uint8)
Y = np.arange(30) % 3


def same(dataset, x=X, y=Y):
    np.testing.assert_array_equal(dataset.train.x, x)
    np.testing.assert_array_equal(dataset.train.y, y)
    assert dataset.train.x.dtype == x.dtype
    assert dataset.classes == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torch_data_loader():
    torch = pytest.importorskip("torch")
    samples = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    loader = torch.utils.data.DataLoader(samples, batch_size=8)  # the last batch has 6
    same(from_iterable(loader, loader, batched=True))
    same(from_iterable(samples, samples, batched=False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_hugging_face_data_set_of_numbers_and_of_pictures():
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    told = {"keys": ("image", "label"), "batched": False}
    columns = datasets.Features({"image": datasets.Array2D((6, 6), "uint8"), "label": datasets.Value("int64")})
    arrays = datasets.Dataset.from_dict({"image": X, "label": Y}, features=columns).with_format("numpy")
    same(from_iterable(arrays, arrays, **told), X.astype(np.float32))  # it reads bytes as int64
    pictures = [image.fromarray(x) for x in X]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    pictured = datasets.Dataset.from_dict({"image": pictures, "label": Y.tolist()}, features=features)
    same(from_iterable(pictured, pictured, **told))
    same(from_iterable(pictured.to_iterable_dataset(), pictured, **told))


def test_a_grain_loader_and_data_set():
    grain = pytest.importorskip("grain.python")
    records = [{"image": x, "label": y} for x, y in zip(X, Y, strict=True)]
    sampler = grain.IndexSampler(len(X), shuffle=False, num_epochs=1, shard_options=grain.NoSharding())
    loader = grain.DataLoader(data_source=records, sampler=sampler, operations=[grain.Batch(8)], worker_count=0)
    same(from_iterable(loader, loader, batched=True, keys=("image", "label")))
    endless = grain.MapDataset.source(records).repeat()
    same(from_iterable(endless, endless, batched=False, keys=("image", "label"), samples=len(X)))


def test_what_is_read_trains():
    pairs = list(zip(X.astype(np.float32).reshape(30, -1), Y, strict=True))
    shards = wavg.data.shard(
        from_iterable(pairs, pairs, batched=False),
        lambda split, seed: wavg.data.iid(len(split.y), 2, seed),
        heldout=4,
        seed=0,
    )
    assert shards.prepare(shards.test.x[:2]).shape == (2, 36)


def test_no_more_is_read_than_asked_for():
    asked = []

    def endless(batch):
        for i in itertools.count():
            asked.append(i)
            yield (X[:batch], Y[:batch]) if batch else (X[i % 30], Y[i % 30])

    dataset = from_iterable(endless(8), endless(8), batched=True, samples=12, classes=3)
    assert (len(dataset.train.y), len(dataset.test.y), asked) == (12, 12, [0, 1, 0, 1])
    asked.clear()
    assert len(from_iterable(endless(0), endless(0), batched=False, samples=5, classes=3).train.y) == 5
    assert asked == [*range(5)] * 2


BATCH = [(X, Y)]


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ([], {}, r"^the train data yield nothing: "),
        (5, {}, r"^the train data are a int, which yields nothing"),
        (BATCH, {"keys": ("image", "label")}, r"^the train data yield a tuple, of which keys='image' makes no array"),
        ([{"image": X, "label": Y}], {}, r"^the train data yield the entries image, label, of which keys=0"),
        ([(X, 3)], {}, r"inputs of shape \(30, 6, 6\) and targets of shape \(\), which are no batch: .* batched=False"),
        ([(X, Y), (X[:, :5], Y)], {}, r"^the train inputs have shapes \(5, 6\) and \(6, 6\): "),
        (BATCH, {"keys": ("a",)}, r"keys is \('a',\); give two"),
        (BATCH, {"batched": 1}, r"batched is 1; it must be True or False"),
        (BATCH, {"samples": 0}, r"samples is 0"),
        (BATCH, {"classes": 1}, "1 classes for 30 training samples"),
    ],
)
def test_what_cannot_be_read_is_one_line(given, options, says):
    with pytest.raises(wavg.WavgError, match=says):
        from_iterable(given, BATCH, **({"batched": True} | options))


def test_a_loader_may_fill_the_same_arrays_again():
    x, y = np.empty((2, 3), np.float32), np.empty(2, np.int64)

    def batches():
        for number in range(3):
            x[:], y[:] = number, number
            yield x, y

    found = from_iterable(batches(), batches(), batched=True)
    assert found.train.x[:, 0].tolist() == found.train.y.tolist() == [0, 0, 1, 1, 2, 2]
