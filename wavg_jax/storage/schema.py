"""The rows of `rows.jsonl`: what each kind holds, and what builds it.

Times are in seconds, shares between 0 and 1, sizes in bytes. A number that is not finite, or beyond 1e100, is
null. A run has two kinds.

`kind="run"`, one per run, first:
  run, arm, seed        the run's name, unique in the file; the arm it belongs to; its seed
  weighting             the scheme that weighs the replicas, "uniform" for a plain average; may be missing
  started               when its first part began: UTC, ISO 8601, such as "2026-01-31T12:00:00Z"; missing in older rows
  dataset, train_samples, heldout_samples, test_samples, shard_sizes, noisy_shards, noise (what those have)
  classes               number of classes; for tokens, the size of the vocabulary; null for regression
  class_names           [classes]; null if unknown, missing in older rows
  data_crc              CRC-32 of labels, shards and stored inputs, to tell data apart; older rows omit the inputs
  devices               how many devices the replicas were spread over
  replica_map           how the replicas of one device were run, a name in `wavg_jax.devices.mapping.MAPS`
  resident              whether the whole training split lay on the devices
  replicas, batch_size, rounds
  checkpoint_every      rounds between checkpoints
  local_steps, samples_per_round    of the longest round
  score_samples, score_every    held-out samples scored in a round, null for all; rounds between scorings
  faults                simulated faults {speed, rate, sent, mean, deviation, noise}, [K] each; null for none
  parameters            numbers in one replica's parameters
  bytes_per_round       sent and received by all replicas together: parameters up, blend down
  compile_seconds       of the round and the evaluation, added up; spent once per process, and on no other clock
  memory                {predicted, limit}: bytes of each device, before the first round: what the run will take, with
                        what its process has taken already, and what there is; CPU devices share the host's; null if
                        not known, missing in older rows
  critical_path         {local, score, blend, exchange, round, link}: the time of a round on one of K devices, computed
                        from measured parts; exchange over link {bandwidth, latency, overhead} in bits a second (null:
                        unlimited) and seconds; no link is null or missing; all null if not measured
  target_accuracy       the test accuracy that "time to target" refers to; null if none is set
  hardware, versions    where the run ran, and with which versions
  elastic               of an elastic run: how it was told to deal with its workers; else missing
  settings              the flags, or `Store(settings=...)`; must agree when the run resumes

`kind="round"`, one per round:
  run, arm, seed, round (from 1), local_steps (H of this round), samples (trained on so far)
  seconds, elapsed      wall time of this round, and of all so far: feeding, training, scoring, blend; neither
                        compilation nor the test split
  train_loss            mean over the living replicas and the local steps
  test_{name}           every scalar metric of the task, of the global parameters; null in rounds without an evaluation.
                        A classifier has test_accuracy, test_loss, test_macro_f1, test_ece; a regressor
                        test_loss; a language model test_loss, test_accuracy and, of text, test_bits_per_byte
  weights, alive        [K]
  effective_replicas    1 / sum(weights^2)
  scores                {signal: [K]}, the signals that the weighting needed; null in a round that was not scored
  diagnosis             likewise {leave_one_out: [K], gain, gain_error}; {} without logits, missing in older rows
  guard                 {loss, bound, rolled_back, rate}: the held-out loss of the blend, the bound beyond which it is
                        rolled back, whether it was, and what updates are multiplied by from the next round on; missing
                        without `Scoring(guard=)`
  {name}                every array metric of the task, on a run's last row. A classifier has confusion
                        [classes][classes], counts on the test split with true classes as rows
  peak_memory           on a run's last row: the most that its process has held of each device by then; null if the
                        system does not tell
  sample                {prompt, text, temperature} on a language model's last row: how it goes on from the prompt
  missing               of an elastic run: {replica: why it took no part}
  workers               of an elastic run: [{worker, replicas, was, sent, ended, computed, why}], `was` being computed,
                        late, "late, counted", "late, dropped", failed or away; seconds since the round began; away has
                        no times; `after` says what else it was in the round, before
  audits                of an elastic run with audits: [{replica, worker, auditor, wrong}]; wrong is a worker or null
  stopped_early         true on the last row of a run that a callback ended early; else missing

A matrix has two kinds of its own.

`kind="matrix"`, one per recording, first, and another each time it resumes on other hardware or versions:
  run                   "matrix"
  scenarios             {name: title} of the scenarios asked for
  reference             the weighting that the others are compared with; if missing, the first one recorded
  recommend             whether the report recommends a weighting; if missing, true
  roles                 where every weighting was tuned: {"oracle": a weighting, "ours": a weighting, "published":
                        [several to find the best of]}; else missing, and all weightings of a scenario share a rate
  series                where scenarios are values of a quantity: {"title": its name, "at": {scenario: value}}
  settings              the settings that all cells share; must agree when the recording resumes
  started               start of the recording: UTC, ISO 8601; may be missing
  dataset, train_samples, heldout_samples, test_samples, parameters, hardware, versions

`kind="cell"`, one per scenario, weighting and seed:
  run                   "<scenario>/<weighting>/<seed>"
  scenario, weighting, seed
  rate                  learning rate of the inner optimizer; the same for every weighting of a scenario without roles
  decay, tuned_accuracy     with roles: weight decay, and accuracy on the tuning split, mean over the tuning seeds
  heldout_accuracy      [R], with roles: on the held-out samples after every round; missing from rows of controls
  test_accuracy, test_loss, test_macro_f1, test_ece     of the final global parameters
  attack_success        share of the test samples that an attacker aims at which get the label it wants; missing where
                        none aims
  weights               [K], mean over the rounds
  effective_replicas    mean over the rounds of 1 / sum(weights^2)
  alive_rounds          [K], rounds in which each replica was alive
  seconds               median over the rounds: feeding, training, scoring, blend

`kind="tuning"`, one per setting tried where every weighting was tuned:
  run                   "<scenario>/<weighting>"
  rate, decay, seed, accuracy, loss

`kind="tuned"`, one per scenario and weighting that was tuned, before its cells:
  run                   "<scenario>/<weighting>"
  rate, decay, accuracy     the setting chosen, and its accuracy, mean over the tuning seeds
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

FILE = "rows.jsonl"
"""The file of a run folder that holds its rows."""
Row = dict[str, Any]
LARGEST = 1e100
"""Numbers beyond are taken for infinite: float32 has none, and their squares and sums overflow in reports."""


def plain(value: Any) -> Any:
    """Turns arrays and NumPy scalars into what JSON knows, and numbers that are not finite, or beyond `LARGEST`, into
    null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not abs(value) <= LARGEST else value


