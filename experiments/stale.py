"""Which recorded results are older than the code that they ran.

  python -m experiments.stale
  python -m experiments.stale experiments/results/evidence

For every recording under experiments/results/ (or in the folders given) it reads the commit in the rows, follows the
imports of the program that made them and of the modules that it starts, what only draws and writes reports left out,
and lists the files whose code has changed since: comments, docstrings and formatting do not count. A change need not
change a number; where something changed, only a new recording can tell. It needs the repository with its history. A
folder that cannot be judged has its error in its line, and the exit status is 0.
"""

import ast
import collections
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
REPORTS = frozenset(
    f"wavg_jax/reporting/{name}.py"
    for name in ("__init__", "publish", "soup_report", "document", "tables", "terminal", "canvas")
)
"""What writes reports and draws: not followed, since it is made of rows. What rows are computed with is."""
flags.DEFINE_integer("named", 0, "How many of the changed files to name.", lower_bound=0)
F = flags.FLAGS
flags.declare_key_flag("named")


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    folders = [pathlib.Path(given).resolve() for given in argv] or sorted(path.parent for path in RESULTS.rglob(FILE))
    if not (ROOT / ".git").exists():
        raise SettingsError("there is no repository here: clone it, since the history says what has changed")
    table, counts = Table("recording", "commit", "program", "code changed since", box=None), collections.Counter[str]()
    for folder in folders:
        try:
            verdict, *cells = _judged(folder)
        except DataError as error:  # the other folders can still be judged
            verdict, *cells = "failed", "-", "-", f"error: {error}"
        counts[verdict] += 1
        table.add_row(_short(folder), *cells)
    said = f"{counts['changed']} of {len(folders)} recordings ran code that has changed since"
    said += f"; {counts['unknown']} unknown, since their rows name no commit" * (counts["unknown"] > 0)
    said += f"; {counts['failed']} not judged, for the errors above" * (counts["failed"] > 0)
    console = app.console(log_width=200)  # an error in its line is not folded
    console.print(table)
    console.print(f"{said}.")


def _judged(folder: pathlib.Path) -> tuple[str, str, str, str]:
    """Verdict, commits, program and what has changed, in words.

    Raises:
      DataError: the rows cannot be read, no program makes them, or the repository lacks their commit.
    """
    rows = read_rows(folder)
    programs, commits = programs_of(rows, folder), commits_of(rows)
    shown = " or ".join(program.removeprefix("experiments.") for program in programs)
    if not commits:
        return "unknown", "-", shown, "unknown"
    found = sorted({path for commit in commits for path in changed(programs, commit)})
    return "changed" if found else "same", ", ".join(commits), shown, _in_words(found)


def _short(folder: pathlib.Path) -> str:
    return str(folder.relative_to(RESULTS)) if folder.is_relative_to(RESULTS) else str(folder)


def _in_words(found: Sequence[str]) -> str:
    if not found:
        return "nothing"
    shown = ", ".join(found[: F.named])
    files = f"{len(found)} file{'s' * (len(found) > 1)}"
    return files + (f": {shown}" if shown else "") + (", ..." if 0 < F.named < len(found) else "")


def programs_of(rows: Sequence[Row], folder: pathlib.Path) -> tuple[str, ...]:
    """The module that made a recording; several where it cannot be told which of them.

    Raises:
      DataError: no program of this project makes such rows.
    """
    first = rows[0]
    match first["kind"]:
        case "run":
            found = _trained_by(rows, folder)
        case "matrix" if "total_steps" in first.get("settings", ()):
            found = ("experiments.reductions",)
        case "matrix":
            found = ("experiments.evidence" if "roles" in first else "experiments.scenarios",)
        case "cost":
            found = ("experiments.scoring_cost",)
        case "expected":
            found = ("experiments.expected",)
        case "benchmark":
            named = _COMMAND.search(str(first.get("command", "")))
            name = str(first.get("name") or first.get("run") or "")
            found = (named[1] if named else f"experiments.benchmarks.{name}",)
        case kind:
            raise DataError(f"the first row is of kind {kind!r}, which no program here records")
    if gone := [program for program in found if not (ROOT / f"{program.replace('.', '/')}.py").exists()]:
        raise DataError(f"{gone[0]}, which made it, is no more")
    return found


