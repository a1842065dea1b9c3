"""What the replicas are given in each round, put together while the round before it is still running."""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator

from wavg_jax.rounds.recipe import Work

Make = Callable[[int, int], Work]
"""`(first_step, steps) -> Work`: what is given in a round of so many steps, after so many in the rounds before."""


class Feeder:
    """Makes works, one of them ahead of time if it is told which. Use `open_feeder`."""

    def __init__(self, make: Make, pool: concurrent.futures.Executor):
        self._make, self._pool = make, pool
        self._ahead: dict[tuple[int, int], concurrent.futures.Future[Work]] = {}

    def prepare(self, first_step: int, steps: int) -> None:
        """Starts making a round's work in the background; what was made for another round is dropped."""
        self._ahead = {(first_step, steps): self._pool.submit(self._make, first_step, steps)}

    def take(self, first_step: int, steps: int) -> Work:
        """Returns a round's work, and raises what making it raised."""
        ahead = self._ahead.pop((first_step, steps), None)
        return self._make(first_step, steps) if ahead is None else ahead.result()


@contextlib.contextmanager
def open_feeder(make: Make) -> Iterator[Feeder]:
    """Opens a feeder with one thread of its own, which ends with the block."""
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        yield Feeder(make, pool)