def run_row(
    *,
    run: str,
    seed: int,
    started: str,
    dataset: str,
    classes: int | None,
    class_names: Sequence[str] | None,
    train_samples: int,
    heldout_samples: int,
    test_samples: int,
    shard_sizes: Sequence[int],
    noisy_shards: Sequence[int],
    noise: str,
    data_crc: int,
    devices: int,
    replica_map: str,
    resident: bool | None,
    local_steps: int,
    batch_size: int,
    rounds: int,
    checkpoint_every: int,
    parameters: int,
    blended_bytes: int,
    compile_seconds: float,
    memory: Mapping[str, int] | None,
    score_samples: int | None,
    score_every: int,
    faults: Mapping[str, Any] | None,
    hardware: Any,
    versions: Any,
) -> Row:
    """A run's first row, without `settings`. Its arm is the run itself unless the caller says otherwise.

    `blended_bytes` is what one replica sends at a blend; it receives as much.
    """
    replicas = len(shard_sizes)
    return {
        "kind": "run",
        "run": run,
        "arm": run,
        "seed": seed,
        "started": started,
        "dataset": dataset,
        "classes": classes,
        "class_names": class_names,
        "train_samples": train_samples,
        "heldout_samples": heldout_samples,
        "test_samples": test_samples,
        "shard_sizes": shard_sizes,
        "noisy_shards": noisy_shards,
        "noise": noise,
        "data_crc": data_crc,
        "replicas": replicas,
        "devices": devices,
        "replica_map": replica_map,
        "resident": resident,
        "local_steps": local_steps,
        "batch_size": batch_size,
        "rounds": rounds,
        "checkpoint_every": checkpoint_every,
        "samples_per_round": replicas * local_steps * batch_size,
        "parameters": parameters,
        "bytes_per_round": 2 * replicas * blended_bytes if replicas > 1 else 0,
        "compile_seconds": compile_seconds,
        "memory": memory,
        "score_samples": score_samples,
        "score_every": score_every,
        "faults": faults,
        "critical_path": None,
        "target_accuracy": None,
        "hardware": hardware,
        "versions": versions,
    }


ROUND_ENTRIES = (
    *("kind", "run", "arm", "seed", "round", "local_steps", "samples", "seconds", "elapsed", "train_loss", "weights"),
    *("effective_replicas", "alive", "scores", "diagnosis", "guard", "peak_memory", "sample", "stopped_early"),
    *("missing", "workers", "audits"),
)


