"""What the files alone would cost: read and write as many bytes, and do nothing with them.

Tiles go to threads as the pipeline's do, from and to buffers made before the clock starts.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RawTransfer:
    """How to move the bytes: `num_threads` threads, `tile_bytes` at a time."""

    num_threads: int
    tile_bytes: int

    def time_reading(self, paths: Iterable[Path]) -> float:
        """Seconds to read the files whole."""
        buffers = self._buffers()
        start_s = time.perf_counter()
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb", buffering=0)) for path in paths]
            tiles = [
                _Tile(file.fileno(), start, length)
                for file in files
                for start, length in self._cut(os.fstat(file.fileno()).st_size)
            ]
            _move(tiles, buffers, lambda tile, view: os.preadv(tile.descriptor, [view], tile.start))
        return time.perf_counter() - start_s

    def time_writing(self, sizes: Mapping[Path, int]) -> float:
        """Seconds to create the files with so many bytes each, and to sync them."""
        buffers = self._buffers()
        start_s = time.perf_counter()
        with ExitStack() as stack:
            files = {
                stack.enter_context(path.open("xb", buffering=0)): num_bytes
                for path, num_bytes in sizes.items()
            }
            tiles = [
                _Tile(file.fileno(), start, length)
                for file, num_bytes in files.items()
                for start, length in self._cut(num_bytes)
            ]
            # A file takes one writer at a time, so the threads are spread over all of them.
            tiles.sort(key=lambda tile: tile.start)
            _move(tiles, buffers, lambda tile, view: os.pwrite(tile.descriptor, view, tile.start))
            for file in files:
                os.fsync(file.fileno())
        return time.perf_counter() - start_s

    def _cut(self, num_bytes: int) -> Iterable[tuple[int, int]]:
        for start in range(0, num_bytes, self.tile_bytes):
            yield start, min(self.tile_bytes, num_bytes - start)

    def _buffers(self) -> list[NDArray[np.uint8]]:
        """One per thread, its pages touched; their bytes do not repeat."""
        generator = np.random.default_rng()
        return [
            generator.integers(0, 256, self.tile_bytes, np.uint8) for _ in range(self.num_threads)
        ]


@dataclass(frozen=True, slots=True)
class _Tile:
    """`length` bytes of an open file, from `start` on."""

    descriptor: int
    start: int
    length: int


def _move(
    tiles: Iterable[_Tile], buffers: list[NDArray[np.uint8]], call: Callable[[_Tile, Any], int]
) -> None:
    """Let one thread per buffer take tiles until none is left; `call` may move less than asked."""
    waiting = deque(tiles)

    def work(buffer: NDArray[np.uint8]) -> None:
        while True:
            try:
                tile = waiting.popleft()
            except IndexError:
                return
            done = 0
            while done < tile.length:
                rest = _Tile(tile.descriptor, tile.start + done, tile.length - done)
                moved = call(rest, buffer[done : tile.length].data)
                if moved == 0:
                    raise OSError(f"a file ended {rest.length} bytes too early")
                done += moved

    with ThreadPoolExecutor(len(buffers)) as pool:
        try:
            list(pool.map(work, buffers))
        finally:
            waiting.clear()
