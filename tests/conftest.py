"""Strict JAX for every test: 8 emulated CPU devices, no silent promotion of dtypes or ranks."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import pytest  # noqa: E402 - jax must be configured before anything else
from hypothesis import settings  # noqa: E402

settings.register_profile("wavg", deadline=None, max_examples=25)  # the first example compiles
settings.load_profile("wavg")


@pytest.fixture
def standard_promotion():
    """For optax.adam, which raises a float to an integer power; strict promotion refuses that."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def compilations():
    """Grows by one entry with everything that XLA compiles from now on."""
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled


@pytest.fixture(scope="module")
def compile_quickly():
    """For tests that compile far longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