def round_row(
    *,
    number: int,
    local_steps: int,
    samples: int,
    seconds: float,
    elapsed: float,
    train_loss: np.ndarray,
    weights: np.ndarray,
    effective_replicas: float,
    alive: np.ndarray,
    scores: Mapping[str, np.ndarray],
    diagnosis: Mapping[str, np.ndarray],
    guard: Mapping[str, np.ndarray],
) -> Row:
    """A round's row, without `run`, `arm`, `seed` and the test split (`quality_row`).

    `train_loss`, `weights`, `alive` and each of `scores` are [K]; the row holds the mean loss of the living.
    """
    living = train_loss[alive]
    return {
        "kind": "round",
        "round": number,
        "local_steps": local_steps,
        "samples": samples,
        "seconds": seconds,
        "elapsed": elapsed,
        "train_loss": float(living.mean()) if len(living) else math.nan,
        "weights": weights,
        "effective_replicas": float(effective_replicas),
        "alive": alive,
        "scores": dict(scores),
        "diagnosis": dict(diagnosis),
        **({"guard": dict(guard)} if guard else {}),
    }


def quality_row(*, scalars: Iterable[str], measured: Mapping[str, np.ndarray] | None, last: bool) -> Row:
    """A round's entries about the test split.

    Args:
      scalars: the names of the task's scalar metrics; the others are arrays.
      measured: every metric; None if the round was not evaluated, which leaves the scalars null.
      last: whether this is the run's last round, which keeps the arrays too.

    >>> quality_row(scalars=["loss"], measured={"loss": np.float32(0.1), "confusion": np.eye(2, dtype=int)}, last=False)
    {'test_loss': 0.1}
    """
    scalars = tuple(scalars)
    row: Row = {f"test_{name}": None if measured is None else float(f"{measured[name]:.7g}") for name in scalars}
    arrays = {} if measured is None or not last else {name: x for name, x in measured.items() if name not in scalars}
    return row | {name: x if x.dtype.kind in "iub" else x.astype(np.float64) for name, x in arrays.items()}


def matrix_row(
    *,
    scenarios: Mapping[str, str],
    recommend: bool,
    roles: Mapping[str, Any] | None,
    series: Mapping[str, Any] | None,
    reference: str,
    settings: Mapping[str, Any],
    started: str,
    dataset: str,
    train_samples: int,
    heldout_samples: int,
    test_samples: int,
    parameters: int,
    hardware: Any,
    versions: Any,
) -> Row:
    """The first row of a matrix."""
    return {
        "kind": "matrix",
        "run": "matrix",
        "scenarios": dict(scenarios),
        "recommend": recommend,
        **({} if roles is None else {"roles": dict(roles)}),
        **({} if series is None else {"series": dict(series)}),
        "reference": reference,
        "settings": dict(settings),
        "started": started,
        "dataset": dataset,
        "train_samples": train_samples,
        "heldout_samples": heldout_samples,
        "test_samples": test_samples,
        "parameters": parameters,
        "hardware": hardware,
        "versions": versions,
    }


_KEPT = ("test_accuracy", "test_loss", "test_macro_f1", "test_ece")


def cell_row(*, run: str, scenario: str, weighting: str, seed: int, rate: float, rows: Iterable[Row]) -> Row:
    """A cell's row: a summary of the `rows` of its run, since a matrix has hundreds of cells."""
    rounds = [row for row in rows if row["kind"] == "round"]
    last = rounds[-1]
    return {
        "kind": "cell",
        "run": run,
        "scenario": scenario,
        "weighting": weighting,
        "seed": seed,
        "rate": rate,
        **{name: None if last[name] is None else round(last[name], 6) for name in _KEPT},
        "weights": np.mean([row["weights"] for row in rounds], axis=0, dtype=np.float64).round(4),
        "effective_replicas": round(float(np.mean([row["effective_replicas"] for row in rounds])), 3),
        "alive_rounds": np.sum([row["alive"] for row in rounds], axis=0),
        "seconds": round(float(np.median([row["seconds"] for row in rounds])), 5),
    }


PATIENCE = 2
"""Consecutive lost rounds that end a run."""


def lost(weights: Any) -> bool:
    """Whether a round was lost, that is, whether all its weights [K] are 0."""
    return not np.any(weights)


def lost_at_the_end(rows: Sequence[Row]) -> int:
    """Counts the consecutive lost rounds that end a run's rows.

    >>> weights = ([0.5, 0.5], [0, 0], [0, 0])
    >>> lost_at_the_end([{"kind": "run"}, *({"kind": "round", "weights": w} for w in weights)])
    2
    """
    count = 0
    for row in reversed(rows):
        if row["kind"] != "round" or not lost(row["weights"]):
            break
        count += 1
    return count
