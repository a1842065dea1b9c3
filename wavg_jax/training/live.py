"""Views of a run while it goes on: TensorBoard, MLflow, Weights & Biases, and a trace of one round.

Each is given to `fit(on_round=...)`. Loggers only look: they are told of a round while the next one trains, so one that
takes less than a round costs nothing, and one that fails is left out with a warning. Of several processes the first
alone logs.
"""

import contextlib
import hashlib
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from wavg_jax.arguments import PATH, TEXT, as_whole, check
from wavg_jax.base import SettingsError
from wavg_jax.extras import need
from wavg_jax.storage.schema import Row
from wavg_jax.training.callbacks import Observer

__all__ = ["mlflow", "profile", "scalars", "tensorboard", "wandb"]

_FACTS = (
    *("run", "arm", "seed", "weighting", "dataset", "replicas", "local_steps", "batch_size", "rounds", "parameters"),
    *("devices", "replica_map", "bytes_per_round", "noisy_shards", "started"),
)
"""Entries of a run's first row that a view shows beside its settings."""


def scalars(row: Row, run: Row, before: Row | None = None) -> dict[str, float]:
    """The numbers of a round that a live view plots, by name.

    Args:
      row: the round's row; see `wavg_jax.storage.schema`.
      run: the run's first row.
      before: the row of the round before; None for the first round.

    Returns:
      `train_loss`, every `test_{metric}` of a round that was evaluated, `effective_replicas`, `alive` (how many),
      `local_steps`, `samples`, this round's `samples_per_second` and `bytes_per_second`, and per replica `weights/{k}`,
      `scores/{signal}/{k}` and, with `diagnose`, `diagnosis/...`. What is null is left out.

    >>> row = {"round": 1, "samples": 64, "seconds": 0.5, "train_loss": 2.0, "test_accuracy": None}
    >>> row |= {"alive": [True, True], "weights": [0.25, 0.75], "scores": {"loss": [2.0, None]}}
    >>> found = scalars(row, {"bytes_per_round": 1000})
    >>> found["weights/1"], found["scores/loss/0"], found["samples_per_second"], found["bytes_per_second"]
    (0.75, 2.0, 128.0, 2000.0)
    >>> "test_accuracy" in found or "scores/loss/1" in found
    False
    """
    plotted = ("train_loss", "effective_replicas", "local_steps", "samples")
    found = {name: value for name, value in row.items() if name in plotted or name.startswith("test_")}
    found |= {"alive": sum(row["alive"])}
    seconds = row["seconds"] or math.nan
    found["samples_per_second"] = (row["samples"] - (before or {}).get("samples", 0)) / seconds
    found["bytes_per_second"] = run["bytes_per_round"] / seconds
    numbers = dict(_numbers("", found))
    for group in ("weights", "scores", "diagnosis"):
        numbers |= _numbers(group, row.get(group, {}))
    return numbers


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The finite numbers in nested dicts and lists, by their paths."""
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers(f"{name}/{key}" if name else str(key), item)
    elif isinstance(value, int | float) and math.isfinite(value):
        yield name, float(value)


def facts(run: Row) -> dict[str, Any]:
    """What a run is: the main entries of its first row, and its settings."""
    return {name: run[name] for name in _FACTS if run.get(name) is not None} | run["settings"]


def _each(rows: Sequence[Row], log: Callable[[Row, dict[str, float]], Any]) -> Callable[[Row], None]:
    """Makes the function that gives every new row and its numbers to `log`."""
    last = rows[-1] if len(rows) > 1 else None

    def see(row: Row) -> None:
        nonlocal last
        log(row, scalars(row, rows[0], last))
        last = row

    return see


def _identity(run: Row) -> str:
    """Tells runs apart, and stays the same when one resumes."""
    # The seconds of compiling tell runs apart that began within one second; a resumed run keeps its first row.
    told = [str(run.get(name)) for name in ("run", "seed", "started", "data_crc", "compile_seconds")]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def tensorboard(folder: str | os.PathLike[str]) -> Observer:
    """Logs rounds for TensorBoard, without TensorFlow.

    Rounds that a resumed run repeats replace what was logged of them.

    Args:
      folder: where the event files go, in a folder of the run's name; the log directory that TensorBoard is given.

    Returns:
      What `fit(on_round=...)` takes.

    Raises:
      MissingExtra: tensorboardX is not installed (`wavg-jax[tensorboard]`).

    Example::

      wavg.fit(..., on_round=wavg.live.tensorboard("runs/events"))
    """
    check("tensorboard: folder", folder, PATH)
    writers = need("tensorboardX", extra="tensorboard", why="live.tensorboard")

    @contextlib.contextmanager
    def start(rows: Sequence[Row]) -> Iterator[Callable[[Row], None]]:
        run = rows[0]
        path = str(pathlib.Path(folder).expanduser() / run["run"])
        # Files are named by the second, and the second of two within one would write over the first.
        options = {"filename_suffix": f".{len(rows):08d}", "flush_secs": 5}
        # What is there of later rounds is another run's, or will be logged again.
        with writers.SummaryWriter(path, purge_step=len(rows) - (len(rows) == 1), **options) as writer:
            table = "\n".join(f"| {name} | {value} |" for name, value in facts(run).items())
            writer.add_text("run", f"| setting | value |\n|---|---|\n{table}", len(rows) - 1)

            def log(row: Row, numbers: dict[str, float]) -> None:
                for name, number in numbers.items():
                    writer.add_scalar(name, number, row["round"])

            yield _each(rows, log)

    return Observer(start)


_AT_ONCE = {"metrics": 1000, "params": 100}
"""What MLflow takes in one request."""


def _send(client: Any, which: str, entries: dict[str, list[Any]]) -> None:
    """Logs parameters or metrics to an MLflow run, in as many requests as it takes."""
    for kind, most in _AT_ONCE.items():
        given = entries.get(kind, [])
        for first in range(0, len(given), most):
            client.log_batch(which, **{kind: given[first : first + most]})


def mlflow(tracking_uri: str, *, experiment: str = "wavg_jax") -> Observer:
    """Logs rounds to MLflow: a run each, which a resumed run continues.

    Rounds that a resumed run repeats are not logged again; they are equal but for their speed.

    Args:
      tracking_uri: where runs are kept: `http://...`, `sqlite:///...` (which needs all of mlflow), or `file:...`, which
        newer versions of MLflow take only with the environment variable `MLFLOW_ALLOW_FILE_STORE=true`.
      experiment: the name of the experiment, made if there is none.

    Returns:
      What `fit(on_round=...)` takes.

    Raises:
      MissingExtra: MLflow is not installed (`wavg-jax[mlflow]`).
      SettingsError: MLflow does not take `tracking_uri`.
    """
    check("mlflow: tracking_uri", tracking_uri, TEXT)
    check("mlflow: experiment", experiment, TEXT)
    library = need("mlflow", extra="mlflow", why="live.mlflow")
    from mlflow.entities import Metric, Param, RunTag

    try:
        client = library.MlflowClient(tracking_uri=tracking_uri)
    except library.exceptions.MlflowException as error:
        raise SettingsError(f"MLflow does not take tracking_uri={tracking_uri!r}: {error}") from None

    def find(run: Row) -> tuple[str, int]:
        """The run's number at MLflow, and how many of its rounds are there already."""
        known = client.get_experiment_by_name(experiment)
        where = client.create_experiment(experiment) if known is None else known.experiment_id
        tag = ("wavg_jax.identity", _identity(run))
        found = client.search_runs([where], f"tags.`{tag[0]}` = '{tag[1]}'")
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id, int(found[0].data.metrics.get("round", 0))
        made = client.create_run(where, run_name=run["run"], tags=dict([tag])).info.run_id
        client.log_batch(made, tags=[RunTag("wavg_jax.version", run["versions"]["wavg-jax"])])
        _send(client, made, {"params": [Param(name, str(value)[:500]) for name, value in facts(run).items()]})
        return made, 0

    @contextlib.contextmanager
    def start(rows: Sequence[Row]) -> Iterator[Callable[[Row], None]]:
        try:
            which, there = find(rows[0])
        except library.exceptions.MlflowException as error:
            raise SettingsError(f"MLflow does not take a run of experiment={experiment!r}: {error}") from None
        done = len(rows) - 1

        def log(row: Row, numbers: dict[str, float]) -> None:
            nonlocal done
            done = row["round"]
            if done > there:
                now, given = int(1000 * time.time()), numbers | {"round": float(done)}
                _send(client, which, {"metrics": [Metric(name, value, now, done) for name, value in given.items()]})

        status = "FAILED"
        try:
            yield _each(rows, log)
            status = "FINISHED" if done == rows[0]["rounds"] else "KILLED"
        finally:
            client.set_terminated(which, status)

    return Observer(start)


