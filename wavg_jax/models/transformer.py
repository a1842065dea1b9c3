"""A small language model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from wavg_jax.arguments import check, number, whole
from wavg_jax.base import SettingsError

# GPT-2's. The logits share the table, so the first loss is also close to log(vocabulary).
_EMBEDDING_INIT = nn.initializers.normal(0.02)


class Transformer(nn.Module):
    """A decoder-only transformer like GPT-2: `x += attention(norm(x)); x += mlp(norm(x))` in every layer.

    Token and learned position embeddings, the layers, LayerNorm, then the logits; or, instead of position embeddings,
    rotary attention, which sees distances alone. Attention is causal: the logits at a position depend only on the
    tokens up to it. The MLP is 4 times as wide as the rest and uses GELU. The logits are
    products with the token embeddings (tied weights), so the network has
    `(vocabulary + length + 12 * layers * width) * width` parameters, plus biases and norms, and without the `length` if
    rotary. Dropout acts on the
    embeddings and on the output of each branch, not inside the attention.

    Attributes:
      vocabulary: number of distinct tokens, and of logits.
      layers: number of layers, at least 1.
      heads: number of attention heads; divides `width`.
      width: features per token.
      length: most tokens in a sequence; shorter ones are fine.
      dropout: dropout rate, in [0, 1).
      dtype: dtype of the computation; parameters are float32 unless cast.
      rotary: whether positions turn queries and keys, rather than be embedded.

    Raises:
      SettingsError: when called, if an attribute is out of range, or the tokens are not integers [B, T] with T from 1
        to `length`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = Transformer(vocabulary=50, layers=1, width=16, length=12)
      >>> tokens = jnp.zeros((5, 12), jnp.uint8)
      >>> logits, params = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), tokens, train=False))
      >>> logits.shape
      (5, 12, 50)

    References: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2;
    https://github.com/openai/gpt-2). Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017
    (arXiv:1608.05859). Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021
    (arXiv:2104.09864).
    """

    vocabulary: int = 256
    layers: int = 2
    heads: int = 4
    width: int = 128
    length: int = 128
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    rotary: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool, position: jax.Array | None = None) -> jax.Array:
        """Computes float32 logits [B, T, vocabulary] of tokens [B, T], integers below `vocabulary`.

        The logits at t predict the token at t + 1. A token of `vocabulary` or more turns its whole sequence into NaN.

        Given a `position`, an int32 scalar, it decodes instead: the tokens [B, 1] are those at that position, and
        attend to the last `length` ones, whose keys and values the collection `cache` holds; see
        `wavg_jax.models.generate`.
        """
        self._check(tokens)
        # From any integer dtype: under strict promotion, bytes do not mix with the int32 of indexing.
        tokens = tokens.astype(jnp.int32)
        embed = nn.Embed(self.vocabulary, self.width, self.dtype, embedding_init=_EMBEDDING_INIT, name="tokens")
        x, at = embed(tokens), jnp.arange(tokens.shape[1]) if position is None else position[None]
        if not self.rotary:
            positions = self.param("positions", _EMBEDDING_INIT, (self.length, self.width))
            x = x + positions[at][None].astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        angles = _angles(at, self.width // self.heads) if self.rotary else None
        for layer in range(self.layers):
            block = _Layer(self.heads, self.layers, self.dropout, self.dtype, self.length, name=f"layer_{layer}")
            x = block(x, train, angles, position)
        return embed.attend(_norm(x, self.dtype)).astype(jnp.float32)

    def _check(self, tokens: jax.Array) -> None:
        for name in ("vocabulary", "layers", "heads", "width", "length"):
            check(name, getattr(self, name), whole(1))
        check("dropout", self.dropout, number(0, below=1))
        # Rotation turns pairs of features.
        unit = 2 * self.heads if self.rotary else self.heads
        if self.width % unit:
            raise SettingsError(
                f"width={self.width} is not a multiple of {unit}, as heads={self.heads} needs: change one of them"
            )
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2:
            raise SettingsError(
                f"a Transformer needs integer tokens [B, T], got {tokens.dtype} of shape {tokens.shape}: "
                "pass dtype=jnp.int32 to from_linen"
            )
        if not 1 <= tokens.shape[1] <= self.length:
            raise SettingsError(
                f"the sequences have {tokens.shape[1]} tokens, but length={self.length} allows 1 to {self.length}: "
                "cut them or raise length="
            )


class _Layer(nn.Module):
    """One layer, [B, T, width] -> [B, T, width], out of `layers`."""

    heads: int
    layers: int
    dropout: float
    dtype: DTypeLike
    length: int

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, angles: jax.Array | None, position: jax.Array | None = None
    ) -> jax.Array:
        width = x.shape[-1]
        # As in GPT-2: the variance of the sum of the 2 * layers branches does not grow with their number.
        last_init = nn.initializers.variance_scaling(0.5 / self.layers, "fan_in", "truncated_normal")

        # One product for all three: a third of the leaves to dispatch and of the matmuls to run.
        y = nn.Dense(3 * width, dtype=self.dtype, name="qkv")(_norm(x, self.dtype))
        query, key, value = (part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(y, 3, axis=-1))
        if angles is not None:
            query, key = _rotated(query, angles), _rotated(key, angles)
        if position is None:
            mask = nn.make_causal_mask(jnp.zeros((1, x.shape[1])), dtype=bool)
        else:
            key, value, mask = self._remembered(key, value, position)
        # Not jax.nn.dot_product_attention: in bfloat16 its gradient mixes dtypes, which strict promotion refuses.
        y = nn.dot_product_attention(query, key, value, mask=mask, dtype=self.dtype)
        y = nn.Dense(width, dtype=self.dtype, kernel_init=last_init, name="attended")(y.reshape(x.shape))
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)

        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="up")(_norm(x, self.dtype)))
        y = nn.Dense(width, dtype=self.dtype, kernel_init=last_init, name="down")(y)
        return x + nn.Dropout(self.dropout, deterministic=not train)(y)

    def _remembered(
        self, key: jax.Array, value: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Puts one position's key and value [B, 1, heads, features] into the cache, a ring over positions; returns all
        that it holds [B, length, ...], and which of them are filled."""

        def kept(name: str, one: jax.Array) -> jax.Array:
            shape = (one.shape[0], self.length, *one.shape[2:])
            ring = self.variable("cache", name, jnp.zeros, shape, one.dtype)
            ring.value = jax.lax.dynamic_update_slice_in_dim(ring.value, one, position % self.length, axis=1)
            return ring.value

        return kept("keys", key), kept("values", value), (jnp.arange(self.length) <= position)[None, None, None]


def _angles(positions: jax.Array, features: int) -> jax.Array:
    """The angles [T, features / 2] by which positions [T] turn the pairs of a head's features."""
    pairs = features // 2
    return positions.astype(jnp.float32)[:, None] * jnp.float32(10_000) ** (-jnp.arange(pairs) / pairs)[None]


def _rotated(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the features of queries or keys [B, T, heads, features], i and i + features / 2 as a pair."""
    cos, sin = (turn(angles)[None, :, None].astype(x.dtype) for turn in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _norm(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    # Flax computes the statistics in float32 and promotes to it on purpose, in any compute dtype.
    with jax.numpy_dtype_promotion("standard"):
        return nn.LayerNorm(dtype=dtype)(x)
