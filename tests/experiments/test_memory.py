"""What does not fit the memory is refused in one line that says what to lower."""

import jax
import jax.numpy as jnp
import pytest
from binary import invoke

from experiments import compare, train, tune

HUGE = "--local_steps=100000000"


@pytest.mark.parametrize(
    ("binary", "arguments", "says"),
    [
        (train, [HUGE], "--local_steps"),
        (compare, [HUGE], "--local_steps"),
        (train, [HUGE, "--feed=stream"], "--feed=resident"),
        (tune, [HUGE], "--local_steps"),
    ],
    ids=["train", "compare", "streamed", "tune"],
)
def test_rounds_that_do_not_fit_the_memory_are_refused_before_they_are_made(
    binary, arguments, says, capfd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert invoke(binary.main, *arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert says in line
    assert "GB, more than a quarter" in line
    assert list(tmp_path.iterdir()) == []


def _asks_for_too_much():
    raise MemoryError


def _asks_xla_for_too_much():
    jax.jit(lambda: jnp.ones((1 << 24, 1 << 24)) + 1)().block_until_ready()


def _is_told_so_by_a_cpu():
    raise jax.errors.JaxRuntimeError("INTERNAL: Error: Out of memory allocating 25600000000 bytes.")


@pytest.mark.parametrize(
    "asks", [_asks_for_too_much, _asks_xla_for_too_much, _is_told_so_by_a_cpu], ids=["host", "xla", "cpu"]
)
def test_out_of_memory_is_one_line_that_says_what_to_lower(asks, capfd):
    assert invoke(lambda argv: asks()) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: out of memory")
    for flag in ("--replicas", "--batch_size", "--hidden", "--local_steps"):
        assert flag in line
