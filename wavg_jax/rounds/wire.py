"""What a replica sends at the sync, and in how many bits.

    float32     its parameters as they are: 4 bytes a number (2 if they are stored in bfloat16), nothing is lost
    bfloat16    its change since the last global parameters, rounded: 2 bytes
    int8        its change in blocks of `BLOCK` numbers, each with a float32 scale, rounded stochastically:
                1 + 4 / BLOCK bytes. What rounding leaves over is sent with the next change: error feedback (Seide et
                al. 2014, doi:10.21437/Interspeech.2014-274; Karimireddy et al. 2019, arXiv:1901.09847)

These are bytes of one replica. In float32 a device sends one weighted sum of its replicas, unless the weighting reads
them all; narrower, it sends each of them, since sums would have to be rounded once more on their way. So K replicas in
int8 send K 1.016 / 8 times the bytes of float32, half for K = 4, and more from K = 8 on
(`wavg_jax.rounds.exchange.wider`).

The same arithmetic runs on one device, where nothing travels, so that a run does not depend on where its replicas live.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wavg_jax import tree
from wavg_jax.base import PyTree
from wavg_jax.devices.network import BLOCK, WIRES

FORMATS = tuple(WIRES)

_MOST = 127.0


class Blocks(NamedTuple):
    """A change in int8: `numbers` [blocks, BLOCK] int8, to be multiplied by `scales` [blocks] float32."""

    numbers: jax.Array
    scales: jax.Array


def _flat(params: PyTree) -> jax.Array:
    return jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in jax.tree.leaves(params)])


def _unflat(flat: jax.Array, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    ends = [0]
    for x in leaves:
        ends.append(ends[-1] + x.size)
    parts = [flat[a:b].reshape(x.shape) for a, b, x in zip(ends, ends[1:], leaves, strict=False)]
    return jax.tree.unflatten(structure, parts)


def no_residual(wire: str, params: PyTree, replicas: int) -> Any:
    """The residual before the first round: zeros float32 [K, n], or `()` for a wire that carries none."""
    return jnp.zeros((replicas, tree.count(params)), jnp.float32) if wire == "int8" else ()


def pack(wire: str, params: PyTree, start: PyTree, residual: Any, rng: jax.Array) -> tuple[PyTree, Any]:
    """Turns one replica's parameters into what it sends.

    Args:
      wire: one of `FORMATS`.
      params: of the replica after its local steps [...].
      start: the global parameters before them.
      residual: what it has not sent yet, float32 [n], or `()`.
      rng: its key for stochastic rounding.

    Returns:
      What it sends, and its next residual.
    """
    if wire == "float32":
        return params, residual
    change = _flat(params) - _flat(start)
    if wire == "bfloat16":
        return change.astype(jnp.bfloat16), residual
    blocks = quantise(change + residual, rng)
    return blocks, change + residual - restore(blocks, len(change))


def arriving(wire: str, packed: PyTree, alive: jax.Array) -> jax.Array:
    """Which of the `alive` replicas [K] sent finite numbers: a narrow wire overflows sooner than float32, and what it
    carries over may not be finite where the replica is.

    Args:
      wire: one of `FORMATS`.
      packed: what they send [K, ...]; see `pack`.
      alive: bool [K]; those whose parameters are finite.
    """
    return alive if wire == "float32" else alive & tree.all_finite(packed)


def unpack(wire: str, sent: PyTree, start: PyTree) -> PyTree:
    """One replica's parameters as its receivers know them; see `pack`."""
    if wire == "float32":
        return sent
    change = restore(sent, tree.count(start)) if wire == "int8" else sent.astype(jnp.float32)
    return jax.tree.map(lambda p, c: (p.astype(jnp.float32) + c).astype(p.dtype), start, _unflat(change, start))


def quantise(x: jax.Array, rng: jax.Array) -> Blocks:
    """Rounds float32 [n] up or down at random to multiples of its block's largest magnitude / 127, right on average.

    >>> blocks = quantise(jnp.array([0.0, 127.0, -63.5]), jax.random.key(0))
    >>> blocks.numbers.shape, blocks.scales.tolist(), blocks.numbers[0, :2].tolist()
    ((1, 256), [1.0], [0, 127])
    """
    blocks = math.ceil(len(x) / BLOCK)
    rows = jnp.pad(x, (0, blocks * BLOCK - len(x))).reshape(blocks, BLOCK)
    largest = jnp.abs(rows).max(1)
    scales = jnp.where(largest == 0, 1, largest / _MOST)  # whole numbers cannot say that something is not finite
    up = jax.random.uniform(rng, rows.shape, jnp.float32)
    numbers = jnp.clip(jnp.floor(rows / scales[:, None] + up), -_MOST, _MOST)
    return Blocks(numbers.astype(jnp.int8), scales)


def restore(blocks: Blocks, n: int) -> jax.Array:
    """The numbers [n], float32, that blocks stand for."""
    return (blocks.numbers.astype(jnp.float32) * blocks.scales[:, None]).reshape(-1)[:n]
