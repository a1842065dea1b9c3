"""The nouns: what a weighting, an averager, a task and a training state are, and the errors the library raises.

Every noun is a NamedTuple of pure functions or of arrays, as in optax. *Stacked* means: every leaf has a leading axis
of length K, one entry per replica.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

PyTree = Any


class WavgError(ValueError):
    """Base of every error the library raises for bad input; the message names what is wrong and how to fix it."""


class SettingsError(WavgError):
    """An argument or flag has a value that cannot work."""


class DataError(WavgError):
    """A data set is missing, corrupt, or holds values that cannot be trained on."""


class WorkdirError(WavgError, OSError):
    """The folder for rows and checkpoints cannot be written, is full, or is in use.

    Attributes:
      errno, strerror: those of the `OSError` that caused it; None where there was none.
      filename: path of the file or folder.
    """

    def __init__(self, message: str, path: os.PathLike[str] | str | None = None, cause: BaseException | None = None):
        super().__init__(message)
        if isinstance(cause, OSError):
            self.errno, self.strerror = cause.errno, cause.strerror
        self.filename = None if path is None else os.fspath(path)

    def __str__(self) -> str:
        return str(self.args[0])  # OSError would write its errno and filename instead

    def __reduce__(self) -> tuple[Any, ...]:
        cause = None if self.errno is None else OSError(self.errno, self.strerror)
        return type(self), (self.args[0], self.filename, cause)  # OSError would lose its filename


class ResumeError(WavgError):
    """A run cannot be resumed: its settings differ, or what it left does not fit together."""


class MissingExtra(WavgError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""


class Diverged(WavgError):
    """Two rounds in a row, or the last one, were lost: no replica was finite, or the outer step was not.

    Attributes:
      result: the `Result` so far, with the last finite parameters.
    """

    def __init__(self, message: str, result: Any):
        super().__init__(message)
        self.result = result


class TooFew(WavgError):
    """An elastic run had fewer replicas than `Workers.min_replicas` for longer than its patience. A checkpoint of the
    rounds before is saved where the run has a `workdir`."""


class WavgWarning(UserWarning):
    """The run survives this, but its user should know: one line, said once."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C ended the run after a whole round, with a checkpoint saved.

    Attributes:
      result: the `Result` so far; None where several runs were under way and none of them was cut short.
    """

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result


class Batch(NamedTuple):
    """Samples and their targets.

    Attributes:
      x: inputs [B, ...].
      y: targets [B, ...]: integer labels [B], integer tokens [B, T], or numbers [B, ...].
    """

    x: Any
    y: Any


Sums = Mapping[str, jax.Array]


def means(sums: Sums, samples: jax.Array) -> dict[str, jax.Array]:
    """Divides every sum by the number of samples.

    >>> means({"loss": 6.0, "accuracy": 3.0}, 4)
    {'loss': 1.5, 'accuracy': 0.75}
    """
    return {name: total / samples for name, total in sums.items()}


class Task(NamedTuple):
    """What a network is to the library. Build one with `wavg_jax.models`, or by hand over plain pytrees.

    Attributes:
      init: `rng -> (params, mutable)`. `mutable` holds what training changes without a gradient, such as BatchNorm
        statistics; `{}` if there is nothing. Its floating-point leaves are averaged over replicas; counts, flags and
        keys made by `jax.random.key` stay each replica's own.
      loss: `(params, mutable, batch, rng) -> (loss, (mutable, metrics))`: the mean training loss of a `Batch` (a
        float32 scalar), the updated mutable collections, and a dict of float32 scalar metrics.
      predict: `(params, mutable, x [B, ...]) -> logits [B, ...]` in evaluation mode, float32, of any shape.
      measure: `(logits, batch) -> {name: sum}`: sums over the batch's samples, each an array of any shape, such as
        `{"loss": total loss, "accuracy": number right}`. Evaluation adds them up over batches and devices.
      metrics: `(sums, samples) -> {name: value}`: metrics from the sums over that many samples; by default the means.
        Scalar ones are signals for weightings and are recorded as `test_{name}`.
      cpu_forms: whether rounds, on a CPU, run the network's convolutions and pooling in forms that XLA runs faster
        there, with the same results up to rounding; see `wavg_jax.models.fast`.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, tuple[PyTree, Mapping[str, jax.Array]]]]
    predict: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    measure: Callable[[jax.Array, Batch], Sums]
    metrics: Callable[[Sums, Any], Mapping[str, jax.Array]] = means
    cpu_forms: bool = True


