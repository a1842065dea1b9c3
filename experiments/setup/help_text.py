"""The text of `--help`: what the binary does, examples, and its flags by topic with their defaults."""

import re
import shutil
import textwrap
from collections.abc import Collection
from types import ModuleType

from absl import flags

from experiments.setup import captions

_INDENT = 26
"""Columns left of a flag's description."""


def text(binary: ModuleType, topics: dict[str, list[str]], always: Collection[str]) -> str:
    """The help of a binary.

    Args:
      binary: its module; the docstring says what it does and gives examples.
      topics: title -> names of flags. The binary's key flags outside every topic come first.
      always: names of flags that every binary reads.
    """
    width = min(shutil.get_terminal_size().columns, 100)
    shared = {name for names in topics.values() for name in names}
    key = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(binary)}
    key |= {name: flags.FLAGS[name] for name in always}
    groups = {"This command": [name for name in key if name not in shared]} | topics
    doc = (binary.__doc__ or "").replace("python -m experiments.", captions.command(""))
    blocks = [_documentation(doc, width)]
    for title, names in groups.items():
        shown = [_flag(key[name], width) for name in names if name in key]
        if shown:
            blocks.append("\n".join([f"{title}:", *shown]))
    blocks.append(_wrap("--flagfile=FILE reads flags from a file; --helpfull lists those of the libraries too.", width))
    return "\n\n".join(blocks)


def _wrap(words: str, width: int, indent: str = "", further: str | None = None) -> str:
    return textwrap.fill(
        words,
        width,
        initial_indent=indent,
        subsequent_indent=indent if further is None else further,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _documentation(doc: str, width: int) -> str:
    """Folds a docstring's paragraphs to the width, and its indented commands at spaces."""
    blocks = []
    for block in textwrap.dedent(doc).strip().split("\n\n"):
        if block.startswith("  "):
            commands = [_wrap(line.strip(), width - 2, "  ", "      ") for line in block.split("\n")]
            folded = [command.replace("\n", " \\\n") for command in commands]
            blocks.append("\n".join(folded))
        else:
            blocks.append(_wrap(" ".join(block.split()), width))
    return "\n\n".join(blocks)


def _flag(flag: flags.Flag, width: int) -> str:
    """One flag: its name and default, and its description beside or below them."""
    default = flag.default
    if flag.boolean:
        left = f"  --{'no' if default else ''}{flag.name}"
    elif default is None:
        left = f"  --{flag.name}={_placeholder(flag)}"
    else:
        left = f"  --{flag.name}={','.join(default) if isinstance(default, list) else default}"
    words = re.sub(r"^<[^>]*>: ", "", " ".join((flag.help or "").split()))  # absl prepends an enum's values
    choices = getattr(flag.parser, "enum_values", None)
    if choices and not all(choice in words for choice in choices):
        words += f" One of {', '.join(choices)}."
    below = _wrap(words, width, " " * _INDENT)
    if len(left) + 2 > _INDENT:
        folded = _wrap(left.strip().replace(",", ", "), width, "  ", "      ")  # a long list only
        return f"{folded if len(left) > width else left}\n{below}"
    return left + below[len(left) :]


def _placeholder(flag: flags.Flag) -> str:
    """The placeholder for the value of a flag without a default."""
    *_, last = parts = flag.name.split("_")
    if "lr" in parts:
        return "RATE"
    return "N" if isinstance(flag.parser, flags.IntegerParser | flags.ListParser) else last.upper()
