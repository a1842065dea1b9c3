"""Which worker holds which replicas."""

from collections.abc import Iterable, Mapping


def deal(replicas: int, held: Mapping[int, Iterable[int]]) -> dict[int, tuple[int, ...]]:
    """Deals K replicas among workers, as evenly as it goes and moving as few as possible.

    Args:
      replicas: K.
      held: {worker: replicas it holds so far}, of all workers among whom to deal; a new one holds none. Replicas that
        nobody holds are dealt to those with the fewest.

    Returns:
      {worker: its replicas, in order}; with more workers than replicas some hold none.

    >>> deal(8, {0: (), 1: ()})
    {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}
    >>> deal(8, {0: (0, 1, 2, 3), 1: (4, 5, 6, 7), 2: ()})  # one joins
    {0: (0, 1, 2), 1: (4, 5, 6), 2: (3, 7)}
    >>> deal(8, {0: (0, 1, 2), 2: (3, 7)})  # worker 1 is gone
    {0: (0, 1, 2, 4), 2: (3, 5, 6, 7)}
    """
    workers = sorted(held)
    if not workers:
        return {}
    least, more = divmod(replicas, len(workers))
    # Who holds most may keep one more than the others.
    order = sorted(workers, key=lambda w: -len(tuple(held[w])))
    room = {w: least + (place < more) for place, w in enumerate(order)}
    kept = {w: sorted(held[w])[: room[w]] for w in workers}
    free = iter(sorted(set(range(replicas)) - {k for own in kept.values() for k in own}))
    return {w: tuple(sorted([*kept[w], *(next(free) for _ in range(room[w] - len(kept[w])))])) for w in workers}