class Init(Protocol):
    """`init(params, replicas) -> state`; `replicas` is K, the number of replicas."""

    def __call__(self, params: PyTree, replicas: int) -> PyTree: ...


class WeightingUpdate(Protocol):
    """`update(stacked, state, params, *, alive, blend, **signals) -> (weights, state)`; see `Weighting`."""

    def __call__(
        self,
        stacked: PyTree,
        state: PyTree,
        params: PyTree,
        *,
        alive: jax.Array,
        blend: Callable[[PyTree], PyTree],
        **signals: Any,
    ) -> tuple[PyTree, PyTree]: ...


class Weighting(NamedTuple):
    """How much each replica counts in the blend.

    Attributes:
      init: `(params, replicas) -> state`; `replicas` is K. Every weighting takes it, with a memory or without.
      update: `(stacked, state, params, *, alive, blend, **signals) -> (weights, state)`. `stacked` are the replicas'
        parameters [K, ...], those of a dead replica replaced by `params`, the last global ones; `alive` is a bool mask
        [K]; `blend` is `weights -> tree`, the reduction in use, for weightings that try weights out. A signal is an
        array [K], a prefix tree of `params` whose leaves are [K] (one per layer) or [K, *leaf.shape] (one per element),
        or the function `evaluate`; see `wavg_jax.signals`. `weights` is a prefix tree of `params` whose leaves are [K]
        or [K, *leaf.shape]; they are not negative and sum to 1 over K, with 0 for every dead replica; all 0 when none
        is alive.
      needs: names of the signals `update` reads.
      reads_replicas: whether `update` may read the numbers in `stacked`, or call `blend` or `evaluate`. False promises
        that it weighs by scores alone, so that devices can exchange one weighted sum instead of all replicas.
    """

    init: Init
    update: WeightingUpdate
    needs: tuple[str, ...] = ()
    reads_replicas: bool = True


class AveragerUpdate(Protocol):
    """`update(stacked, state, params, *, alive=None, check_finite=True, place=..., **signals)`; see `Averager`."""

    def __call__(
        self,
        stacked: PyTree,
        state: PyTree,
        params: PyTree,
        *,
        alive: jax.Array | None = None,
        check_finite: bool = True,
        place: Callable[[Callable], Callable] = ...,
        **signals: Any,
    ) -> tuple[PyTree, PyTree, PyTree]: ...


class Restart(Protocol):
    """`restart(stacked, old, new, *, alive=None, check_finite=True, round=None) -> stacked`; see `Averager`."""

    def __call__(
        self,
        stacked: PyTree,
        old: PyTree,
        new: PyTree,
        *,
        alive: jax.Array | None = None,
        check_finite: bool = True,
        round: jax.Array | int | None = None,
    ) -> PyTree: ...


class Halves(NamedTuple):
    """An averager's update in two; arguments are as for `Averager.update`, and `alive` [K] is trusted.

    Attributes:
      weighting: the weighting itself.
      weigh: `(stacked, state, params, *, alive, place=identity, **signals) -> (weights, state)`, with the state of the
        weighting alone.
      step: `(stacked, weights, state, params, *, alive, place=identity) -> (params, state, taken)`: blends with weights
        from anywhere, and takes the outer step, with a state of `Averager.init` whose part for the weighting may be
        missing. `taken` is False, and nothing changes, if no replica is alive or the step is not finite.
    """

    weighting: Weighting
    weigh: Callable[..., tuple[PyTree, PyTree]]
    step: Callable[..., tuple[PyTree, Any, jax.Array]]


