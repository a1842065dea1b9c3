"""wavg_jax: K replicas of a network, each trained on its own shard for H local steps, scored, and blended by a weighted
average into the next global parameters."""

from wavg_jax import data, elastic, estimators, models
from wavg_jax.averaging import outer, pull, smoothing, transforms
from wavg_jax.averaging.averager import averager
from wavg_jax.averaging.reduce import disjoint_mean, model_stock, norm_preserving, radial_directional, weighted_mean
from wavg_jax.base import (
    Averager,
    Batch,
    DataError,
    Diverged,
    MissingExtra,
    Replicas,
    ResumeError,
    SettingsError,
    Stopped,
    Task,
    TooFew,
    TrainState,
    WavgError,
    WavgWarning,
    Weighting,
    WorkdirError,
)
from wavg_jax.devices.machine import release
from wavg_jax.devices.placement import place
from wavg_jax.devices.processes import initialize
from wavg_jax.rounds import drift, faults, policy
from wavg_jax.rounds.guard import SpikeGuard
from wavg_jax.rounds.local import Pace, local_steps
from wavg_jax.rounds.round import RoundLog, Rounds, make_rounds
from wavg_jax.rounds.score import Scoring
from wavg_jax.rounds.sync import AtSync
from wavg_jax.soups.average import Soup, average_checkpoints
from wavg_jax.soups.start import start_from
from wavg_jax.storage.tensors import save_safetensors
from wavg_jax.training import live, schedule
from wavg_jax.training.callbacks import with_state
from wavg_jax.training.fit import Result, Store, fit
from wavg_jax.training.recipe import Layout
from wavg_jax.tree import replica, replicate
from wavg_jax.weighting import robust, signals
from wavg_jax.weighting.penalty import pseudo_gradient_penalty
from wavg_jax.weighting.pool import opinion_pool
from wavg_jax.weighting.scores import (
    best,
    effective_replicas,
    fisher_merging,
    inverse,
    normalise,
    proportional,
    rank,
    softmax,
    token_weighted,
    uniform,
)
from wavg_jax.weighting.search import best_of, greedy_soup, learned
from wavg_jax.weighting.wrappers import grawa, momentum, shortlist, smooth_signals, uniform_floor

__version__ = release()

__all__ = [
    "AtSync",
    "Averager",
    "Batch",
    "DataError",
    "Diverged",
    "Layout",
    "MissingExtra",
    "Pace",
    "Replicas",
    "Result",
    "ResumeError",
    "RoundLog",
    "Rounds",
    "Scoring",
    "SettingsError",
    "Soup",
    "SpikeGuard",
    "Stopped",
    "Store",
    "Task",
    "TooFew",
    "TrainState",
    "WavgError",
    "WavgWarning",
    "Weighting",
    "WorkdirError",
    "average_checkpoints",
    "averager",
    "best",
    "best_of",
    "data",
    "disjoint_mean",
    "drift",
    "effective_replicas",
    "elastic",
    "estimators",
    "faults",
    "fisher_merging",
    "fit",
    "grawa",
    "greedy_soup",
    "initialize",
    "inverse",
    "learned",
    "live",
    "local_steps",
    "make_rounds",
    "model_stock",
    "models",
    "momentum",
    "norm_preserving",
    "normalise",
    "opinion_pool",
    "outer",
    "place",
    "policy",
    "proportional",
    "pseudo_gradient_penalty",
    "pull",
    "radial_directional",
    "rank",
    "replica",
    "replicate",
    "robust",
    "save_safetensors",
    "schedule",
    "shortlist",
    "signals",
    "smooth_signals",
    "smoothing",
    "softmax",
    "start_from",
    "token_weighted",
    "transforms",
    "uniform",
    "uniform_floor",
    "weighted_mean",
    "with_state",
]


def __dir__() -> list[str]:
    return __all__
