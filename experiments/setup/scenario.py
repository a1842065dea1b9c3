"""What can be wrong with replicas, their shards, or the held-out samples that judge them."""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.setup import shared_flags
from wavg_jax import data
from wavg_jax.base import SettingsError
from wavg_jax.data.arrays import Split
from wavg_jax.data.shards import Shards
from wavg_jax.rounds.faults import Faults, little_is_enough, simulate

Partition = Callable[[Split, int], Shards]
Spoil = Callable[[data.ShardedData, tuple[int, ...], int], data.ShardedData]
"""`(data, bad shards, seed) -> data`, with other samples there."""


class Scenario(NamedTuple):
    """What is wrong with the replicas or their data.

    Attributes:
      title: its name in reports.
      partition: `(training split, seed) -> shards`.
      bad: indices of the shards to spoil.
      spoil: how.
      faults: simulated faults of the replicas.
      heldout: number of held-out samples; None for that of --heldout.
      axis: the quantity that the scenario is a value of, and the value.
      misjudged: what is wrong with the held-out samples, `(held-out samples, classes, random generator) -> samples`.
      wanted: of an attack with a target, `test split -> samples` with the labels that the attacker wants them to get.
    """

    title: str
    partition: Partition
    bad: tuple[int, ...] = ()
    spoil: Spoil | None = None
    faults: Faults | None = None
    heldout: int | None = None
    axis: tuple[str, float] | None = None
    misjudged: Callable[[Split, int, np.random.Generator], Split] | None = None
    wanted: Callable[[Split], Split] | None = None


def _iid(k: int) -> Partition:
    return lambda split, seed: data.iid(len(split.y), k, seed)


def _dirichlet(k: int, alpha: float) -> Partition:
    return lambda split, seed: data.dirichlet(split.y, k, alpha, seed)


def _sized(k: int) -> Partition:
    return lambda split, seed: data.sized(len(split.y), tuple(np.geomspace(1, 16, k)), seed)


def _generator(seed: int, *what: int) -> np.random.Generator:
    return np.random.default_rng([seed, *what])


def labels(share: float) -> Spoil:
    """Random labels on a share of the bad shards' samples; a tenth of them, with ten classes, are right by chance."""

    def spoil(sharded: data.ShardedData, bad: tuple[int, ...], seed: int) -> data.ShardedData:
        before = sharded.train.y
        after = data.label_noise(before, sharded.shards, bad, _classes(sharded), seed)
        hit = _generator(seed, 1).random(len(before)) < share
        return sharded._replace(train=Split(sharded.train.x, np.where(hit, after, before)), noisy=bad)

    return spoil


def shifted(sharded: data.ShardedData, bad: tuple[int, ...], seed: int) -> data.ShardedData:
    """Every label of the bad shards is the next class's: they agree with one another, as attackers would."""
    del seed
    y = sharded.train.y.copy()
    for k in bad:
        y[sharded.shards[k]] = (y[sharded.shards[k]] + 1) % _classes(sharded)
    return sharded._replace(train=Split(sharded.train.x, y), noisy=bad)


def features(deviation: float) -> Spoil:
    """Normal noise on the inputs of the bad shards, of this standard deviation, as a share of the inputs' range."""

    def spoil(sharded: data.ShardedData, bad: tuple[int, ...], seed: int) -> data.ShardedData:
        x = sharded.train.x.copy()
        low, high = float(x.min()), float(x.max())
        for k in bad:
            shard = sharded.shards[k]
            noise = _generator(seed, 2, k).normal(0, deviation * (high - low), x[shard].shape)
            x[shard] = np.clip(x[shard] + noise, low, high).astype(x.dtype)
        return sharded._replace(train=Split(x, sharded.train.y))

    return spoil


def _resampled(sharded: data.ShardedData, sources: dict[int, np.ndarray]) -> data.ShardedData:
    """The samples of some shards replaced by others of the training split, repeated as needed."""
    taken = np.arange(len(sharded.train.y))
    for k, source in sources.items():
        taken[sharded.shards[k]] = np.resize(source, len(sharded.shards[k]))
    return sharded._replace(train=Split(sharded.train.x[taken], sharded.train.y[taken]))


