"""Workers that come and go: the replicas of `fit` train in processes that may die, hang, be slow, and return.

`fit` here takes what `wavg_jax.fit` takes, and `Workers`. Each worker is a Ray actor that holds a group of replicas and
their shards alone; the driver, the process that calls `fit`, holds everything else. A round blends whoever came back in
time, weighted by how good it is. Rows say who was missing and why.

Security is Ray's, which trusts everybody who can reach a cluster: whoever does can run any code on all of its machines,
the driver's among them, for what processes exchange is unpickled. So a cluster that we start listens on the loopback
interface alone, and one with an address is joined with a token, which it asks for only if it was started with
`RAY_AUTH_MODE=token`; still, put it on a network of its own. The checks of what workers send, in
`wavg_jax.elastic.arrivals`, protect a run from workers that are broken, or wrong, not from intruders.
"""

from wavg_jax.elastic.deadlines import Deadline, fixed, median_mad, polynomial, quantile, wait_for_all
from wavg_jax.elastic.run import fit
from wavg_jax.elastic.settings import Workers

__all__ = ["Deadline", "Workers", "fit", "fixed", "median_mad", "polynomial", "quantile", "wait_for_all"]


def __dir__() -> list[str]:
    return __all__
