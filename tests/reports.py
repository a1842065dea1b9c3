"""Rows as a comparison leaves them, what a terminal shows of them, and what the report says of them."""

import json
from typing import Any

import numpy as np
from rich.console import Console

from wavg_jax.reporting.findings import scenario_sentences
from wavg_jax.reporting.publish import summarise
from wavg_jax.reporting.summary import summarise_scenarios
from wavg_jax.reporting.tables import comparison_tables

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


def text_of(rows: list[Row], width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as shown:
        console.print(summarise(rows))
    return shown.get()


def cells(rows: list[Row], title: str, name: str) -> tuple[str, ...]:
    """The cells of the row called `name` in the table whose title starts with `title`."""
    (one,) = summarise_scenarios(rows)
    (table,) = (table for table in comparison_tables(one) if table.title.startswith(title))
    (row,) = (row for section in table.sections for row in section if row[0] == name)
    return row[1:]


def sentences(rows: list[Row]) -> str:
    (one,) = summarise_scenarios(rows)
    return "\n".join(scenario_sentences(one))


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
