"""Text as data: each byte is predicted once, in one part; shards deal windows; noise keeps a shard's bytes."""

import math
import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from wavg_jax import data
from wavg_jax.base import DataError, SettingsError
from wavg_jax.data.text_sets import python_docs

TEXT = b"It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."


def sharded(text=TEXT, context=4, replicas=3, heldout=3, noisy=(), seed=0, partition=None):
    partition = partition or (lambda split, seed: data.contiguous(len(split.y), replicas))
    return data.shard(
        data.from_text(text, context=context, test=0.1), partition, heldout=heldout, seed=seed, noisy=noisy
    )


@given(st.integers(0, 60), st.integers(1, 7))
def test_each_token_but_the_first_is_a_target_once_and_follows_its_input(n, context):
    tokens = np.arange(n)  # a token is its own place
    x, y = data.windows(tokens, context)
    assert x.shape == y.shape == (max(n - 1, 0) // context, context)
    np.testing.assert_array_equal(y.reshape(-1), 1 + np.arange(y.size))
    np.testing.assert_array_equal(x, y - 1)
    assert 0 <= max(n - 1, 0) - y.size < context  # what no window predicts


@given(st.integers(40, 200), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_no_byte_is_a_target_in_two_parts_or_in_two_shards_and_none_is_lost(n, context, heldout, replicas, length):
    text = bytes(np.arange(n, dtype=np.uint8))  # a byte is its own place
    for partition in (
        lambda split, seed: data.contiguous(len(split.y), replicas),
        lambda split, seed: data.interleaved(len(split.y), replicas, length, seed),
        lambda split, seed: data.iid(len(split.y), replicas, seed),
    ):
        made = sharded(text, context, heldout=heldout, partition=partition)
        parts = [made.train.y[shard] for shard in made.shards] + [made.heldout.y, made.test.y]
        targets = np.concatenate([part.reshape(-1) for part in parts])
        np.testing.assert_array_equal(np.sort(targets), 1 + np.arange((n - 1) // context * context))
        for split in (made.train, made.heldout, made.test):
            np.testing.assert_array_equal(split.x, split.y - 1)
        # Training, held-out and test targets lie one after another, so no window crosses a border.
        assert made.train.y.max() < made.heldout.y.min() <= made.heldout.y.max() < made.test.y.min()


def test_held_out_windows_are_the_last_ones_in_an_order_of_the_seed():
    text = bytes(np.arange(200, dtype=np.uint8))
    one, other = (sharded(text, heldout=20, seed=seed).heldout for seed in (0, 1))
    assert sorted(one.y[:, 0]) == sorted(other.y[:, 0]) == list(range(97, 177, 4))  # 5 of 49 windows are for testing
    assert list(one.y[:, 0]) != list(other.y[:, 0])
    assert sharded(heldout=0).heldout.y.shape == (0, 4)


def test_contiguous_shards_are_passages_and_blocks_come_from_all_over():
    assert [s.tolist() for s in data.contiguous(7, 2)] == [[0, 1, 2, 3], [4, 5, 6]]
    for seed in range(3):
        shards = data.interleaved(24, 3, 4, seed)
        assert [len(s) for s in shards] == [8, 8, 8]
        runs = [s.reshape(2, 4) for s in shards]
        assert all((np.diff(r) == 1).all() and (r[:, 0] % 4 == 0).all() for r in runs)
    assert not np.array_equal(data.interleaved(24, 3, 4, 0)[0], data.interleaved(24, 3, 4, 1)[0])
    with pytest.raises(SettingsError, match="length is 0"):
        data.interleaved(24, 3, 0, 0)


def test_noise_shuffles_the_bytes_of_its_shards_and_leaves_the_others_alone():
    clean, noisy = sharded(), sharded(noisy=(0, 2))
    assert (noisy.noisy, noisy.noise) == ((0, 2), "shuffled bytes")
    for k, shard in enumerate(clean.shards):
        before, after = clean.train.y[shard].reshape(-1), noisy.train.y[shard].reshape(-1)
        np.testing.assert_array_equal(np.sort(before), np.sort(after))
        assert np.array_equal(before, after) == (k == 1)
        # It is a text still: the next input is this target.
        np.testing.assert_array_equal(noisy.train.x[shard].reshape(-1)[1:], after[:-1])
    np.testing.assert_array_equal(noisy.train.x[clean.shards[1]], clean.train.x[clean.shards[1]])
    for part in ("heldout", "test"):
        np.testing.assert_array_equal(getattr(noisy, part).x, getattr(clean, part).x)
    alone = sharded(noisy=(2,)).train
    np.testing.assert_array_equal(alone.y[clean.shards[2]], noisy.train.y[clean.shards[2]])
    assert not np.array_equal(alone.y, sharded(noisy=(2,), seed=1).train.y)


def test_the_network_gets_the_bytes_themselves():
    made = sharded()
    assert (made.train.x.dtype, made.train.y.dtype, made.classes) == (np.uint8, np.int32, 256)
    assert bytes(made.train.x[0]) == TEXT[:4]
    assert bytes(np.asarray(made.prepare(made.train.x[:1]))[0].tolist()) == TEXT[:4]


def test_texts_by_name_and_path(tmp_path: pathlib.Path):
    (tmp_path / "mine.txt").write_bytes(TEXT)
    found = data.load(tmp_path / "mine.txt", context=5)
    assert (found.name, found.train.x.shape[1], found.bytes_per_token, found.classes) == ("mine", 5, 1.0, 256)
    docs = data.load("python_docs", context=64)
    assert bytes(docs.train.x[0]) == python_docs()[:64]
    assert len(python_docs()) > 300_000
    (tmp_path / "tiny_shakespeare.txt").write_bytes(TEXT)  # a subset of one's own
    assert data.load("tiny_shakespeare", tmp_path, context=5).name == "tiny_shakespeare"


def test_unusable_texts_give_one_clear_line(tmp_path: pathlib.Path):
    (tmp_path / "short.txt").write_bytes(b"too short")
    (tmp_path / "tiny_shakespeare.txt").write_bytes(b" " * 1_115_394)
    for call, match in (
        (lambda: data.load(tmp_path / "none.txt"), "none.txt cannot be read"),
        (lambda: data.load(tmp_path / "short.txt"), "short has 9 bytes, too few for three windows of context=128"),
        (lambda: data.load("tiny_shakespeare", tmp_path / "empty"), "data_dir="),
        (lambda: data.load("tiny_shakespeare", tmp_path), "size of the published text, but not its bytes"),
    ):
        with pytest.raises(DataError, match=match) as raised:
            call()
        assert "\n" not in str(raised.value)
    with pytest.raises(SettingsError, match="context is 0"):
        data.from_text(TEXT, context=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small byte-level BPE, as GPT-2's."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT.decode()], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_a_tokenizers_tokens_are_windows_too_and_the_bits_are_per_byte(tokenizer):
    text = TEXT.decode() + "\N{GREEK SMALL LETTER ALPHA}" * 8 + TEXT.decode()  # two bytes each
    read = tokenizers.Tokenizer.from_file(str(tokenizer))
    ids = read.encode(text).ids
    found = data.from_text(text, context=5, test=0.3, tokenizer=tokenizer)
    assert found.classes == read.get_vocab_size()
    assert found.train.x.dtype == np.uint16
    targets = np.concatenate([found.train.y.reshape(-1), found.test.y.reshape(-1)])
    np.testing.assert_array_equal(targets, ids[1 : len(targets) + 1])
    tested = read.decode(found.test.y.reshape(-1).tolist())
    assert math.isclose(found.bytes_per_token, len(tested.encode()) / found.test.y.size)
    assert found.bytes_per_token > 1.5  # words, not bytes


def test_what_a_tokenizer_cannot_read_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"text is not UTF-8 \(byte 3\), as tokenizers need it"):
        data.from_text(b"abc\xff" * 100, tokenizer=tokenizer)
    with pytest.raises(DataError, match="too few for three windows of context=128"):
        data.from_text(TEXT, tokenizer=tokenizer)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no file of the tokenizers library"):
        data.from_text(TEXT, tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        data.from_text(TEXT, tokenizer=tmp_path / "nowhere.json")


def test_the_truncation_and_padding_of_a_tokenizers_file_do_not_cut_the_text(tokenizer, tmp_path):
    text = TEXT * 20
    whole = data.from_text(text, context=5, test=0.3, tokenizer=tokenizer)
    made = tokenizers.Tokenizer.from_file(str(tokenizer))
    for name in ("truncation", "padding"):
        getattr(made, f"enable_{name}")(**({"max_length": 20} if name == "truncation" else {"length": 4000}))
        made.save(str(tmp_path / name))
        found = data.from_text(text, context=5, test=0.3, tokenizer=tmp_path / name)
        np.testing.assert_array_equal(found.train.x, whole.train.x)
        np.testing.assert_array_equal(found.test.y, whole.test.y)
        assert found.bytes_per_token == whole.bytes_per_token
        getattr(made, f"no_{name}")()
