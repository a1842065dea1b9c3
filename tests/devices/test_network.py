"""What an exchange sends and how long it takes, against schedules played out by hand."""

import math

import pytest

from wavg_jax.devices.network import BLOCK, NOTHING, WIRES, Link, all_gather, all_reduce, as_entry, from_entry
from wavg_jax.storage.schema import plain


@pytest.mark.parametrize("workers", [2, 3, 5, 8])
def test_a_ring_sends_what_reduce_scatter_and_all_gather_send_step_by_step(workers):
    n = 120_000  # divisible by every K here, so that chunks are equal
    steps = [n // workers for _ in range(workers - 1)] * 2
    ring = all_reduce(n, workers)
    assert ring.steps == len(steps)
    assert ring.sent == pytest.approx(4 * sum(steps))
    assert all_reduce(n, workers, "bfloat16").sent == pytest.approx(2 * sum(steps))


@pytest.mark.parametrize("workers", [2, 3, 5, 8])
def test_a_gather_sends_every_tree_on_to_the_next(workers):
    for wire, width in (("float32", 4), ("bfloat16", 2)):
        found = all_gather(1000, workers, wire)
        assert (found.sent, found.steps) == (1000 * width * (workers - 1), workers - 1)


def test_int8_carries_a_byte_a_number_and_a_float32_scale_a_block():
    numbers, blocks = 10 * BLOCK, 10
    assert all_gather(numbers, 2, "int8").sent == numbers + 4 * blocks
    assert all_reduce(numbers, 2, "int8").sent == numbers + 4 * blocks  # two phases of half of them
    assert min(WIRES.values()) == WIRES["int8"]


def test_time_adds_bytes_latency_and_overhead_and_grows_with_each():
    exchange = all_reduce(1_000_000, 4)  # 6 MB in 6 steps
    assert exchange.seconds(Link(48e6)) == pytest.approx(1.0)
    assert exchange.seconds(Link(48e6, latency=0.01)) == pytest.approx(1.06)
    assert exchange.seconds(Link(48e6, 0.01, overhead=0.2)) == pytest.approx(1.26)
    assert exchange._replace(times=50).seconds(Link(48e6, 0.01, 0.2)) == pytest.approx(63)
    assert exchange.seconds(Link(latency=0.01)) == pytest.approx(0.06)  # of unlimited bandwidth


def test_nothing_takes_no_time():
    slow = Link(1.0, 1.0, 1.0)
    assert NOTHING.seconds(slow) == all_reduce(100, 1).seconds(slow) == all_gather(100, 1).seconds(slow) == 0
    assert all_reduce(100, 2).seconds(None) == 0


@pytest.mark.parametrize("link", [None, Link(1e8), Link(latency=0.01), Link(1e9, 0.001, 0.002)])
def test_a_link_survives_a_row(link):
    assert from_entry(plain(as_entry(link))) == link


def test_a_link_in_words():
    assert str(Link(950)) == "950 bit/s"
    assert str(Link(2.5e5, latency=1e-4)) == "250 kbit/s, 0.1 ms latency"
    assert str(Link(math.inf)) == "unlimited bandwidth"
