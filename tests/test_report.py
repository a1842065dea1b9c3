"""Tables, report.md and report.html of rows as a comparison leaves them."""

import json
import pathlib
import re
import subprocess
import sys
import unittest.mock
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from experiments import report as binary
from wavg_jax import canvas, findings, headline, plots, report, summary, tables
from wavg_jax.base import DataError, WavgError, WorkdirError
from wavg_jax.summary import summarise

Row = dict[str, Any]
MINUS = "\N{MINUS SIGN}"
ROUNDS, K, CLASSES = 12, 8, 10
ARMS = ("sequential", "sync", "plain", "weighted")
CURVES = {  # the accuracy that an arm tends to, and how fast, without and with noisy shards
    "sequential": ((0.871, 0.9), (0.822, 0.9)),
    "sync": ((0.842, 0.35), (0.801, 0.35)),
    "plain": ((0.848, 0.45), (0.784, 0.4)),
    "weighted": ((0.849, 0.45), (0.844, 0.45)),
}
SECONDS = {"sequential": 0.19, "sync": 0.14, "plain": 0.21, "weighted": 0.25}
PATHS = {"sequential": 0.19, "sync": 0.052, "plain": 0.031, "weighted": 0.036}


def make_weights(arm: str, noisy: tuple[int, ...], rng: np.random.Generator) -> list[float]:
    raw = np.ones(1 if arm in ("sequential", "sync") else K)
    if arm == "weighted":
        raw += 0.01 * rng.standard_normal(K)
        raw[list(noisy)] *= 0.12
    return [float(w) for w in raw / raw.sum()]


RUN = json.loads("""{"kind": "run", "local_steps": 50, "batch_size": 32, "rounds": 12, "parameters": 269322,
  "samples_per_round": 12800, "classes": 10, "dataset": "fashion_mnist", "train_samples": 55000,
  "heldout_samples": 5000, "test_samples": 10000, "target_accuracy": 0.82, "compile_seconds": 2.75, "devices": 1,
  "hardware": {"device": "cpu", "kind": "cpu", "count": 1, "processor": "Any Processor 3000", "cores": 2},
  "versions": {"jax": "0.10.2", "flax": "0.12.8", "python": "3.11.7", "wavg_jax": "0.1.0"}}""")
SETTINGS = json.loads("""{"dataset": "fashion_mnist", "replicas": 8, "local_steps": 50,
  "hidden": ["256", "256"], "augment": false, "weighting": "accuracy", "lr_weighted": 0.05}""")


def make_run(arm: str, seed: int, noisy: tuple[int, ...], rounds: int = ROUNDS) -> list[Row]:
    """The rows of one run, like those of a comparison on Fashion-MNIST."""
    rng = np.random.default_rng([seed, ARMS.index(arm), len(noisy)])
    one = arm in ("sequential", "sync")
    head = {"run": f"{arm}-seed{seed}", "arm": arm, "seed": seed}
    own = {
        "replicas": 1 if one else K,
        "bytes_per_round": {"sequential": 0, "sync": 50 * 17236608}.get(arm, 17236608),
        "shard_sizes": [55000] if one else [6875] * K,
        "noisy_shards": list(noisy),
        "weighting": "accuracy" if arm == "weighted" else "uniform",
        "critical_path": {"local": PATHS[arm] - 0.002, "score": 0.0, "blend": 0.002, "round": PATHS[arm]},
    }
    own["settings"] = SETTINGS | {"seed": seed, "noisy": len(noisy)}
    rows: list[Row] = [RUN | head | own]
    top, rate = CURVES[arm][bool(noisy)]
    top += 0.003 * rng.standard_normal()
    seconds = SECONDS[arm] * (1 + 0.05 * rng.standard_normal(ROUNDS).clip(-1, 1))
    for number in range(1, rounds + 1):
        accuracy = float(top - 0.25 * np.exp(-rate * number) + 0.002 * rng.standard_normal())
        weights = make_weights(arm, noisy, rng)
        row = {"kind": "round", **head, "round": number, "samples": 12800 * number, "train_loss": 0.9, "scores": {}}
        clock = {"seconds": float(seconds[number - 1]), "elapsed": float(seconds[:number].sum())}
        quality = {"test_accuracy": accuracy, "test_loss": 1.5 - 1.3 * accuracy, "test_macro_f1": accuracy - 0.004}
        blend = {"weights": weights, "effective_replicas": 1 / sum(w * w for w in weights)}
        rows.append(row | clock | quality | blend | {"test_ece": 0.025, "alive": [True] * len(weights)})
    wrong = rng.integers(0, 40, (CLASSES, CLASSES))
    rows[-1]["confusion"] = (wrong + np.diag(1000 - wrong.sum(axis=1))).tolist()
    return rows


