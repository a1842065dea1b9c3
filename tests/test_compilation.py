"""The tests' own compilation: which programs are optimized, and that each is compiled once."""

import os

import jax
import jax.numpy as jnp
import pytest
from conftest import LONGEST


def test_the_places_with_a_rule_of_their_own_exist():
    assert [place for place in LONGEST if not place.exists()] == []


CALL = jax.jit(lambda x: jnp.sin(x) * 2 + 1)


def test_a_test_is_compiled_quickly_unless_asked_otherwise(request):
    asked = request.config.getoption("--optimize")
    assert jax.config.values["jax_disable_most_optimizations"] is not asked
    assert os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == str(int(not asked))
    CALL(jnp.ones(3))
    program = jax.jit(lambda x: jnp.sin(x) * 2 + 1).lower(jnp.ones(3)).compile()
    assert program(jnp.ones(3)).shape == (3,)  # the compiler knows every option that it is given


@pytest.mark.optimized
def test_a_marked_test_compiles_with_care_what_was_compiled_without(request, compilations):
    assert not jax.config.values["jax_disable_most_optimizations"]
    assert os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0"
    CALL(jnp.ones(3))
    assert compilations or request.config.getoption("--optimize")


def test_a_program_is_read_and_not_compiled_again(request):
    if not hasattr(request.config, "cache"):
        pytest.skip("nothing is kept without pytest's cache")
    read = []
    jax.monitoring.register_event_listener(lambda event, **_: read.append(event.endswith("/cache_hits")))
    for _ in range(2):
        jax.jit(lambda x: jnp.cos(x) * 3 + 1)(jnp.ones(5))  # another function each time
    assert any(read)


def test_the_library_does_not_see_where_programs_are_kept():
    assert jax.config.jax_compilation_cache_dir is None