class Averager(NamedTuple):
    """A weighting, then one reduction, then an optional outer optimizer; see `wavg_jax.averaging.averager.averager`.

    Attributes:
      init: `(params, replicas) -> state`; `replicas` is K.
      update: `(stacked, state, params, *, alive=None, check_finite=True, place=identity, **signals) -> (params, state,
        weights)`. Replicas that are not `alive` [K] or hold non-finite parameters get weight 0; `check_finite=False`
        skips that test for a caller that has done it: `alive` is then required, and trusted. `place` lays the reduction
        out over devices.
      needs: names of the signals `update` reads.
      restart: `(stacked, old, new, *, alive=None, check_finite=True, round=None) -> stacked`: the parameters that the
        replicas start the next round from, given their own and the global ones before and after the update; copies of
        `new` when replicas are replaced. `check_finite` is as in `update`. `round`, the number of rounds before this
        one, is needed if the pull changes over rounds.
      reads_replicas: whether `update` needs all replicas on every device; if not, one all-reduce of their weighted sum
        will do.
      halves: `update` in two, for rounds that blend fragments of the parameters one after another; None if it cannot
        be taken apart.
    """

    init: Init
    update: AveragerUpdate
    needs: tuple[str, ...]
    restart: Restart
    reads_replicas: bool = True
    halves: Halves | None = None


class Replicas(NamedTuple):
    """K replicas of a network in training; every leaf has the leading axis K.

    Attributes:
      params: parameters [K, ...].
      opt_state: state of the inner optimizer [K, ...]; random keys in it differ from replica to replica.
      mutable: collections such as BatchNorm statistics [K, ...].
      rng: one key per replica [K], for dropout and augmentation.
      residual: what a narrow wire has not sent yet, float32 [K, n]; `()` unless the wire carries it. See
        `wavg_jax.rounds.wire`.
      pending: what the replicas have sent of the last fragment, which the next round blends; `()` unless parameters
        are synchronised in fragments. See `wavg_jax.rounds.streaming`.
      drift: control variates [K, ...]; `()` unless a correction of the local steps keeps them. See
        `wavg_jax.rounds.drift`.
    """

    params: PyTree
    opt_state: PyTree
    mutable: PyTree
    rng: jax.Array
    residual: PyTree = ()
    pending: PyTree = ()
    drift: PyTree = ()


class Smoothed(NamedTuple):
    """An average of the global parameters over rounds, for evaluation.

    Attributes:
      params: the average.
      mutable: the mutable collections re-estimated for it; see `wavg_jax.rounds.reestimation`.
      state: of the smoothing transformation.
    """

    params: PyTree
    mutable: PyTree
    state: PyTree


class TrainState(NamedTuple):
    """Everything a checkpoint holds, and nothing else.

    Attributes:
      params: the global parameters, after the last blend.
      mutable: the global mutable collections, for evaluation.
      replicas: the K replicas as they start the next round.
      averager: state of the averager (weighting and outer optimizer).
      round: rounds done, int32 scalar.
      smoothed: the average of the global parameters over rounds, if the run keeps one.
      stream: what rounds with fragments know of one another; `()` without. See `wavg_jax.rounds.streaming`.
      weights: those of the last round that was scored, as the weighting gave them; `()` if every round is, or where
        `stream` has them.
      drift: the mean of the replicas' control variates; `()` without. See `wavg_jax.rounds.drift`.
      guard: what the guard against loss spikes remembers; `()` without. See `wavg_jax.rounds.guard`.
    """

    params: PyTree
    mutable: PyTree
    replicas: Replicas
    averager: PyTree
    round: jax.Array
    smoothed: Smoothed | None = None
    stream: PyTree = ()
    weights: PyTree = ()
    drift: PyTree = ()
    guard: PyTree = ()
