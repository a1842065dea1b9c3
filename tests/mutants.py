"""Which small changes of the library do its tests find? Changes one place at a time, and runs the tests.

    python -m pip install -e ".[dev,mutants]"
    python tests/mutants.py --each=26 --minutes=60
    python tests/mutants.py --again

The changes are cosmic-ray's: another operator, comparison or number, a negated condition, an exception that is not
caught, a loop that is not entered. Draws places of each module at random and one change of each. A change is killed if
a test fails or the tests take many times as long; what the module's own tests let pass, those of its neighbours judge.

Writes mutants.json and mutants.md to --workdir. Read the survivors, and name in survivors.json beside them the test
that kills each, or why none can; `--again` runs these tests with and without their changes, and writes both anew.
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

Row = dict[str, Any]
ROOT = pathlib.Path(__file__).parents[1]


class Module(NamedTuple):
    """Files that are changed, the tests of their own, and those of their neighbours; without `.py`."""

    files: str
    own: str
    neighbours: str


MODULES = {
    "averager": Module(
        "averaging/averager averaging/stepping averaging/pull",
        "averaging/test_averager averaging/test_pull",
        "averaging/test_outer averaging/test_deltas averaging/test_transforms weighting/test_schemes",
    ),
    "outer": Module(
        "averaging/outer averaging/smoothing averaging/transforms",
        "averaging/test_outer averaging/test_smoothing averaging/test_transforms",
        "averaging/test_averager averaging/test_deltas",
    ),
    "reduce": Module(
        "averaging/reduce",
        "averaging/test_reduce averaging/test_deltas",
        "averaging/test_averager averaging/test_transforms weighting/test_schemes",
    ),
    "scores": Module(
        "weighting/scores weighting/make weighting/signals weighting/blends",
        "weighting/test_scores",
        "weighting/test_schemes weighting/test_schemes_compiled weighting/test_wrappers rounds/test_score",
    ),
    "robust": Module(
        "weighting/robust weighting/distances weighting/penalty",
        "weighting/test_robust weighting/test_penalty",
        "weighting/test_schemes weighting/test_schemes_compiled",
    ),
    "wrappers": Module("weighting/wrappers", "weighting/test_wrappers", "weighting/test_schemes"),
    "pool": Module(
        "weighting/pool",
        "weighting/test_opinion_pool",
        "weighting/test_search_problem weighting/test_schemes rounds/test_score",
    ),
    "search": Module(
        "weighting/search",
        "weighting/test_search weighting/test_search_problem",
        "weighting/test_opinion_pool weighting/test_schemes rounds/test_score",
    ),
    "sync": Module("rounds/sync", "rounds/test_sync", "rounds/test_drift rounds/test_reestimation rounds/test_round"),
    "journal": Module(
        "storage/journal",
        "storage/test_resume",
        "storage/test_lock storage/test_shared_journal training/test_fit_options",
    ),
    "checkpoints": Module(
        "storage/checkpoints",
        "storage/test_checkpoints",
        "storage/test_damaged_storage storage/test_tensors storage/test_resume",
    ),
    "rows": Module(
        "storage/rows",
        "storage/test_rows storage/test_schema",
        "storage/test_damaged_storage reporting/test_summary storage/test_resume",
    ),
}
FAMILIES = [
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"},
    {"BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
    {"In", "NotIn"},
]
"""Operators replace others of their family alone: an array shifted by an array is an error that any test finds."""
PATIENCE, SLOWER = 120.0, 8.0
"""Seconds that tests may take, and times as long as without a change, before they count as hung."""


ENDLESS = "no end"


class Mutant(NamedTuple):
    """A change of one place: the operator's `occurrence` in the file, and the line as it was and as it becomes."""

    module: str
    path: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str