def wandb(project: str, **options: Any) -> Observer:
    """Logs rounds to Weights & Biases: a run each, which a resumed run continues.

    Rounds that a resumed run repeats are not logged again; they are equal but for their speed. Offline
    (`mode="offline"`, or the environment variable `WANDB_MODE`) it writes files for `wandb sync`.

    Args:
      project: the name of the project.
      options: further arguments of `wandb.init`, such as `mode`, `dir`, `entity` and `tags`.

    Returns:
      What `fit(on_round=...)` takes.

    Raises:
      MissingExtra: wandb is not installed (`wavg-jax[wandb]`).
    """
    check("wandb: project", project, TEXT)
    library = need("wandb", extra="wandb", why="live.wandb")

    @contextlib.contextmanager
    def start(rows: Sequence[Row]) -> Iterator[Callable[[Row], None]]:
        run = rows[0]
        given = {"name": run["run"], "id": _identity(run), "resume": "allow", "config": facts(run)}
        # A run of the caller's own stays open beside this one.
        with library.init(project=project, **({"reinit": "create_new"} | given | options)) as logged:
            there = logged.step

            def log(row: Row, numbers: dict[str, float]) -> None:
                if row["round"] >= there:
                    logged.log(numbers, step=row["round"])

            yield _each(rows, log)

    return Observer(start)


