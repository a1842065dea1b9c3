"""The library's messages in the binaries: arguments become flags, code samples and paths stay."""

import ast
import pathlib
import re

import pytest
from absl import flags

from experiments import train  # noqa: F401 - defines the flags
from experiments.setup import translate
from experiments.setup.translate import to_flags

PACKAGE = pathlib.Path(__file__).parents[2] / "wavg_jax"


def written(node):
    """The text of a string, with `...` for the values that it shows; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def messages():
    """The texts of all `raise` statements of the library."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                yield from map(written, node.exc.args)


MESSAGES = sorted({text for text in messages() if re.search(r"\b[a-z_]+=", text)})


def test_the_library_names_arguments_in_many_messages():
    assert len(MESSAGES) > 10


@pytest.mark.parametrize("message", MESSAGES)
def test_no_argument_with_a_flag_is_left_in_a_message(message):
    translated = to_flags(message)
    calls = re.compile(r"\w\([^()]*\)|`[^`]*`")  # code samples stay
    for name in re.findall(r"(?<![\w-])([a-z]\w*)=", calls.sub("", translated)):
        assert translate.FLAGS.get(name, name) not in flags.FLAGS, translated


@pytest.mark.parametrize(
    "message",
    [
        "pip install 'wavg-jax[run]'",
        "call jax.config.update('jax_num_cpu_devices', 8) first",
        "give held_out=Batch(x, y)",
        "learned(carry=True) keeps one logit per replica",
        "give store=Store(name='a', checkpoint_every=5)",
        "give scoring=Scoring(samples=100)",
        "call `fit(task, data, averager, inner=optax.sgd(0.1), rounds=20)`",
        "give outer=optax.sgd(0.7)",
        "give noisy=(0, 1)",
        "from_linen(dtype=jnp.int32) makes a task of one",
        "the folder /tmp/devices=3/seed=1 cannot be used: Permission denied",
        "there is no file runs/batch_size=16.npz",
        "'rounds=3' is not a flag",
        "set XLA_FLAGS=--xla_force_host_platform_device_count=8",
        "`tfds convert_format --dataset_version_dir=DIR --out_file_format=array_record`",
    ],
)
def test_code_and_paths_stay_as_they_are(message):
    assert to_flags(message) == message


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("hold out some samples (heldout=)", "hold out some samples (--heldout)"),
        ("take fewer local_steps=, a smaller batch_size=16", "take fewer --local_steps, a smaller --batch_size=16"),
        ("4 replicas (K) do not fit: set devices= to 2 or 4", "4 replicas (K) do not fit: set --devices to 2 or 4"),
        ("workdir='runs/a' holds rows", "--workdir=runs/a holds rows"),
        ("choose another workdir=/tmp/a; or resume=True", "choose another --workdir=/tmp/a; or --resume"),
        ("temperature is 0; it must be a finite number", "--temperature is 0; it must be a finite number"),
    ],
)
def test_arguments_and_their_values_become_flags(message, shown):
    assert to_flags(message) == shown
