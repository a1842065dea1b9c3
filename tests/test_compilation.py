"""The tests' own compilation: which programs are optimized, and that each is compiled once."""

import jax
import jax.numpy as jnp
import pytest
from conftest import EXACT, LONGEST, within


def test_the_places_with_a_rule_of_their_own_exist():
    assert [place for place in (*EXACT, *LONGEST) if not place.exists()] == []


def test_a_file_outside_of_exact_is_compiled_quickly_unless_asked_otherwise(request):
    assert not within(request.path, EXACT)
    asked = request.config.getoption("--optimize")
    assert jax.config.values["jax_disable_most_optimizations"] is not asked
    program = jax.jit(lambda x: jnp.sin(x) * 2 + 1).lower(jnp.ones(3)).compile()
    assert program(jnp.ones(3)).shape == (3,)  # the compiler knows every option that it is given


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
