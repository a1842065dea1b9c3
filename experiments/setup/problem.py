"""From flags to what is learnt: data, shards, network, and what a language model writes."""

import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import wavg_jax as wavg
from experiments.setup.choices import SCALES
from experiments.setup.shared_flags import numbers
from wavg_jax import data, models
from wavg_jax.base import DataError, PyTree, SettingsError
from wavg_jax.data.text import load_tokenizer
from wavg_jax.devices import processes

F = flags.FLAGS

PROMPT, WRITTEN, TEMPERATURE = 32, 256, 0.8
"""Of the sample that a language model writes: bytes it goes on from, bytes it adds, and how freely."""
WHITENED = 5000
"""Training images that the first layer of --model=airbench is computed from, as published."""
_NETWORK = {
    "mlp": ("hidden", "dropout"),
    "cnn": ("batch_norm", "dropout"),
    "resnet": (),
    "airbench": ("widths",),
    "transformer": ("layers", "width", "heads", "dropout"),
}
"""--model -> the flags that it reads."""


def load(*, texts: bool = False) -> data.Dataset:
    """Loads --dataset, and sets the default of --chance, 1 / classes.

    Raises:
      DataError: it is not for classification, nor a text where `texts` are allowed.
    """
    if not processes.first():  # process 0 may have to prepare the files first
        processes.barrier("data")
    dataset = data.load(F.dataset, F.data_dir, context=F.context, tokenizer=F.tokenizer)
    if processes.first():
        processes.barrier("data")
    text = dataset.bytes_per_token is not None
    if text and not texts:
        raise DataError(f"{dataset.name} is a text, and this command trains classifiers: use train, compare or tune")
    if F.chance is None:
        F["chance"].value = 1 / classes_of(dataset)
    of_images = ("augment", "scale", "crop_padding", "crop_fill", "mirror", "label_smoothing")
    for name in of_images if text else ("context", "tokenizer"):
        if F[name].present:
            raise SettingsError(f"--{name} has no effect on {dataset.name}; leave it out")
    return dataset


def classes_of(dataset: data.Dataset) -> int:
    """The number of classes, or the vocabulary of a text; DataError if the data set is neither."""
    if dataset.classes is None or (dataset.train.y.ndim != 1 and dataset.bytes_per_token is None):
        raise DataError(
            f"the targets of {dataset.name} are {dataset.train.y.dtype} of shape {dataset.train.y.shape}; the commands "
            "train classifiers and language models, give integer labels [N] or a .txt file, or call wavg_jax.fit"
        )
    return dataset.classes


def make_task(dataset: data.Dataset, *, of_inputs: bool = False) -> wavg.Task:
    """Builds the task of --model for a data set; it computes in --compute_dtype or, `of_inputs`, in theirs."""
    dtype: Any = None if of_inputs else jnp.dtype(F.compute_dtype)
    stored = jax.ShapeDtypeStruct(dataset.train.x[:1].shape, dataset.train.x.dtype)
    shape = jax.eval_shape(data.make_prepare(dataset), stored).shape[1:]
    text = dataset.bytes_per_token is not None
    if text != (F.model == "transformer"):
        needs, other = ("a text", "mlp") if not text else ("other data", "transformer")
        raise SettingsError(f"--model={F.model} needs {needs}, not {dataset.name}; use --model={other}")
    if F.model in ("cnn", "resnet", "airbench") and len(shape) != 3:
        raise SettingsError(
            f"--model={F.model} needs images, the samples of {dataset.name} have shape {shape}; use --model=mlp"
        )
    for name in sorted({name for names in _NETWORK.values() for name in names}.difference(_NETWORK[F.model])):
        if F[name].present:
            raise SettingsError(f"--{name} has no effect with --model={F.model}; leave it out")
    if F.mirror and len(shape) != 3:
        raise SettingsError(f"--mirror needs images, the samples of {dataset.name} have shape {shape}; leave it out")
    module = _network(classes_of(dataset), dtype, _whitening(dataset) if F.model == "airbench" else None)
    if not text:
        classifier = functools.partial(models.classifier, label_smoothing=F.label_smoothing)
        task = models.from_linen(module, shape, make=classifier)
        return models.mirrored(task) if F.mirror else task
    make = functools.partial(models.language_model, bytes_per_token=dataset.bytes_per_token)
    return models.from_linen(module, shape, dtype=jnp.int32, make=make)


