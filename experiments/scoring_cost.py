"""What scoring and searching cost, as a share of a round's time.

  python -m experiments.scoring_cost --flagfile=experiments/presets/fashion_cost.flags --data_dir=DIR

Times every weighting in turn with plain averaging, in one process, at every H of --steps, every size of --subsets (the
held-out samples that a round scores, a fresh subset each round; 0 means all of them) and every entry of --cost_every
(rounds between scorings; a turn is as many rounds). The share is the median over --repeats turns of `(weighted - plain)
/ weighted`. Writes rows.jsonl and report.md to --workdir.
"""

import itertools
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from absl import flags

import wavg_jax as wavg
from experiments.benchmarks.harness import alternate, refuse_unused, round_runner
from experiments.setup import app, arms, problem, shared_flags
from experiments.setup.conditions import read_condition, settings_of
from experiments.setup.optimizers import make_inner
from experiments.setup.shared_flags import numbers
from experiments.setup.weightings import WEIGHTINGS
from wavg_jax import data
from wavg_jax.base import SettingsError
from wavg_jax.devices import machine
from wavg_jax.storage.rows import Records, write_atomically
from wavg_jax.storage.schema import Row
from wavg_jax.training import automap, progress
from wavg_jax.training.recipe import make_recipe

MEASURED = (
    *("accuracy", "softmax_loss", "inverse_grad_norm", "fisher", "greedy_soup", "learned", "learned_online"),
    *("best_of", "coordinate_median", "geometric_median", "multi_krum"),
)
flags.DEFINE_list("cost_weightings", list(MEASURED), f"Which weightings, of {', '.join(WEIGHTINGS)}.")
flags.DEFINE_list("subsets", "0,1000,256", "Held-out samples to score per round; 0 means all.")
flags.DEFINE_list("cost_every", "1", "Rounds between scorings.")
flags.DEFINE_bool("bfloat16", False, "Score in bfloat16, with a network that computes in its inputs' dtype.")
F = flags.FLAGS

SETTINGS = (
    *(*shared_flags.DATA, *shared_flags.SHARDS, *shared_flags.NETWORK, *shared_flags.WEIGHTING),
    *("replicas", "batch_size", "inner", "lr_plain", "steps", "subsets", "cost_every", "repeats"),
    "bfloat16",
)
"""Flags that the shares depend on."""
READS = (*SETTINGS, "data_dir", "devices", "workdir")
for _name in READS:
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Times every weighting against plain averaging and writes the table."""
    app.refuse_arguments(argv)
    refuse_unused(READS)
    names = shared_flags.names("cost_weightings", WEIGHTINGS)
    steps, subsets, everies = numbers("steps", int), numbers("subsets", int, least=0), numbers("cost_every", int)
    condition = read_condition()
    dataset = problem.load()
    dtype = jnp.bfloat16 if F.bfloat16 else None
    # A network fixed to float32 would score in float32 too.
    task = problem.make_task(dataset, of_inputs=dtype is not None)
    sharded = problem.make_data(dataset, 0, condition.noisy)
    inner = make_inner(F.inner, condition.rates["plain"])
    averagers = {name: wavg.averager(**WEIGHTINGS[name](F)) for name in ("plain", *names)}
    arms.check_heldout(averagers)
    workdir = arms.choose_workdir("cost")
    records = Records(workdir)
    if records.rows:
        raise SettingsError("the folder already holds rows; choose another --workdir")
    settings = settings_of(SETTINGS, condition)
    records.append({"kind": "cost", "run": "cost", "settings": settings, **_where(dataset)})
    base = make_recipe(task, sharded, averagers["plain"], inner, layout=wavg.Layout(F.devices))
    base = automap.settle(base, sharded, batch_size=F.batch_size)
    with progress.bar(len(steps) * len(subsets) * len(everies) * len(names)) as advance:
        for local_steps, subset, every, name in itertools.product(steps, subsets, everies, names):
            recipe = base._replace(averager=averagers[name], scoring=wavg.Scoring(subset or None, dtype, every=every))
            rounds = {"plain": base, "weighted": recipe}
            cases = {arm: round_runner(made, sharded, local_steps, F.batch_size, every) for arm, made in rounds.items()}
            plain, weighted = (seconds / every for seconds in alternate(cases, F.repeats).values())
            shares = (weighted - plain) / weighted
            low, share, high = (float(x) for x in np.quantile(shares, (0.25, 0.5, 0.75)))
            row = {"weighting": name, "local_steps": local_steps, "score_samples": subset or F.heldout, "every": every}
            row |= {"plain": float(np.median(plain)), "weighted": float(np.median(weighted))}
            row |= {"share": share, "share_quartiles": [low, high]}
            records.append({"kind": "share", "run": f"{name}/{local_steps}/{subset}/{every}", **row})
            advance(f"{name}: H={local_steps}, {subset or F.heldout} samples, every {every} rounds")
    _publish(records.rows, workdir)


def _where(dataset: data.Dataset) -> Row:
    return {"dataset": dataset.name, "hardware": machine.hardware(), "versions": machine.versions()}


def _publish(rows: Sequence[Row], folder: pathlib.Path) -> None:
    """Writes the table of shares and prints it."""
    cells = {(*_column(row), row["weighting"]): row for row in rows if row["kind"] == "share"}
    names = dict.fromkeys(key[-1] for key in cells)
    columns = sorted({key[:-1] for key in cells}, key=lambda column: (column[1:], column[0]))
    head = rows[0]
    lines = [
        "# What scoring and searching cost",
        "",
        f"Share of a round's time in % that a weighting adds to plain averaging: {head['dataset']}, "
        f"K={head['settings']['replicas']}, batch {head['settings']['batch_size']}, network {F.model}"
        f"{' ' + ','.join(F.hidden) if F.model == 'mlp' else ''}{', scored in bfloat16' if F.bfloat16 else ''}; median "
        f"and quartiles of {F.repeats} alternating turns. {head['hardware']['processor']}, "
        f"{head['hardware']['cores']} cores, {head['hardware']['count']} devices, jax {head['versions']['jax']}.",
        "",
        "| weighting | " + " | ".join(map(_heading, columns)) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    lines += [f"| {name} | " + " | ".join(_share(cells.get((*c, name))) for c in columns) + " |" for name in names]
    path = folder / "report.md"
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    console = app.console()
    console.print("\n".join(lines[2:]), soft_wrap=True)
    console.print(f"wrote {path}", soft_wrap=True)


def _column(row: Row) -> tuple[int, int, int]:
    return row["local_steps"], row["score_samples"], row["every"]


def _heading(column: tuple[int, int, int]) -> str:
    local_steps, samples, every = column
    return f"{samples} samples, H={local_steps}" + (f", every {every} rounds" if every > 1 else "")


def _share(row: Row | None) -> str:
    if row is None:
        return "-"
    low, high = row["share_quartiles"]
    return f"{100 * row['share']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    app.run(main)
