"""What each replica is worth to the blend, read from logits that a round has anyway."""

import jax
import jax.numpy as jnp
import optax

from wavg_jax import tree
from wavg_jax.averaging.reduce import weighted_mean
from wavg_jax.weighting.scores import normalise


def diagnose(logits: jax.Array, labels: jax.Array, weights: jax.Array, alive: jax.Array) -> dict[str, jax.Array]:
    """Says what replicas and weights are worth, taking the blend's logits as those of the replicas, weighted.

        leave_one_out_k = loss(equal weights without k) - loss(equal weights)
        gain            = loss(equal weights) - loss(weights)

    A replica without which equal weights do worse is worth trusting, so its `leave_one_out` is positive. The noise of
    `gain` is its standard error over the samples: where it is not a few times smaller than `gain`, the weights differ
    from equal ones by chance.

    Args:
      logits: [K, S, C], on held-out samples; of replicas that count, finite.
      labels: integers [S]; those below 0, or of no class, do not count.
      weights: [K], of the blend.
      alive: bool [K].

    Returns:
      `leave_one_out` [K], 0 for the dead and for one alone; `gain` and `gain_error`, scalars. In nats, float32.

    >>> logits = jnp.array([[[2.0, 0.0]], [[0.0, 2.0]]])  # one sample; replica 0 is right
    >>> found = diagnose(logits, jnp.array([0]), jnp.array([1.0, 0.0]), jnp.array([True, True]))
    >>> [round(float(x), 2) for x in (*found["leave_one_out"], found["gain"])]  # equal: log 2; alone: log(1 + e^-+2)
    [1.43, -0.57, 0.57]
    """
    alive = alive & jnp.isfinite(logits).all((1, 2))
    logits = jnp.where(alive[:, None, None], logits, 0)
    valid = (labels >= 0) & (labels < logits.shape[-1])
    count = jnp.maximum(valid.sum(), 1).astype(jnp.float32)

    def losses(weights: jax.Array) -> jax.Array:
        pooled, classes = weighted_mean(logits, weights), jnp.where(valid, labels, 0)
        return jnp.where(valid, optax.losses.softmax_cross_entropy_with_integer_labels(pooled, classes), 0)

    def mean(losses: jax.Array) -> jax.Array:
        return losses.sum() / count

    def without(k: jax.Array) -> jax.Array:
        left = alive & (jnp.arange(len(alive)) != k)
        return jnp.where(alive[k] & left.any(), mean(losses(tree.equal_weights(left)) - equal), 0)

    equal = losses(tree.equal_weights(alive))
    gains = equal - losses(normalise(jnp.where(alive, weights, 0), alive))
    return {
        "leave_one_out": jax.lax.map(without, jnp.arange(len(alive))),
        "gain": mean(gains),
        "gain_error": jnp.sqrt(mean(jnp.where(valid, jnp.square(gains - mean(gains)), 0)) / count),
    }
