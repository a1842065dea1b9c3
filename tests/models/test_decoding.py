"""generate: what it writes is what whole forward passes would choose, also beyond the cache; it samples the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import filled

from wavg_jax.base import SettingsError
from wavg_jax.models import MLP, Transformer, from_linen, generate, language_model
from wavg_jax.models.transformer import _angles, _rotated

LENGTH, VOCABULARY = 8, 11
PROMPT = np.array([[3, 1, 4], [1, 5, 9]])


def network(**attributes):
    module = Transformer(
        **{"vocabulary": VOCABULARY, "layers": 2, "heads": 2, "width": 16, "length": LENGTH} | attributes
    )
    params, _ = filled(from_linen(module, (LENGTH,), dtype=jnp.int32, make=language_model))
    # Larger than at the start, so that the likeliest token depends on the text.
    return module, jax.tree.map(lambda leaf: 3 * leaf, params)


def logits_of(module, params, tokens):
    return np.asarray(module.apply({"params": params}, jnp.asarray(tokens), train=False))


@pytest.mark.parametrize("rotary", [False, True])
def test_greedy_text_is_what_whole_forward_passes_choose(rotary):
    module, params = network(rotary=rotary)
    text = np.asarray(generate(module, params, PROMPT, LENGTH + 1 - 3))
    assert (text.shape, text.dtype) == ((2, LENGTH + 1), np.int32)
    np.testing.assert_array_equal(text[:, :3], PROMPT)
    chosen = logits_of(module, params, text[:, :-1]).argmax(-1)
    np.testing.assert_array_equal(text[:, 3:], chosen[:, 2:])
    assert len(np.unique(text)) > 3


def test_one_rotary_layer_sees_the_last_tokens_only_however_long_the_text():
    # With one layer, keys and values depend on their own token alone, so a window's whole pass sees the same.
    module, params = network(rotary=True, layers=1)
    text = np.asarray(generate(module, params, PROMPT, 20))
    for end in range(LENGTH, text.shape[1] - 1):
        window = text[:, end + 1 - LENGTH : end + 1]
        np.testing.assert_array_equal(text[:, end + 1], logits_of(module, params, window)[:, -1].argmax(-1), str(end))


def test_rotation_keeps_lengths_and_makes_products_depend_on_distances_alone():
    query, key = (jax.random.normal(jax.random.key(seed), (1, 1, 2, 6)) for seed in (0, 1))

    def product(at, other):
        turned = [_rotated(x, _angles(jnp.array([p]), 6)) for x, p in ((query, at), (key, other))]
        return (turned[0] * turned[1]).sum(-1)

    np.testing.assert_allclose(product(7, 4), product(103, 100), rtol=1e-4, atol=1e-5)
    assert not np.allclose(product(7, 4), product(7, 5), atol=1e-2)
    turned = _rotated(query, _angles(jnp.array([9]), 6))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(query, axis=-1), rtol=1e-5)


def test_temperature_draws_from_the_softmax():
    module, params = network(rotary=True, layers=1)
    many = np.repeat(PROMPT[:1], 4000, axis=0)
    drawn = np.asarray(generate(module, params, many, 1, temperature=2.0, rng=jax.random.key(1)))[:, -1]
    expected = np.asarray(jax.nn.softmax(logits_of(module, params, PROMPT[:1])[0, -1] / 2))
    frequency = np.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    np.testing.assert_allclose(frequency, expected, atol=5 * np.sqrt(0.25 / len(drawn)))
    again, other = (
        np.asarray(generate(module, params, PROMPT, 5, temperature=1.0, rng=jax.random.key(seed))) for seed in (1, 2)
    )
    assert not np.array_equal(again, other)


def test_lengths_and_temperatures_share_a_program_where_they_can(compilations):
    module, params = network(rotary=True)
    key, text = jax.random.key(0), jnp.asarray(PROMPT)
    generate(module, params, text, 5)
    del compilations[:]
    for temperature in (0.5, 1.0):
        generate(module, params, text, 5, temperature=temperature, rng=key)
    assert not compilations


def test_bfloat16_decodes():
    module, params = network(rotary=True, dtype=jnp.bfloat16)
    assert generate(module, params, PROMPT, 4).shape == (2, 7)


BAD = {
    "too long": ({}, {"tokens": 7}, "have 10 tokens, and length=8 with position embeddings allows 9"),
    "no key": ({}, {"temperature": 0.5}, "temperature=0.5 draws at random: set rng= to a key"),
    "one prompt": ({}, {"prompt": [1, 2]}, r"the prompt is int32 of shape \(2,\): give integer tokens \[B, P\]"),
    "no tokens": ({}, {"tokens": 0}, "tokens is 0"),
    "cold": ({}, {"temperature": -1.0}, "temperature is -1.0"),
    "no decoder": ({}, {"module": MLP((4,), 3)}, "takes no `position`"),
    "odd features": ({"rotary": True, "heads": 16}, {}, "width=16 is not a multiple of 32, as heads=16 needs"),
}


@pytest.mark.parametrize(("attributes", "options", "match"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_clear_line(attributes, options, match):
    def call():
        module, params = network(**attributes)
        given = {"module": module, "params": params, "prompt": PROMPT, "tokens": 2} | options
        generate(given.pop("module"), given.pop("params"), given.pop("prompt"), given.pop("tokens"), **given)

    with pytest.raises(SettingsError, match=match) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_a_prompt_of_tokens_beyond_the_vocabulary_is_refused(token):
    module, params = network()
    with pytest.raises(SettingsError, match=r"tokens outside \[0, 11\)"):
        generate(module, params, [[1, token]], 3)
