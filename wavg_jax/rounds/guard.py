"""A guard against loss spikes: rolls back a round whose blend is much worse than the last ones, and lowers the rate.

Where a rate is too high, or a batch is bad, training can go astray within a round and stay finite: it then takes many
rounds to come back, or never does. `Scoring(guard=SpikeGuard())` measures every blend on the held-out samples of
its round. Where the loss is beyond the bound, the state goes back to what it was before the round, and all further
updates of the inner optimizer are multiplied by a smaller factor; what follows trains on the next samples.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.arguments import check_fields, number, whole
from wavg_jax.base import PyTree, SettingsError, TrainState
from wavg_jax.rounds.local import Pace


class SpikeGuard(NamedTuple):
    """When a round is rolled back, and how far the rate is lowered then.

        bound = m + (factor - 1) |m|,    m = the lowest held-out loss of the last `rounds` blends that were kept

    A blend whose loss is beyond the bound or not finite is rolled back, as is a lost round: parameters, optimizer
    states, statistics, averager and the average over rounds stay as they were before the round. No loss is too high
    for the first blend. Every device needs room for another copy of the state.

    Attributes:
      factor: above 1; of a loss above 0 the bound is a multiple of the lowest. With few `Scoring(samples=)` losses
        differ from round to round by chance, so leave room.
      lower: between 0 and 1: what each rollback multiplies the updates of the inner optimizer by, whichever it is, from
        then on.
      rounds: how many blends are remembered.
    """

    factor: float = 2.0
    lower: float = 0.5
    rounds: int = 5


_GUARD = {"factor": number(above=1), "lower": number(above=0, below=1), "rounds": whole(1)}


def check(guard: SpikeGuard | None, fragments: int) -> None:
    """Raises SettingsError if a field is not what it must be, or if fragments of the parameters are blended in turn."""
    if guard is not None:
        check_fields(guard, _GUARD)
        if fragments != 1:
            raise SettingsError(
                "Scoring: guard= rolls back whole rounds, and AtSync(fragments=) blends them part by part: leave out "
                "one of them"
            )


class Watch(NamedTuple):
    """What a guard remembers.

    Attributes:
      losses: of the last blends that were kept, the newest last, float32 [rounds]; infinite before there were so many.
      rate: what updates are multiplied by, a float32 scalar.
    """

    losses: jax.Array
    rate: jax.Array


def begin(guard: SpikeGuard | None) -> Watch | tuple[()]:
    """What is remembered before the first round; `()` without a guard."""
    return () if guard is None else Watch(jnp.full(guard.rounds, jnp.inf, jnp.float32), jnp.ones((), jnp.float32))


def paced(watch: PyTree, pace: Pace) -> Pace:
    """The pace at the rate that is left."""
    if watch == ():
        return pace
    return pace._replace(rate=watch.rate if pace.rate is None else watch.rate * jnp.asarray(pace.rate, jnp.float32))


def judged(
    guard: SpikeGuard, before: TrainState, after: TrainState, loss: jax.Array, taken: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state to go on from, and what the round's row says of it.

    Args:
      guard: the settings.
      before, after: the round.
      loss: held-out loss of the blend, a scalar.
      taken: whether there is a blend, a bool scalar.
    """
    watch, loss = before.guard, loss.astype(jnp.float32)
    lowest = watch.losses.min()
    bound = lowest + (guard.factor - 1) * jnp.abs(lowest)
    kept = taken & jnp.isfinite(loss) & (loss <= bound)
    rate = jnp.where(kept, watch.rate, watch.rate * jnp.float32(guard.lower))
    losses = jnp.where(kept, jnp.append(watch.losses[1:], loss), watch.losses)
    # The keys of the replicas go on, or the next round would draw the same again.
    replicas = before.replicas._replace(rng=after.replicas.rng)
    back = before._replace(replicas=replicas, round=after.round, guard=())
    state = tree.select(kept, after._replace(guard=()), back)
    found = {"loss": loss, "bound": bound, "rolled_back": ~kept, "rate": rate}
    return state._replace(guard=Watch(losses, rate)), found
