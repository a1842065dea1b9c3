"""Strict JAX for every test: 8 emulated CPU devices, no silent promotion of dtypes or ranks; and compilation, where
nearly all the time of the tests goes, that is quick and done once.

Programs are compiled with few optimizations, but in tests marked `optimized`, and kept in pytest's cache for the other
processes and the next run. `--optimize` compiles everything as a user would; `--cache-clear` starts afresh.
"""

import os
import pathlib
import shutil
import subprocess

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import fuzz  # noqa: E402 - jax must be configured before anything else
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from quick import use_plain_loops  # noqa: E402

from wavg_jax.training.programs import initialiser, programs_of  # noqa: E402

settings.register_profile("wavg", deadline=None, max_examples=25)  # the first example compiles
settings.load_profile("wavg")
use_plain_loops()

HERE = pathlib.Path(__file__).parent

LONGEST = [HERE / name for name in ("weighting", "training", "rounds")]
"""Tests that start first, so that no process works alone at the end."""

MOST_BYTES = 2**28
"""Of kept programs, beyond which all are deleted: those of changed code are never asked for again."""


def pytest_addoption(parser):
    parser.addoption(
        "--optimize", action="store_true", help="compile all tests as users' programs, not those marked optimized alone"
    )
    parser.addoption("--fuzz", type=int, default=50, help="how many cases of each kind to draw at random")
    parser.addoption("--fuzz_record", help="folder for a record of what became of the cases")


def pytest_configure(config):
    if config.getoption("--fuzz_record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(fuzz.Record(config.getoption("--fuzz_record")))
    compile_quickly(not config.getoption("--optimize"))
    if hasattr(config, "cache"):  # there is none under `-p no:cacheprovider`
        kept = config.cache.mkdir("programs")
        if not hasattr(config, "workerinput") and sum(file.stat().st_size for file in kept.iterdir()) > MOST_BYTES:
            shutil.rmtree(kept)
        if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
            keep_programs(kept)


def keep_programs(folder):
    """Lets JAX keep compiled programs, and hides from the library that it does.

    The library stores how it maps replicas beside them, and the tests of that start with nothing stored.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.jit(lambda: 0)()  # the first compilation opens the cache for the whole process
    jax.config.update("jax_compilation_cache_dir", None)


def pytest_collection_modifyitems(items):
    """The longest files first; those of a file that need optimized programs last, as they empty JAX's caches."""
    place = {path: number for number, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (not within(item.path, LONGEST), place[item.path], is_optimized(item)))


def within(path, places):
    return any(path.is_relative_to(place) for place in places)


def is_optimized(item):
    """Whether a test says something of users' programs alone, such as that two give the same bits."""
    return item.get_closest_marker("optimized") is not None


@pytest.hookimpl(tryfirst=True)  # fixtures compile too
def pytest_runtest_setup(item):
    """Compiles such tests, the last ones of a file, as a user's programs, also what was compiled with less care."""
    with_care = item.config.getoption("--optimize") or is_optimized(item)
    if jax.config.values["jax_disable_most_optimizations"] and with_care:
        jax.clear_caches()
        programs_of.cache_clear()
        initialiser.cache_clear()
    compile_quickly(not with_care)


def compile_quickly(asked):
    """Sets how programs are compiled from now on, here and in the processes that are started."""
    jax.config.update("jax_disable_most_optimizations", asked)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(asked))


@pytest.fixture
def cases(request, record_property):
    """`cases(kind, share=1)` opens the cases of a kind, of which `--fuzz` says how many, times the share."""

    def opened(kind, share=1.0):
        tries = max(round(share * request.config.getoption("--fuzz")), 1)
        return fuzz.cases_of(kind, tries, record_property)

    return opened


@pytest.fixture
def disk(tmp_path):
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def standard_promotion():
    """For optax.adam, which raises a float to an integer power; strict promotion refuses that."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def compilations():
    """Grows by one entry with everything that XLA compiles, or reads from the kept programs, from now on."""
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled
