"""Checkpoints as named tensors, from whatever program: read one tensor at a time, written one after another.

Safetensors is the format of Hugging Face and much of PyTorch: the length of a header, the header in JSON, and the
tensors' bytes (https://github.com/huggingface/safetensors). Its library reads single tensors, but writes all of them at
once; `write_tensors` needs the memory of one.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from wavg_jax.base import DataError, PyTree
from wavg_jax.extras import need
from wavg_jax.storage.checkpoints import orbax_arrays
from wavg_jax.storage.rows import replaced
from wavg_jax.tree import is_key, named

_CODES = {
    np.dtype(dtype): code
    for dtype, code in (
        (np.float64, "F64"),
        (np.float32, "F32"),
        (np.float16, "F16"),
        (ml_dtypes.bfloat16, "BF16"),
        (np.int64, "I64"),
        (np.int32, "I32"),
        (np.int16, "I16"),
        (np.int8, "I8"),
        (np.uint64, "U64"),
        (np.uint32, "U32"),
        (np.uint16, "U16"),
        (np.uint8, "U8"),
        (np.bool_, "BOOL"),
    )
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class Spec(NamedTuple):
    """What a tensor is like."""

    dtype: np.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{[*self.shape]}"


class Tensors(NamedTuple):
    """An open checkpoint.

    Attributes:
      path: of the file or folder.
      specs: {name: what the tensor is like}, in alphabetical order.
      metadata: the texts that a safetensors file carries beside its tensors.
      read: `name -> array`, as stored, bfloat16 as `ml_dtypes.bfloat16`.
    """

    path: pathlib.Path
    specs: dict[str, Spec]
    metadata: dict[str, str]
    read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def open_tensors(path: str | PathLike[str]) -> Iterator[Tensors]:
    """Opens a checkpoint, of which `read` then loads one tensor at a time.

    Args:
      path: a safetensors file; a folder of such files, which hold different tensors of one model; or the folder of an
        Orbax checkpoint of a tree. Of a checkpoint that `fit` saved, the global parameters and mutable collections
        count.

    Raises:
      DataError: it is none of these, is damaged, or holds a dtype that is not averaged.
      MissingExtra: safetensors or Orbax is not installed.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise DataError(f"there is no checkpoint {path}: give a .safetensors file, a folder of them, or Orbax's folder")
    with contextlib.ExitStack() as stack:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        yield _of_files(path, files, stack) if files else _of_orbax(path)


def _of_files(path: pathlib.Path, files: list[pathlib.Path], stack: contextlib.ExitStack) -> Tensors:
    safetensors = need("safetensors", extra="soup", why=f"{path}")
    places: dict[str, Any] = {}
    specs: dict[str, Spec] = {}
    metadata: dict[str, str] = {}
    for file in files:
        try:
            opened = stack.enter_context(safetensors.safe_open(file, framework="np"))
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(
                f"{file} is no whole safetensors file ({error}): copy it again; a pickle of PyTorch's (.pt, .bin) is "
                "loaded there, and written with safetensors.torch.save_file"
            ) from None
        metadata |= opened.metadata() or {}
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            part = opened.get_slice(name)
            if name in places:
                raise DataError(f"{file} and another file of {path} both hold {name!r}: leave one of them out")
            if part.get_dtype() not in _DTYPES:
                raise DataError(
                    f"{name!r} in {file} is {part.get_dtype()}, which has no sensible mean: average the checkpoints "
                    f"before they are quantised, in one of {', '.join(_DTYPES)}"
                )
            places[name], specs[name] = opened, Spec(_DTYPES[part.get_dtype()], tuple(part.get_shape()))
    return Tensors(path, dict(sorted(specs.items())), metadata, lambda name: places[name].get_tensor(name))


def _of_orbax(path: pathlib.Path) -> Tensors:
    try:
        found = orbax_arrays(path)
    except DataError:  # it says more than what follows
        raise
    except (OSError, ValueError, KeyError, TypeError):  # Orbax raises many types
        found = None
    if found is None:
        raise DataError(
            f"the folder {path} holds no *.safetensors, and is no whole Orbax checkpoint of a tree: give one step's"
        )
    leaves, read = found
    specs = {name: Spec(np.dtype(leaf.dtype), tuple(leaf.shape)) for name, leaf in sorted(leaves.items())}
    for name, spec in specs.items():
        if spec.dtype not in _CODES:
            raise DataError(f"{name!r} in {path} is {spec}; a tensor must be one of {', '.join(map(str, _CODES))}")
    return Tensors(path, specs, {}, read)


def write_tensors(
    path: str | PathLike[str],
    specs: Mapping[str, Spec],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file whole or not at all, in memory of one tensor.

    Args:
      path: of the file; one that is there is replaced.
      specs: {name: what the tensor will be like}.
      tensor: `name -> array`; asked once for each, in the order of the file.
      metadata: texts to carry along, such as `{"format": "pt"}`.

    Raises:
      WorkdirError: the file cannot be written.
    """
    path = pathlib.Path(path).expanduser()
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))  # so that every tensor is aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        spec = specs[name]
        start, end = end, end + spec.dtype.itemsize * int(np.prod(spec.shape, dtype=np.int64))
        header[name] = {"dtype": _CODES[spec.dtype], "shape": [*spec.shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replaced(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.asarray(tensor(name))
            if (array.dtype, array.shape) != specs[name]:
                raise DataError(f"{name!r} is {Spec(array.dtype, array.shape)}, not {specs[name]} as announced")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def save_safetensors(
    path: str | PathLike[str], params: PyTree, mutable: PyTree = (), metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a network as a safetensors file, whole or not at all.

    A tensor's name is the keys on the way to it, joined by dots, such as `Dense_0.kernel`; random keys stay out.
    `flax.traverse_util.unflatten_dict(safetensors.numpy.load_file(path), sep=".")` makes a tree of it again.

    Args:
      path: of the file; one that is there is replaced.
      params: parameters, such as `Result.params`.
      mutable: mutable collections, such as `Result.mutable`.
      metadata: texts to carry along.

    Raises:
      SettingsError: two tensors have the same name.
      WorkdirError: the file cannot be written.
    """
    arrays = {name: x for name, x in named(params, mutable).items() if not is_key(x)}
    specs = {name: Spec(np.dtype(x.dtype), tuple(x.shape)) for name, x in arrays.items()}
    write_tensors(path, specs, lambda name: np.asarray(arrays[name]), metadata)
