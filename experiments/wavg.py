"""The console command `wavg`: runs a binary by its name, from any folder.

wavg compare --noisy=0,2
wavg train --help
"""

import ast
import importlib.metadata
import pathlib
import runpy
import shutil
import sys
import textwrap

import experiments
from experiments.setup import before_imports, captions

HERE = pathlib.Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in HERE.glob("[a-z]*.py") if path != pathlib.Path(__file__)))
MODULE = f"{experiments.__name__}.wavg"
"""What Python runs as this command, in a process that a binary starts."""
_PRESET = "--flagfile=experiments/"


def main() -> None:
    """Runs the binary that the first argument names with the others."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(_usage())
        return
    if name == "--version":
        print(f"wavg {importlib.metadata.version('wavg-jax')}")
        return
    if name not in NAMES:
        print(f"error: there is no command {name!r}; choose from {', '.join(NAMES)}", file=sys.stderr)
        raise SystemExit(2)
    before_imports.begin()
    sys.argv[1:] = [_found(argument) for argument in rest]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


def _usage() -> str:
    """What the binaries are for, from the first lines of their files: importing them all takes seconds."""
    width, columns = max(map(len, NAMES)) + 4, shutil.get_terminal_size().columns
    lines = []
    for name in NAMES:
        start, further = f"  {name}".ljust(width), " " * width
        lines.append(
            textwrap.fill(_purpose(HERE / f"{name}.py"), columns, initial_indent=start, subsequent_indent=further)
        )
    return "\n".join([f"usage: {captions.command('NAME')} [--flags]", "", *lines, "", "NAME --help lists its flags."])


def _purpose(path: pathlib.Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def _found(argument: str) -> str:
    """A preset is named as in the documents, and lies with the binaries; one in the folder at hand goes first."""
    if not argument.startswith(_PRESET) or pathlib.Path(argument.partition("=")[2]).exists():
        return argument
    return f"--flagfile={HERE / argument.removeprefix(_PRESET)}"


if __name__ == "__main__":
    main()