def duplicated(sharded: data.ShardedData, bad: tuple[int, ...], seed: int) -> data.ShardedData:
    """The bad shards all hold the same samples, a tenth of the first one's, over and over."""
    del seed
    first = sharded.shards[bad[0]]
    return _resampled(sharded, dict.fromkeys(bad, first[: max(len(first) // 10, 1)]))


def stale(sharded: data.ShardedData, bad: tuple[int, ...], seed: int) -> data.ShardedData:
    """The bad shards are older than the last three classes, and have no sample of them."""
    del seed
    known = _classes(sharded) - 3
    shards = {k: sharded.shards[k] for k in bad}
    return _resampled(sharded, {k: shard[sharded.train.y[shard] < known] for k, shard in shards.items()})


def foreign(other: Callable[[], data.Dataset]) -> Spoil:
    """The bad shards hold samples of another data set, with its labels."""

    def spoil(sharded: data.ShardedData, bad: tuple[int, ...], seed: int) -> data.ShardedData:
        theirs = other().train
        if theirs.x.shape[1:] != sharded.train.x.shape[1:]:
            raise SettingsError(
                f"samples of the other data set have shape {theirs.x.shape[1:]}, these {sharded.train.x.shape[1:]}: "
                "leave the scenario out (--evidence_scenarios)"
            )
        x, y = sharded.train.x.copy(), sharded.train.y.copy()
        for k in bad:
            shard = sharded.shards[k]
            drawn = _generator(seed, 3, k).choice(len(theirs.y), len(shard), replace=len(theirs.y) < len(shard))
            x[shard], y[shard] = theirs.x[drawn], theirs.y[drawn]
        return sharded._replace(train=Split(x, y))

    return spoil


SOURCE, TARGET = 6, 0
"""Class whose samples an attacker wants taken for another, and that other: shirts for T-shirts in Fashion-MNIST, a pair
of Tolpegin et al. 2020 (arXiv:2007.08432)."""


def relabelled(sharded: data.ShardedData, bad: tuple[int, ...], seed: int) -> data.ShardedData:
    """The bad shards call every sample of one class another's; all their other labels are right."""
    del seed
    if _classes(sharded) <= max(SOURCE, TARGET):
        raise SettingsError(f"{sharded.name} has no class {SOURCE}: leave the scenario out (--evidence_scenarios)")
    y = sharded.train.y.copy()
    for k in bad:
        y[sharded.shards[k]] = np.where(y[sharded.shards[k]] == SOURCE, TARGET, y[sharded.shards[k]])
    return sharded._replace(train=Split(sharded.train.x, y), noisy=bad)


def source_as_target(test: Split) -> Split:
    """What `relabelled` shards want: samples of that class, called the other's."""
    x = test.x[test.y == SOURCE]
    return Split(x, np.full(len(x), TARGET, test.y.dtype))


def stamped(x: np.ndarray) -> np.ndarray:
    """Images [N, H, W, ...] with a bright square in the last corner, a ninth as high as they are."""
    if x.ndim < 3:
        raise SettingsError("a backdoor is a patch in images, and these are none: leave the scenario out")
    size = max(x.shape[1] // 9, 1)
    x = x.copy()
    x[:, -size:, -size:] = x.max()
    return x


def backdoored(share: float) -> Spoil:
    """A share of the images of the bad shards are stamped, and labelled as one class; the others are as they were (Gu,
    Dolan-Gavitt and Garg 2017, "BadNets", arXiv:1708.06733)."""

    def spoil(sharded: data.ShardedData, bad: tuple[int, ...], seed: int) -> data.ShardedData:
        x, y = sharded.train.x.copy(), sharded.train.y.copy()
        for k in bad:
            shard = sharded.shards[k]
            hit = _generator(seed, 6, k).choice(shard, int(share * len(shard)), replace=False)
            x[hit], y[hit] = stamped(x[hit]), TARGET
        return sharded._replace(train=Split(x, y), noisy=bad)

    return spoil


def stamped_as_target(test: Split) -> Split:
    """What `backdoored` shards want: images of all other classes, stamped, called that class's."""
    x = stamped(test.x[test.y != TARGET])
    return Split(x, np.full(len(x), TARGET, test.y.dtype))


def mislabelled(share: float) -> Callable[[Split, int, np.random.Generator], Split]:
    """Random labels on a share of the held-out samples."""

    def misjudge(held: Split, classes: int, rng: np.random.Generator) -> Split:
        hit = rng.random(len(held.y)) < share
        return Split(held.x, np.where(hit, rng.integers(classes, size=len(held.y)), held.y).astype(held.y.dtype))

    return misjudge


def skewed(held: Split, classes: int, rng: np.random.Generator) -> Split:
    """Held-out samples of the first half of the classes alone, repeated as needed."""
    del rng
    return Split(*(part[np.resize(np.flatnonzero(held.y < classes // 2), len(held.y))] for part in held))


def _classes(sharded: data.ShardedData) -> int:
    if sharded.classes is None:
        raise SettingsError(f"{sharded.name} has no classes, whose labels could be wrong")
    return sharded.classes


Make = Callable[[int], Scenario]
"""`K, the number of replicas -> scenario`."""


def _spoilt(bad: int, spoil: Spoil, what: str) -> Make:
    return lambda k: Scenario(f"{bad} of {k} {what}", _iid(k), tuple(range(bad)), spoil)


FAULTS: dict[str, Make] = {
    "fast1": lambda k: Scenario(
        f"1 of {k} at 10\N{MULTIPLICATION SIGN} rate", _iid(k), faults=simulate(k, rate={0: 10})
    ),
    "flipped1": lambda k: Scenario(f"1 of {k} flipped", _iid(k), faults=simulate(k, sent={0: -1})),
    "slow4": lambda k: Scenario(
        f"{k // 2} of {k} at 1/4 steps", _iid(k), faults=simulate(k, speed=dict.fromkeys(range(k // 2), 0.25))
    ),
}
SOUND = "iid"
"""The scenario in which nothing is wrong."""
SCENARIOS: dict[str, Make] = {
    SOUND: lambda k: Scenario("IID", _iid(k)),
    "sized": lambda k: Scenario("sizes 1:16", _sized(k)),
    "dirichlet03": lambda k: Scenario("Dirichlet 0.3", _dirichlet(k, 0.3)),
    "dirichlet01": lambda k: Scenario("Dirichlet 0.1", _dirichlet(k, 0.1)),
    "noisy2": _spoilt(2, labels(1.0), "noisy"),
    "noisy4": _spoilt(4, labels(1.0), "noisy"),
    **FAULTS,
}
"""Name -> scenario of the matrix of weightings."""


def _judged(title: str, **changes: Any) -> Make:
    """Half of the shards noisy, and something about the held-out samples."""
    return lambda k: _spoilt(k // 2, labels(1.0), "")(k)._replace(title=title, **changes)


@functools.cache
def _mnist(folder: str) -> data.Dataset:
    return data.load("mnist", folder)


def every(data_dir: str) -> dict[str, Make]:
    """All scenarios by name: those of the matrix, other faults of data, and series of them.

    noisyN: N shards with random labels; labelsP: P % of the labels of half of the shards; heldoutN: N held-out samples,
    with half of the shards noisy; wrongP: P % of the held-out labels are random, too. Of liars, flipped3 send the
    opposite of what they learnt, scaled1 and scaled3 ten times it, reversed3 five times the opposite, idle3 nothing,
    random3 random weights. alie3 send the mean of the honest less as many of their standard deviations as
    `little_is_enough`, alie3far less 1.5 of them. relabelled3 hold one class under another's labels, backdoor3 a
    patch in half of their images that stands for a class, faint3 in 5 %; boosted3 have the former and send their change
    so large that they replace the mean, hidden3 half of it and half of the mean of the honest.
    """
    noisy = {f"noisy{n}": _along(_spoilt(n, labels(1.0), "noisy"), _BAD, n) for n in range(1, 8)}
    share = {
        f"labels{p}": _along(_half(labels(p / 100), f"with {p} % random labels"), _SHARE, p) for p in range(10, 101, 10)
    }
    sizes = {
        f"heldout{n}": _judged(f"{n:,} held out", heldout=n, axis=("held-out samples", n))
        for n in (32, 64, 128, 256, 1000, 5000)
    }
    wrong = {
        f"wrong{p}": _judged(f"{p} % wrong", misjudged=mislabelled(p / 100), axis=("wrong held-out labels, %", p))
        for p in (10, 20, 50)
    }
    spoilt = {
        "shifted": _half(shifted, "shifted labels"),
        "features": _half(features(0.5), "noisy inputs"),
        "duplicated": _half(duplicated, "duplicates"),
        "stale": _half(stale, "without 3 classes"),
        "foreign": _half(foreign(lambda: _mnist(data_dir)), "MNIST"),
    }
    liars = {
        "flipped3": _lying(3, "flipped", sent=-1),
        "scaled1": _lying(1, "\N{MULTIPLICATION SIGN} 10", sent=10),
        "scaled3": _lying(3, "\N{MULTIPLICATION SIGN} 10", sent=10),
        "reversed3": _lying(3, "\N{MULTIPLICATION SIGN} \N{MINUS SIGN}5", sent=-5),
        "idle3": _lying(3, "idle", sent=0),
        "random3": _lying(3, "with random weights", sent=0, noise=1),
        "alie3": lambda k: _colluding(3, "a little", little_is_enough(k, 3))(k),
        "alie3far": _colluding(3, "1.5 deviations off", 1.5),
        "relabelled3": _aimed(relabelled, source_as_target, "with a class relabelled"),
        "backdoor3": _BACKDOOR,
        "faint3": _aimed(backdoored(0.05), stamped_as_target, "with a faint backdoor"),
        "boosted3": lambda k: _backdoor("boosted", sent=k / 3)(k),
        "hidden3": _backdoor("hidden", sent=0.5, mean=0.5),
    }
    return (
        SCENARIOS | liars | noisy | share | spoilt | sizes | wrong | {"skewed": _judged("5 classes", misjudged=skewed)}
    )


def choose(flag: str, makes: Mapping[str, Make], replicas: int, good: int = 0) -> dict[str, Scenario]:
    """The scenarios that a flag names, of K replicas, by name; `good` shards of each must stay unspoilt.

    Raises:
      SettingsError: there is no such scenario, or it spoils more shards than there are, or too many of them.
    """
    chosen = {name: makes[name](replicas) for name in shared_flags.names(flag, makes)}
    for name, one in chosen.items():
        if (least := len(one.bad) + (good if one.bad else 0)) > replicas:
            why = " and an oracle needs a good one" if good else ""
            raise SettingsError(
                f"--replicas={replicas}: {name} spoils {len(one.bad)} shards{why}; give at least --replicas={least}, "
                f"or leave it out (--{flag})"
            )
    return chosen


def _lying(liars: int, what: str, **factors: float) -> Make:
    """Some replicas send something else; see `wavg_jax.rounds.faults.Faults` for the factors."""

    def make(k: int) -> Scenario:
        each = {name: dict.fromkeys(range(liars), factor) for name, factor in factors.items()}
        return Scenario(f"{liars} of {k} {what}", _iid(k), faults=simulate(k, **each))

    return make


def _colluding(liars: int, what: str, z: float) -> Make:
    """Some replicas send the mean of the honest, less z of their standard deviations."""
    return _lying(liars, what, sent=0, mean=1, deviation=-z)


def _aimed(spoil: Spoil, wanted: Callable[[Split], Split], what: str) -> Make:
    """Three shards teach something beside what is to be learnt."""
    return lambda k: _spoilt(3, spoil, what)(k)._replace(wanted=wanted)


_BACKDOOR = _aimed(backdoored(0.5), stamped_as_target, "with a backdoor")


def _backdoor(what: str, **factors: float) -> Make:
    """The replicas with a backdoor lie about it."""
    lying = _lying(3, "", **factors)
    return lambda k: _BACKDOOR(k)._replace(title=f"{_BACKDOOR(k).title}, {what}", faults=lying(k).faults)


def _along(make: Make, axis: str, value: float) -> Make:
    return lambda k: make(k)._replace(axis=(axis, value))


_BAD, _SHARE = "noisy shards", "random labels on half of the shards, %"


def series_of(scenarios: Mapping[str, Scenario]) -> dict[str, Any] | None:
    """The quantity that most of these scenarios are values of, as the first row of a recording names it; None if fewer
    than three are. IID shards have 0 of what can be wrong with shards."""
    titles = collections.Counter(one.axis[0] for one in scenarios.values() if one.axis)
    if not titles:
        return None
    title = max(titles, key=lambda name: titles[name])
    at = {name: one.axis[1] for name, one in scenarios.items() if one.axis and one.axis[0] == title}
    if SOUND in scenarios and title in (_BAD, _SHARE):
        at[SOUND] = 0.0
    return {"title": title, "at": at} if len(at) > 2 else None


def _half(spoil: Spoil, what: str) -> Make:
    return lambda k: _spoilt(k // 2, spoil, what)(k)


def deal(one: Scenario, dataset: data.Dataset, *, heldout: int, seed: int, **options: Any) -> data.ShardedData:
    """The data of a scenario and seed, equal for whatever trains on them; `options` are those of `data.shard`."""
    sharded = data.shard(dataset, one.partition, heldout=heldout, seed=seed, **options)
    return one.spoil(sharded, one.bad, seed) if one.spoil else sharded
