"""Methods that others published, at their published settings: how they average, and when.

Settings are those of the papers and of their authors' code as far as we read them, H among them; the inner optimizer is
that of all arms, at a rate tuned for each.
"""

from collections.abc import Callable
from typing import NamedTuple

import optax
from absl import flags

import wavg_jax as wavg
from wavg_jax.averaging import outer
from wavg_jax.base import Averager
from wavg_jax.training import schedule
from wavg_jax.training.schedule import Past, Schedule
from wavg_jax.weighting import penalty, scores, wrappers

F = flags.FLAGS


class Method(NamedTuple):
    """How a method averages.

    Attributes:
      averager: makes its averager.
      schedule: `(local steps of the whole run, shape of the rate) -> H over the run`; the shape gives the rate of each
        step as a share of its peak.
    """

    averager: Callable[[], Averager]
    schedule: Callable[[int, Callable], Schedule]


def _every(local_steps: int) -> Callable[[int, Callable], Schedule]:
    """The same H in every round but the last, which may be shorter."""
    return lambda steps, shape: Schedule(local_steps, lambda past: min(local_steps, steps - past.steps))


def _cut(made: Schedule, steps: int) -> Schedule:
    """A schedule that ends after so many local steps."""

    def within(past: Past) -> int:
        return min(made.steps(past), steps - past.steps)

    return Schedule(made.longest, within)


def _edit() -> Averager:
    step = optax.chain(optax.clip_by_global_norm(10.0), outer.nesterov(0.8, 0.85))
    return wavg.averager(penalty.pseudo_gradient_penalty(), outer=step)


METHODS: dict[str, Method] = {
    # Lin et al. 2020, arXiv:1808.07217: every step averaged for the first half, then every 16 steps.
    "post_local": Method(
        lambda: wavg.averager(wavg.uniform()),
        lambda steps, shape: _cut(schedule.post_local(16, after=steps // 2), steps),
    ),
    # Gu et al. 2024, arXiv:2310.14423: at least every 2 steps, growth coefficient a quarter of the peak rate.
    "qsr": Method(
        lambda: wavg.averager(wavg.uniform()),
        lambda steps, shape: _cut(
            schedule.qsr(shape, alpha=0.25, least=2, longest=max(steps // 4, 2), warmup=F.warmup), steps
        ),
    ),
    # Douillard et al. 2023, arXiv:2311.08105: the outer step is theirs; H is --local_steps, theirs is 500.
    "diloco": Method(
        lambda: wavg.averager(wavg.uniform(), outer=outer.nesterov(0.7, 0.9)),
        lambda steps, shape: _every(F.local_steps)(steps, shape),
    ),
    # Cheng et al. 2025, arXiv:2412.07210.
    "edit128": Method(_edit, _every(128)),
    # Dimlioglu and Choromanska 2024, arXiv:2403.04206: tau 32, lambda 0.5.
    "grawa32": Method(lambda: wavg.averager(wrappers.grawa(), pull=0.5), _every(32)),
    # Jolicoeur-Martineau et al. 2023, arXiv:2304.03094: alpha 0.99 every 10 steps.
    "papa": Method(lambda: wavg.averager(wavg.uniform(), pull=0.01), _every(10)),
    # Teng et al. 2019, arXiv:1905.10395: pulled toward the replica with the least training loss.
    "lsgd": Method(lambda: wavg.averager(scores.best("train_loss"), pull=0.1), _every(10)),
}
"""Name -> method."""
