"""Averages checkpoints of one network, yours or others': a model soup.

  python -m experiments.soup A.safetensors B.safetensors -o mean.safetensors
  python -m experiments.soup A.safetensors B.safetensors --shares=3,1
  python -m experiments.soup A.safetensors B.safetensors --weighting=model_stock --base=PRETRAINED.safetensors
  python -m experiments.soup A.safetensors B.safetensors --weighting=learned --dataset=digits --model=mlp
  python -m experiments.soup A.safetensors B.safetensors --weighting=greedy_soup --dataset=FILE.npz --task=mine:network

A checkpoint is a safetensors file, a folder of the parts of one, or the folder of an Orbax checkpoint. All weigh the
same unless --weighting or --shares is given. Weightings that score checkpoints or try blends out need --dataset and the
network: --model with its flags, as experiments.train --export writes it, or a function of your own that returns a Task
whose parameters have the names of the tensors. Writes the average to -o, and report.md and report.html to a folder
beside it.
"""

import importlib
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags

import wavg_jax as wavg
from experiments.setup import app, problem, shared_flags
from experiments.setup.arms import chunk_of_texts
from experiments.setup.choices import REDUCES, SCALES, make_outer
from experiments.setup.shared_flags import numbers
from experiments.setup.weightings import WEIGHTINGS
from wavg_jax import data
from wavg_jax.base import SettingsError
from wavg_jax.weighting.signals import FREE

flags.DEFINE_string("output", "soup.safetensors", "The file to write.", short_name="o")
flags.DEFINE_string("base", None, "The checkpoint that the others were fine-tuned from, for rules that read changes.")
flags.DEFINE_list("shares", None, "How much each checkpoint counts, such as 3,1; instead of --weighting.")
flags.DEFINE_string("task", None, "MODULE:FUNCTION of your own that returns the network, a wavg_jax.Task.")
flags.DEFINE_integer("split_seed", 0, "The seed that held samples out when the checkpoints were trained.")
F = flags.FLAGS

_OUTER = ("outer", "outer_lr", "outer_momentum", "outer_tau")
READS = {
    *("dataset", "data_dir", "heldout", "context", "tokenizer", "scale", "score_samples", "weighting", "reduce"),
    *shared_flags.WEIGHTING,
    *shared_flags.NETWORK,
    *("layers", "width", "heads"),
    *_OUTER,
}
for _name in READS:
    flags.declare_key_flag(_name)


def main(argv: Sequence[str]) -> None:
    """Averages the checkpoints, shows what each of them counts, and writes the report."""
    shared_flags.refuse_unused(READS)
    if len(argv) < 2:
        raise SettingsError("give two checkpoints or more, such as A.safetensors B.safetensors")
    out = pathlib.Path(F.output)
    if out.suffix != ".safetensors":
        raise SettingsError(f"--output={out}: give a .safetensors file")
    dataset = problem.load(texts=True) if F["dataset"].present else None  # before the weighting, which may read chance
    options, signals = _rule(len(argv))
    _check_needs(options["weighting"].needs, signals)
    judged = {} if dataset is None else _judged(dataset)
    soup = wavg.average_checkpoints(
        argv,
        out,
        **options,
        base=F.base,
        **judged,
        scoring=wavg.Scoring(samples=F.score_samples, **chunk_of_texts()),
        signals=signals,
    )
    _publish(soup, argv, out)


def _rule(count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `averager`, and the shares that are given, if any."""
    F["replicas"].value = count  # some weightings read it
    options: dict[str, Any] = {"reduce": REDUCES[F.reduce], "outer": make_outer(F)}
    if F.shares is None:
        name = F.weighting if F["weighting"].present else "plain"
        return options | WEIGHTINGS[name](F), {}
    if F["weighting"].present:
        raise SettingsError("--shares are the weights: leave out --weighting, or the shares")
    shares = numbers("shares", float, least=0)
    if len(shares) != count or not sum(shares) > 0:
        raise SettingsError(f"--shares={','.join(F.shares)}: give {count} numbers, one for each checkpoint, not all 0")
    return options | {"weighting": wavg.proportional("share", higher_is_better=True)}, {"share": shares}


def _check_needs(needs: Sequence[str], given: dict[str, Any]) -> None:
    """Raises SettingsError if the weighting reads what neither files nor held-out samples tell, or there are none."""
    wanted = [name for name in needs if name not in given]
    for name in wanted:
        if name in FREE:
            raise SettingsError(
                f"--weighting={F.weighting} reads {name!r}, which only training tells: choose another, or give --shares"
            )
    if wanted and not F["dataset"].present:
        raise SettingsError(
            f"--weighting={F.weighting} reads {wanted[0]!r}, which files do not tell: give --dataset, and the "
            "network by --model and its flags, or by --task"
        )
    if wanted and not F.heldout:
        raise SettingsError(f"--heldout=0: --weighting={F.weighting} would score held-out samples; hold some out")


def _judged(dataset: data.Dataset) -> dict[str, Any]:
    """The network and the data that checkpoints are judged on."""
    sharded = data.shard(
        dataset,
        lambda split, seed: data.iid(len(split.y), 1, seed),
        heldout=F.heldout,
        seed=F.split_seed,
        scale=SCALES[F.scale],
    )
    return {"task": problem.make_task(dataset) if F.task is None else _imported(F.task), "data": sharded}


def _imported(where: str) -> wavg.Task:
    """The task of a user's function."""
    module, _, name = where.partition(":")
    sys.path.insert(0, "")  # a module in this folder, as `python -m` finds it; the console command does not
    try:
        task = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SettingsError(
            f"--task={where} cannot be called ({error}): give MODULE:FUNCTION, a function without arguments in a "
            "module that Python finds from here"
        ) from error
    if not isinstance(task, wavg.Task):
        raise SettingsError(f"--task={where} returned a {type(task).__name__}: return a wavg_jax.Task")
    return task


def _publish(soup: wavg.Soup, names: Sequence[str], out: pathlib.Path) -> None:
    from wavg_jax.reporting.soup_report import SoupReport  # rich and markdown-it take a while

    effective = float(wavg.effective_replicas(jnp.asarray(soup.weights)))
    facts = [
        f"{soup.averaged} tensors were averaged; {soup.kept} are the first checkpoint's, since they are the same in "
        "all, or no floating-point numbers.",
        f"The weights count as {effective:.2f} of {len(names)} checkpoints: 1 / sum of squared weights.",
    ]
    given = [flag.serialize() for flag in F.get_key_flags_for_module(__name__) if flag.present]
    command = shlex.join(["python", "-m", "experiments.soup", *names, *(text for text in given if text)])
    report = SoupReport(names, soup.weights, soup.scores, soup.quality, facts, command)
    folder = out.with_name(f"{out.stem}-report")
    report.write(folder)
    console = app.console()
    console.print(report)
    console.print(f"wrote {out}, and {folder / 'report.md'} and report.html", soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
