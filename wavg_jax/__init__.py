"""wavg_jax: K replicas of a network, each trained on its own shard for H local steps, scored, and blended by a weighted
average into the next global parameters."""

from wavg_jax import data, models, outer, policy
from wavg_jax.averager import averager
from wavg_jax.base import (
    Averager,
    Batch,
    DataError,
    Replicas,
    ResumeError,
    SettingsError,
    Stopped,
    Task,
    TrainState,
    WavgError,
    Weighting,
    WorkdirError,
)
from wavg_jax.local import local_steps
from wavg_jax.reduce import weighted_mean
from wavg_jax.trainer import Result, fit
from wavg_jax.tree import replica, replicate
from wavg_jax.weighting import effective_replicas, inverse, normalise, proportional, softmax, uniform

__all__ = [
    "Averager",
    "Batch",
    "DataError",
    "Replicas",
    "Result",
    "ResumeError",
    "SettingsError",
    "Stopped",
    "Task",
    "TrainState",
    "WavgError",
    "Weighting",
    "WorkdirError",
    "averager",
    "data",
    "effective_replicas",
    "fit",
    "inverse",
    "local_steps",
    "models",
    "normalise",
    "outer",
    "policy",
    "proportional",
    "replica",
    "replicate",
    "softmax",
    "uniform",
    "weighted_mean",
]
