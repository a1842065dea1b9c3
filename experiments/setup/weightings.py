"""The weightings by name, for --weighting and the scenario matrix."""

from collections.abc import Callable
from typing import Any

import optax
from absl import flags

from experiments.setup.choices import make_outer
from wavg_jax.averaging import outer, reduce, transforms
from wavg_jax.base import Weighting
from wavg_jax.weighting import penalty, pool, robust, scores, search, wrappers

Flags = flags.FlagValues


def _softmax(f: Flags) -> Weighting:
    return scores.softmax("loss", f.temperature)


def _candidates(f: Flags) -> tuple[Weighting, ...]:
    """What `best_of` chooses among, beside equal weights."""
    softmaxes = (scores.softmax("loss", factor * f.temperature) for factor in (0.25, 1.0, 4.0))
    return (scores.proportional("accuracy"), *softmaxes, search.learned(scores.uniform()))


def _before_outer(first: optax.GradientTransformation, f: Flags) -> optax.GradientTransformation:
    """The outer optimizer of --outer, plain averaging without one, on a pseudo-gradient that `first` transforms."""
    return optax.chain(first, make_outer(f) or optax.sgd(1.0))


WEIGHTINGS: dict[str, Callable[[Flags], dict[str, Any]]] = {
    "plain": lambda f: {"weighting": scores.uniform()},
    # From scores of each replica
    "accuracy": lambda f: {"weighting": scores.proportional("accuracy")},
    "accuracy_above_chance": lambda f: {"weighting": scores.proportional("accuracy", chance=f.chance, power=2.0)},
    "softmax_loss": lambda f: {"weighting": _softmax(f)},
    "softmax_z": lambda f: {"weighting": scores.softmax("loss", 1.0, standardise=True)},
    "softmax_floor": lambda f: {"weighting": wrappers.uniform_floor(_softmax(f), 0.5)},
    "softmax_momentum": lambda f: {"weighting": wrappers.momentum(_softmax(f), 0.5)},
    "softmax_train_loss": lambda f: {"weighting": scores.softmax("train_loss", f.temperature)},
    "inverse_loss": lambda f: {"weighting": scores.inverse("loss")},
    "inverse_grad_norm": lambda f: {"weighting": scores.inverse("grad_norm")},
    "grawa": lambda f: {"weighting": wrappers.grawa()},
    "grawa_layers": lambda f: {"weighting": wrappers.grawa(layerwise=True)},
    "rank_loss": lambda f: {"weighting": scores.rank("loss")},
    "best_replica": lambda f: {"weighting": scores.best("loss")},
    "leader_train_loss": lambda f: {"weighting": scores.best("train_loss")},
    "samples": lambda f: {"weighting": scores.proportional("samples")},
    "steps": lambda f: {"weighting": scores.proportional("steps")},
    "fisher": lambda f: {"weighting": scores.fisher_merging()},
    # From scores of blends
    "opinion_pool": lambda f: {"weighting": pool.opinion_pool()},
    "greedy_soup": lambda f: {"weighting": search.greedy_soup("accuracy")},
    "learned": lambda f: {"weighting": search.learned(scores.uniform())},
    "learned_carry": lambda f: {"weighting": search.learned(scores.uniform(), carry=True)},
    "learned_online": lambda f: {"weighting": search.learned(scores.uniform(), carry=True, steps=1)},
    "best_of": lambda f: {"weighting": search.best_of(*_candidates(f))},
    # From the parameters alone
    "coordinate_median": lambda f: {"weighting": robust.coordinate_median()},
    "trimmed_mean": lambda f: {"weighting": robust.trimmed_mean(f.byzantine)},
    "geometric_median": lambda f: {"weighting": robust.geometric_median()},
    "krum": lambda f: {"weighting": robust.krum(f.byzantine)},
    "multi_krum": lambda f: {"weighting": robust.multi_krum(f.byzantine, keep=max(f.replicas - f.byzantine, 1))},
    "mean_around_median": lambda f: {"weighting": robust.mean_around_median(f.byzantine)},
    "bulyan": lambda f: {"weighting": robust.bulyan(f.byzantine)},
    "edit": lambda f: {
        "weighting": penalty.pseudo_gradient_penalty(),
        "outer": _before_outer(optax.clip_by_global_norm(10.0), f),
    },
    "clip": lambda f: {"weighting": scores.uniform(), "transform": robust.clip_deltas()},
    "norm_preserving": lambda f: {"weighting": scores.uniform(), "reduce": reduce.norm_preserving},
    "radial_directional": lambda f: {
        "weighting": scores.proportional("steps"),  # Decoupled DiLoCo's tokens^2 / steps, with batches of one size
        "reduce": reduce.radial_directional,
        "deltas": True,
    },
    "iso_c": lambda f: {"weighting": scores.uniform(), "outer": _before_outer(outer.isotropic(), f)},
    "model_stock": lambda f: {"weighting": scores.uniform(), "reduce": reduce.model_stock, "deltas": True},
    "ties": lambda f: {
        "weighting": scores.uniform(),
        "transform": transforms.trim_deltas(),
        "reduce": reduce.disjoint_mean,
        "deltas": True,
    },
    "dare": lambda f: {"weighting": scores.uniform(), "transform": transforms.drop_deltas(0.5)},
}
"""Name -> function of the flags that returns arguments of `wavg_jax.averager`.

Call it once per run or matrix, since runs share compiled programs only if they get the same objects, and after
`experiments.setup.problem.load`, which sets --chance.
"""