def _whitening(dataset: data.Dataset) -> np.ndarray:
    """The kernel of --model=airbench's first layer, of inputs alone, and the same for every seed and arm.

    They are the first training images, those held out included; labels and test images have no part in it.
    """
    prepare = data.make_prepare(dataset, SCALES[F.scale])
    return models.whitening(np.asarray(jax.jit(prepare)(dataset.train.x[:WHITENED])))


def _network(classes: int, dtype: Any, whitening: Any = None) -> nn.Module:
    networks: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: models.MLP(numbers("hidden", int), classes, F.dropout, dtype),
        "cnn": lambda: models.CNN(classes, F.batch_norm, F.dropout, dtype),
        "resnet": lambda: models.ResNet(classes, dtype=dtype),
        "airbench": lambda: models.Airbench(whitening, numbers("widths", int), classes, dtype),
        "transformer": lambda: models.Transformer(
            classes, F.layers, F.heads, F.width, F.context, F.dropout, dtype, rotary=True
        ),
    }
    return networks[F.model]()


def make_data(dataset: data.Dataset, seed: int, noisy: int = 0) -> data.ShardedData:
    """Holds samples out, cuts shards, and spoils the first `noisy`; equal for every arm of a seed."""
    partitions: dict[str, Callable] = {
        "iid": lambda split, seed: data.iid(len(split.y), F.replicas, seed),
        "sized": lambda split, seed: data.sized(len(split.y), _proportions(), seed),
        "dirichlet": lambda split, seed: data.dirichlet(split.y, F.replicas, F.alpha, seed),
        "contiguous": lambda split, seed: data.contiguous(len(split.y), F.replicas),
        "interleaved": lambda split, seed: data.interleaved(len(split.y), F.replicas, F.block, seed),
    }
    return data.shard(
        dataset,
        partitions[F.partition],
        heldout=F.heldout,
        seed=seed,
        noisy=tuple(range(noisy)),
        augment=augmentation(),
        scale=SCALES[F.scale],
    )


def augmentation() -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """What --augment does to training images, if anything.

    Raises:
      SettingsError: the command line gives a flag of it without --augment.
    """
    if F.augment:
        return _crop_flip(F.crop_padding, F.crop_fill)
    for name in ("crop_padding", "crop_fill"):
        if F[name].present:
            raise SettingsError(f"--{name} has no effect without --augment; leave it out, or add that")
    return None


@functools.cache
def _crop_flip(padding: int, fill: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """One object per setting of the flags, so that runs share their programs."""
    return functools.partial(data.crop_flip, padding=padding, fill=fill)


def _proportions() -> tuple[float, ...]:
    return tuple(itertools.islice(itertools.cycle(numbers("proportions", float)), F.replicas))


def writer(sharded: data.ShardedData, seed: int) -> Callable[[PyTree, PyTree], Mapping[str, Any]] | None:
    """What the last row of a language model's run says: how it goes on from the start of the test split; None for
    other networks."""
    if F.model != "transformer" or sharded.classes is None:
        return None
    module = _network(sharded.classes, jnp.dtype(F.compute_dtype))
    prompt = sharded.test.x[:1, :PROMPT].astype(np.int32)

    def write(params: PyTree, mutable: PyTree) -> Mapping[str, Any]:
        del mutable
        tokens = models.generate(module, params, prompt, WRITTEN, temperature=TEMPERATURE, rng=jax.random.key(seed))
        tokens = np.asarray(tokens)[0]
        given, written = (_text(part) for part in (tokens[: prompt.shape[1]], tokens[prompt.shape[1] :]))
        return {"sample": {"prompt": given, "text": written, "temperature": TEMPERATURE}}

    return write


def _text(tokens: np.ndarray) -> str:
    """What tokens say, as far as it can be printed."""
    if F.tokenizer is None:
        decoded = tokens.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
    else:
        decoded = load_tokenizer(pathlib.Path(F.tokenizer)).decode(tokens.tolist(), skip_special_tokens=False)
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in decoded)
