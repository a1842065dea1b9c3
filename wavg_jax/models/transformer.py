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

    Token and learned position embeddings, the layers, LayerNorm, then the logits. Attention is causal: the logits at a
    position depend only on the tokens up to it. The MLP is 4 times as wide as the rest and uses GELU. The logits are
    products with the token embeddings (tied weights), so the network has
    `(vocabulary + length + 12 * layers * width) * width` parameters, plus biases and norms. Dropout acts on the
    embeddings and on the output of each branch, not inside the attention.

    Attributes:
      vocabulary: number of distinct tokens, and of logits.
      layers: number of layers, at least 1.
      heads: number of attention heads; divides `width`.
      width: features per token.
      length: most tokens in a sequence; shorter ones are fine.
      dropout: dropout rate, in [0, 1).
      dtype: dtype of the computation; parameters are float32 unless cast.

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
    (arXiv:1608.05859).
    """

    vocabulary: int = 256
    layers: int = 2
    heads: int = 4
    width: int = 128
    length: int = 128
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        """Computes float32 logits [B, T, vocabulary] of tokens [B, T], integers below `vocabulary`.

        The logits at t predict the token at t + 1. A token of `vocabulary` or more turns its whole sequence into NaN.
        """
        self._check(tokens)
        # From any integer dtype: under strict promotion, bytes do not mix with the int32 of indexing.
        tokens = tokens.astype(jnp.int32)
        embed = nn.Embed(self.vocabulary, self.width, self.dtype, embedding_init=_EMBEDDING_INIT, name="tokens")
        positions = self.param("positions", _EMBEDDING_INIT, (self.length, self.width))
        x = embed(tokens) + positions[None, : tokens.shape[1]].astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for layer in range(self.layers):
            x = _Layer(self.heads, self.layers, self.dropout, self.dtype, name=f"layer_{layer}")(x, train)
        return embed.attend(_norm(x, self.dtype)).astype(jnp.float32)

    def _check(self, tokens: jax.Array) -> None:
        for name in ("vocabulary", "layers", "heads", "width", "length"):
            check(name, getattr(self, name), whole(1))
        check("dropout", self.dropout, number(0, below=1))
        if self.width % self.heads:
            raise SettingsError(f"width={self.width} is not a multiple of heads={self.heads}: change one of them")
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

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        # As in GPT-2: the variance of the sum of the 2 * layers branches does not grow with their number.
        last_init = nn.initializers.variance_scaling(0.5 / self.layers, "fan_in", "truncated_normal")

        # One product for all three: a third of the leaves to dispatch and of the matmuls to run.
        y = nn.Dense(3 * width, dtype=self.dtype, name="qkv")(_norm(x, self.dtype))
        query, key, value = (part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(y, 3, axis=-1))
        # Not jax.nn.dot_product_attention: in bfloat16 its gradient mixes dtypes, which strict promotion refuses.
        mask = nn.make_causal_mask(jnp.zeros((1, x.shape[1])), dtype=bool)
        y = nn.dot_product_attention(query, key, value, mask=mask, dtype=self.dtype)
        y = nn.Dense(width, dtype=self.dtype, kernel_init=last_init, name="attended")(y.reshape(x.shape))
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)

        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="up")(_norm(x, self.dtype)))
        y = nn.Dense(width, dtype=self.dtype, kernel_init=last_init, name="down")(y)
        return x + nn.Dropout(self.dropout, deterministic=not train)(y)


def _norm(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    # Flax computes the statistics in float32 and promotes to it on purpose, in any compute dtype.
    with jax.numpy_dtype_promotion("standard"):
        return nn.LayerNorm(dtype=dtype)(x)
