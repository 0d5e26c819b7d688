"""PyTorch's caching allocator on CUDA, followed request by request without a GPU.

What a program is handed out is more than it asked for: requests are rounded, and a free block that
is less than 1 MiB larger is handed out whole. How much more depends on the order of requests, so
the order is replayed. Rules: c10/cuda/CUDACachingAllocator.cpp of PyTorch, default settings.

    allocator = CachingAllocator()
    block = allocator.allocate(3 << 20)
    allocator.free(block)
    allocator.peak_bytes
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Final

from qtool.planner.units import MIB

ROUNDING_BYTES: Final = 512  # every request is rounded up to this
SMALL_BYTES: Final = 1 * MIB  # requests up to this come from segments of their own
SMALL_SEGMENT_BYTES: Final = 2 * MIB
MEDIUM_BYTES: Final = 10 * MIB  # requests under this share segments of 20 MiB
MEDIUM_SEGMENT_BYTES: Final = 20 * MIB
LARGE_ROUNDING_BYTES: Final = 2 * MIB


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment, handed out or free; `before` and `after` are its neighbours."""

    num_bytes: int
    number: int
    pool: _Pool
    is_free: bool = True
    before: Block | None = None
    after: Block | None = None


@dataclass(slots=True)
class _Pool:
    """The free blocks for small or for large requests, by size, then by age."""

    is_small: bool
    free: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)

    def take(self, num_bytes: int) -> Block | None:
        """The smallest free block that holds `num_bytes`."""
        index = bisect.bisect_left(self.free, (num_bytes, -1))
        return self.blocks[self.free.pop(index)[1]] if index < len(self.free) else None

    def put(self, block: Block) -> None:
        block.is_free = True
        self.blocks[block.number] = block
        bisect.insort(self.free, (block.num_bytes, block.number))

    def withdraw(self, block: Block) -> None:
        del self.free[bisect.bisect_left(self.free, (block.num_bytes, block.number))]
        del self.blocks[block.number]

    def splits(self, left_bytes: int) -> bool:
        """Whether `left_bytes` of a block become a free block of their own."""
        return left_bytes >= ROUNDING_BYTES if self.is_small else left_bytes > SMALL_BYTES


class CachingAllocator:
    """What was handed out (`allocated_bytes`, at most `peak_bytes`) and taken from the device."""

    def __init__(self) -> None:
        self.allocated_bytes = self.peak_bytes = self.reserved_bytes = 0
        self._small, self._large = _Pool(is_small=True), _Pool(is_small=False)
        self._num_blocks = 0

    def allocate(self, num_bytes: int) -> Block:
        """A block of at least `num_bytes`, which counts whole."""
        rounded = max(-(-num_bytes // ROUNDING_BYTES), 1) * ROUNDING_BYTES
        pool = self._small if rounded <= SMALL_BYTES else self._large
        block = pool.take(rounded) or self._new_segment(pool, rounded)
        pool.blocks.pop(block.number, None)
        if pool.splits(block.num_bytes - rounded):
            self._split(block, rounded)
        block.is_free = False
        self.allocated_bytes += block.num_bytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Give the block back; free neighbours become one with it."""
        self.allocated_bytes -= block.num_bytes
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                block.pool.withdraw(other)
                _merge(block, other)
        block.pool.put(block)

    def _new_segment(self, pool: _Pool, num_bytes: int) -> Block:
        if pool.is_small:
            segment_bytes = SMALL_SEGMENT_BYTES
        elif num_bytes < MEDIUM_BYTES:
            segment_bytes = MEDIUM_SEGMENT_BYTES
        else:
            segment_bytes = -(-num_bytes // LARGE_ROUNDING_BYTES) * LARGE_ROUNDING_BYTES
        self.reserved_bytes += segment_bytes
        return self._new_block(segment_bytes, pool)

    def _new_block(self, num_bytes: int, pool: _Pool) -> Block:
        self._num_blocks += 1
        return Block(num_bytes, self._num_blocks, pool)

    def _split(self, block: Block, num_bytes: int) -> None:
        rest = self._new_block(block.num_bytes - num_bytes, block.pool)
        block.num_bytes = num_bytes
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after = rest
        block.pool.put(rest)


def _merge(block: Block, other: Block) -> None:
    """Add the free neighbour `other` to `block`."""
    block.num_bytes += other.num_bytes
    if other is block.before:
        block.before = other.before
        if block.before is not None:
            block.before.after = block
    else:
        block.after = other.after
        if block.after is not None:
            block.after.before = block
