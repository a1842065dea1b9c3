"""Quicker compilation where JAX compiles with few optimizations: in the tests, and in the processes that they spawn."""

import jax


def use_plain_loops():
    """Lets XLA do without its emitters of fused loops, which take half the time that is left.

    jaxlib 0.12 has no other ones, and aborts if `XLA_FLAGS` names the option.
    """
    if jax.__version_info__ >= (0, 11):
        return

    from jax._src import compiler

    compile_options = compiler.get_compile_options

    def with_plain_loops(*args, env_options_overrides=None, **kwargs):
        if jax.config.values["jax_disable_most_optimizations"]:
            env_options_overrides = {"xla_cpu_use_fusion_emitters": False} | (env_options_overrides or {})
        return compile_options(*args, env_options_overrides=env_options_overrides, **kwargs)

    compiler.get_compile_options = with_plain_loops
