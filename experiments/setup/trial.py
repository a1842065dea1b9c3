"""One training of one arm at a rate and a weight decay that are no constants of its program, so that tuning compiles
each arm once; and everything that controls need of it."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wavg_jax as wavg
from experiments.setup.choices import FALLS, MOMENTUM
from experiments.setup.climb import Setting
from wavg_jax import data, tree
from wavg_jax.base import Averager, PyTree, Task
from wavg_jax.rounds import policy
from wavg_jax.rounds.faults import Faults
from wavg_jax.storage.schema import Row, lost, round_row
from wavg_jax.training.recipe import Layout, make_recipe
from wavg_jax.training.run import Plan, Run
from wavg_jax.training.schedule import Past, Schedule


class Budget(NamedTuple):
    """How long an arm trains, and how.

    Attributes:
      steps, batch_size: of each of the arm's own replicas, over the whole run.
      schedule: H over the run.
      warmup: steps in which the rate rises; then it falls, or stays.
      decay: how, of `FALLS`.
    """

    steps: int
    batch_size: int
    schedule: Schedule
    warmup: int
    decay: str


def shape_of(steps: int, warmup: int, decay: str) -> Callable[[Any], Any]:
    """The rate of each step, as a share of its peak."""
    fall = FALLS[decay](1.0, max(steps - warmup, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, max(warmup, 1)), fall], [warmup])


class Trained(NamedTuple):
    """What a training leaves, on the host.

    Attributes:
      path: the global (params, mutable) after every round.
      replicas: the parameters of the living replicas before the last blend, one tree each.
      held: loss on the held-out samples after every round; inf where it is not finite.
      right: accuracy there.
      rows: of the rounds, without the test split.
    """

    path: list[tuple[PyTree, PyTree]]
    replicas: list[PyTree]
    held: np.ndarray
    right: np.ndarray
    rows: list[Row]

    @property
    def diverged(self) -> bool:
        """Whether the last round left no replica finite, so that older parameters are judged."""
        return lost(self.rows[-1]["weights"])


@functools.cache
def make_inner(steps: int, warmup: int, fall: str) -> optax.GradientTransformation:
    """SGD with momentum and coupled weight decay, whose `rate` and `decay` are in its state."""
    course = shape_of(steps, warmup, fall)

    def sgd(rate: Any, decay: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(decay),
            optax.trace(MOMENTUM),
            optax.scale_by_schedule(course),
            optax.scale(-rate),
        )

    return optax.inject_hyperparams(sgd)(rate=0.0, decay=0.0)


@functools.cache
def remembering(averager: Averager) -> Averager:
    """The same averager, whose state also holds the replicas of its last update."""

    def init(params: PyTree, replicas: int) -> PyTree:
        return averager.init(params, replicas), tree.replicate(params, replicas)

    def update(stacked: PyTree, state: PyTree, params: PyTree, **given: Any) -> tuple[PyTree, PyTree, PyTree]:
        blend, inner, weights = averager.update(stacked, state[0], params, **given)
        return blend, (inner, stacked), weights

    return averager._replace(init=init, update=update, halves=None)


def train(
    task: Task,
    sharded: data.ShardedData,
    averager: Averager,
    budget: Budget,
    setting: Setting,
    *,
    seed: int,
    scoring: wavg.Scoring,
    layout: Layout,
    faults: Faults | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Trained:
    """Trains an arm; only what the rounds themselves need is read: training and held-out samples.

    A run that loses all replicas stays at its last finite parameters.
    """
    sharded = sharded._replace(test=sharded.heldout)  # what `Run` evaluates after every round
    replicas = len(sharded.shards)
    at_sync = wavg.AtSync(policy.keep, policy.average if replicas > 1 else policy.keep)
    recipe = make_recipe(
        task,
        sharded,
        remembering(averager),
        make_inner(budget.steps, budget.warmup, budget.decay),
        scoring=scoring,
        at_sync=at_sync,
        layout=layout,
        faults=faults,
    )
    plan = Plan(budget.schedule, budget.steps, budget.batch_size, seed, budget.steps, 1)
    run = Run(recipe, sharded, plan, "trial", ())
    values = {name: jnp.full(replicas, value, jnp.float32) for name, value in setting._asdict().items()}
    state = run.first()
    opt_state = optax.tree.set(state.replicas.opt_state, **values)
    state = state._replace(replicas=state.replicas._replace(opt_state=opt_state))
    path: list[tuple[PyTree, PyTree]] = []
    rows: list[Row] = []
    held: list[float] = []
    right: list[float] = []
    elapsed, samples, given = 0.0, 0, 0
    while given < budget.steps:
        begun = time.perf_counter()
        local_steps = budget.schedule.steps(Past(len(rows), given, ()))
        work = run.work(given, local_steps)
        given += local_steps
        state, log, _ = run.step.program.call(state, work, run.shared, run.ask(False))
        log = jax.device_get(log)
        seconds = time.perf_counter() - begun
        elapsed, samples = elapsed + seconds, samples + int(log.steps.sum()) * budget.batch_size
        found = jax.device_get(run.evaluate(state))
        held.append(float(np.nan_to_num(found["loss"], nan=np.inf)))
        right.append(float(found["accuracy"]))
        path.append(jax.device_get((state.params, state.mutable)))
        rows.append(_row(len(rows) + 1, local_steps, log, seconds, elapsed, samples))
        advance()
    stacked = jax.device_get(state.averager[1])
    own = [jax.tree.map(lambda x, k=k: x[k], stacked) for k in range(replicas)]
    alive = [one for one in own if all(np.isfinite(x).all() for x in jax.tree.leaves(one))]
    return Trained(path, alive, np.array(held), np.array(right), rows)


def _row(number: int, local_steps: int, log: Any, seconds: float, elapsed: float, samples: int) -> Row:
    return round_row(
        number=number,
        local_steps=local_steps,
        samples=samples,
        seconds=seconds,
        elapsed=elapsed,
        train_loss=log.train_loss,
        weights=log.weights,
        effective_replicas=log.effective_replicas,
        alive=log.alive,
        scores={},
        diagnosis={},
        guard={},
    )
