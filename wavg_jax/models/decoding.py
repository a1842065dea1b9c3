"""Lets a language model write: greedy or at a temperature, one token after another from cached keys and values."""

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wavg_jax.arguments import as_whole, check, instance, number
from wavg_jax.base import PyTree, SettingsError


def generate(
    module: nn.Module,
    params: PyTree,
    prompt: ArrayLike,
    tokens: int,
    *,
    temperature: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Continues prompts, in one compiled program.

        x_{t+1} ~ softmax(logits_t / temperature),    or argmax(logits_t) at temperature 0

    Args:
      module: a `Transformer`, or a Linen module that decodes like one. A rotary one writes as much as you like, each
        token seeing the `length` before it; one with position embeddings, up to `length`.
      params: its parameters.
      prompt: tokens [B, P], integers, P at least 1.
      tokens: N, how many to write.
      temperature: 0 for the likeliest token every time, 1 for the model's own distribution.
      rng: a key; needed unless the temperature is 0.

    Returns:
      Prompts and what was written, int32 [B, P + N].

    Raises:
      SettingsError: an argument is out of range, the module does not decode, or the text would be longer than it can.

    Example:
      >>> from wavg_jax.models import Transformer
      >>> net = Transformer(vocabulary=50, layers=1, width=16, length=8, rotary=True)
      >>> params = net.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), train=False)["params"]
      >>> generate(net, params, [[1, 2, 3]], 20).shape
      (1, 23)
    """
    check("module", module, instance(nn.Module, "a flax.linen.Module"))
    tokens, prompt = as_whole("tokens", tokens, 1), jnp.asarray(prompt)
    check("temperature", temperature, number(0))
    if "position" not in inspect.signature(type(module).__call__).parameters:
        raise SettingsError(
            f"{type(module).__name__}.__call__ takes no `position`, so it cannot decode: see Transformer"
        )
    if prompt.ndim != 2 or not prompt.size or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise SettingsError(f"the prompt is {prompt.dtype} of shape {prompt.shape}: give integer tokens [B, P]")
    vocabulary = getattr(module, "vocabulary", None)
    concrete = not isinstance(prompt, jax.core.Tracer)
    if vocabulary is not None and concrete and not 0 <= int(prompt.min()) <= int(prompt.max()) < vocabulary:
        raise SettingsError(f"the prompt has tokens outside [0, {vocabulary}), the vocabulary of the module")
    if rng is None:
        if temperature:
            raise SettingsError(f"temperature={temperature:g} draws at random: set rng= to a key")
        rng = jax.random.key(0)
    longest, length = getattr(module, "length", None), prompt.shape[1] + tokens
    if longest is not None and not getattr(module, "rotary", False) and length > longest + 1:
        raise SettingsError(
            f"prompt and text have {length} tokens, and length={longest} with position embeddings allows "
            f"{longest + 1}: ask for fewer tokens, or train with rotary=True"
        )
    return _written(module, tokens, params, prompt.astype(jnp.int32), jnp.float32(temperature), rng)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _written(
    module: Any, tokens: int, params: PyTree, prompt: jax.Array, temperature: jax.Array, rng: jax.Array
) -> jax.Array:
    """One step a position: those of the prompt fill the cache, and their predictions are dropped."""
    given = prompt.shape[1]

    def logits_of(cache: PyTree, token: jax.Array, position: jax.Array) -> tuple[jax.Array, PyTree]:
        variables = {"params": params, **cache}
        logits, cache = module.apply(variables, token[:, None], train=False, position=position, mutable=["cache"])
        return logits[:, 0], cache

    def step(carry: tuple[PyTree, jax.Array], position: jax.Array) -> tuple[tuple[PyTree, jax.Array], jax.Array]:
        cache, token = carry
        logits, cache = logits_of(cache, token, position)
        # By the highest perturbed score at any temperature, so that 0 needs no program of its own.
        noise = jax.random.gumbel(jax.random.fold_in(rng, position), logits.shape)
        chosen = (logits + temperature * noise).argmax(-1).astype(jnp.int32)
        following = jnp.minimum(position + 1, given - 1)
        token = jnp.where(position + 1 < given, prompt[:, following], chosen)
        return (cache, token), token

    _, empty = jax.eval_shape(logits_of, {}, prompt[:, 0], jnp.int32(0))
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)
    _, text = jax.lax.scan(step, (cache, prompt[:, 0]), jnp.arange(given + tokens - 1))
    return jnp.concatenate([prompt[:, :1], text.T], axis=1)
