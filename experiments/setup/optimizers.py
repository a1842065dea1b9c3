"""--inner: any optax optimizer by its name and arguments, clipped, at a rate that warms up and decays."""

import ast
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from experiments.setup.choices import FALLS, MOMENTUM
from wavg_jax.base import SettingsError


def airbench(
    learning_rate: Any, momentum: float = 0.85, weight_decay: float = 0.00153, bias_scale: float = 64.0
) -> optax.GradientTransformation:
    """Nesterov's SGD as airbench94 sets it: L2 decay, and BatchNorm's biases at a rate `bias_scale` times as high.

    The decay of those biases is not scaled with it. What is no bias of a module named BatchNorm takes plain steps.

    Args:
      learning_rate: a number, or a schedule.
      momentum: of Nesterov's kind.
      weight_decay: added to the gradients, this times the parameters.
      bias_scale: multiplies the gradients of BatchNorm's biases.

    Reference: Jordan, 2024, section 3.4 (arXiv:2404.00498); numbers of its ablations, for means over a batch.
    """

    def norm_biases(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "BatchNorm" in (text := jax.tree_util.keystr(path)) and "bias" in text, params
        )

    return optax.chain(
        optax.masked(optax.scale(bias_scale), norm_biases),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum, nesterov=True),
    )


SHORT: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "momentum": functools.partial(optax.sgd, momentum=MOMENTUM),
    "airbench": airbench,
}
"""Names of our own, beside optax's."""
EXAMPLES = "sgd, adamw(weight_decay=0.1), contrib.muon or rprop"


class Course(NamedTuple):
    """What surrounds an optimizer: nothing by default.

    Attributes:
      clip: largest global norm of a gradient; None for no limit.
      warmup: steps in which the rate rises from 0 to its peak.
      decay: how the rate then falls to 0, of `FALLS`.
      steps: all steps that the optimizer will take.
    """

    clip: float | None = None
    warmup: int = 0
    decay: str = "none"
    steps: int = 1


def make_inner(text: str, rate: float, course: Course = Course()) -> optax.GradientTransformation:  # noqa: B008
    """The inner optimizer that a text such as `adamw(weight_decay=0.1)` names, one object per setting, so that runs
    share their programs.

    Args:
      text: the name of a function of optax that takes a `learning_rate`, and its other arguments by keyword.
      rate: the learning rate, or its peak.
      course: clipping and the schedule of the rate.

    Raises:
      SettingsError: there is no such optimizer, or its arguments are not what it takes.
    """
    return _made(text, rate, course)


@functools.cache
def _made(text: str, rate: float, course: Course) -> optax.GradientTransformation:
    name, arguments = parse(text)
    make = SHORT.get(name) or _of_optax(name)
    try:
        made = make(learning_rate=_rate(rate, course), **arguments)
        weights = {"w": jnp.zeros((2, 2))}
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(lambda w: made.update(w, made.init(w), w), weights)
    except Exception as error:  # whatever optax makes of arguments that are not its own
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(f"--inner={text} cannot be an inner optimizer with these flags ({reason})") from None
    return made if course.clip is None else optax.chain(optax.clip_by_global_norm(course.clip), made)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Splits an optimizer's text into its name and its arguments, which are plain Python values: nothing is run.

    Raises:
      SettingsError: it is neither a name nor a call of one with keyword arguments.

    >>> parse("adamw(weight_decay=0.1, nesterov=True)"), parse("contrib.muon")
    (('adamw', {'weight_decay': 0.1, 'nesterov': True}), ('contrib.muon', {}))
    """
    try:
        tree: ast.expr = ast.parse(text.strip(), mode="eval").body
        arguments: dict[str, Any] = {}
        if isinstance(tree, ast.Call) and not tree.args:
            arguments = {str(given.arg): ast.literal_eval(given.value) for given in tree.keywords}
            tree = tree.func
        if not isinstance(tree, ast.Name | ast.Attribute) or not {"None", "learning_rate"}.isdisjoint(arguments):
            raise ValueError
        return ast.unparse(tree), arguments
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise SettingsError(
            f"--inner={text}: give an optimizer of optax with keyword arguments that are plain values, such as "
            f"{EXAMPLES}; the learning rate is that of --lr_plain and its like"
        ) from None


def _of_optax(name: str) -> Callable[..., optax.GradientTransformation]:
    module: Any = optax.contrib if name.startswith("contrib.") else optax
    short = name.removeprefix("contrib.")
    found = None if short.startswith("_") else getattr(module, short, None)
    if not inspect.isfunction(found) or "learning_rate" not in inspect.signature(found).parameters:
        raise SettingsError(f"--inner={name}: optax has no optimizer of that name; give one such as {EXAMPLES}")
    return found


def _rate(rate: float, course: Course) -> Any:
    """The rate of each step."""
    if not course.warmup and course.decay == "none":
        return rate
    decay = FALLS[course.decay](rate, max(course.steps - course.warmup, 1))
    if not course.warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, rate, course.warmup), decay], [course.warmup])


def read_course(flags: Any, steps: int, stretch: float = 1.0) -> Course:
    """The course of the flags for an optimizer that takes `steps` steps, `stretch` times as many as the replicas take.

    Raises:
      SettingsError: the optimizer's state, and so its place on the course, would be forgotten at every blend; or the
        rate would still rise at the end.
    """
    decays, warmup = flags.decay != "none", math.ceil(flags.warmup * stretch)
    if (decays or warmup) and flags.opt_state_at_sync == "reset":
        raise SettingsError("--opt_state_at_sync=reset starts --warmup and --decay again at every blend; use keep")
    if warmup >= steps and warmup:
        raise SettingsError(f"--warmup={flags.warmup} is no less than all local steps, --rounds times --local_steps")
    # Equal courses are one object's, so what has no effect is left out.
    return Course(flags.clip, warmup, flags.decay, steps if decays else 1)
