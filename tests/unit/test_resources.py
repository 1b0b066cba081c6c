"""What a part holds: growth is told from noise, and what a process takes at first is no leak."""

import mmap
import os
import random

import pytest

from flows.bench import resources
from flows.bench.resources import Sample, judge, slope


def part(memory, files=lambda n: 40, connections=lambda n: 10, count=90):
    return [Sample(2.0 * n, memory(n), files(n), connections(n)) for n in range(count)]


def noisy(seed, grows=0.0, start=200.0, sigma=1.0):
    draw = random.Random(seed)
    return lambda n: start + grows * n / 30 + draw.gauss(0, sigma)


def test_noise_is_flat_and_what_grows_leaks():
    flat = [judge(part(noisy(seed))) for seed in range(50)]
    assert not any(found["leaks"] for found in flat)
    growing = [judge(part(noisy(seed, grows=10.0))) for seed in range(50)]
    assert all(found["leaks"] == ["memory"] and found["verdict"] == "leaks" for found in growing)
    assert all(abs(found["slope_mib_per_min"] - 10.0) < 1.5 for found in growing)


def test_a_slope_is_within_its_error_about_as_often_as_it_should_be():
    """95 % of slopes of noise; of 400, at least 360 (five standard deviations below)."""
    slopes = [slope([2.0 * n for n in range(80)], list(map(noisy(seed), range(80)))) for seed in range(400)]
    assert sum(found.is_noise for found in slopes) >= 360


def test_what_is_taken_at_first_is_no_leak():
    found = judge(part(lambda n: 100.0 + min(n, 20) * 10))
    assert found["leaks"] == [] and found["memory_start_mib"] == found["memory_end_mib"] == 300.0


def test_what_has_a_bound_may_come_near_it_and_not_go_beyond():
    assert judge(part(noisy(1, grows=300.0)), "engine")["leaks"] == []
    assert judge(part(noisy(1, grows=600.0)), "engine")["leaks"] == ["memory"]
    assert judge(part(noisy(1, grows=300.0)), "api")["leaks"] == ["memory"]


@pytest.mark.parametrize("name", ["files", "connections"])
def test_what_is_opened_and_never_closed_leaks(name):
    assert judge(part(noisy(1), **{name: lambda n: 40 + n // 3}))["leaks"] == [name]
    assert judge(part(noisy(1), **{name: lambda n: 40 + n % 7}))["leaks"] == []


def test_shared_segments_are_not_counted_and_what_is_ones_own_is():
    size = 64 * 1024**2
    before = resources._own_bytes(os.getpid())
    with mmap.mmap(-1, size) as shared:  # as PostgreSQL has its buffers
        for page in range(0, size, mmap.PAGESIZE):
            shared[page] = 1
        assert resources._own_bytes(os.getpid()) - before < size / 2
    # A large object may be given memory that the process has already.
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own:
        for page in range(0, size, mmap.PAGESIZE):
            own[page] = 1
        assert resources._own_bytes(os.getpid()) - before > size / 2