def places(path: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """Position in a file -> operators that change what is there, each with its occurrence in the file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    found = collections.defaultdict(list)
    source = (ROOT / path).read_text()
    annotated, nodes = annotations(source), list(ast_nodes(get_ast(source)))
    for operator in sorted(operator_names()):
        if not get_operator(operator).arguments() and same_family(operator):
            starts = [start for node in nodes for start, _ in get_operator(operator)().mutation_positions(node)]
            for occurrence, start in enumerate(starts):
                if not any(first <= start < last for first, last in annotated):
                    found[start].append((operator, occurrence))
    return dict(found)


def same_family(operator: str) -> bool:
    """Whether an operator that replaces one by another does so within a family; all others do what they do."""
    _, *pair = operator.split("_")
    return "Replace" not in operator or len(pair) != 2 or "Unary" in operator or any(set(pair) <= f for f in FAMILIES)


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where types are annotated, which computes nothing."""
    nodes = [getattr(node, name, None) for node in ast.walk(ast.parse(source)) for name in ("annotation", "returns")]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes if isinstance(n, ast.expr)]


def mutate(source: str, operator: str, occurrence: int) -> str:
    """The source with one change."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return mutate_code(source, get_operator(operator)(), occurrence)


def make(module: str, path: str, operator: str, occurrence: int) -> Mutant | None:
    """A mutant; None if it is not another program, or none at all."""
    source = (ROOT / path).read_text()
    changed = mutate(source, operator, occurrence)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
                return None
    except SyntaxError:
        return None
    old, new = source.splitlines(), changed.splitlines()
    first = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    last = next(i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b)
    before, after = (" ".join(line.strip() for line in text[first : len(text) - last]) for text in (old, new))
    return Mutant(module, path, first + 1, operator, occurrence, before, after)


def draw(module: str, each: int, seed: int) -> tuple[list[Mutant], int]:
    """So many places of a module at random, one change of each; and how many places there are."""
    chance = random.Random(f"{seed} {module}")
    paths = [f"wavg_jax/{name}.py" for name in MODULES[module].files.split()]
    found = [(path, changes) for path in paths for changes in places(path).values()]
    chance.shuffle(found)
    made = (make(module, path, *chance.choice(changes)) for path, changes in found)
    return list(itertools.islice(filter(None, made), each)), len(found)


def prepare() -> None:
    """Gives this process a copy of the tree, and all imports that are not ours."""
    for name in ("flax.linen", "hypothesis.strategies", "jax.numpy", "optax", "orbax.checkpoint", "pytest", "rich"):
        importlib.import_module(name)

    global COPY
    COPY = pathlib.Path(tempfile.mkdtemp(prefix="mutants-")) / "tree"
    # With .pytest_cache, where tests keep compiled programs.
    shutil.copytree(ROOT, COPY, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs"))
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (COPY, COPY / "tests")))


def run_tests(tests: str, limit: float) -> str:
    """Runs tests in a fork, on the copy. "" if they pass, else the test that failed."""
    log = COPY.parent / "log"
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.chdir(COPY)
            sys.path[:0] = [str(COPY), str(COPY / "tests")]
            with log.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            import pytest

            files = [f"tests/{name if '::' in name else f'{name}.py'}" for name in tests.split()]
            known = "ignore::pytest.PytestAssertRewriteWarning"  # of plugins that `prepare` has imported
            code = pytest.main(["-x", "-q", "-n0", "--tb=line", "-W", known, *files])
            sys.stdout.flush()
            os._exit(int(code))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    end = time.monotonic() + limit
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with the processes that tests have started
    if not ended[0]:
        os.waitpid(child, 0)
        return ENDLESS
    if not ended[1]:
        return ""
    said = [line.split(" - ")[0] for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in said if line.startswith(("FAILED ", "ERROR "))), f"status {ended[1]}")


@functools.cache
def limit(tests: str) -> float:
    """Seconds that tests may take.

    Raises:
      RuntimeError: they fail without any change.
    """
    begun = time.monotonic()
    if failed := run_tests(tests, 3600.0):
        raise RuntimeError(f"{failed}: fails without any change")
    return PATIENCE + SLOWER * (time.monotonic() - begun)


def judge(mutant: Mutant, stages: Sequence[str], deadline: float) -> str | None:
    """What kills a mutant; "" if nothing does, None if the time is over."""
    if time.time() > deadline:
        return None
    limits = [limit(tests) for tests in stages]
    path = COPY / mutant.path
    source = path.read_text()
    path.write_text(mutate(source, mutant.operator, mutant.occurrence))
    try:
        return next(filter(None, map(run_tests, stages, limits)), "")
    finally:
        path.write_text(source)
        # Two changes within a second look the same to Python's cache.
        pathlib.Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def judge_all(tests: dict[Mutant, Sequence[str]], options: argparse.Namespace) -> Iterator[tuple[Mutant, str]]:
    """Yields every mutant that is tried in time, with what kills it; its tests come in stages."""
    deadline = time.time() + 60 * options.minutes
    forked = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(options.processes, mp_context=forked, initializer=prepare) as pool:
        asked = {pool.submit(judge, mutant, stages, deadline): mutant for mutant, stages in tests.items()}
        for done in concurrent.futures.as_completed(asked):
            if (killer := done.result()) is not None:
                mutant = asked[done]
                print(f"{mutant.path}:{mutant.line}: `{mutant.after}`: {killer or 'survived'}", flush=True)
                yield mutant, killer


def first_run(options: argparse.Namespace) -> None:
    """Draws and tries mutants, of all modules in turn, so that a run that ends early has tried as many of each."""
    drawn = {module: draw(module, options.each, options.seed) for module in options.modules.split(",")}
    turns = itertools.chain(*itertools.zip_longest(*(mutants for mutants, _ in drawn.values())))
    begun, rows = time.monotonic(), []
    record = {
        "command": " ".join(["python tests/mutants.py", *(a for a in sys.argv[1:] if not a.startswith("--workdir="))]),
        "places": {module: count for module, (_, count) in drawn.items()},
        "mutants": rows,
    }
    for mutant, killer in judge_all({m: MODULES[m.module][1:] for m in turns if m}, options):
        rows.append(mutant._asdict() | {"killed_by": killer})
        record["seconds"] = time.monotonic() - begun
        write(record, options.workdir)


def run_again(options: argparse.Namespace) -> None:
    """Tries each survivor with the test that is named for it. Where the file has changed, its line finds it again."""
    record, named = json.loads((options.workdir / "mutants.json").read_text()), verdicts(options.workdir)
    rows, tests = {}, {}
    for row in record["mutants"]:
        test = named(row)
        if row["killed_by"] or "::" not in test:
            continue
        for operator, occurrence in itertools.chain(*places(row["path"]).values()):
            mutant = operator == row["operator"] and make(row["module"], row["path"], operator, occurrence)
            if mutant and (mutant.before, mutant.after) == (row["before"], row["after"]):
                rows[mutant], tests[mutant] = row, (test,)
    for mutant, killer in judge_all(tests, options):
        rows[mutant] |= {"killed_since": bool(killer), "line": mutant.line, "occurrence": mutant.occurrence}
    write(record, options.workdir)


def verdicts(folder: pathlib.Path) -> Callable[[Row], str]:
    """What survivors.json says of a mutant: a test `folder/test_file.py::test_name`, why it is none, or ""."""
    file = folder / "survivors.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    return lambda row: known.get(row["path"], {}).get(f"{row['before']} -> {row['after']}", "")


def write(record: Row, folder: pathlib.Path) -> None:
    """Writes the record with its counts, and as a page."""
    from wavg_jax.devices import machine

    say = verdicts(folder)
    for row in record["mutants"]:
        row["verdict"] = "" if row["killed_by"] else say(row)
    if "versions" not in record:  # `--again` keeps those of the first run
        found = machine.versions() | {"cosmic-ray": version("cosmic-ray")}
        record |= {"hardware": machine.hardware(), "versions": found}
    record["at_first"] = share(record, lambda row: bool(row["killed_by"]))
    record["since"] = share(record, lambda row: bool(row["killed_by"] or row.get("killed_since")))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mutants.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "mutants.md").write_text(page(record))


def equivalent(row: Row) -> bool:
    """Whether a mutant is said to be none."""
    return bool(row["verdict"]) and "::" not in row["verdict"]


def share(record: Row, killed: Callable[[Row], bool]) -> Row:
    """How many mutants are killed, the 95 % interval of a sample's share (Wilson), and the share of all places."""
    import scipy.stats

    rows = [row for row in record["mutants"] if not equivalent(row)]
    count = sum(map(killed, rows))
    low, high = scipy.stats.binomtest(count, max(len(rows), 1)).proportion_ci(method="wilson")
    of_module = {name: [killed(row) for row in rows if row["module"] == name] for name in record["places"]}
    weights = {name: record["places"][name] for name, own in of_module.items() if own}
    means = {name: sum(of_module[name]) / len(of_module[name]) for name in weights}
    of_places = sum(weights[name] * means[name] for name in weights) / max(sum(weights.values()), 1)
    return {"killed": count, "of": len(rows), "low": low, "high": high, "of_places": of_places}


