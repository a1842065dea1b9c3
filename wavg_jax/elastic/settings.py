"""What an elastic run is told about its workers."""

from collections.abc import Callable
from typing import NamedTuple

from wavg_jax.arguments import FUNCTION, NONE, TEXT, YES_OR_NO, check_fields, either, instance, number, whole
from wavg_jax.base import SettingsError
from wavg_jax.elastic.deadlines import Deadline, Discount, median_mad
from wavg_jax.elastic.worker import Hook


class Workers(NamedTuple):
    """The workers of an elastic run, and how long it waits for them.

    Attributes:
      size: how many workers; or a function of the round, from 1 on, for workers that are added and removed while the
        run goes on, among whom the shards are dealt again.
      address: of a Ray cluster to join, "HOST:PORT" or "auto"; None starts one on this machine. See
        `wavg_jax.elastic`.
      deadline: how long a round waits; see `wavg_jax.elastic.deadlines`. A fixed one must leave time for a whole
        round.
      min_replicas: fewest replicas that must come; with fewer the round waits past its deadline. Those that come broken
        count here, and have no weight.
      late: what a result is worth that comes while a later round waits, such as `polynomial(0.5)`; the driver scores it
        anew. None drops it.
      audit: replicas in each round whose scores another worker measures too. Where the two differ the driver measures,
        and the replicas of a worker that was wrong have no weight in the round; that worker is checked in every round
        from then on.
      fill: slower workers take fewer local steps, as many as fit in the time that the median worker takes for H.
      norm_bound: a replica whose change is longer than that many times the median of the last rounds has no weight.
      patience: seconds that a round waits for `min_replicas`, or for workers without a deadline.
      start_timeout: seconds that a round waits for workers to start, or to take over shards; then it goes on without.
      away: seconds after which the shards of a worker that is away are dealt to the others, until it is back. Whoever
        takes over replicas compiles its program anew, for which a round waits.
      cpus, gpus: of each worker on a cluster, which places it by them. Workers of this machine share its cores.
      hook: for tests and traces, `(point, worker, round, reply) -> reply`, called in the worker's process at the
        points "hold" and "ready", before and after it takes over replicas (round 0), and "train", where the reply is
        None, and "reply" and "score", whose reply is sent.
    """

    size: int | Callable[[int], int] = 4
    address: str | None = None
    deadline: Deadline = median_mad()
    min_replicas: int = 1
    late: Discount | None = None
    audit: int = 0
    fill: bool = False
    norm_bound: float = 100.0
    patience: float = 300.0
    start_timeout: float = 120.0
    away: float = 60.0
    cpus: float = 1.0
    gpus: float = 0.0
    hook: Hook | None = None


_WORKERS = {
    "size": either(whole(1), FUNCTION),
    "address": either(NONE, TEXT),
    "deadline": FUNCTION,
    "min_replicas": whole(1),
    "late": either(NONE, FUNCTION),
    "audit": whole(0),
    "fill": YES_OR_NO,
    "norm_bound": number(above=1),
    "patience": number(above=0),
    "start_timeout": number(above=0),
    "away": number(above=0),
    "cpus": number(least=0),
    "gpus": number(least=0),
    "hook": either(NONE, FUNCTION),
}
WORKERS = instance(Workers, "a wavg_jax.elastic.Workers")


def check_workers(workers: Workers, replicas: int) -> None:
    """Raises SettingsError if these workers cannot train K replicas."""
    check_fields(workers, _WORKERS)
    for name in ("min_replicas", "audit"):
        if getattr(workers, name) > replicas:
            raise SettingsError(f"{name}={getattr(workers, name)} is more than the {replicas} replicas there are")
    if workers.audit and not callable(workers.size) and workers.size < 2:
        raise SettingsError("audit= needs at least two workers: none can vouch for itself")
    if not callable(workers.size) and workers.size > replicas:
        raise SettingsError(
            f"size={workers.size} workers for {replicas} replicas: a worker trains at least one; use {replicas} or "
            "fewer, or more shards"
        )


def size_in(workers: Workers, round: int, replicas: int) -> int:
    """How many workers a round has.

    Raises:
      SettingsError: `size` gave no number from 1 to K.
    """
    size = workers.size(round) if callable(workers.size) else workers.size
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= replicas:
        raise SettingsError(f"size({round}) gave {size!r}; it must give a whole number from 1 to {replicas}")
    return size
