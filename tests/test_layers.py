"""The house: imports go down only, the core knows no flax and no devices, and files stay readable."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "wavg_jax"

# From the ground up; a room imports from floors below its own alone.
FLOORS = [
    {"base", "lazy"},
    {"arguments", "checks", "extras"},
    {"tree"},
    {"devices", "data", "models"},
    {"storage"},
    {"averaging"},
    {"weighting"},
    {"rounds"},
    {"training", "reporting", "soups"},
    {"elastic", "estimators"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def home(path):
    """`wavg_jax/data/feed.py` is in the room `data`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The names of what a file imports, in full."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor():
    assert {home(path) for path in MODULES} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    here = home(path)
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] != "experiments", f"{path} imports a binary"
        if parts[0] == "wavg_jax" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != here:
            assert FLOOR[parts[1]] < FLOOR[here], f"{path}: {here} may not import {parts[1]}"


def test_inside_a_room_imports_go_in_no_circle():
    for room in FLOOR:
        files = [path for path in MODULES if home(path) == room]
        left = {
            path.stem: {name.split(".")[2] for name in imported(path) if name.startswith(f"wavg_jax.{room}.")}
            for path in files
        }
        left = {name: needs & set(left) - {name} for name, needs in left.items()}
        while ready := [name for name, needs in left.items() if not needs]:
            left = {name: needs - set(ready) for name, needs in left.items() if name not in ready}
        assert not left, f"{room}: {left} import one another"


NAMESAKES = {"averaging/averager.py", "training/fit.py"}
"""Files whose function of the same name is the one that users call: `wavg_jax.averager` and `wavg_jax.fit`."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_or_class_has_the_name_of_its_module(path):
    body = ast.parse(path.read_text()).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert (path.stem in defined) == (str(path.relative_to(PACKAGE)) in NAMESAKES)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_needs_no_flax_and_only_placement_knows_devices(path):
    text, names = path.read_text(), set(imported(path))
    if home(path) != "models":
        assert not any(name.split(".")[0] == "flax" for name in names)
    if home(path) != "devices":
        for word in ("shard_map", "PartitionSpec", "jax.devices(", "pmap("):
            assert word not in text, f"{path} speaks of {word}"
    if path.name != "checkpoints.py":
        assert not any(name.split(".")[0] == "orbax" for name in names)
    assert not any(name.split(".")[0] == "tensorflow" for name in names)


def test_importing_the_library_imports_little_beyond_jax_and_optax():
    heavy = {"IPython", "PIL", "absl", "filelock", "flax", "markdown_it", "matplotlib", "msgpack", "orbax", "rich"}
    heavy |= {"scipy", "sklearn", "tensorflow", "tensorflow_datasets", "torch", "tqdm", "yaml"}
    code = """
import sys
import jax, optax
before = set(sys.modules)
import wavg_jax
print(*sys.modules.keys() - before)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    added = [name for name in said.split() if name.split(".")[0] != "wavg_jax"]
    assert not {name.split(".")[0] for name in added} & heavy
    assert len(added) <= 60, sorted(added)  # 37 with jax 0.10.2, most of them under jax.extend


# Two dashes that are no flags of ours: variables of style sheets, options of git, TFDS and XLA.
FOREIGN = re.compile(r"--(?:ink|paper|rule|soft|link|shade)\b|--(?:always|exclude|abbrev|dirty|xla_\w+)\b|`tfds [^`]*`")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_names_arguments_and_knows_no_command(path):
    text = FOREIGN.sub("", path.read_text())
    assert not re.findall(r"(?<!\w)--[a-z]\w*", text), (
        "a flag: name the argument, such as devices=3; the binaries translate"
    )
    assert "experiments" not in text, "the library knows nothing of its callers"


@pytest.mark.parametrize(
    "path", [*MODULES, *(ROOT / "experiments").rglob("*.py")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 50, f"{path}: {node.name} has {lines} lines"
