"""What `fit` calls after every round."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from wavg_jax.arguments import FUNCTION, as_whole, check
from wavg_jax.base import TrainState
from wavg_jax.storage.schema import Row


class WithState(NamedTuple):
    """A callback that sees the training state; made by `with_state`.

    Attributes:
      call: `(row, state) -> bool | None`.
      every: rounds between calls.
    """

    call: Callable[[Row, TrainState], Any]
    every: int


Callback = Callable[[Row], Any] | WithState


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


def as_callbacks(given: Callback | Sequence[Callback]) -> tuple[Callback, ...]:
    """One callback or several, as a tuple.

    Raises:
      SettingsError: one is neither a function nor made by `with_state`.
    """
    several = given if isinstance(given, Sequence) and not isinstance(given, WithState | str) else (given,)
    for callback in several:
        if not isinstance(callback, WithState):
            check("on_round", callback, FUNCTION)
    return tuple(several)


def ends(callbacks: Sequence[Callback], row: Row, state: TrainState) -> bool:
    """Calls the callbacks of a round, and says whether one of them returned True, to end the run."""
    answers = []
    for callback in callbacks:
        if not isinstance(callback, WithState):
            answers.append(callback(row))
        elif row["round"] % callback.every == 0:
            answers.append(callback.call(row, state))
    # Only True itself: a callback such as list.append or file.write returns something too.
    return any(isinstance(answer, bool | np.bool_) and bool(answer) for answer in answers)
