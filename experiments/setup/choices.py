"""What enum flags choose from, by name: outer optimizers, pulls, reductions, smoothing, corrections of the local steps,
schedules, scales, feeds."""

from collections.abc import Callable
from typing import Any

import optax
from absl import flags

from wavg_jax import data
from wavg_jax.averaging import outer, pull, reduce, smoothing
from wavg_jax.base import SettingsError
from wavg_jax.rounds import drift
from wavg_jax.training import schedule

Flags = flags.FlagValues


def _given(f: Flags, **names: str) -> dict[str, Any]:
    """The arguments whose flags are set; the others keep their defaults."""
    return {argument: f[flag].value for argument, flag in names.items() if f[flag].value is not None}


_ADAPTIVE = {"learning_rate": "outer_lr", "b1": "outer_momentum", "tau": "outer_tau"}
OUTERS: dict[str, Callable[[Flags], optax.GradientTransformation | None]] = {
    "none": lambda f: None,
    "nesterov": lambda f: outer.nesterov(**_given(f, learning_rate="outer_lr", momentum="outer_momentum")),
    "bmuf": lambda f: outer.bmuf(
        **{"momentum": 1 - 1 / f.replicas} | _given(f, block_learning_rate="outer_lr", momentum="outer_momentum")
    ),
    "lookahead": lambda f: outer.lookahead(**_given(f, alpha="outer_lr")),
    "fedavgm": lambda f: outer.fedavgm(**_given(f, learning_rate="outer_lr", momentum="outer_momentum")),
    "fedadagrad": lambda f: outer.fedadagrad(**_given(f, **_ADAPTIVE)),
    "fedyogi": lambda f: outer.fedyogi(**_given(f, **_ADAPTIVE)),
    "fedadam": lambda f: outer.fedadam(**_given(f, **_ADAPTIVE)),
}
_IGNORED = {
    "none": ("outer_lr", "outer_momentum", "outer_tau"),
    "lookahead": ("outer_momentum", "outer_tau"),
    **dict.fromkeys(("nesterov", "bmuf", "fedavgm"), ("outer_tau",)),
}
"""Outer optimizer -> flags that it does not read."""
PULLS: dict[str, Callable[[float], float | pull.Pull]] = {"new": float, "old": pull.toward_old}
REDUCES: dict[str, Any] = {"mean": reduce.weighted_mean, "norm_preserving": reduce.norm_preserving}
SMOOTHINGS: dict[str, Callable[[Flags], optax.GradientTransformation | None]] = {
    "none": lambda f: None,
    "ema": lambda f: smoothing.ema(f.ema_decay),
    "swa": lambda f: smoothing.swa(f.swa_start),
    "lawa": lambda f: smoothing.lawa(f.lawa_window),
}
DRIFTS: dict[str, Callable[[Flags, float], drift.Correction | None]] = {
    "none": lambda f, rate: None,
    "fedprox": lambda f, rate: drift.fedprox(f.prox_mu),
    "scaffold": lambda f, rate: drift.scaffold(rate * _steps_worth(f)),
}
"""Name -> function of the flags and the inner optimizer's learning rate."""
FALLS: dict[str, Callable[[float, int], optax.Schedule]] = {
    "none": lambda rate, steps: optax.constant_schedule(rate),
    "cosine": optax.cosine_decay_schedule,
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
}
"""Name -> function of the peak of a learning rate and the steps in which it falls to 0."""
MOMENTUM = 0.9
"""Of --inner=momentum."""
SCHEDULES: dict[str, Callable[[Flags], schedule.Schedule]] = {
    "fixed": lambda f: schedule.fixed(f.local_steps),
    "post_local": lambda f: schedule.post_local(f.local_steps, f.post_local_steps),
    "linear": lambda f: schedule.linear(1, f.local_steps, f.schedule_rounds),
    "adacomm": lambda f: schedule.adacomm(f.local_steps, f.schedule_rounds),
}


def make_diloco(f: Flags) -> optax.GradientTransformation:
    """The outer optimizer of the arms diloco and weighted_diloco, one round late with --delayed.

    Raises:
      SettingsError: --outer names another, which would be of plain and weighted alone.
    """
    if f.outer != "none":
        raise SettingsError(
            f"--outer={f.outer} is for plain and weighted; the arms diloco and weighted_diloco have nesterov: leave it "
            "out, or these arms"
        )
    return outer.delayed(outer.nesterov()) if f.delayed else outer.nesterov()


def make_outer(f: Flags) -> optax.GradientTransformation | None:
    """The outer optimizer of --outer, one round late with --delayed.

    Raises:
      SettingsError: the command line gives a flag that this optimizer does not read.
    """
    for name in _IGNORED.get(f.outer, ()):
        if f[name].value is not None:
            raise SettingsError(
                f"--{name} has no effect with --outer={f.outer}; leave it out, or choose another --outer"
            )
    chosen = OUTERS[f.outer](f)
    return outer.delayed(chosen or optax.sgd(1.0)) if f.delayed else chosen


def _steps_worth(f: Flags) -> float:
    """How many times the learning rate a constant gradient moves the parameters in a step.

    Raises:
      SettingsError: the steps of this optimizer are no multiple of the gradient.
    """
    worth = {"sgd": 1.0, "momentum": 1 / (1 - MOMENTUM)}
    if f.inner not in worth:
        raise SettingsError(
            f"--drift=scaffold reads gradients off the steps of SGD, which --inner={f.inner} does not take: choose "
            f"--inner={' or '.join(worth)}, or --drift=fedprox"
        )
    if f.clip is not None or f.warmup or f.decay != "none":
        raise SettingsError(
            "--drift=scaffold reads gradients off steps of a constant rate: leave out --clip, --warmup and --decay, or "
            "choose --drift=fedprox"
        )
    return worth[f.inner]


SCALES = {"channel": data.per_channel, "feature": data.per_feature, "all": data.overall, "none": None}
FEEDS: dict[str, bool | None] = {"auto": None, "resident": True, "stream": False}
"""--feed -> `Layout.resident`."""
