"""Which devices the replicas spread over, and what is said where they do not."""

import jax
import pytest

import wavg_jax as wavg


@pytest.mark.parametrize(
    ("replicas", "devices", "processes", "instead"),
    [
        (6, 4, 1, "replicas= to 4 or 8, or devices= to 3 or 6"),
        (7, 4, 1, "replicas= to 4 or 8, or devices= to 1 or 7"),
        (3, 4, 1, "replicas= to 4, or devices= to 3"),
        (6, 4, 2, "replicas= to 4 or 8, or devices= to 2 or 6"),  # 3 is not the same in both
        (9, 6, 2, "replicas= to 6 or 12"),
    ],
)
def test_replicas_that_do_not_fit_the_devices_name_the_nearest_that_do(
    replicas, devices, processes, instead, monkeypatch
):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(wavg.SettingsError) as error:
        wavg.place(replicas, jax.devices()[:devices])
    assert str(error.value) == f"{replicas} replicas do not spread evenly over {devices} devices: set {instead}"
