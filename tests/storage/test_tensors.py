"""Named tensors on disk: read as others write them, written as others read them, whole or not at all."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from orbax.checkpoint import v1 as ocp
from small import regression, sharded

import wavg_jax as wavg
from wavg_jax.base import DataError, SettingsError, WorkdirError
from wavg_jax.storage.tensors import Spec, open_tensors, save_safetensors, write_tensors

MIXED = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer.half": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "step": np.array(7),
    "mask": np.array([True, False, True]),
    "empty": np.zeros((0, 3), np.float16),
    "ünïcode/name": np.ones(1, np.float64),
}


def written(path, tensors, metadata=None):
    write_tensors(path, {n: Spec(x.dtype, x.shape) for n, x in tensors.items()}, tensors.get, metadata)
    return path


def assert_equal(found, wanted):
    assert sorted(found) == sorted(wanted)
    for name, x in wanted.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        np.testing.assert_array_equal(found[name], x)


def test_their_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    ours = written(tmp_path / "ours.safetensors", MIXED, {"format": "pt"})
    assert_equal(safetensors.numpy.load_file(ours), MIXED)
    with safetensors.safe_open(ours, framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}
    safetensors.numpy.save_file(MIXED, tmp_path / "theirs.safetensors", {"epoch": "3"})
    with open_tensors(tmp_path / "theirs.safetensors") as theirs:
        assert theirs.metadata == {"epoch": "3"}
        assert_equal({name: theirs.read(name) for name in theirs.specs}, MIXED)
        assert str(theirs.specs["layer.half"]) == "bfloat16[2]"


def test_files_are_the_same_bytes_as_theirs_where_all_dtypes_are_the_same(tmp_path):
    """Tensors come in the same order, aligned, under the same header."""
    tensors = {name: np.full(n, n, np.float32) for n, name in enumerate(("b", "a", "c"), 1)}
    ours = written(tmp_path / "ours.safetensors", tensors, {"format": "np"})
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "np"})
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_pytorch_state_dict_goes_round(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    save_file(module.state_dict(), tmp_path / "a.safetensors", {"format": "pt"})
    with open_tensors(tmp_path / "a.safetensors") as opened:
        written(tmp_path / "b.safetensors", {name: opened.read(name) for name in opened.specs}, opened.metadata)
    back, given = load_file(tmp_path / "b.safetensors"), module.state_dict()
    assert back.keys() == given.keys()
    assert all(back[name].dtype == x.dtype and torch.equal(back[name], x) for name, x in given.items())
    module.load_state_dict(back)


def test_a_folder_of_parts_is_one_checkpoint(tmp_path):
    for part, names in enumerate((("layer.weight", "step"), ("mask",))):
        written(tmp_path / f"model-{part}.safetensors", {name: MIXED[name] for name in names})
    with open_tensors(tmp_path) as opened:
        assert [*opened.specs] == ["layer.weight", "mask", "step"]
        assert opened.read("step") == 7
    written(tmp_path / "more.safetensors", {"mask": MIXED["mask"]})
    with pytest.raises(DataError, match="both hold 'mask'"), open_tensors(tmp_path):
        pass


def test_a_network_is_written_under_the_names_of_its_tensors(tmp_path):
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    mutable = {"batch_stats": {"mean": jnp.full(3, 2.0)}, "rng": jax.random.key(0)}
    save_safetensors(tmp_path / "a.safetensors", params, mutable)
    stored = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert sorted(stored) == ["batch_stats.mean", "dense.bias", "dense.kernel"]
    tree = flax.traverse_util.unflatten_dict(stored, sep=".")
    np.testing.assert_array_equal(tree["dense"]["kernel"], params["dense"]["kernel"])
    with pytest.raises(SettingsError, match=r"two tensors have the name 'a\.b'"):
        save_safetensors(tmp_path / "b.safetensors", {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})


def test_anyones_orbax_checkpoint_of_a_tree_is_read_tensor_by_tensor(tmp_path):
    tree = {"dense": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}, "layers": [jnp.arange(4.0), jnp.int32(3)]}
    ocp.save(tmp_path / "a", tree)
    with open_tensors(tmp_path / "a") as opened:
        found = {name: opened.read(name) for name in opened.specs}
    wanted = {"dense.kernel": tree["dense"]["kernel"], "layers.0": tree["layers"][0], "layers.1": tree["layers"][1]}
    assert_equal(found, {name: np.asarray(x) for name, x in wanted.items()})


def test_two_arrays_of_one_name_are_refused_by_it(tmp_path):
    ocp.save(tmp_path / "a", {"x": jnp.ones(1), "a": {"b": jnp.ones(1)}, "a.b": jnp.zeros(1)})
    with pytest.raises(DataError, match=r"two arrays of the name 'a\.b': rename one"), open_tensors(tmp_path / "a"):
        pass


def test_of_a_runs_checkpoint_the_global_network_counts(tmp_path):
    averager = wavg.averager(wavg.uniform())
    options = {"inner": optax.sgd(0.1), "local_steps": 2, "rounds": 1, "batch_size": 8}
    result = wavg.fit(regression(), sharded(2), averager, **options, workdir=tmp_path, progress=False)
    with open_tensors(tmp_path / "checkpoints" / "run" / "1") as opened:
        found = {name: opened.read(name) for name in opened.specs}
    assert_equal(found, {name: np.asarray(x) for name, x in (result.params | result.mutable).items()})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "there is no checkpoint"),
        (lambda path: path.write_bytes(b"no header"), "is no whole safetensors file .*save_file"),
        (lambda path: path.mkdir(), "holds no .*safetensors, and is no whole Orbax checkpoint"),
        (
            lambda path: safetensors.numpy.save_file({"q": np.ones(2, ml_dtypes.float8_e4m3fn)}, path),
            "'q' in .* is F8_E4M3, .* before they are quantised",
        ),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, make, says):
    make(tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=says) as raised, open_tensors(tmp_path / "a.safetensors"):
        pass
    assert "\n" not in str(raised.value)


def test_a_file_cut_short_is_refused(tmp_path):
    path = written(tmp_path / "a.safetensors", MIXED)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="copy it again"), open_tensors(path):
        pass


def test_a_write_that_fails_halfway_leaves_the_old_file_and_no_other(tmp_path):
    path = written(tmp_path / "a.safetensors", {"w": np.zeros(3, np.float32)})
    before, asked = path.read_bytes(), []

    def tensor(name):
        asked.append(name)
        if len(asked) > 1:
            raise OSError(28, "No space left on device")
        return MIXED[name]

    with pytest.raises(WorkdirError, match="No space left"):
        write_tensors(path, {n: Spec(x.dtype, x.shape) for n, x in MIXED.items()}, tensor)
    assert len(asked) == 2
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(DataError, match=r"'w' is float32\[2\], not float32\[3\] as announced"):
        write_tensors(path, {"w": Spec(np.dtype("float32"), (3,))}, lambda name: np.zeros(2, np.float32))
    assert path.read_bytes() == before
