"""Where the time of a round goes: local steps, input, scoring, search, blend, metrics, checkpoint.

  python -m experiments.benchmarks.round_anatomy
  python -m experiments.benchmarks.round_anatomy --networks=mlp --scored=learned:1000 --round_steps=200

Times rounds of `fit` in turn with their parts, which are compiled apart. Evaluation on the test split is left out,
since it is off `fit`'s clock. Last come the same rounds with streamed batches, as a ratio to those with the training
data on the devices.

  local steps  the replicas' training
  input        drawing the round's indices on the host and sending them to the devices
  scoring      the held-out passes over the replicas, if the weighting needs them
  search       finding the weights: the averager's update minus that of plain averaging
  blend        the update of plain averaging, and the restart of the replicas
  metrics      fetching the round's log and writing its row to disk
  checkpoint   copying the state, which the next round waits for, divided by --checkpoint_every
  rest         the remainder of `fit`'s time: what saving the copy beside a round costs it, where both need the same
               cores; negative where parts overlap

Beside them, not a part: `saving`, writing the copy until it is on disk with its sums, as nothing else runs, divided by
--checkpoint_every. `fit` does it while the next round trains.

Each case's row: network, weighting, replicas, devices, mapping, local_steps, batch_size, held_out, score_samples (null
for all), rounds (timed rounds of `fit` per turn), saving (its share of the whole), parts {name: seconds of a round},
shares {name: share of the whole}, whole (wall-clock seconds of a round of `fit`), local_share (ratio to the whole),
sum_to_whole (ratio of all parts but the rest to the whole), streamed (ratio of a round with streamed batches to the
whole).
"""

import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import wavg_jax as wavg
from experiments.benchmarks import networks
from experiments.benchmarks.harness import (
    BenchmarkTable,
    Case,
    Recording,
    alternate,
    begin,
    in_place,
    ratio,
    shown,
    timed,
)
from experiments.benchmarks.networks import HELD_OUT, INNER, PLAIN, Network, local_phase
from experiments.benchmarks.sync_cost import sync_case
from experiments.setup import app
from experiments.setup.shared_flags import WEIGHTING
from experiments.setup.weightings import WEIGHTINGS
from wavg_jax.base import SettingsError, TrainState
from wavg_jax.data import ShardedData
from wavg_jax.rounds.round import RoundLog
from wavg_jax.storage.checkpoints import Checkpoints, open_checkpoints, snapshot
from wavg_jax.storage.rows import Records
from wavg_jax.training import progress
from wavg_jax.training.batches import Work, make_work, put_shared
from wavg_jax.training.phases import blend_phase, score_phase, window_phase
from wavg_jax.training.programs import compiled, programs_of
from wavg_jax.training.recipe import Recipe
from wavg_jax.weighting.signals import FREE

flags.DEFINE_list(
    "scored",
    "plain:0,learned:0,learned:1000,learned_online:256",
    f"Weightings, of {', '.join(WEIGHTINGS)}, each with the held-out samples to score per round; 0 means all.",
)
F = flags.FLAGS

READS = (*networks.READS, *WEIGHTING, "scored", "round_steps", "checkpoint_every", "repeats")
for _name in (*READS, "workdir"):
    flags.declare_key_flag(_name)

PARTS = ("local steps", "input", "scoring", "search", "blend", "metrics", "checkpoint")


def main(argv: Sequence[str]) -> None:
    """Times rounds and their parts, and writes the table."""
    app.refuse_arguments(argv)
    scorings = [_scoring(text) for text in F.scored]
    pairs = networks.pairs(networks.chosen("mlp", "cnn"), networks.replica_counts(4))
    recording = begin("round_anatomy", READS)
    with progress.bar(len(pairs) * len(scorings) * 11 * (F.repeats + 1)) as advance:
        for net, replicas in pairs:
            for scoring in scorings:
                _measure(recording, net, replicas, scoring, advance)
    recording.publish(_table(recording))


class Scored(NamedTuple):
    """A weighting, and the held-out samples it scores per round; None for all."""

    name: str
    averager: wavg.Averager
    samples: int | None


