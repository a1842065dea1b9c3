"""Constructor of the library's weightings; adds argument checks to `init` and `update`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wavg_jax import checks, tree
from wavg_jax.arguments import as_whole
from wavg_jax.base import Init, PyTree, SettingsError, Weighting, WeightingUpdate
from wavg_jax.weighting.signals import zeros


def stateless(params: PyTree, replicas: int) -> tuple:
    """The `init` of a stateless weighting."""
    del params, replicas
    return ()


def _no_blend(weights: PyTree) -> PyTree:
    raise SettingsError(
        "this weighting evaluates blends: pass blend=, a function weights -> tree, such as "
        "functools.partial(wavg.weighted_mean, stacked), or call averager(weighting).update, which passes it"
    )


def make_weighting(
    update: WeightingUpdate, *, needs: tuple[str, ...] = (), init: Init = stateless, reads_replicas: bool = True
) -> Weighting:
    """Builds a `Weighting` that raises a one-line SettingsError for a bad K or mask and a missing signal or blend.

    Args:
      update: as in `Weighting`; always receives `alive`, `blend` and the signals in `needs`.
      needs: names of the signals that `update` reads.
      init: `(params, replicas) -> state`; receives an `int` of at least 1.
      reads_replicas: as in `Weighting`.
    """

    def checked_init(params: PyTree, replicas: int) -> PyTree:
        return init(params, as_whole("replicas", replicas, 1))

    def checked_update(
        stacked: PyTree,
        state: PyTree,
        params: PyTree,
        *,
        alive: jax.Array | None = None,
        blend: Callable[[PyTree], PyTree] = _no_blend,
        **signals: Any,
    ) -> tuple[PyTree, PyTree]:
        checks.signals(needs, signals)
        return update(stacked, state, params, alive=checks.mask(alive), blend=blend, **signals)

    return Weighting(checked_init, checked_update, needs, reads_replicas)


def weights_like(weighting: Weighting, state: PyTree, params: PyTree, replicas: int) -> PyTree:
    """Returns the shapes of the weights that `weighting` gives for K replicas, without computing them."""

    def run(state: PyTree, params: PyTree) -> PyTree:
        signals = {name: zeros(name, params, replicas) for name in weighting.needs}
        if "evaluate" in signals:
            signals["evaluate"] = lambda params, weights: {"loss": jnp.float32(0), "accuracy": jnp.float32(0)}
        return weighting.update(
            tree.replicate(params, replicas),
            state,
            params,
            alive=jnp.ones(replicas, bool),
            blend=lambda weights: tree.as_accumulators(params),
            **signals,
        )[0]

    return jax.eval_shape(run, state, params)
