"""Library errors name arguments, `devices=3`; a command line has flags, `--devices=3`."""

import re

from absl import flags

from experiments.setup.flags import ARMS

FLAGS = {
    "samples": "score_samples",
    "resident": "feed",
    "outer": "outer_lr",
    "scale": "scale",
    "noisy": "noisy",
}
"""Argument -> flag, where their names differ; every other argument goes by its own name."""
_VALUES = {"resident=True": "feed=resident", "resident=False": "feed=stream", "resume=True": "resume"}
_ARGUMENT = re.compile(r"(?<![\w.=-])([a-z]\w*)=(True\b|False\b|'[^']*'|\[[^\]]*\]|[\w./-]*\w)?")
_RUN = re.compile(rf"^'({'|'.join(ARMS)})\b")
_FIRST = re.compile(r"^([a-z]\w*)(?= is )")


def to_flags(message: str) -> str:
    """Writes the arguments that a message of the library names as flags of the running binary.

    An argument without such a flag stays as it is. The inner optimizer's learning rate is the flag of the arm whose run
    the message names first.

    >>> to_flags("resume=True needs workdir=, the folder of the run")
    '--resume needs --workdir, the folder of the run'
    """
    arm = _RUN.match(message)

    def flag(found: re.Match) -> str:
        name, value = found[1], found[2]
        if name == "inner" and arm and f"lr_{arm[1]}" in flags.FLAGS:
            return f"--lr_{arm[1]}"
        if found[0] in _VALUES:
            return f"--{_VALUES[found[0]]}"
        name = FLAGS.get(name, name)
        if name not in flags.FLAGS:
            return found[0]
        return f"--{name}={value.strip(chr(39))}" if value else f"--{name}"

    translated = _ARGUMENT.sub(flag, message)
    return _FIRST.sub(lambda found: f"--{found[1]}" if found[1] in flags.FLAGS else found[1], translated)
