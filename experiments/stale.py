"""Which recorded results are older than the code that they ran.

  python -m experiments.stale
  python -m experiments.stale experiments/results/evidence

For every recording under experiments/results/ (or in the folders given) it reads the commit in the rows, follows the
imports of the program that made them, reports left out, and lists the files whose code has changed since: comments,
docstrings and formatting do not count. A change need not change a number; where something changed, only a new
recording can tell. It needs the repository with its history, and always exits with 0.
"""

import ast
import functools
import pathlib
import re
import subprocess
from collections.abc import Iterator, Sequence

from absl import flags
from rich.table import Table

from experiments.setup import app
from wavg_jax.base import DataError, SettingsError
from wavg_jax.storage.rows import read_rows
from wavg_jax.storage.schema import FILE, Row

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
UNCOUNTED = ("wavg_jax/reporting/", "experiments/results/")
"""What is made of rows, not the rows."""
flags.DEFINE_integer("named", 0, "How many of the changed files to name.", lower_bound=0)
F = flags.FLAGS
flags.declare_key_flag("named")


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    folders = [pathlib.Path(given).resolve() for given in argv] or sorted(path.parent for path in RESULTS.rglob(FILE))
    if not (ROOT / ".git").exists():
        raise SettingsError("there is no repository here: clone it, since the history says what has changed")
    table = Table("recording", "commit", "program", "code changed since", box=None)
    old = 0
    for folder in folders:
        rows = read_rows(folder)
        program, commits = program_of(rows), commits_of(rows)
        said = "unknown, since the rows name no commit"
        if commits:
            found = sorted({path for commit in commits for path in changed(program, commit)})
            said = _in_words(found)
        old += said != "nothing"
        table.add_row(_short(folder), ", ".join(commits) or "-", program.removeprefix("experiments."), said)
    app.console().print(table)
    app.console().print(f"{old} of {len(folders)} recordings ran code that has changed since.")


def _short(folder: pathlib.Path) -> str:
    return str(folder.relative_to(RESULTS)) if folder.is_relative_to(RESULTS) else str(folder)


def _in_words(found: Sequence[str]) -> str:
    if not found:
        return "nothing"
    shown = ", ".join(found[: F.named])
    files = f"{len(found)} file{'s' * (len(found) > 1)}"
    return files + (f": {shown}" if shown else "") + (", ..." if 0 < F.named < len(found) else "")


_PROGRAMS = {
    "run": "experiments.compare",
    "cost": "experiments.scoring_cost",
    "expected": "experiments.expected",
}


def program_of(rows: Sequence[Row]) -> str:
    """The module that made a recording, from its first row.

    Raises:
      DataError: no program of this project makes such rows.
    """
    first = rows[0]
    if first["kind"] == "matrix":
        made = "reductions" if "total_steps" in first["settings"] else "evidence" if "roles" in first else "scenarios"
        return f"experiments.{made}"
    if first["kind"] == "benchmark":
        named = re.search(r"python -m (experiments\.[\w.]+)", str(first.get("command", "")))
        name = str(first.get("name") or first.get("run") or "")
        return named[1] if named else f"experiments.benchmarks.{name}"
    if first["kind"] not in _PROGRAMS:
        raise DataError(f"the first row is of kind {first['kind']!r}, which no program here records")
    return _PROGRAMS[first["kind"]]


def commits_of(rows: Sequence[Row]) -> list[str]:
    """The commits that rows name, in order; a version without one names none."""
    versions = [str(row["versions"].get("wavg-jax", "")) for row in rows if isinstance(row.get("versions"), dict)]
    found = [match[1] for version in versions if (match := re.search(r"\+g([0-9a-f]{7,40})", version))]
    return list(dict.fromkeys(found))


def changed(program: str, commit: str) -> list[str]:
    """The files that a program imports, directly or not, whose code differs from that of a commit.

    Raises:
      DataError: the repository does not have the commit.
    """
    if _git("cat-file", "-e", f"{commit}^{{commit}}") is None:
        raise DataError(f"the repository has no commit {commit}: fetch its whole history (git fetch --unshallow)")
    listed = _git("diff", "--name-only", commit, "--", "wavg_jax", "experiments") or ""
    differ = {path for path in listed.split() if path.endswith(".py") and not path.startswith(UNCOUNTED)}
    return sorted(path for path in differ & needed(program) if _code(_git("show", f"{commit}:{path}")) != _here(path))


def _git(*arguments: str) -> str | None:
    """What git says; None if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


@functools.cache
def needed(program: str) -> frozenset[str]:
    """The project's files that a module imports, directly or not, itself included."""
    found: set[str] = set()
    ahead = [program]
    while ahead:
        path = _path(ahead.pop())
        if path is not None and path not in found:
            found.add(path)
            ahead += _imported((ROOT / path).read_text())
    return frozenset(found)


def _path(module: str) -> str | None:
    """The file of a module of the project, or of the module that a name is in."""
    for name in (module, module.rpartition(".")[0]):
        stem = name.replace(".", "/")
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if stem.startswith(("wavg_jax", "experiments")) and (ROOT / path).exists():
                return path
    return None


def _imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _code(source: str | None) -> str:
    """A source without comments, docstrings and formatting; "" if there was none."""
    tree = ast.parse(source or "")
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [line for line in node.body if not _is_text(line)]
    return ast.dump(tree) if source else ""


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


@functools.cache
def _here(path: str) -> str:
    return _code((ROOT / path).read_text()) if (ROOT / path).exists() else ""


if __name__ == "__main__":
    app.run(main)
