"""Library errors name arguments, `devices=3`; a command line has flags, `--devices=3`."""

import re

from absl import flags

FLAGS = {
    "samples": "score_samples",
    "every": "score_every",
    "resident": "feed",
    "outer": "outer_lr",
    "opt_state": "opt_state_at_sync",
    "stats": "stats_at_sync",
    "name_or_path": "dataset",
    "trim": "byzantine",
    "tau": "outer_tau",
    "timeout": "start_timeout",
}
"""Argument -> flag, where their names differ; every other argument goes by its own name."""
_VALUES = {"resident=True": "feed=resident", "resident=False": "feed=stream", "resume=True": "resume"}
_ARGUMENT = re.compile(r"(?<![\w.=-])([a-z]\w*)=(True\b|False\b|'[^']*'|\[[^\]]*\]|[\w./-]*\w)?")
_RUN = re.compile(r"^'?([a-z]\w*)(?=[-/'])")
_FIRST = re.compile(r"^([a-z]\w*)(?= is )")


def to_flags(message: str) -> str:
    """Turns the arguments that a library message names into flags of the running binary.

    An argument without such a flag stays as it is. The learning rate of `inner=` is the flag of the arm or the scenario
    whose run the message names first: `'sync-seed0'` or `iid/plain/0`.

    >>> to_flags("resume=True needs workdir=, the folder of the run")
    '--resume needs --workdir, the folder of the run'
    """
    run = _RUN.match(message)

    def flag(found: re.Match) -> str:
        name, value = found[1], found[2]
        if name == "inner":
            rate = f"lr_{run[1]}" if run else ""
            return f"--{rate}" if rate in flags.FLAGS else found[0]
        if found[0] in _VALUES:
            return f"--{_VALUES[found[0]]}"
        name = FLAGS.get(name, name)
        if name not in flags.FLAGS:
            return found[0]
        return f"--{name}={value.strip(chr(39))}" if value else f"--{name}"

    translated = _ARGUMENT.sub(lambda found: found[0] if _in_code_or_path(found) else flag(found), message)
    return _FIRST.sub(lambda found: f"--{found[1]}" if found[1] in flags.FLAGS else found[1], translated)


_CALL = re.compile(r"\w\([^()]*$")


def _in_code_or_path(found: re.Match) -> bool:
    """Whether `name=value` belongs to a path, to a call such as `Store(name="a")`, or has Python for a value."""
    before, after = found.string[: found.start()], found.string[found.end() :]
    in_path = "/" in re.split(r"\s", before)[-1] or before.endswith("'")  # a path, or what the user typed
    return in_path or before.count("`") % 2 == 1 or bool(_CALL.search(before)) or after.startswith(("(", "[", "{", '"'))
