"""From flags to live views of a run."""

from collections.abc import Callable

from absl import flags

from wavg_jax.base import SettingsError
from wavg_jax.training import live
from wavg_jax.training.callbacks import Observer

F = flags.FLAGS

VIEWS: dict[str, Callable[[str], Observer]] = {
    "tensorboard": live.tensorboard,
    "mlflow": live.mlflow,
    "wandb": live.wandb,
}
"""What --log_to names, and what makes its view."""


def read_views() -> list[Observer]:
    """Reads --log_to.

    Raises:
      SettingsError: an entry is no VIEW:WHERE.
      MissingExtra: its package is not installed.
    """
    found = []
    for given in F.log_to or ():
        name, _, where = given.partition(":")
        if name not in VIEWS or not where:
            raise SettingsError(
                f"--log_to={given}: give tensorboard:FOLDER, mlflow:URI or wandb:PROJECT, or several with commas"
            )
        found.append(VIEWS[name](where))
    return found