def _scoring(text: str) -> Scored:
    """Reads an entry of --scored.

    Raises:
      SettingsError: it is not `weighting:samples`.
    """
    name, _, samples = text.partition(":")
    if name not in WEIGHTINGS or not samples.isdigit() or int(samples) > HELD_OUT:
        raise SettingsError(
            f"--scored={','.join(F.scored)}: give weightings, of {', '.join(WEIGHTINGS)}, and samples up to "
            f"{HELD_OUT}, such as learned:1000"
        )
    return Scored(name, wavg.averager(**WEIGHTINGS[name](F)), int(samples) or None)


def _measure(
    recording: Recording, net: Network, replicas: int, scoring: Scored, advance: Callable[[str], None]
) -> None:
    """Times a round of one network and its parts, and records them."""
    steps, scored = F.round_steps or 50, scoring.samples
    recipe = net.recipe(net.sharded(replicas), scoring.averager)._replace(scoring=wavg.Scoring(scored))
    with tempfile.TemporaryDirectory(dir=recording.folder) as name:
        folder = pathlib.Path(name)
        with open_checkpoints(folder / "checkpoints") as store:
            cases = _cases(recipe, net, replicas, steps, store, folder)
            replica_map = recipe.placement.replica_map
            for name, resident in (("whole", True), ("streamed", False)):
                cases[name] = _fit(net, replicas, steps, scoring, folder, resident=resident, replica_map=replica_map)
            label = f"{net.name}, {scoring.name}, {scored or HELD_OUT} scored"
            times = alternate(cases, F.repeats, lambda name: advance(f"{label}: {name}"))
    for name in ("checkpoint", "saving"):
        times[name] = times[name] / F.checkpoint_every
    times["search"] = times["update"] - times["plain update"]
    times["rest"] = times["whole"] - sum(times[name] for name in PARTS)
    parts = {name: float(np.median(times[name])) for name in (*PARTS, "rest")}
    recording.case(
        network=net.name,
        weighting=scoring.name,
        replicas=replicas,
        devices=len(recipe.placement.devices),
        mapping=recipe.placement.replica_map,
        local_steps=steps,
        batch_size=net.batch_size,
        held_out=HELD_OUT,
        score_samples=scored,
        rounds=F.checkpoint_every,
        saving=float(np.median(times["saving"] / times["whole"])),
        parts=parts,
        shares={name: float(np.median(times[name] / times["whole"])) for name in parts},
        whole=float(np.median(times["whole"])),
        local_share=ratio(times["local steps"], times["whole"]),
        sum_to_whole=ratio(np.sum([times[name] for name in PARTS], axis=0), times["whole"]),
        streamed=ratio(times["streamed"], times["whole"]),
    )


def _cases(
    recipe: Recipe, net: Network, replicas: int, steps: int, store: Checkpoints, folder: pathlib.Path
) -> dict[str, Case]:
    """The cases that measure the parts of a round."""
    shared, program = put_shared(recipe, net.sharded(replicas)), programs_of(recipe, replicas)
    state = program.init(jax.random.key(0))
    alive = jnp.ones(replicas, bool)
    held_out = jax.jit(window_phase(recipe))(state.round, shared.held_out)
    score = jax.jit(score_phase(recipe))
    scores = score(state.replicas, held_out, alive)
    signals = dict.fromkeys(FREE, jnp.ones(replicas, jnp.float32)) | scores
    plain = blend_phase(recipe._replace(averager=PLAIN))
    before = state._replace(averager=PLAIN.init(state.params, replicas))
    train, first = local_phase(recipe, net, replicas, steps)
    sharded = net.sharded(replicas)
    work = _work(recipe, sharded, steps, net.batch_size)
    _, log, _ = compiled(program.run, state, work, shared).call(program.init(jax.random.key(0)), work, shared)
    return {
        "local steps": in_place(train, first),
        "input": timed(_work, recipe, sharded, steps, net.batch_size),
        "scoring": timed(score, state.replicas, held_out, alive) if scores else lambda: 0.0,
        "update": timed(jax.jit(blend_phase(recipe)), state, state.replicas, alive, held_out, signals),
        "plain update": timed(jax.jit(plain), before, state.replicas, alive, held_out, signals),
        "blend": sync_case(jax.tree.map(jnp.copy, state.replicas.params), recipe.placement),
        "metrics": _metrics(log, Records(folder)),
        "checkpoint": timed(snapshot, state),
        "saving": _saving(state, store),
    }


