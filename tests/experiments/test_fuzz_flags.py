"""Flags and flag files drawn at random, for the real binaries: each process ends with 0, or with 2 and one line."""

import functools
import importlib
import pathlib
import re
import shutil

import forked
import fuzz
import hypothesis.strategies as st
import numpy as np
import pytest
from absl import flags

from wavg_jax.storage.rows import read_rows
from wavg_jax.storage.schema import FILE
from wavg_jax.storage.tensors import save_safetensors

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    **{"rounds": "1", "replicas": "2", "local_steps": "2", "batch_size": "4", "hidden": "4", "devices": "1"},
    **{"heldout": "20", "seeds": "0", "steps": "2", "total_steps": "2", "arms": "plain", "tune": "plain"},
    **{"rates": "0.1", "tuning_seeds": "7", "scenarios": "iid", "weightings": "plain", "noisy": "0"},
    **{"cost_weightings": "plain", "subsets": "16", "evidence_arms": "plain,oracle", "tuning_samples": "50"},
    **{"worker_counts": "10", "wire_formats": "float32", "replica_map": "vmap", "data_dir": "nothing"},
    **{"controlled": "plain", "readings": "temperature", "evidence_scenarios": "iid"},
}
"""What makes a run small, where a binary reads it."""
UNUSED = {"expected": ("seeds",)}
"""Flags of which a binary says that they have no effect."""
BINARIES = {
    **dict.fromkeys(["train", "compare", "tune", "scenarios", "reductions", "scoring_cost", "evidence"], ()),
    **dict.fromkeys(["plan", "expected"], ()),
    "report": ("done",),
    "soup": ("a.safetensors", "b.safetensors"),
}
"""Name -> its arguments that are no flags."""
ENDLESS = {"rounds", "total_steps", "layers", "named", "checkpoint_every", "start_timeout", "heartbeat"}
"""Flags for which a large number is no mistake, and takes its time."""
TEXTS = [
    "",
    " ",
    "x",
    "nan",
    "None",
    "a\nb",
    "é",
    "\u202e",
    "\udcff",
    "<b>",
    "%s{0}",
    "x" * 300,
    "-1",
    "1;2",
    "'",
    "--",
]
PATHS = [
    "done",
    "good.npz",
    "torn.npz",
    "a.txt",
    "a.safetensors",
    "nowhere/x",
    "file/x",
    "/proc/x",
    "~nobody",
    ".",
    "/",
]


def numbers(flag):
    """Values of a number: those at its bounds, and beyond."""
    low, high = (getattr(flag.parser, bound, None) for bound in ("lower_bound", "upper_bound"))
    near = [bound + step for bound in (low, high) if bound is not None for step in (-1, 0, 1)]
    far = [] if flag.name in ENDLESS else [10**12, 2**63, 10**40]
    if isinstance(flag.parser, flags.FloatParser):
        far = ["inf", "-inf", "nan", "1e-320", "1e308", 0.5, 1e-3]
    return [str(value) for value in (*near, 0, 1, 2, 3, *far)] + ["", "x", "0x2", "1_0", "2.5", " 2", "٣", "-", "1e1"]


def values(flag):
    """A strategy of what to give a flag."""
    parser, default = flag.parser, flag.default
    if isinstance(parser, flags.IntegerParser | flags.FloatParser):
        return st.sampled_from(numbers(flag))
    if isinstance(parser, flags.BooleanParser):
        return st.sampled_from(["true", "false", "1", "maybe", ""])
    if isinstance(parser, flags.EnumParser):
        return st.sampled_from([*parser.enum_values, "x", "", parser.enum_values[0].upper()])
    if isinstance(parser, flags.ListParser):
        entries = [str(entry) for entry in default or ()][:8]
        known = st.lists(st.sampled_from([*entries, "0", "1", "2", "0.1"]), max_size=3).map(",".join)
        return st.one_of(known, st.sampled_from([*TEXTS, ",", "1,", "1,1", "-1", "1e400", "1e-9", str(10**12)]))
    return st.sampled_from(TEXTS + PATHS)


@functools.cache
def own_flags(name):
    """The flags of a binary by name, and those of JAX and processes."""
    module = importlib.import_module(f"experiments.{name}")
    own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)]
    return {name: flags.FLAGS[name] for name in own} | {"matmul_precision": flags.FLAGS["matmul_precision"]}