def make_rows(noisy: tuple[int, ...] = (0, 1), seeds: int = 3, arms: tuple[str, ...] = ARMS) -> list[Row]:
    return [row for seed in range(seeds) for arm in arms for row in make_run(arm, seed, noisy)]


@pytest.fixture(autouse=True, scope="module")
def coarse() -> Iterator[None]:
    """Draws few dots: what the figures look like is not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "DPI", 30)
        yield


def text_of(rows: list[Row], width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as shown:
        console.print(*map(report.terminal_table, summarise(rows)))
    return shown.get()


def cells(rows: list[Row], title: str, name: str) -> tuple[str, ...]:
    """The cells of the row called `name` in the table whose title starts with `title`."""
    (one,) = summarise(rows)
    (table,) = (table for table in tables.tables(one) if table.title.startswith(title))
    (row,) = (row for section in table.sections for row in section if row[0] == name)
    return row[1:]


def sentences(rows: list[Row]) -> str:
    (one,) = summarise(rows)
    return "\n".join(findings.findings(one))


def small(values: dict[tuple[str, int], list[float]], **header: Any) -> list[Row]:
    """Runs of given accuracies: rounds of 100 samples and 0.5 s (0.1 s on the critical path), target 80 %."""
    rows = []
    for (arm, seed), accuracies in values.items():
        first, *rest = make_run(arm, seed, (), len(accuracies))
        path = {"local": 0.1, "score": 0.0, "blend": 0.0, "round": 0.1}
        rows.append(
            first | {"target_accuracy": 0.8, "rounds": 2, "critical_path": path, "compile_seconds": 2.0} | header
        )
        for row, accuracy in zip(rest, accuracies, strict=True):
            n = row["round"]
            clock = {"samples": 100 * n, "seconds": 0.5, "elapsed": 0.5 * n}
            rows.append(row | clock | {"test_accuracy": accuracy, "test_loss": 1 - accuracy, "test_ece": 0.05})
    return rows


PAIRS = small(
    {
        ("plain", 0): [0.70, 0.80],
        ("plain", 1): [0.60, 0.70],
        ("weighted", 0): [0.82, 0.90],
        ("weighted", 1): [0.75, 0.86],
    }
)
ONE_SEED = [row for row in PAIRS if row["seed"] == 0]
DIVERGED = [row | {"test_loss": None} if row["seed"] == 1 else row for row in PAIRS]
DEAD = {"weights": [0.0] * 8, "alive": [False] * 8, "effective_replicas": 0.0}
ALL_DEAD = [row | DEAD if row["kind"] == "round" and row["arm"] == "weighted" else row for row in PAIRS]


def test_a_column_of_times_has_one_unit_and_says_it() -> None:
    (one,) = summarise(PAIRS)
    heads = {table.title: table.columns for table in tables.tables(one)}
    assert heads["To 80 % test accuracy"][-2:] == ("measured (s)", "computed (ms)")
    assert heads["Cost"][2:5] == ("compiling (s)", "round, measured (ms)", "round, computed (ms)")


@pytest.mark.parametrize(
    ("rows", "title", "name", "expected"),
    [
        # 0.90 and 0.86: mean 0.88, sd 0.04 / sqrt(2) = 0.0283; losses 0.10 and 0.14.
        (PAIRS, "Final", "weighted", ("2", "88.00 ± 2.83", "0.120 ± 0.028")),
        # 0.10 and 0.16.
        (PAIRS, "Final", f"weighted {MINUS} plain", ("2", "+13.00 ± 4.24", f"{MINUS}0.130 ± 0.042")),
        (ONE_SEED, "Final", "weighted", ("1", "90.00 ± n/a", "0.100 ± n/a")),
        # Rounds 1 and 2 of 0.5 s and of 0.1 s: the first column has a whole second, the second has none.
        (PAIRS, "To 80 %", "weighted", ("2 of 2", "150 ± 71", "0.750 ± 0.354", "150 ± 71")),
        (PAIRS, "To 80 %", "plain", ("1 of 2", "200 ± n/a", "1.00 ± n/a", "200 ± n/a")),
        (
            PAIRS,
            "To 80 %",
            f"weighted {MINUS} plain",
            ("1", f"{MINUS}100 ± n/a", f"{MINUS}0.500 ± n/a", f"{MINUS}100 ± n/a"),
        ),
        (PAIRS, "Cost", "plain", ("2", "2.00", "500 ± 0", "100", "17.2")),
        # A seed that diverged is counted out in the open; of no output that is not finite there is an accuracy.
        (DIVERGED, "Final", "plain", ("2", "80.00 ± n/a (1 of 2)", "0.200 ± n/a (1 of 2)")),
        (PAIRS, "Weights", "plain", ("8", "8.00", "8.00", "1.00 (replica 0)")),
        (ALL_DEAD, "Weights", "weighted", ("8", "all dead", "all dead", "all dead", "all dead")),
    ],
)
def test_cells(rows: list[Row], title: str, name: str, expected: tuple[str, ...]) -> None:
    assert cells(rows, title, name)[: len(expected)] == expected


def test_a_target_out_of_reach_or_missing_and_a_clock_that_was_not_measured_are_told_apart() -> None:
    far, unset = ([row | {"target_accuracy": target} for row in PAIRS] for target in (0.99, None))
    assert cells(far, "To 99 %", "plain") == ("0 of 2", *["not reached"] * 3)
    assert cells(unset, "To the target", "plain") == ("0 of 2", *["no target"] * 3)
    rows = [row | ({"critical_path": None} if row["kind"] == "run" else {}) for row in PAIRS]
    assert cells(rows, "To 80 %", "weighted") == ("2 of 2", "150 ± 71", "0.750 ± 0.354", "not measured")
    assert "computed clock" not in "".join(plot.title for plot in plots.draw(summarise(rows)[0]))


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            PAIRS,
            f"ended 13.00 points of test accuracy above plain (paired over 2 seeds, 95 % interval {MINUS}25.12 to "
            "+51.12): too few seeds to show a difference.",
        ),
        (
            ONE_SEED,
            "weighted ended 10.00 points of test accuracy above plain (one seed): too few seeds to show a difference.",
        ),
        (
            small(
                {("plain", n): [a] for n, a in enumerate((0.5, 0.7, 0.6))} | {("weighted", n): [0.6] for n in range(3)}
            ),
            # Differences 0.1, -0.1 and 0: sd 0.1, t = 4.303, so 0.1 * 4.303 / sqrt(3) = 0.2484.
            f"plain (paired over 3 seeds, 95 % interval {MINUS}24.84 to +24.84): seeds differ by as much, so no "
            "difference is shown.",
        ),
        (small({("plain", 0): [0.5], ("weighted", 1): [0.6]}), "cannot be compared with plain: they share no seed"),
        (make_rows(noisy=()), "weighted: the weights were indistinguishable from uniform (effective number 8.00 of 8"),
        (make_rows(), "replicas 0, 1 were down-weighted (mean weight below half of 1/8; effective number 6.4"),
        (make_rows(), "; these are exactly the noisy shards."),
        (
            [row | ({"noisy_shards": [1, 5]} if row["kind"] == "run" else {}) for row in make_rows()],
            "; noisy shards: 1, 5.",
        ),
        (
            small({("weighted", 3): [0.5]}),
            "Incomplete: weighted-seed3 has 1 of 2 rounds; round 1, its last, stands for",
        ),
        ([*PAIRS, PAIRS[0] | {"run": "plain-seed9", "seed": 9}], "Left out: plain-seed9 has no recorded round."),
        (
            [row | ({"hardware": {"device": "gpu"}} if row["run"] == "plain-seed1" else {}) for row in PAIRS],
            "different hardware: their measured times are not comparable",
        ),
        (DIVERGED, "plain diverged with seed 1: the network's outputs are not finite, so these runs have no quality"),
        (DIVERGED, "weighted ended 10.00 points of test accuracy above plain (one seed)"),
        (
            [row | {"test_loss": None} if row["arm"] == "plain" else row for row in PAIRS],
            "weighted cannot be compared with plain: no seed in which both ended with finite numbers.",
        ),
        (
            ALL_DEAD,
            "weighted: all replicas were dead (numbers not finite, or masked) in 4 of 4 rounds (all seeds together), "
            "in which nothing was averaged; with seeds 0, 1 that is how the run ended.",
        ),
        (PAIRS, "One device that is already busy gains nothing from K replicas"),
    ],
)
def test_findings(rows: list[Row], line: str) -> None:
    assert line in sentences(rows)


def test_uneven_weights_that_spare_nobody_and_dead_replicas_are_reported() -> None:
    rows = small({("weighted", 0): [0.5, 0.6]}, noisy_shards=[3])
    for row in rows[1:]:
        row.update(weights=[0.19, 0.0, *[0.135] * 6], alive=[True, False, *[True] * 6], effective_replicas=6.5)
    found = sentences(rows)
    assert "replica 1 took no part in 2 rounds" in found
    assert "the weights differed (effective number 6.50 of 8 replicas), but no replica's mean weight was below" in found
    assert "The noisy shards (3) had 1.08 of 1/8." in found


def test_the_report_is_dated_by_its_rows(written: pathlib.Path) -> None:
    assert "\nWhen the runs were made is not recorded.\n" in (written / "report.md").read_text()
    days = [{"started": f"2026-01-{day:02}T10:11:12Z"} for day in (31, 30)]
    assert report.dated(days) == "The runs were started from 2026-01-30 to 2026-01-31 (UTC)."
    assert report.dated([*days[:1], {}]) == "The runs were started on 2026-01-31 (UTC); of some it is not recorded."


def test_the_answer_tells_where_weighting_helped_and_where_not() -> None:
    def scenario(noisy: list[int], *pairs: tuple[float, float]) -> list[Row]:
        made = {(arm, n): [pair[i]] for n, pair in enumerate(pairs) for i, arm in enumerate(("plain", "weighted"))}
        return small(made, noisy_shards=noisy)

    helped = scenario([0, 1], (0.7, 0.8), (0.6, 0.71), (0.65, 0.76))
    equal = scenario([], (0.8, 0.81), (0.7, 0.69), (0.75, 0.75))
    few = scenario([0], (0.7, 0.8), (0.6, 0.75))
    harm = scenario([0, 1, 2], (0.8, 0.7), (0.71, 0.6), (0.76, 0.65))
    alone = [row for row in scenario([1, 2, 3, 4], (0.5, 0.5)) if row["arm"] == "weighted"]
    first, *rest = findings.answer(summarise([*equal, *few, *helped, *alone, *harm]))
    assert first == (
        "Weighting helped: 2 of 8 shards with random labels; weighting did harm: 3 of 8 shards with random labels; no "
        "difference in accuracy from plain averaging is shown: clean shards; too few seeds to show a difference: 1 of "
        "8 shards with random labels; no comparison with plain averaging: 4 of 8 shards with random labels."
    )
    assert len(rest) == 4
    assert rest[2] == (
        "2 of 8 shards with random labels: weighted ended 10.67 points of test accuracy above plain (paired over 3 "
        "seeds, 95 % interval +9.23 to +12.10). Its test loss is 0.107 lower. The highest mean of all arms is that of "
        "weighted, 75.67 %."
    )


def test_the_answer_names_the_runs_that_diverged() -> None:
    _, line = findings.answer(summarise(DIVERGED))
    assert line.endswith("Left out, since they diverged: plain with seed 1; weighted with seed 1.")


def test_scenarios_that_differ_in_more_than_their_shards_are_told_apart() -> None:
    def made(**header: Any) -> list[Row]:
        return small({("weighted", 0): [0.5]}, **header)

    one = summarise([*made(settings={"lr": 1}), *made(settings={"lr": 2}), *made(settings={"lr": 1}, noisy_shards=[3])])
    assert summary.names(one) == ("clean shards (lr = 1)", "clean shards (lr = 2)", "1 of 8 shards with random labels")
    two = summarise([*made(), *made(dataset="digits", settings={"partition": "dirichlet"})])
    assert summary.names(two) == ("fashion_mnist, clean shards", "digits, clean dirichlet shards")


def test_dead_rounds_are_no_part_of_the_effective_number() -> None:
    half = [row | DEAD if row.get("round") == 2 and row["arm"] == "weighted" else row for row in PAIRS]
    assert cells(half, "Weights", "weighted")[1] == cells(PAIRS, "Weights", "weighted")[1]
    assert "in 2 of 4 rounds" in sentences(half)
    for made in (half, ALL_DEAD):
        assert "effective number 0" not in sentences(made)
        assert "nan" not in sentences(made)
        assert "took no part" not in sentences(made)


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_tables_fit_unfolded_and_keep_every_spread(width: int) -> None:
    spread = [
        row | ({"test_ece": 0.4 * row["test_ece"] * row["seed"]} if "round" in row else {}) for row in make_rows()
    ]
    lines = text_of(spread, width).splitlines()
    assert max(map(len, lines)) <= width
    spare = 0 if width == 100 else 7  # F1 gives way, in 7 rows
    assert text_of(spread, width).count("±") == text_of(spread, 200).count("±") - spare
    assert any(re.match("weighted .* 17.2 *$", line) for line in lines)
    assert "…" not in "".join(lines)


def test_a_terminal_that_is_too_narrow_for_a_table_goes_on_below() -> None:
    lines = text_of(make_rows(), 50).splitlines()
    assert max(map(len, lines)) <= 50
    assert sum(line.startswith("weighted  ") for line in lines) > 4  # once for each block of each table
    assert text_of(make_rows(), 50).count("±") == text_of(make_rows(), 200).count("±") - 7


def test_minus_signs_are_all_alike() -> None:
    (one,) = summarise(make_rows())
    every = [cell for table in tables.tables(one) for rows in table.sections for row in rows for cell in row]
    assert any(MINUS in cell for cell in every)
    assert not [text for text in (*every, *findings.findings(one)) if re.search(r"(^|[ (])-\d", text)]


@pytest.mark.usefixtures("one_plot")
def test_arm_names_are_text_and_never_markup(tmp_path: pathlib.Path) -> None:
    rows = [row | {"arm": "[red]<b>|x|</b>"} for row in make_rows(seeds=1, arms=("weighted",))]
    assert "[red]<b>|x|</b>" in text_of(rows)
    report.write(tmp_path, rows)
    page = (tmp_path / "report.html").read_text()
    assert "[red]&lt;b&gt;|x|&lt;/b&gt;" in page
    assert "<b>" not in page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the report of `make_rows()`."""
    folder = tmp_path_factory.mktemp("report")
    report.write(folder, make_rows())
    return folder