_COMMAND = re.compile(r"python -m (experiments\.[\w.]+)")


def _trained_by(rows: Sequence[Row], folder: pathlib.Path) -> tuple[str, ...]:
    """Who trained these runs: the first program that run.flags names; otherwise compare, if there are several, since
    train does one. Rows of both are alike, so one run is either's."""
    path = folder / "run.flags"
    if named := _COMMAND.search(path.read_text() if path.exists() else ""):
        return (named[1],)
    runs = sum(row["kind"] == "run" for row in rows)
    return ("experiments.compare",) if runs > 1 else ("experiments.compare", "experiments.train")


def commits_of(rows: Sequence[Row]) -> list[str]:
    """The commits that rows name, in order; a version without one names none."""
    versions = [str(row["versions"].get("wavg-jax", "")) for row in rows if isinstance(row.get("versions"), dict)]
    found = [match[1] for version in versions if (match := re.search(r"\+g([0-9a-f]{7,40})", version))]
    return list(dict.fromkeys(found))


def changed(programs: Sequence[str], commit: str) -> list[str]:
    """The files that all of these programs need whose code differs from that of a commit.

    Raises:
      DataError: the repository does not have the commit.
    """
    if _git("cat-file", "-e", f"{commit}^{{commit}}") is None:
        raise DataError(f"the repository has no commit {commit}: fetch its whole history (git fetch --unshallow)")
    differ = set((_git("diff", "--name-only", commit, "--", "wavg_jax", "experiments") or "").split())
    counted = differ.intersection(*map(needed, programs))
    return sorted(path for path in counted if _code(_git("show", f"{commit}:{path}")) != _here(path))


def _git(*arguments: str) -> str | None:
    """What git says; None if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


@functools.cache
def needed(program: str) -> frozenset[str]:
    """The project's files that a module imports or starts, directly or not, itself included."""
    found: set[str] = set()
    ahead = [program]
    while ahead:
        for path in set(_paths(ahead.pop())) - found:
            found.add(path)
            ahead += _named((ROOT / path).read_text())
    return frozenset(found)


def _paths(module: str) -> Iterator[str]:
    """The file of a module of the project, or of the module that a name is in, and those of the packages around it."""
    stems = [name.replace(".", "/") for name in (module, module.rpartition(".")[0]) if _OURS.match(name)]
    files = [path for stem in stems for path in (f"{stem}.py", f"{stem}/__init__.py") if (ROOT / path).exists()]
    if files and files[0] not in REPORTS:
        around = {f"{package}/__init__.py" for package in pathlib.PurePosixPath(files[0]).parents[:-1]}
        yield from (path for path in {files[0], *around} - REPORTS if (ROOT / path).exists())


_OURS = re.compile(r"(wavg_jax|experiments)(\.|$)")
_MODULE = re.compile(r"(wavg_jax|experiments)(\.\w+)+")
_PACKAGE = re.compile(r"(wavg_jax|experiments)\.(\w+\.)*")


def _named(source: str) -> Iterator[str]:
    """What a source imports, and the modules that it may start: strings such as "experiments.train", and where a string
    is made of a package and a name, f"experiments.{name}", all names among the strings of the source."""
    nodes = [*ast.walk(ast.parse(source))]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    yield from filter(_MODULE.fullmatch, texts)
    for node in nodes:
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(str(module), names):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.JoinedStr([ast.Constant(str(package)), *_]) if _PACKAGE.fullmatch(package):
                yield from (package + text for text in texts if text.isidentifier())
            case _:
                pass


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
