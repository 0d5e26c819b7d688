"""Moves one shard's bytes: read a tile, run the kernel, write the result at its known offset.

Each worker thread carries a whole tile from file to file in buffers of its own. While one waits
for the disk the others compute, and memory is bounded by workers x tile. Order does not matter:
every offset is known from the plan.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qtool.backends.protocol import Backend, SourceArray
from qtool.checkpoint.reading import ShardReader, open_shard
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.errors import QtoolError
from qtool.events import Advanced, OnEvent
from qtool.formats.bitsandbytes import QUANT_STATE_PREFIX, ROW_MAJOR, quant_state_bytes
from qtool.formats.codebooks import FP4_CODE, NF4_CODE, dynamic_map
from qtool.formats.precisions import NESTED_BLOCKSIZE, QuantFormat
from qtool.formats.tensors import SourceDtype
from qtool.quantize.memory import PeakMemory
from qtool.quantize.plan import QUANTIZABLE_DTYPES, ShardPlan, TensorPlan
from qtool.quantize.tiles import Tile, cut_shard

NUMPY_DTYPES: Mapping[SourceDtype, type[np.generic]] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
}


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """What may change from run to run without changing a byte of the output."""

    num_workers: int
    tile_bytes: int
    allow_nonfinite: bool = False


class ShardPipeline:
    """Fills one preallocated output file.

    Args:
        shard: what to write.
        output_fd: the file, open for writing, its header written.
        offsets: absolute offset of every output tensor in it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shard: ShardPlan,
        fmt: QuantFormat,
        *,
        output_fd: int,
        offsets: Mapping[str, int],
        backend: Backend,
        settings: PipelineSettings,
    ) -> None:
        self._checkpoint = checkpoint
        self._shard = shard
        self._format = fmt
        self._fd = output_fd
        self._offsets = offsets
        self._backend = backend
        self._settings = settings
        self._constants = _constant_statistics(fmt)
        self._readers: dict[str, ShardReader] = {}
        self._collected = _AbsmaxCollector()
        self._buffers = threading.local()

    def run(self, on_event: OnEvent, peak_memory: PeakMemory) -> None:
        """Write all tensor data; returns when the last byte was handed to the system."""
        with ExitStack() as stack:
            for name in {cast(TensorInfo, tensor.source).shard for tensor in self._shard.tensors}:
                reader = open_shard(self._checkpoint, name)
                self._readers[name] = stack.enter_context(reader)
            pool = stack.enter_context(ThreadPoolExecutor(self._settings.num_workers))
            tiles = cut_shard(self._shard, self._format, self._settings.tile_bytes)
            for tile in _run_bounded(pool, self._carry, tiles, 2 * self._settings.num_workers):
                peak_memory.sample()
                on_event(Advanced(tile.source_bytes, tile.tensor.source.name))

    # -- one tile -------------------------------------------------------------------------------

    def _carry(self, tile: Tile) -> Tile:
        if tile.tensor.action == "copy":
            self._copy(tile)
        elif self._format.is_int8:
            self._quantize_int8(tile)
        else:
            self._quantize_4bit(tile)
        return tile

    def _copy(self, tile: Tile) -> None:
        source = cast(TensorInfo, tile.tensor.source)
        data = self._buffer("source", tile.length)
        self._readers[source.shard].read_into(data, source.offset + tile.start)
        if source.dtype in QUANTIZABLE_DTYPES:
            dtype = cast(SourceDtype, source.dtype)
            values = data.view(NUMPY_DTYPES[dtype])
            self._check_finite(tile, values, self._backend.count_nonfinite(values, dtype))
        self._write(data, self._offsets[source.name] + tile.start)

    def _quantize_4bit(self, tile: Tile) -> None:
        fmt, weight = self._format, tile.tensor.source
        values, dtype = self._read_values(tile)
        first_block = tile.start // fmt.blocksize
        num_blocks = -(-tile.length // fmt.blocksize)
        packed = self._buffer("packed", -(-tile.length // 2))
        if fmt.double_quant:
            collected = self._collected.of(tile.tensor, fmt.blocksize)
            absmax = collected[first_block : first_block + num_blocks]
        else:
            absmax = self._buffer("absmax", 4 * num_blocks).view(np.float32)
        num_bad = self._backend.quantize_4bit(
            values, dtype, fmt.quant_type, fmt.blocksize, packed, absmax
        )
        self._check_finite(tile, values, num_bad)
        self._write(packed, self._offsets[weight.name] + tile.start // 2)
        if not fmt.double_quant:
            self._write(absmax, self._offsets[f"{weight.name}.absmax"] + 4 * first_block)
            if tile.start == 0:
                self._write_constants(tile.tensor, nested_offset=None)
        elif self._collected.is_complete(tile, weight.num_elements):
            self._write_nested(tile.tensor)

    def _write_nested(self, tensor: TensorPlan) -> None:
        absmax = self._collected.take(tensor)
        codes = np.empty(absmax.size, np.uint8)
        nested = np.empty(-(-absmax.size // NESTED_BLOCKSIZE), np.float32)
        offset = self._backend.quantize_absmax(absmax, codes, nested)
        self._write(codes, self._offsets[f"{tensor.source.name}.absmax"])
        self._write(nested, self._offsets[f"{tensor.source.name}.nested_absmax"])
        self._write_constants(tensor, nested_offset=float(offset))

    def _quantize_int8(self, tile: Tile) -> None:
        values, dtype = self._read_values(tile)
        row = tile.tensor.outputs[0].shape[-1]
        num_rows = tile.length // row if row else 0
        codes = self._buffer("packed", tile.length).view(np.int8).reshape(num_rows, row)
        scb = np.empty(num_rows, np.float32)
        num_bad = self._backend.quantize_int8(values.reshape(num_rows, row), dtype, codes, scb)
        self._check_finite(tile, values, num_bad)
        weight = tile.tensor.source.name
        first_row = tile.start // row if row else 0
        self._write(codes, self._offsets[weight] + tile.start)
        self._write(scb, self._offsets[f"{weight.removesuffix('.weight')}.SCB"] + 4 * first_row)
        if tile.start == 0:
            self._write_constants(tile.tensor, nested_offset=None)

    def _write_constants(self, tensor: TensorPlan, nested_offset: float | None) -> None:
        """Code tables and markers, the same for every tensor; and the quant_state blob."""
        for layout in tensor.outputs[1:]:
            _, _, statistic = layout.name.rpartition(".")
            if statistic in self._constants:
                self._write(self._constants[statistic], self._offsets[layout.name])
            elif f".{QUANT_STATE_PREFIX}" in layout.name:
                dtype = cast(SourceDtype, tensor.source.dtype)
                shape = tensor.source.shape[::-1] if tensor.transposed else tensor.source.shape
                blob = quant_state_bytes(shape, dtype, self._format, nested_offset)
                self._write(np.frombuffer(blob, np.uint8), self._offsets[layout.name])

    # -- bytes in and out -----------------------------------------------------------------------

    def _read_values(self, tile: Tile) -> tuple[SourceArray, SourceDtype]:
        """The tile's values in output order, in one of this thread's buffers."""
        source = cast(TensorInfo, tile.tensor.source)
        dtype = cast(SourceDtype, source.dtype)
        reader = self._readers[source.shard]
        data = self._buffer("source", tile.source_bytes)
        if not tile.tensor.transposed:
            itemsize = np.dtype(NUMPY_DTYPES[dtype]).itemsize
            reader.read_into(data, source.offset + tile.start * itemsize)
            return cast(SourceArray, data.view(NUMPY_DTYPES[dtype])), dtype
        # [in, out] on disk: these output rows are a slab of columns.
        num_in, num_out = source.shape
        itemsize = np.dtype(NUMPY_DTYPES[dtype]).itemsize
        num_rows = tile.length // num_in
        reader.read_columns(
            source.offset,
            rows=num_in,
            row_bytes=num_out * itemsize,
            col_start_bytes=tile.start // num_in * itemsize,
            col_num_bytes=num_rows * itemsize,
            buffer=data,
        )
        values = self._buffer("transposed", tile.source_bytes).view(NUMPY_DTYPES[dtype])
        slab = data.view(NUMPY_DTYPES[dtype]).reshape(num_in, num_rows)
        np.copyto(values.reshape(num_rows, num_in), slab.T)
        return cast(SourceArray, values), dtype

    def _buffer(self, role: str, num_bytes: int) -> NDArray[np.uint8]:
        """This thread's buffer for `role`; reused, as fresh pages cost more than the kernel."""
        held: NDArray[np.uint8] | None = getattr(self._buffers, role, None)
        if held is None or held.size < num_bytes:
            held = np.empty(num_bytes, np.uint8)
            setattr(self._buffers, role, held)
        return held[:num_bytes]

    def _write(self, data: NDArray[Any], offset: int) -> None:
        view = data.reshape(-1).view(np.uint8).data
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def _check_finite(self, tile: Tile, values: SourceArray, num_bad: int) -> None:
        if num_bad and not self._settings.allow_nonfinite:
            raise _nonfinite_error(tile, values, num_bad, is_int8=self._format.is_int8)


def warm_up_kernels(backend: Backend, dtype: SourceDtype, fmt: QuantFormat) -> None:
    """Run every kernel that the pipeline calls for `dtype` and `fmt` once, on one small block."""
    values = np.zeros((1, fmt.blocksize), NUMPY_DTYPES[dtype])
    flat = cast(SourceArray, values.reshape(-1))
    backend.count_nonfinite(flat, dtype)
    if fmt.is_int8:
        codes, scb = np.empty(values.shape, np.int8), np.empty(1, np.float32)
        backend.quantize_int8(cast(SourceArray, values), dtype, codes, scb)
        return
    packed, absmax = np.empty(flat.size // 2, np.uint8), np.empty(1, np.float32)
    backend.quantize_4bit(flat, dtype, fmt.quant_type, fmt.blocksize, packed, absmax)
    if fmt.double_quant:
        backend.quantize_absmax(absmax, np.empty(1, np.uint8), np.empty(1, np.float32))


def _constant_statistics(fmt: QuantFormat) -> dict[str, NDArray[Any]]:
    """The statistics that are the same for every weight, by the last part of their names."""
    if fmt.is_int8:
        return {"weight_format": np.array(ROW_MAJOR, np.uint8)}
    tables = {"quant_map": NF4_CODE if fmt.quant_type == "nf4" else FP4_CODE}
    return tables | {"nested_quant_map": dynamic_map()} if fmt.double_quant else tables


class _AbsmaxCollector:
    """Keeps each tensor's absmax until its last tile is done: double quantization needs them all.

    The largest thing that the pipeline holds: 4 bytes per block, 1/32 of a bf16 tensor.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._absmax: dict[str, NDArray[np.float32]] = {}
        self._done_elements: dict[str, int] = {}

    def of(self, tensor: TensorPlan, blocksize: int) -> NDArray[np.float32]:
        name = tensor.source.name
        with self._lock:
            if name not in self._absmax:
                num_blocks = -(-tensor.source.num_elements // blocksize)
                self._absmax[name] = np.empty(num_blocks, np.float32)
                self._done_elements[name] = 0
            return self._absmax[name]

    def is_complete(self, tile: Tile, num_elements: int) -> bool:
        """Count the tile as done; True for exactly one caller, the one that was last."""
        name = tile.tensor.source.name
        with self._lock:
            self._done_elements[name] += tile.length
            return self._done_elements[name] == num_elements

    def take(self, tensor: TensorPlan) -> NDArray[np.float32]:
        with self._lock:
            del self._done_elements[tensor.source.name]
            return self._absmax.pop(tensor.source.name)


def _run_bounded(
    pool: ThreadPoolExecutor, work: Any, items: Iterator[Tile], max_pending: int
) -> Iterator[Tile]:
    """Yield results as they come, with at most `max_pending` submitted; the first error ends it."""
    pending: set[Future[Tile]] = set()
    try:
        for item in items:
            if len(pending) >= max_pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            pending.add(pool.submit(work, item))
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        for future in pending:
            future.cancel()


def _nonfinite_error(tile: Tile, values: SourceArray, num_bad: int, *, is_int8: bool) -> QtoolError:
    source = cast(TensorInfo, tile.tensor.source)
    floats = _as_float32(values, cast(SourceDtype, source.dtype))
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(floats.astype(np.float16) if is_int8 else floats)
    if not bad.any():  # a copied tensor in an INT8 run
        bad = ~np.isfinite(floats)
    where = int(np.argmax(bad))
    itemsize = np.dtype(NUMPY_DTYPES[cast(SourceDtype, source.dtype)]).itemsize
    index = tile.start // itemsize if tile.tensor.action == "copy" else tile.start
    overflow = is_int8 and np.isfinite(floats[where])
    found = (
        f"{floats[where]} (beyond float16, which INT8 rows go through)"
        if overflow
        else floats[where]
    )
    return QtoolError(
        f"{source.shard}: {source.name}: {num_bad} values are not finite; "
        f"element {index + where} is {found}",
        kind="bad_file",
        hint="the checkpoint is damaged; --allow-nonfinite quantizes it all the same",
    )


def _as_float32(values: SourceArray, dtype: SourceDtype) -> NDArray[np.float32]:
    flat = values.reshape(-1)
    if dtype == "BF16":
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(np.float32)
