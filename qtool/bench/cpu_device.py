"""qtool's CPU kernels by all cores, in tiles as `qtool quantize` gives them to its workers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qtool.backends.cpu import DEFAULT_TILE_BYTES, CpuBackend
from qtool.bench.contenders import Run, Sample
from qtool.bench.operations import BLOCKSIZE, Operation, Shape
from qtool.bench.random_weights import fill_with_gaussians
from qtool.bench.weights import Array, Weight, allocate_weight, num_weights
from qtool.formats.floats import NUMPY_DTYPES
from qtool.formats.tensors import SourceDtype

Tile = slice  # of values


class CpuClock:
    """The wall clock around one run."""

    runs_per_sample = 1

    def time(self, run: Run, first: int) -> Sample:
        """See `Clock.time`."""
        start_s = time.perf_counter()
        run(first)
        return Sample(time.perf_counter() - start_s)


class CpuDevice:
    """See `Device`: `num_threads` cores of the host. Outputs are reused, as the pipeline does."""

    def __init__(self, num_threads: int) -> None:
        self.clock = CpuClock()
        self.num_threads = num_threads
        self._backend = CpuBackend()
        self._pool = ThreadPoolExecutor(num_threads)

    def make_weights(
        self, shape: Shape, dtype: SourceDtype, operations: Sequence[Operation]
    ) -> list[Weight]:
        """See `Device.make_weights`."""
        sources = [
            np.empty(shape[0] * shape[1], NUMPY_DTYPES[dtype])
            for _ in range(num_weights(shape, dtype))
        ]
        seed = secrets.randbits(64)

        def fill(number: int) -> None:
            fill_with_gaussians(sources[number], dtype, (seed, number))

        list(self._pool.map(fill, range(len(sources))))
        return [allocate_weight(source, shape, dtype, operations, _touched) for source in sources]

    def bind_copy(self, weight: Weight) -> Callable[[], object]:
        """See `Device.bind_copy`: the same tiles, copied by the same threads."""

        def copy(tile: Tile) -> None:
            np.copyto(weight.restored[tile], weight.source[tile])

        return self._by_tiles(copy, weight)

    def bind(self, operation: Operation, weight: Weight) -> Callable[[], object]:
        """See `Device.bind`."""
        if operation.precision == "int8":
            return self._bind_int8(operation, weight)
        if operation.direction == "quantize":
            return self._bind_quantize_4bit(operation, weight)
        return self._bind_dequantize_4bit(operation, weight)

    def to_host(self, array: Array) -> NDArray[Any]:
        """See `Device.to_host`."""
        return cast(NDArray[Any], array)

    def release(self) -> None:
        """See `Device.release`."""

    def close(self) -> None:
        """See `Device.close`."""
        self._pool.shutdown(cancel_futures=True)

    # -- one operation each ---------------------------------------------------------------------

    def _bind_quantize_4bit(self, operation: Operation, weight: Weight) -> Callable[[], object]:
        """Tiles by all threads; double quantization by one, at the end: it needs every absmax."""
        stored, quant_type = weight.four_bit[operation.precision], operation.format.quant_type

        def quantize(tile: Tile) -> None:
            packed, absmax = stored.packed[_bytes_of(tile)], stored.absmax[_blocks_of(tile)]
            self._backend.quantize_4bit(
                weight.source[tile], weight.dtype, quant_type, BLOCKSIZE, packed, absmax
            )

        quantize_tiles = self._by_tiles(quantize, weight)
        if not operation.format.double_quant:
            return quantize_tiles

        def quantize_twice() -> None:
            quantize_tiles()
            stored.offset[0] = self._backend.quantize_absmax(
                stored.absmax, stored.codes, stored.nested_absmax
            )

        return quantize_twice

    def _bind_dequantize_4bit(self, operation: Operation, weight: Weight) -> Callable[[], object]:
        stored, quant_type = weight.four_bit[operation.precision], operation.format.quant_type

        def dequantize(tile: Tile) -> None:
            packed, absmax = stored.packed[_bytes_of(tile)], stored.absmax[_blocks_of(tile)]
            self._backend.dequantize_4bit(
                packed, absmax, quant_type, BLOCKSIZE, weight.dtype, weight.restored[tile]
            )

        dequantize_tiles = self._by_tiles(dequantize, weight)
        if not operation.format.double_quant:
            return dequantize_tiles

        def dequantize_twice() -> None:
            self._backend.dequantize_absmax(
                stored.codes, stored.nested_absmax, stored.offset[0], stored.absmax
            )
            dequantize_tiles()

        return dequantize_twice

    def _bind_int8(self, operation: Operation, weight: Weight) -> Callable[[], object]:
        assert weight.int8 is not None
        scb = weight.int8.scb
        codes, source, restored = (
            array.reshape(weight.shape)
            for array in (weight.int8.codes, weight.source, weight.restored)
        )

        def quantize(tile: Tile) -> None:
            rows = _rows_of(tile, weight.shape)
            self._backend.quantize_int8(source[rows], weight.dtype, codes[rows], scb[rows])

        def dequantize(tile: Tile) -> None:
            rows = _rows_of(tile, weight.shape)
            self._backend.dequantize_int8(codes[rows], scb[rows], weight.dtype, restored[rows])

        work = quantize if operation.direction == "quantize" else dequantize
        return self._by_tiles(work, weight)

    def _by_tiles(self, work: Callable[[Tile], None], weight: Weight) -> Callable[[], object]:
        tiles = cut_into_tiles(weight.shape, weight.source.itemsize)
        return lambda: list(self._pool.map(work, tiles))


def cut_into_tiles(shape: Shape, itemsize: int) -> list[Tile]:
    """Whole rows of about DEFAULT_TILE_BYTES; BLOCKSIZE rows are whole blocks in any case."""
    num_rows, num_columns = shape
    rows = max(1, DEFAULT_TILE_BYTES // (num_columns * itemsize) // BLOCKSIZE) * BLOCKSIZE
    size, step = num_rows * num_columns, rows * num_columns
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _touched(size: int, dtype: Any) -> Array:
    """Memory whose pages are there already."""
    return np.full(size, 1, dtype)


def _bytes_of(tile: Tile) -> slice:
    return slice(tile.start // 2, -(-tile.stop // 2))


def _blocks_of(tile: Tile) -> slice:
    return slice(tile.start // BLOCKSIZE, -(-tile.stop // BLOCKSIZE))


def _rows_of(tile: Tile, shape: Shape) -> slice:
    return slice(tile.start // shape[1], tile.stop // shape[1])
