"""The four networks of the benchmarks, at benchmark size, with random data of the right shapes and dtypes.

Images are stored as bytes and prepared inside the compiled program, as with a real data set. Labels are random, since
only times count.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments.benchmarks import limits
from experiments.setup.shared_flags import names, numbers
from wavg_jax import averager, data, models, uniform
from wavg_jax.base import Averager, Batch, Replicas, SettingsError, Task
from wavg_jax.data import Dataset, ShardedData, Split
from wavg_jax.devices.mapping import MAPS
from wavg_jax.training import automap, phases
from wavg_jax.training.batches import make_work, put_shared
from wavg_jax.training.operations import training_flops
from wavg_jax.training.programs import programs_of
from wavg_jax.training.recipe import Layout, Recipe, make_recipe

NAMES = ("mlp", "cnn", "resnet20", "transformer")
AUTO = "auto"
flags.DEFINE_list("networks", None, f"Which networks, of {', '.join(NAMES)}; by default the benchmark's.")
flags.DEFINE_list("replica_counts", None, "Which K, numbers of replicas; by default the benchmark's.")
flags.DEFINE_list("maps", None, f"How to run the replicas of a device, of {', '.join((AUTO, *MAPS))}; by default all.")
flags.DEFINE_integer(
    "round_steps",
    None,
    "H, local steps of a round; by default the benchmark's, or enough for a call of about half a second.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "shrink", 1, "Divides widths, depths, batch and image sides, for a quick trial of a benchmark.", lower_bound=1
)
F = flags.FLAGS

READS = ("networks", "replica_counts", "compute_dtype", "shrink")
"""Flags that every benchmark of networks reads."""

SAMPLES, HELD_OUT, TEST, CLASSES, VOCABULARY = 16384, 5000, 64, 10, 256
INNER = optax.sgd(0.01, momentum=0.9)
PLAIN = averager(uniform())
"""One object each: recipes share compiled programs only if these are the same objects."""


class Network(NamedTuple):
    """A network at benchmark size.

    Attributes:
      name: one of `NAMES`.
      task: what the library trains.
      dataset: random samples.
      prepare: stored inputs -> the network's, inside the compiled program.
      batch_size: B of one replica.
      flops: operations per sample of a training step; see `wavg_jax.training.operations`.
    """

    name: str
    task: Task
    dataset: Dataset
    prepare: Callable[[jax.Array], jax.Array]
    batch_size: int
    flops: float

    def sharded(self, replicas: int) -> ShardedData:
        """The samples in K equal shards, with a held-out split.

        Raises:
          SettingsError: the shards are smaller than a batch.
        """
        train, shards = self.dataset.train, data.iid(SAMPLES, replicas, 0)
        if len(shards[-1]) < self.batch_size:
            raise SettingsError(f"{replicas} replicas are too many for {SAMPLES} samples (--replica_counts)")
        held_out = Split(train.x[:HELD_OUT], train.y[:HELD_OUT])
        return ShardedData(self.name, train, held_out, self.dataset.test, shards, self.dataset.classes, self.prepare)

    def recipe(
        self, sharded: ShardedData, averager: Averager, *, devices: int | None = None, replica_map: str = AUTO
    ) -> Recipe:
        """The recipe of a round; AUTO is settled here, by timing."""
        recipe = make_recipe(self.task, sharded, averager, INNER, layout=Layout(devices, replica_map))
        return automap.settle(recipe, sharded, batch_size=self.batch_size) if replica_map == AUTO else recipe

    def batch(self) -> Batch:
        """Shapes and dtypes of one replica's batch, as the network gets it."""
        return _batch(self.dataset, self.prepare, self.batch_size)

    def steps(self, replicas: int) -> int:
        """H: --round_steps, or enough for a call of about half a second."""
        return self.calibrated(replicas) if F.round_steps is None else int(F.round_steps)

    def calibrated(self, replicas: int) -> int:
        """Enough local steps for a call of about half a second."""
        # Small networks reach about a third of the rate of large products.
        return int(np.clip(0.5 * limits.rate() / 3 / (self.flops * self.batch_size * replicas), 2, 1000))


def chosen(*default: str) -> list[Network]:
    """The networks of --networks."""
    wanted = names("networks", NAMES) if F.networks is not None else default or NAMES
    return [build(name, F.shrink, F.compute_dtype) for name in wanted]