def page(record: Row) -> str:
    """The record to read."""
    rows, hardware, first, since = record["mutants"], record["hardware"], record["at_first"], record["since"]
    lines = [
        "# Small changes of the library that its tests find",
        "",
        f"    {record['command']}",
        "",
        f"{hardware['processor']}, {hardware['isa']}, {hardware['cores']} cores; {record['seconds'] / 60:.0f} min; "
        + ", ".join(f"{name} {found}" for name, found in record["versions"].items()),
        "",
        f"Of {len(rows)} changes tried {len(rows) - since['of']} change nothing that matters. Of the {since['of']} "
        f"others the tests found {first['killed']} ({100 * first['killed'] / max(first['of'], 1):.1f} %, 95 % interval "
        f"{100 * first['low']:.1f} to {100 * first['high']:.1f} %) as they were, and **{since['killed']} "
        f"({100 * since['killed'] / max(since['of'], 1):.1f} %)** with those written or named since for the survivors. "
        f"Only the first estimates what was not drawn: {100 * first['of_places']:.1f} % of all places, as modules were "
        f"not drawn by their size. {record.get('note', '')}".strip(),
        "",
        "| module | places | tried | killed | of these without end | killed since | equivalent | left |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for module, count in record["places"].items():
        own = [row for row in rows if row["module"] == module]
        killed = [row["killed_by"] for row in own if row["killed_by"]]
        since = sum(row.get("killed_since", False) for row in own)
        equal = sum(map(equivalent, own))
        counts = (count, len(own), len(killed), killed.count(ENDLESS), since, equal)
        lines.append(f"| {module} | {' | '.join(map(str, counts))} | {len(own) - len(killed) - since - equal} |")
    lines += ["", "Survivors, and the test that kills each or why none can:", ""]
    for row in rows:
        if not row["killed_by"]:
            fate = row["verdict"] if row.get("killed_since") or equivalent(row) else ""
            lines.append(f"- {row['path']}:{row['line']}: `{row['before']}` → `{row['after']}`: {fate or '**left**'}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Tries changes, and writes what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=ROOT / "runs" / "mutants")
    parser.add_argument("--again", action="store_true", help="try the survivors with the tests named in survivors.json")
    parser.add_argument("--each", type=int, default=26, help="places of each module")
    parser.add_argument("--modules", default=",".join(MODULES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further change after so many")
    options = parser.parse_args()
    run_again(options) if options.again else first_run(options)
    print((options.workdir / "mutants.md").read_text())


if __name__ == "__main__":
    main()
