"""What else could be made of a training, for the same samples: the controls that a gain must survive.

Each reading of a `Trained` is a network, or several, whose logits are judged once. What a reading chooses, it chooses
on the held-out samples.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax
import scipy.optimize
import scipy.special

from experiments.setup.choices import MOMENTUM
from experiments.setup.trial import Trained
from wavg_jax import data
from wavg_jax.base import Batch, PyTree, Task
from wavg_jax.data.arrays import Split

EMA_DECAY = 0.8
"""Of `ema`, a round."""
EPOCHS, BATCH = 5, 32
"""Of fine-tuning on the held-out samples."""
FINETUNING_RATES = (0.001, 0.003, 0.01, 0.03)
_CHUNK = 2000


class Reader:
    """Runs the networks of one task and one kind of data."""

    def __init__(self, task: Task, prepare: Callable[[jax.Array], jax.Array]):
        self._task, self._prepare = task, prepare
        self._predict = jax.jit(lambda params, mutable, x: task.predict(params, mutable, prepare(x)))
        self._measure = jax.jit(lambda logits, y: task.metrics(task.measure(logits, Batch(logits, y)), len(y)))
        self._finetune = jax.jit(self._finetuned)

    def logits(self, network: tuple[PyTree, PyTree], x: np.ndarray) -> np.ndarray:
        """Logits [N, classes] of (params, mutable), float32."""
        parts = [self._predict(*network, x[at : at + _CHUNK]) for at in range(0, len(x), _CHUNK)]
        return np.concatenate([np.asarray(part, np.float32) for part in parts])

    def quality(self, logits: np.ndarray, y: np.ndarray) -> dict[str, float]:
        """Every scalar metric of the task as `test_{name}`."""
        found = jax.device_get(self._measure(logits, y))
        return {f"test_{name}": float(value) for name, value in found.items() if np.ndim(value) == 0}

    def read(
        self, trained: Trained, held: Split, x: np.ndarray, wanted: Iterable[str], *, seed: int, finetuning: float
    ) -> Mapping[str, np.ndarray]:
        """Logits on `x` [N, ...] of each reading wanted, of `READINGS` or "", that this training `has`.

        Args:
          trained: the training.
          held: the held-out samples that readings choose on.
          x: what is judged.
          wanted: names.
          seed: order of the samples in fine-tuning.
          finetuning: its peak learning rate.
        """
        final = trained.path[-1]
        own = trained.replicas or [final[0]]  # if none is alive, the blend stands for them
        found: dict[str, Callable[[], np.ndarray]] = {
            "": lambda: self.logits(final, x),
            "temperature": lambda: self.logits(final, x) / temperature(self.logits(final, held.x), held.y),
            "selection": lambda: self.logits(trained.path[int(trained.held.argmin())], x),
            "finetuned": lambda: self.logits(self.finetuned(final, held, seed, finetuning), x),
            "ensemble": lambda: mixture([self.logits((one, final[1]), x) for one in own]),
            **{name: functools.partial(self._averaged, trained, name, x) for name in AVERAGES},
        }
        return {name: found[name]() for name in wanted}

    def has(self, reading: str, *, several: bool) -> bool:
        """Whether a training has a reading; `several` says whether of several replicas.

        An average's BatchNorm statistics would have to be estimated anew.
        """
        averages = not jax.tree.leaves(jax.eval_shape(self._task.init, jax.random.key(0))[1])
        return {"ensemble": several, **dict.fromkeys(AVERAGES, averages)}.get(reading, True)

    def _averaged(self, trained: Trained, name: str, x: np.ndarray) -> np.ndarray:
        shares = AVERAGES[name](len(trained.path))
        params = [params for params, _ in trained.path]
        mean = jax.tree.map(lambda *each: np.tensordot(shares, np.stack(each), 1).astype(each[0].dtype), *params)
        return self.logits((mean, trained.path[-1][1]), x)

    def finetuned(self, network: tuple[PyTree, PyTree], held: Split, seed: int, rate: float) -> tuple[PyTree, PyTree]:
        """(params, mutable) after `EPOCHS` over the held-out samples by momentum SGD whose rate falls to zero."""
        rng, size = np.random.default_rng([seed, 4]), min(BATCH, len(held.y))
        orders = [rng.permutation(len(held.y)) for _ in range(EPOCHS)]
        batches = np.concatenate([order[: len(order) // size * size].reshape(-1, size) for order in orders])
        rates = rate * (1 + np.cos(np.pi * np.arange(len(batches)) / len(batches))) / 2
        return self._finetune(network, held.x[batches], held.y[batches], rates.astype(np.float32), jax.random.key(seed))

    def _finetuned(
        self, network: tuple[PyTree, PyTree], x: jax.Array, y: jax.Array, rates: jax.Array, rng: jax.Array
    ) -> tuple[PyTree, PyTree]:
        momentum = optax.trace(MOMENTUM)

        def step(carry: Any, given: Any) -> tuple[Any, None]:
            (params, mutable), state = carry
            images, targets, rate, key = given
            gradient = jax.grad(self._task.loss, has_aux=True)
            grads, (mutable, _) = gradient(params, mutable, Batch(self._prepare(images), targets), key)
            updates, state = momentum.update(grads, state)
            params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), params, updates)
            return ((params, mutable), state), None

        start = (network, momentum.init(network[0]))
        (network, _), _ = jax.lax.scan(step, start, (x, y, rates, jax.random.split(rng, len(rates))))
        return network


def _tail(rounds: int) -> np.ndarray:
    shares = np.zeros(rounds)
    shares[rounds // 2 :] = 1 / (rounds - rounds // 2)
    return shares


def _exponential(rounds: int) -> np.ndarray:
    shares = EMA_DECAY ** np.arange(rounds)[::-1]
    return shares / shares.sum()


AVERAGES: dict[str, Callable[[int], np.ndarray]] = {"swa": _tail, "ema": _exponential}
"""Name -> share of each of R rounds [R] in an average of the global parameters."""
READINGS = ("temperature", "selection", "swa", "ema", "finetuned", "ensemble")
"""Names of readings; the training itself is ""."""


def temperature(logits: np.ndarray, y: np.ndarray) -> float:
    """The temperature by which logits [N, classes] have the least loss on labels [N] (Guo et al. 2017,
    arXiv:1706.04599), between 0.05 and 20.

    >>> calibrated = np.array([[np.log(3.0), 0.0]] * 4)  # says 3 of 4
    >>> round(temperature(7 * calibrated, np.array([0, 0, 0, 1])), 2)
    7.0
    """
    wide = logits.astype(np.float64)

    def loss(log_t: float) -> float:
        scaled = wide * np.exp(-log_t)
        return float(np.mean(scipy.special.logsumexp(scaled, axis=1) - scaled[np.arange(len(y)), y]))

    found = scipy.optimize.minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded")
    return float(np.exp(found.x))


def mixture(each: list[np.ndarray]) -> np.ndarray:
    """Logits of the mean of several networks' probabilities, from their logits, each [N, classes].

    >>> np.exp(mixture([np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.9, 0.1]]))])).round(3)
    array([[0.7, 0.3]])
    """
    logs = np.stack([scipy.special.log_softmax(logits, axis=1) for logits in each])
    return np.asarray(scipy.special.logsumexp(logs, axis=0) - np.log(len(each)), np.float32)


def split_off(sharded: data.ShardedData, samples: int) -> tuple[data.ShardedData, Split]:
    """The data with the first `samples` of their held-out ones, and the others, for tuning."""
    held, rest = (Split(*(part[where] for part in sharded.heldout)) for where in (slice(samples), slice(samples, None)))
    return sharded._replace(heldout=held), rest