STRANGE = ["--nosuch=1", "rounds=3", "--", "-", "", "--=", "---x", "--rounds", "--norounds", "--seed", "-o", "\udcff"]
STRANGE += ["--flagfile=nowhere", "--flagfile=.", "--flagfile=self.flags", "--flagfile=", "--undefok=x", "--resume"]
STRANGE += ["--fromenv=rounds", "--tryfromenv=PATH", "--help", "--help=x", "--only_check_args", "x" * 300]


@st.composite
def commands(draw, name):
    """Arguments of a binary: those of a small run, and some that may be anything."""
    own = own_flags(name)
    given = {flag: value for flag, value in TINY.items() if flag in own and flag not in UNUSED.get(name, ())}
    asked = draw(st.lists(st.sampled_from(sorted(own)), min_size=0, max_size=3, unique=True))
    given |= {flag: draw(values(own[flag])) for flag in asked}
    arguments = [f"--{flag}={value}" for flag, value in given.items()]
    rest = list(BINARIES[name])
    if draw(st.integers(0, 5)) == 0:
        rest.append(draw(st.sampled_from(STRANGE + PATHS)))
    if rest and draw(st.integers(0, 9)) == 0:
        rest.pop(0)
    return [*arguments, *rest]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files to name: a finished run, data, texts, checkpoints."""
    folder = tmp_path_factory.mktemp("inputs")
    x, y = np.arange(600, dtype=np.float32).reshape(100, 6) % 17, np.arange(100) % 3
    np.savez(folder / "good.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    (folder / "torn.npz").write_bytes((folder / "good.npz").read_bytes()[:700])
    (folder / "a.txt").write_text("to be or not to be " * 40)
    (folder / "file").write_text("x")
    (folder / "self.flags").write_text("--flagfile=self.flags\n")
    for name in "ab":
        save_safetensors(folder / f"{name}.safetensors", {"w": np.arange(6, dtype=np.float32) + ord(name)})
    forked.prepare()
    tiny = [f"--{flag}={value}" for flag, value in TINY.items() if flag in own_flags("train")]
    code, _, said = forked.run("train", [*tiny, "--weighting=plain", "--workdir=done"], folder, fuzz.LIMIT)
    assert code == 0, said
    return folder


def settle(cases, shown, code, out, err, folder):
    """Judges how a process ended, and what it left."""
    lines = [line for line in err.splitlines() if line.strip()]
    said = f"code {code}: {' | '.join(lines[-3:])[-600:]}"
    if code is None:
        return cases.defect("hangs", shown, said)
    if "Traceback (most recent call last)" in out + err or code not in (0, 2):
        return cases.defect("tracebacks", shown, f"{err[-1500:]}\n{said}")
    if foul := unwhole(folder):
        return cases.defect("silent changes", shown, f"{said}\nleft {foul}")
    if code == 0:
        cases.counts["ran"] += 1
        return None
    if not lines or not lines[-1].startswith("error: ") or sum(line.startswith("error: ") for line in lines) != 1:
        return cases.defect("tracebacks", shown, f"no one line: {said}")
    return cases.refused(lines[-1], shown)


PARTIAL = re.compile(r"\.[^/]*\.[0-9a-f]{32}|.*\.part")
"""Names of files that are to take the place of others."""


def unwhole(folder):
    """What a process left that is not whole."""
    for path in folder.rglob("*"):
        if PARTIAL.fullmatch(path.name):
            return path.name
        if path.name == FILE and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            return path.name
        if path.name == FILE and path.stat().st_size:
            read_rows(path)
        if path.name == "report.html" and not path.read_bytes().rstrip().endswith(b"</html>"):
            return path.name
    return None


def try_one(cases, inputs, name, arguments):
    """Runs a binary in a copy of the inputs, with a cache of programs for all."""
    shown = f"{name} {' '.join(map(repr, arguments))}"[: fuzz.LONGEST]
    folder = inputs.parent / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(inputs, folder)
    given = [f"--compilation_cache={inputs.parent / 'programs'}", *arguments]
    settle(cases, shown, *forked.run(name, given, folder, 2 * fuzz.LIMIT), folder)


@pytest.mark.parametrize("name", BINARIES)
def test_flags_of_any_value_end_with_a_report_or_one_line(name, inputs, cases):
    with cases(f"flags: {name}", 0.1) as tried:
        tried.draw(commands(name), lambda arguments: try_one(tried, inputs, name, arguments), counted=False)
