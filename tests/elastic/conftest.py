import breaking
import pytest


@pytest.fixture(scope="session")
def cluster():
    """One cluster for all tests of a process: starting it takes longer than most of them."""
    from wavg_jax.elastic.cluster import connected

    with connected(None) as ray:
        ray.cloudpickle.register_pickle_by_value(breaking)  # workers do not know this folder
        yield ray