def test_the_report_names_setup_and_how_to_build_it_again(written: pathlib.Path) -> None:
    text = (written / "report.md").read_text()
    for expected in (
        "## 2 of 8 shards with random labels\n\nfashion_mnist, 8 replicas, noisy shards 0, 1.\n",
        "| splits | train 55,000, held-out 5,000, test 10,000 |",
        "| shards | 8 of 6,875 to 6,875 samples; noisy: 0, 1 |",
        "| seeds | sequential: 0, 1, 2; sync: 0, 1, 2; plain: 0, 1, 2; weighted: 0, 1, 2 |",
        "| hardware | device cpu, kind cpu, count 1, processor Any Processor 3000, cores 2 |",
        "| versions | jax 0.10.2, flax 0.12.8, python 3.11.7, wavg_jax 0.1.0 |",
        "\n--hidden=256,256\n",
        "\n--augment=false\n",
        "python -m experiments.report DIR",
    ):
        assert expected in text
    assert "--parameters" not in text
    for name in re.findall(r"\((plots/[^)]*)\)", text):
        assert (written / name).read_bytes().startswith(b"\x89PNG")


def test_the_same_rows_give_the_same_bytes(written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    again = report.write(tmp_path, json.loads(json.dumps(make_rows())))
    assert len(again) == 9
    for path in again:
        assert path.read_bytes() == (written / path.relative_to(tmp_path)).read_bytes(), path.name


@pytest.fixture
def one_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces drawing, which takes most of the time, where files matter and figures do not."""
    monkeypatch.setattr(plots, "draw", lambda one: (canvas.Plot("only", "Only", "A plot.", b"png", b"dark"),))
    monkeypatch.setattr(headline, "draw", lambda every: canvas.Plot("headline", "First", "A plot.", b"png", b"dark"))


@pytest.mark.usefixtures("one_plot")
def test_scenarios_get_sections_and_plots_of_their_own(tmp_path: pathlib.Path) -> None:
    report.write(tmp_path, [*make_run("weighted", 0, (0, 1)), *make_run("weighted", 0, ())])
    text = (tmp_path / "report.md").read_text()
    assert "## 2 of 8 shards with random labels\n\nfashion_mnist, 8 replicas, noisy shards 0, 1 (noisy = 2).\n" in text
    assert "## Clean shards\n\nfashion_mnist, 8 replicas, no noisy shards (noisy = 0).\n" in text
    assert text.count("### Final quality") == 2
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"headline.png", "1-only.png", "2-only.png"}
    assert re.findall(r"\((plots/.*)\)", text) == [*("plots/headline.png", "plots/1-only.png", "plots/2-only.png")]


@pytest.mark.usefixtures("one_plot")
def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: pathlib.Path) -> None:
    report.write(tmp_path, make_rows(seeds=1))
    old = (tmp_path / "report.md").read_bytes()
    with pytest.raises(DataError):
        report.write(tmp_path, [])
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WorkdirError, match="cannot be written"):
        report.write(tmp_path / "file", make_rows(seeds=1))
    full = unittest.mock.patch("os.replace", side_effect=OSError(28, "No space left on device"))
    with full, pytest.raises(WorkdirError, match="No space left on device"):
        report.write(tmp_path, make_rows(seeds=2))
    assert (tmp_path / "report.md").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "plots", "report.html", "report.md"]


@pytest.mark.parametrize(
    "rows",
    [
        make_rows(seeds=1, arms=("sequential",)),
        make_run("plain", 0, (), rounds=1),
        [row | {"test_accuracy": None, "effective_replicas": None} for row in make_rows(seeds=2, arms=("weighted",))],
        [row | {"weights": [None] * 8, "alive": [False] * 8} for row in make_run("weighted", 0, ())],
    ],
    ids=["one replica", "one round", "not finite", "all dead"],
)
def test_odd_rows_are_reported_all_the_same(rows: list[Row], tmp_path: pathlib.Path) -> None:
    assert tmp_path / "report.md" in report.write(tmp_path, rows)
    assert text_of(rows)


def test_the_binary_builds_the_report_from_the_rows_alone(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], one_plot: None
) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        rows = [*make_run("plain", seed, ()), *make_run("weighted", seed, ())]
        (tmp_path / str(seed) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(out=str(tmp_path / "both")):
        binary.main([str(tmp_path / "0"), str(tmp_path / "1" / "rows.jsonl")])
    said = capsys.readouterr().out
    assert re.search(rf"weighted {MINUS} plain +2 ", said)
    assert said.index("Did weighting help? Too few seeds to show a difference: clean shards.") > said.index("Weights")
    assert (tmp_path / "both" / "report.html").exists()
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["rows.jsonl"]
    binary.main([str(tmp_path / "1" / "rows.jsonl")])
    assert (tmp_path / "1" / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no RUN given"),
        ("", "no rows"),
        ('{"kind": "run"\n{}\n', "line 1"),
        ('{"kind": "run", "run": "a"}\n', "lacks"),
    ],
)
def test_bad_input_to_the_binary_is_refused_before_anything_is_written(
    content: str | None, message: str, tmp_path: pathlib.Path
) -> None:
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(WavgError, match=message) as caught:
        binary.main([] if content is None else [str(tmp_path)])
    assert "\n" not in str(caught.value)
    assert len(list(tmp_path.iterdir())) == (content is not None)


def test_bad_input_to_the_binary_is_one_line_and_exit_code_2(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "experiments.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no rows in" in done.stderr
    assert done.stderr.count("\n") == 1
