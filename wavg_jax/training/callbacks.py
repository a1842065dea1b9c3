"""What `fit` calls after every round."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from wavg_jax.arguments import FUNCTION, as_whole, check
from wavg_jax.base import TrainState, WavgWarning
from wavg_jax.storage.schema import Row


class WithState(NamedTuple):
    """A callback that sees the training state; made by `with_state`.

    Attributes:
      call: `(row, state) -> bool | None`.
      every: rounds between calls.
    """

    call: Callable[[Row, TrainState], Any]
    every: int


class Observer(NamedTuple):
    """A callback with a beginning and an end, of which the first process has the only one; see `wavg_jax.live`.

    Attributes:
      start: `rows -> context manager of f(row)`; `rows` are the run's first row and those of the rounds done before.
      waits: whether rounds wait for it. One that does not only looks: what it returns ends nothing, and if it fails, a
        warning says so and the run goes on without it.
    """

    start: Callable[[Sequence[Row]], contextlib.AbstractContextManager[Callable[[Row], Any]]]
    waits: bool = False


Callback = Callable[[Row], Any] | WithState | Observer
Told = Callable[[Row], Any] | WithState
"""A callback that has been started."""


def with_state(call: Callable[[Row, TrainState], Any], *, every: int = 1) -> WithState:
    """Makes a callback for `fit(on_round=...)` that sees the training state.

    Args:
      call: `(row, state) -> bool | None`; True ends the run. The next round reuses the memory of the state: copy what
        you keep (`jax.device_get`).
      every: rounds between calls.

    Raises:
      SettingsError: `call` is no function, or `every` not a whole number of at least 1.
    """
    check("with_state: call", call, FUNCTION)
    return WithState(call, as_whole("with_state: every", every, 1))


def as_callbacks(given: Callback | Sequence[Callback] | None) -> tuple[Callback, ...]:
    """One callback or several, as a tuple.

    Raises:
      SettingsError: one is neither a function nor made by `with_state` or in `wavg_jax.live`.
    """
    if given is None:
        return ()
    several = given if isinstance(given, Sequence) and not isinstance(given, WithState | Observer | str) else (given,)
    for callback in several:
        if not isinstance(callback, WithState | Observer):
            check("on_round", callback, FUNCTION)
    return tuple(several)


@contextlib.contextmanager
def started(
    callbacks: Sequence[Callback], rows: Sequence[Row], show: Callable[[Row], Any], *, first: bool
) -> Iterator[tuple[list[Told], Callable[[Row], Any]]]:
    """Starts the observers of a run, and ends them with the block.

    Args:
      callbacks: of the run.
      rows: its rows so far.
      show: called with every row, while the next round trains.
      first: whether this process has the observers.

    Yields:
      The callbacks that rounds wait for, and `show` with those that only look behind it.
    """
    waiting: list[Told] = []
    looking = [show]
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if not isinstance(callback, Observer):
                waiting.append(callback)
            elif first:
                if callback.waits:
                    waiting.append(stack.enter_context(callback.start(rows)))
                else:
                    watched = callback.start(rows)
                    looking.append(_guarded(watched.__enter__()))
                    stack.push(_ended(watched))
        yield waiting, lambda row: [see(row) for see in looking]


def _guarded(see: Callable[[Row], Any]) -> Callable[[Row], None]:
    """One that looks no more once it has failed, with a warning: a logger's server must not end a run."""
    works = True

    def look(row: Row) -> None:
        nonlocal works
        if works:
            try:
                see(row)
            except Exception as error:
                works = False
                _warn(f"in round {row['round']}, and sees no more of this run", error)

    return look


def _ended(watched: contextlib.AbstractContextManager[Any]) -> Callable[..., bool | None]:
    """The end of one that only looks, which does not cost the result of a run either."""

    def leave(*failure: Any) -> bool | None:
        try:
            return watched.__exit__(*failure)
        except Exception as error:
            _warn("when the run was over", error)
            return None

    return leave


def _warn(when: str, error: Exception) -> None:
    said = " ".join(str(error).split())[:300]
    warnings.warn(f"a live view failed {when}: {type(error).__name__}: {said}", WavgWarning, stacklevel=3)


def ends(callbacks: Sequence[Told], row: Row, state: TrainState) -> bool:
    """Calls the callbacks of a round, and says whether one of them returned True, to end the run."""
    answers = []
    for callback in callbacks:
        if not isinstance(callback, WithState):
            answers.append(callback(dict(row)))
        elif row["round"] % callback.every == 0:
            answers.append(callback.call(dict(row), state))
    return any(_is_true(answer) for answer in answers)


def _is_true(answer: Any) -> bool:
    """Whether an answer is True, or an array that is; file.write and others return something that is not a bool."""
    of_bool = isinstance(answer, bool | np.bool_) or (isinstance(answer, jax.Array) and answer.dtype == bool)
    return of_bool and not np.ndim(answer) and bool(answer)
