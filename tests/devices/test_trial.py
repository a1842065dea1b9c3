"""The collectives are tried: right ones pass in every size, wrong ones are named."""

import jax
import pytest

import wavg_jax as wavg
from wavg_jax.devices.trial import _wrong, try_collectives


@pytest.mark.parametrize(("devices", "gathered", "summed"), [(8, 1000, 1), (3, 1, 1000), (8, 7, 1001)])
def test_right_collectives_pass(devices, gathered, summed):
    try_collectives(tuple(jax.devices()[:devices]), gathered, summed)


@pytest.mark.parametrize(("broken", "says"), [("psum", "a sum over 4 devices"), ("all_gather", "a gather over 4 dev")])
def test_one_wrong_number_is_found(broken, says, monkeypatch):
    right = getattr(jax.lax, broken)

    def wrong(x, *arguments, **options):
        out = right(x, *arguments, **options)
        return out.at[(-1,) * out.ndim].add(1)

    monkeypatch.setattr(jax.lax, broken, wrong)
    with pytest.raises(wavg.WavgError, match=says):
        try_collectives(tuple(jax.devices()[:4]), 300, 200)


@pytest.mark.optimized
def test_the_trial_takes_no_more_memory_on_many_devices():
    """Each of D devices gathers a D-th of all numbers."""
    for devices in (2, 8):
        mesh = jax.sharding.Mesh(jax.devices()[:devices], ("all",))
        each = 2**20 // devices
        program = jax.shard_map(
            lambda devices=devices, each=each: _wrong(devices, each, 2**20),
            mesh=mesh,
            in_specs=(),
            out_specs=jax.sharding.PartitionSpec("all"),
            check_vma=False,
        )
        assert jax.jit(program).lower().compile().memory_analysis().temp_size_in_bytes < 6 * 4 * 2**20