def replica_counts(*default: int) -> tuple[int, ...]:
    """The K of --replica_counts."""
    return default if F.replica_counts is None else numbers("replica_counts", int, least=1)


def pairs(nets: Iterable[Network], counts: Iterable[int]) -> list[tuple[Network, int]]:
    """Every network with every K.

    Raises:
      SettingsError: a K is too large.
    """
    found = list(itertools.product(nets, counts))
    for net, replicas in found:
        net.sharded(replicas)
    return found


def maps(*default: str) -> tuple[str, ...]:
    """The mappings of --maps."""
    return default if F.maps is None else names("maps", (AUTO, *MAPS))


def local_phase(
    recipe: Recipe, net: Network, replicas: int, steps: int, batch_size: int | None = None
) -> tuple[Callable[[Replicas], Replicas], Replicas]:
    """A recipe's local steps alone, as a compiled program that donates the replicas; and the first of them.

    Args:
      recipe: of the round.
      net: the network.
      replicas: K.
      steps: H.
      batch_size: B; None is the network's own.
    """
    sharded = net.sharded(replicas)
    shared = put_shared(recipe, sharded)
    work = make_work(recipe, sharded, seed=0, first_step=0, longest=steps, batch_size=batch_size or net.batch_size)
    run = jax.jit(phases.local_phase(recipe), donate_argnums=0)
    held = programs_of(recipe, replicas).init(jax.random.key(0)).replicas
    return lambda held: run(held, work, shared)[0], held


@functools.cache
def build(name: str, shrink: int = 1, dtype: str = "float32") -> Network:
    """Builds a network and its data, once for the same arguments.

    Args:
      name: of NAMES.
      shrink: divides its size.
      dtype: of the computation.
    """
    computed = jnp.dtype(dtype)
    if name == "transformer":
        return _transformer(shrink, computed)

    def part(size: int, least: int = 1) -> int:
        return max(size // shrink, least)

    side = part(28 if name in ("mlp", "cnn") else 32, 4)
    shape = (side, side) if name in ("mlp", "cnn") else (side, side, 3)
    modules = {
        "mlp": lambda: models.MLP((part(512), part(512)), CLASSES, dtype=computed),
        "cnn": lambda: models.CNN(CLASSES, dtype=computed),
        "resnet20": lambda: models.ResNet(CLASSES, blocks=part(3), width=part(16), dtype=computed),
    }
    task = models.from_linen(modules[name](), (side, side, shape[2] if len(shape) == 3 else 1))
    dataset = Dataset(name, images(SAMPLES, shape), images(TEST, shape), CLASSES)
    return network(name, task, dataset, data.make_prepare(dataset), part(64))


def _transformer(shrink: int, dtype: Any) -> Network:
    length, width = max(64 // shrink, 4), max(128 // shrink, 4)
    layers = max(2 // shrink, 1)
    module = models.Transformer(VOCABULARY, layers, heads=4, width=width, length=length, dtype=dtype)
    task = models.from_linen(module, (length,), dtype=np.int32, make=models.language_model)
    dataset = Dataset("transformer", _tokens(SAMPLES, length), _tokens(TEST, length), VOCABULARY)
    return network("transformer", task, dataset, as_stored, max(16 // shrink, 1))


def as_stored(x: jax.Array) -> jax.Array:
    """Tokens need no preparing."""
    return x


def network(name: str, task: Task, dataset: Dataset, prepare: Callable, batch_size: int) -> Network:
    """Puts a network together, and counts its operations."""
    flops = training_flops(task, _batch(dataset, prepare, batch_size)) / batch_size
    return Network(name, task, dataset, prepare, batch_size, flops)


def _batch(dataset: Dataset, prepare: Callable, size: int) -> Batch:
    x, y = (jax.ShapeDtypeStruct((size, *part.shape[1:]), part.dtype) for part in dataset.train)
    return jax.eval_shape(lambda x, y: Batch(prepare(x), y), x, y)


def images(samples: int, shape: tuple[int, ...]) -> Split:
    rng = np.random.default_rng(samples)
    x = rng.integers(0, 256, (samples, *shape), np.uint8)
    return Split(x, rng.integers(0, CLASSES, samples, np.int32))


def _tokens(samples: int, length: int) -> Split:
    text = np.random.default_rng(samples).integers(0, VOCABULARY, (samples, length + 1), np.uint8)
    return Split(text[:, :-1], text[:, 1:].astype(np.int32))