def profile(round: int, folder: str | os.PathLike[str]) -> Observer:
    """Traces one round, with all that the host does meanwhile, by `jax.profiler`.

    Rounds wait for one another while it watches. Compilation is over before the first round, so the trace has none.

    Args:
      round: which round, from 1.
      folder: where the trace goes: `plugins/profile/<time>/perfetto_trace.json.gz`, which https://ui.perfetto.dev
        opens, and files for TensorBoard and XProf.

    Returns:
      What `fit(on_round=...)` takes.

    Raises:
      SettingsError: `round` is no round of the run, or was done by its first part; when the run starts.
    """
    round = as_whole("profile: round", round, 1)
    check("profile: folder", folder, PATH)

    @contextlib.contextmanager
    def start(rows: Sequence[Row]) -> Iterator[Callable[[Row], None]]:
        done, last = len(rows) - 1, rows[0]["rounds"]
        if not done < round <= last:
            left = f"of {done + 1} to {last}" if done < last else "only of rounds that are left, and none is"
            raise SettingsError(f"profile={round}: the run takes a trace {left}; choose another round")
        running = False

        def see(row: Row) -> None:
            nonlocal running
            if row["round"] == round - 1:
                jax.profiler.start_trace(pathlib.Path(folder).expanduser(), create_perfetto_trace=True)
                running = True
            elif running:
                jax.profiler.stop_trace()
                running = False

        try:
            see({"round": done})
            yield see
        finally:
            if running:
                jax.profiler.stop_trace()

    return Observer(start, waits=True)


def __dir__() -> list[str]:
    return __all__
