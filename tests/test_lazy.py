"""The public names: what a package says it has is there, imported at once or at first use, and nothing else shows."""

import ast
import importlib
import pathlib
import pickle
import subprocess
import sys
import types

import pytest

import wavg_jax as wavg
from wavg_jax import models, reporting

MODULES = {"wavg_jax": wavg, "wavg_jax.reporting": reporting}
MODULES |= {f"wavg.{name}": x for name in wavg.__all__ if isinstance(x := getattr(wavg, name), types.ModuleType)}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_dir_lists_the_public_names_alone_and_all_are_there(module):
    assert dir(module) == sorted(module.__all__)
    for name in dir(module):
        value = getattr(module, name)
        assert getattr(value, "__module__", "wavg_jax").split(".")[0] in ("wavg_jax", "collections", "typing")


@pytest.mark.parametrize("package", [models, reporting])
def test_type_checkers_see_the_names_where_they_are_found(package):
    tree = ast.parse(pathlib.Path(package.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in typed.body for alias in node.names}
    assert sorted(homes) == dir(package)
    for name, home in homes.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)


def test_a_name_that_is_not_there_is_an_error_and_a_module_can_be_imported():
    with pytest.raises(AttributeError, match="has no attribute 'RNN'"):
        _ = models.RNN
    with pytest.raises(ImportError, match="cannot import name 'RNN'"):
        from wavg_jax.models import RNN  # noqa: F401
    from wavg_jax.models import quality

    assert quality.__name__ == "wavg_jax.models.quality"


def test_a_process_that_has_only_the_pickle_finds_what_is_in_it():
    network = models.MLP((8,), 3)
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
    said = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(network), capture_output=True, check=True)
    assert said.stdout.decode().strip() == str(network).strip()


def test_flax_comes_with_the_first_network_alone():
    code = """
import sys
from wavg_jax import models
models.classifier, models.fast
assert "flax" not in sys.modules
from wavg_jax.models import *
assert from_linen is models.from_linen and "flax.linen" in sys.modules and "flax.nnx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