def _work(recipe: Recipe, sharded: ShardedData, steps: int, batch_size: int) -> Work:
    return make_work(recipe, sharded, seed=0, first_step=0, longest=steps, batch_size=batch_size)


def _metrics(log: RoundLog, records: Records) -> Case:
    """Fetches a round's log and writes its row."""

    def fetch() -> float:
        fresh = jax.block_until_ready(jax.tree.map(jnp.copy, log))  # a fetched array caches its value
        start = time.perf_counter()
        records.append({"kind": "round", "run": "anatomy", **jax.device_get(fresh)._asdict()})
        return time.perf_counter() - start

    return fetch


def _saving(state: TrainState, store: Checkpoints) -> Case:
    """Saves a copy of the state, under another round number each time."""
    number = itertools.count(1)

    def save() -> float:
        kept = jax.block_until_ready(snapshot(state._replace(round=jnp.int32(next(number)))))
        start = time.perf_counter()
        store.save(kept)
        store.wait()
        return time.perf_counter() - start

    return save


def _fit(
    net: Network,
    replicas: int,
    steps: int,
    scoring: Scored,
    folder: pathlib.Path,
    *,
    resident: bool,
    replica_map: str,
) -> Case:
    """Runs `fit` and returns the mean seconds of a round, from the end of the first to the end of the last but one.

    No round precedes the first, and evaluation follows the last.
    """
    number, rounds, sharded = itertools.count(), F.checkpoint_every + 2, net.sharded(replicas)

    def run() -> float:
        ends: list[float] = []
        wavg.fit(
            net.task,
            sharded,
            scoring.averager,
            inner=INNER,
            local_steps=steps,
            rounds=rounds,
            batch_size=net.batch_size,
            scoring=wavg.Scoring(scoring.samples, test_every=rounds),
            layout=wavg.Layout(None, replica_map, resident),
            workdir=folder / f"fit-{resident}-{next(number)}",
            store=wavg.Store(checkpoint_every=F.checkpoint_every),
            progress=lambda text: ends.append(time.perf_counter()),
        )
        return (ends[-2] - ends[0]) / F.checkpoint_every

    return run


def _table(recording: Recording) -> BenchmarkTable:
    text = (
        f"Shares of a round, in %; {HELD_OUT:,} samples are held out, a checkpoint is saved every "
        f"{F.checkpoint_every} rounds. Parts are compiled apart, and timed in turn with rounds of `fit`; `rest` is "
        "what those take beside them. `saving` is what writing a checkpoint takes, in the background. The "
        f"figure is the share of the local steps, median and quartiles of {F.repeats} runs."
    )
    head = ("network", "weighting", "scored", "K", "devices", "mapping", "H")
    columns = (*head, *PARTS[1:], "rest", "saving", "round, ms", "sum / whole", "streamed / whole")
    lines = [
        (
            row["network"],
            row["weighting"],
            "all" if row["score_samples"] is None else str(row["score_samples"]),
            str(row["replicas"]),
            str(row["devices"]),
            row["mapping"],
            str(row["local_steps"]),
            *(f"{100 * row['shares'][name]:.1f}" for name in (*PARTS[1:], "rest")),
            f"{100 * row['saving']:.1f}",
            f"{1e3 * row['whole']:.0f}",
            shown(row["sum_to_whole"]),
            shown(row["streamed"]),
            shown([100 * share for share in row["local_share"]]),
        )
        for row in recording.cases()
    ]
    return BenchmarkTable("Anatomy of a round", text, columns, lines)


if __name__ == "__main__":
    app.run(main)
