"""Averages checkpoint files: one tensor of all K in memory at a time, or all of them where the weighting needs it."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavg_jax.arguments import check_fields
from wavg_jax.averaging.averager import averager
from wavg_jax.averaging.reduce import Reduction, weighted_mean
from wavg_jax.averaging.transforms import Transform
from wavg_jax.base import Averager, DataError, SettingsError, Task, Weighting, WorkdirError
from wavg_jax.data import ShardedData
from wavg_jax.rounds.score import SCORING, Scoring
from wavg_jax.soups.judge import Judge, loaded
from wavg_jax.soups.survey import Survey, check_alike, stacked, surveyed
from wavg_jax.storage.tensors import Spec, Tensors, open_tensors, write_tensors
from wavg_jax.weighting.scores import per_replica, uniform
from wavg_jax.weighting.signals import OF_SAMPLES


class Soup(NamedTuple):
    """What came of averaging K checkpoints.

    Attributes:
      weights: float32 [K], of each checkpoint; the mean over tensors or elements, where they have weights of their own.
      scores: {signal: [K]}, what the weighting read of each checkpoint.
      quality: {metric: [K + 1]} on the test split, of each checkpoint and then of the average; `{}` without a task.
      averaged, kept: how many tensors were averaged, and how many taken from the first checkpoint.
    """

    weights: np.ndarray
    scores: dict[str, np.ndarray]
    quality: dict[str, np.ndarray]
    averaged: int
    kept: int


class _Job(NamedTuple):
    """What is averaged, and how."""

    checkpoints: Sequence[Tensors]
    start: Tensors
    found: Survey
    averager: Averager
    signals: Mapping[str, Any]
    judge: Judge | None


def average_checkpoints(
    paths: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    weighting: Weighting | None = None,
    *,
    base: str | PathLike[str] | None = None,
    reduce: Reduction = weighted_mean,
    transform: Transform | None = None,
    deltas: bool = False,
    outer: optax.GradientTransformation | None = None,
    task: Task | None = None,
    data: ShardedData | None = None,
    scoring: Scoring = Scoring(),  # noqa: B008
    signals: Mapping[str, Any] | None = None,
    stream: bool = True,
) -> Soup:
    """Averages checkpoints of one network, such as several fine-tuned ones, and writes the result: a model soup.

    Tensors that all checkpoints share bit by bit, and integers, are taken from the first; all others are averaged in
    float32 (float64 for float64) by `averager(weighting, reduce=..., ...)`, with the tensors for parameters, and keep
    their dtype. BatchNorm statistics are averaged as well. A checkpoint with NaNs or infinities has weight 0.

    Memory: one tensor of all K checkpoints, where weights come from the scores of each alone (`uniform`, `softmax`,
    `fisher_merging`, ...) with any reduction; what scores read is measured on one checkpoint at a time. Weightings that
    try blends out (`learned`, `greedy_soup`, `opinion_pool`) or compare parameters (`robust`), transforms and outer
    optimizers take all checkpoints at once.

    Args:
      paths: K checkpoints: safetensors files, folders of their parts, or Orbax checkpoints.
      out: the safetensors file to write; it carries the metadata of the first checkpoint.
      weighting: how much each checkpoint counts; by default equally.
      base: the checkpoint that the others were fine-tuned from, where the rule reads how far they moved: with `deltas`,
        a `transform` or an `outer` optimizer.
      reduce, transform, deltas, outer: as for `wavg_jax.averager`; Model Stock is `reduce=model_stock, deltas=True`.
      task: the network, whose parameters and mutable collections have the names and shapes of the tensors, the keys on
        the way to a leaf joined by dots. Needed where the weighting reads scores or tries out blends.
      data: its `heldout` samples are scored, and on `test` all checkpoints and the average are judged.
      scoring: how; `samples` takes the first so many.
      signals: further signals of the weighting, [K] each: `proportional("share", higher_is_better=True)` with
        `signals={"share": [2, 1]}` gives the weights 2/3 and 1/3.
      stream: False takes all checkpoints at once. Weights per element that depend on other tensors need it, as
        `fisher_merging(normalise=True)` does.

    Returns:
      A `Soup`.

    Raises:
      SettingsError: fewer than two checkpoints, or what the rule needs is missing.
      DataError: a checkpoint cannot be read, or they are not of one network.
      WorkdirError: `out` cannot be written.

    Wortsman et al. 2022, "Model soups" (arXiv:2203.05482).

    >>> import tempfile
    >>> import wavg_jax as wavg
    >>> from wavg_jax.storage.tensors import Spec, open_tensors, write_tensors
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for k, value in enumerate([1.0, 5.0]):
    ...     write_tensors(folder / str(k), {"w": Spec(np.dtype("float32"), ())}, lambda name: np.float32(value))
    >>> soup = average_checkpoints([folder / "0", folder / "1"], folder / "soup.safetensors")
    >>> with open_tensors(folder / "soup.safetensors") as mean:
    ...     soup.weights.tolist(), float(mean.read("w"))
    ([0.5, 0.5], 3.0)
    """
    weighting = uniform() if weighting is None else weighting
    check_fields(scoring, SCORING)
    if len(paths) < 2:
        raise SettingsError(f"{len(paths)} checkpoints: give two or more to average")
    if (task is None) != (data is None):
        raise SettingsError("task= and data= go together: give the network, and the samples that it is judged on")
    moves = deltas or transform is not None or outer is not None
    if moves and base is None:
        raise SettingsError("this rule reads how far checkpoints moved: give base=, what they were fine-tuned from")
    _check_files(paths, out, base)
    own = _given(weighting, signals or {}, len(paths))
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(open_tensors(path)) for path in paths]
        start = checkpoints[0] if base is None else stack.enter_context(open_tensors(base))
        check_alike([checkpoints[0], start])
        specs = checkpoints[0].specs
        if any(spec.dtype == np.float64 for spec in specs.values()):
            stack.enter_context(jax.enable_x64(True))
            reduce = _by_wide_weights(reduce)
        rule = averager(weighting, outer=outer, reduce=reduce, transform=transform, deltas=deltas)
        found = surveyed(checkpoints)
        judge = None if task is None or data is None else Judge(task, data, scoring, specs)
        if judge is not None and data is not None and not len(data.heldout.y) and set(rule.needs) - own.keys():
            raise SettingsError("no samples are held out, and the weighting scores some: hold some out (heldout=)")
        folder = pathlib.Path(stack.enter_context(_beside(pathlib.Path(out).expanduser())))
        measured = _measured(checkpoints, found, rule, own, judge, folder, stack)
        job = _Job(checkpoints, start, found, rule, own | measured, judge)
        together = not stream or weighting.reads_replicas or transform is not None or outer is not None
        weights = (_all_at_once if together else _one_by_one)(job, pathlib.Path(out))
        quality = {} if judge is None else _quality(judge, checkpoints, out)
        scores = {name: np.asarray(x) for name, x in job.signals.items() if isinstance(x, jax.Array) and x.ndim == 1}
        return Soup(weights, scores, quality, len(found.averaged), len(found.kept))


def _check_files(paths: Sequence[str | PathLike[str]], out: str | PathLike[str], base: Any) -> None:
    """Raises SettingsError if the result would be written over what is read."""
    target = pathlib.Path(out).expanduser().resolve()
    for path in (*paths, *([] if base is None else [base])):
        if pathlib.Path(path).expanduser().resolve() == target:
            raise SettingsError(f"out={str(out)!r} is one of the checkpoints: give another file to write")


def _given(weighting: Weighting, signals: Mapping[str, Any], count: int) -> dict[str, jax.Array]:
    """The signals that the caller gives, one number for each checkpoint.

    Raises:
      SettingsError: the weighting does not read one, or it is no such numbers.
    """
    for name in signals:
        if name not in weighting.needs:
            raise SettingsError(
                f"signals has {name!r}, which the weighting does not read; it reads "
                f"{', '.join(map(repr, weighting.needs)) or 'none'}"
            )
    try:
        own = {name: jnp.asarray(value, jnp.float32) for name, value in signals.items()}
    except (TypeError, ValueError) as error:
        raise SettingsError(f"signals are no numbers ({error}): give one number for each checkpoint") from None
    for name, x in own.items():
        if x.shape != (count,):
            raise SettingsError(f"signals[{name!r}] has shape {x.shape}: give one number for each checkpoint")
    return own


def _by_wide_weights(reduce: Reduction) -> Reduction:
    """Weights in float64, which sum to 1 there: a third in float32 is too large in the eighth digit."""

    def wide(weights: jax.Array) -> jax.Array:
        weights = weights.astype(jnp.float64)
        total = weights.sum(axis=0)
        return weights / jnp.where(total > 0, total, 1)

    def reduced(stacked: Any, weights: Any, **options: Any) -> Any:
        return reduce(stacked, jax.tree.map(wide, weights), **options)

    return reduced


@contextlib.contextmanager
def _beside(out: pathlib.Path) -> Iterator[str]:
    """A folder for what does not fit memory; on the disk that the result goes to, if it exists.

    Raises:
      WorkdirError: nothing can be written there.
    """
    try:
        folder = tempfile.TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None, prefix=".soup-")
    except OSError as error:
        raise WorkdirError(f"{out} cannot be written: {error.strerror or error}; choose another out=") from error
    with folder as path:
        yield path


def _measured(
    checkpoints: Sequence[Tensors],
    found: Survey,
    rule: Averager,
    own: Mapping[str, jax.Array],
    judge: Judge | None,
    folder: pathlib.Path,
    stack: contextlib.ExitStack,
) -> dict[str, Any]:
    """Measures the signals of every checkpoint, one after another.

    Returns:
      {signal: [K], logits [K, S, C], or, of one with numbers for every tensor, a function of the tensor's name that
      reads files in `folder`}.
    """
    needs = [name for name in rule.needs if name not in own]
    if not needs:
        return {}
    if judge is None:
        raise SettingsError(
            f"the weighting reads {needs[0]!r}, which files do not tell: give task= and data=, or signals={{...}}"
        )
    measure = judge.measure(needs)
    rows: list[dict[str, Any]] = []
    for k, one in enumerate(checkpoints):
        signals = measure(loaded(one.read, judge.names() & one.specs.keys()))
        if missing := [name for name in needs if name not in {*signals, *OF_SAMPLES}]:
            raise SettingsError(f"the weighting reads {missing[0]!r}, which files do not tell: give signals={{...}}")
        rows.append({name: _kept(x, folder / f"{name}-{k}", stack) for name, x in signals.items()})
    return {name: _together([row[name] for row in rows], found, checkpoints[0].specs) for name in rows[0]}


def _kept(signal: Any, path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    """A signal of one checkpoint; one with numbers for every tensor is as large as the network, and waits on disk."""
    if isinstance(signal, jax.Array):
        return signal
    write_tensors(path, {n: Spec(x.dtype, x.shape) for n, x in signal.items()}, lambda n: np.asarray(signal[n]))
    return stack.enter_context(open_tensors(path))


def _together(rows: Sequence[Any], found: Survey, specs: Mapping[str, Spec]) -> Any:
    if isinstance(rows[0], jax.Array):
        # A broken checkpoint's scores say nothing.
        return jnp.stack(rows)

    def of(name: str) -> jax.Array:
        if name in rows[0].specs:
            return jnp.asarray(stacked(rows, name))
        # No parameter, such as a statistic: without a score all count the same.
        shape = specs[name].shape if any(len(spec.shape) for spec in rows[0].specs.values()) else ()
        return jnp.zeros((len(rows), *shape), jnp.float32)

    return of


def _one_by_one(job: _Job, out: pathlib.Path) -> np.ndarray:
    """Averages and writes one tensor after another; returns the weights [K]."""
    k = len(job.checkpoints)
    seen: list[np.ndarray] = []
    alive = jnp.asarray(job.found.alive)

    @jax.jit
    def update(stacked: jax.Array, start: jax.Array, signals: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        state = job.averager.init({"": start}, k)
        params, _, weights = job.averager.update(
            {"": stacked}, state, {"": start}, alive=alive, check_finite=False, **signals
        )
        return params[""], per_replica(weights)

    def blended(name: str) -> np.ndarray:
        if name not in averaged:
            return job.checkpoints[0].read(name)
        signals = {key: {"": x(name)} if callable(x) else x for key, x in job.signals.items()}
        start = jnp.asarray(job.start.read(name))
        new, weights = update(jnp.asarray(stacked(job.checkpoints, name)), start, signals)
        seen.append(_sound(weights, name))
        return np.asarray(new)

    averaged = set(job.found.averaged)
    write_tensors(out, job.checkpoints[0].specs, blended, job.checkpoints[0].metadata)
    return np.mean(seen, axis=0) if seen else job.found.alive / job.found.alive.sum()


def _all_at_once(job: _Job, out: pathlib.Path) -> np.ndarray:
    """Averages all tensors in one update, then writes them; returns the weights [K]."""
    first = job.checkpoints[0]
    if not job.found.averaged:
        return _one_by_one(job, out)
    signals = {
        key: {name: x(name) for name in job.found.averaged} if callable(x) else x for key, x in job.signals.items()
    }

    @jax.jit
    def update(replicas: Any, params: Any, signals: Mapping[str, Any], kept: Any, samples: Any) -> tuple:
        shared = {} if job.judge is None else job.judge.shared(job.averager.needs, signals, kept, samples)
        state = job.averager.init(params, len(job.checkpoints))
        alive = jnp.asarray(job.found.alive)
        new, _, weights = job.averager.update(
            replicas, state, params, alive=alive, check_finite=False, **signals, **shared
        )
        return new, per_replica(weights)

    new, weights = update(
        {name: jnp.asarray(stacked(job.checkpoints, name)) for name in job.found.averaged},
        loaded(job.start.read, job.found.averaged),
        signals,
        {} if job.judge is None else loaded(first.read, job.judge.names() & set(job.found.kept)),
        () if job.judge is None else job.judge.samples(),
    )
    weights = _sound(weights, job.found.averaged[0])
    write_tensors(
        out, first.specs, lambda name: np.asarray(new[name]) if name in new else first.read(name), first.metadata
    )
    return weights


def _sound(weights: jax.Array, name: str) -> np.ndarray:
    """The weights; an averager whose step is not finite gives none."""
    found = np.asarray(weights)
    if not found.sum() > 0:
        raise DataError(f"the average of {name!r} is not finite in its dtype; nothing was written")
    return found


def _quality(judge: Judge, checkpoints: Sequence[Tensors], out: str | PathLike[str]) -> dict[str, np.ndarray]:
    """Judges every checkpoint and the average, as it was written, on the test split."""
    with open_tensors(out) as average:
        found = [judge.quality(loaded(one.read, judge.names() & one.specs.keys())) for one in (*checkpoints, average)]
    return {name: np.array([one[name] for one in found]) for name in found[0]}
