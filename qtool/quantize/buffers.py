"""Host memory of the pipeline, all of it from the backend: a worker's buffers, and tensors' absmax.

Nothing is given back before the run ends, because fresh pages cost more than the kernels.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from qtool.backends.protocol import Backend
from qtool.formats.precisions import NESTED_BLOCKSIZE, QuantFormat
from qtool.quantize.plan import TensorPlan
from qtool.quantize.tiles import Tile, cut_tensor

_ALIGNMENT_BYTES = 4096  # every buffer begins a page


class BufferSizes(NamedTuple):
    """Bytes that a tile takes of each of `TileBuffers`."""

    source: int
    transposed: int = 0
    codes: int = 0
    statistics: int = 0


@dataclass(frozen=True, slots=True)
class TileBuffers:
    """What one worker works in, uint8 each, large enough for every tile of a run.

    `source` is filled from the file, `transposed` holds the values of a Conv1D weight in output
    order, `codes` the packed or INT8 weight, `statistics` absmax or SCB.
    """

    source: NDArray[np.uint8]
    transposed: NDArray[np.uint8]
    codes: NDArray[np.uint8]
    statistics: NDArray[np.uint8]

    @classmethod
    def allocate(cls, backend: Backend, sizes: BufferSizes) -> Self:
        """Cut one host buffer into four."""
        padded = [-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes]
        memory = backend.host_buffer(sum(padded))
        ends = np.cumsum(padded)
        return cls(*np.split(memory, ends[:-1]))


def largest_sizes(tensors: Iterable[TensorPlan], fmt: QuantFormat, tile_bytes: int) -> BufferSizes:
    """The most that any tile of `tensors` takes of each buffer."""
    firsts = (next(cut_tensor(tensor, fmt, tile_bytes)) for tensor in tensors)
    return BufferSizes(*map(max, zip(*(_sizes_of(tile, fmt) for tile in firsts), strict=True)))


def _sizes_of(tile: Tile, fmt: QuantFormat) -> BufferSizes:
    if tile.tensor.action == "copy":
        return BufferSizes(tile.source_bytes)
    transposed = tile.source_bytes if tile.tensor.transposed else 0
    if fmt.is_int8:
        return BufferSizes(tile.source_bytes, transposed, tile.length, 4 * tile.num_rows)
    num_blocks = -(-tile.length // fmt.blocksize)
    statistics = 0 if fmt.double_quant else 4 * num_blocks  # else in a `CollectedAbsmax`
    return BufferSizes(tile.source_bytes, transposed, -(-tile.length // 2), statistics)


class BufferPool:
    """Buffers that are taken and given back; the smallest that is large enough serves."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._free: list[NDArray[np.uint8]] = []  # by size

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """A buffer of at least `num_bytes`."""
        with self._lock:
            index = bisect_left(self._free, num_bytes, key=len)
            if index < len(self._free):
                return self._free.pop(index)
        return self._backend.host_buffer(num_bytes)

    def give_back(self, buffer: NDArray[np.uint8]) -> None:
        """Let others have it."""
        with self._lock:
            insort(self._free, buffer, key=len)


def collected_bytes(num_blocks: int) -> int:
    """What `CollectedAbsmax` takes."""
    return 5 * num_blocks + 4 * -(-num_blocks // NESTED_BLOCKSIZE)


class CollectedAbsmax:
    """A tensor's absmax, float32 (num_blocks,), and room for what double quantization makes of it.

    `codes` is uint8 (num_blocks,), `nested_absmax` float32 (ceil(num_blocks / 256),).
    """

    def __init__(self, pool: BufferPool, num_blocks: int) -> None:
        num_bytes = collected_bytes(num_blocks)
        self._pool = pool
        self._memory = pool.take(num_bytes)
        floats = self._memory[: num_bytes - num_blocks].view(np.float32)
        self.absmax = floats[:num_blocks]
        self.nested_absmax = floats[num_blocks:]
        self.codes = self._memory[num_bytes - num_blocks : num_bytes]

    def give_back(self) -> None:
        """Return the memory, of which nothing may be used any more."""
        self._pool.give_back(self._memory)


class AbsmaxCollector:
    """Keeps each tensor's absmax until its last tile is done: double quantization needs them all.

    The largest thing that the pipeline holds, for as many tensors as are in work: 5 bytes per
    block, 1/25 of a bf16 tensor in blocks of 64.
    """

    def __init__(self, pool: BufferPool, blocksize: int) -> None:
        self._pool = pool
        self._blocksize = blocksize
        self._lock = threading.Lock()
        self._collected: dict[str, CollectedAbsmax] = {}
        self._num_left: dict[str, int] = {}  # elements, by tensor name

    def of(self, tensor: TensorPlan) -> CollectedAbsmax:
        """Where the absmax of `tensor` goes, block by block."""
        source = tensor.source
        with self._lock:
            if source.name not in self._collected:
                num_blocks = -(-source.num_elements // self._blocksize)
                self._collected[source.name] = CollectedAbsmax(self._pool, num_blocks)
                self._num_left[source.name] = source.num_elements
            return self._collected[source.name]

    def take_complete(self, tile: Tile) -> CollectedAbsmax | None:
        """Count the tile as done; whoever is last with a tensor gets its absmax."""
        name = tile.tensor.source.name
        with self._lock:
            self._num_left[name] -= tile.length
            return self._collected.pop(name) if self._num_left[name] == 0 else None
