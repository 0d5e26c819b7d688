"""The caching allocator's rules, and that nothing is lost among them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.planner.allocator import CachingAllocator

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("asked", "handed_out", "reserved"),
    [
        (0, 512, 2 * MIB),
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (9 * MIB, 9 * MIB, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # the last 1 MiB is no block of its own
        (112 * MIB + 5, 112 * MIB + 512, 114 * MIB),
    ],
)
def test_one_request(asked, handed_out, reserved):
    allocator = CachingAllocator()
    allocator.allocate(asked)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (handed_out, reserved)


def test_a_freed_block_serves_the_next_request_whole_if_little_is_left():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(40 * MIB))
    assert allocator.allocate(39 * MIB).num_bytes == 40 * MIB
    assert allocator.reserved_bytes == allocator.peak_bytes == 40 * MIB


def test_the_smallest_block_that_is_large_enough_serves():
    allocator = CachingAllocator()
    large, small = allocator.allocate(80 * MIB), allocator.allocate(30 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.allocate(20 * MIB) is small
    assert allocator.reserved_bytes == 110 * MIB


def test_free_neighbours_become_one_block_again():
    allocator = CachingAllocator()
    whole = allocator.allocate(60 * MIB)
    allocator.free(whole)
    parts = [allocator.allocate(20 * MIB) for _ in range(3)]
    for part in (parts[0], parts[2], parts[1]):
        allocator.free(part)
    assert allocator.allocate(60 * MIB).num_bytes == 60 * MIB
    assert allocator.reserved_bytes == 60 * MIB


@given(st.lists(st.tuples(st.integers(0, 64 * MIB), st.integers(0, 8)), max_size=60))
def test_what_is_handed_out_is_what_was_asked_for_and_at_most_a_mebibyte_more(steps):
    allocator, held = CachingAllocator(), []
    for num_bytes, victim in steps:
        held.append((num_bytes, allocator.allocate(num_bytes)))
        if victim < len(held):
            allocator.free(held.pop(victim)[1])
        total = sum(block.num_bytes for _, block in held)
        assert allocator.allocated_bytes == total <= allocator.reserved_bytes
        assert allocator.peak_bytes >= total
        assert len({id(block) for _, block in held}) == len(held)
        for asked, block in held:
            assert asked <= block.num_bytes <= asked + MIB + 512
    for _, block in held:
        allocator.free(block)
    assert allocator.allocated_bytes == 0
