"""Moves one shard's bytes: read a tile, run the kernel, write the result at its known offset.

A worker carries a whole tile from file to file in buffers of its own. While one waits for the disk
the others compute, and memory is bounded by workers x tile. Order does not matter: every offset is
known from the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, cast

import numpy as np
from numpy.typing import NDArray

from qtool.architecture.stored_weights import QUANTIZABLE_DTYPES
from qtool.backends.protocol import Backend, SourceArray
from qtool.checkpoint.reading import OpenTensors, TensorReader, open_shards
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.errors import Option, QtoolError, Words
from qtool.formats.bitsandbytes import QUANT_STATE_PREFIX, ROW_MAJOR, quant_state_bytes
from qtool.formats.codebooks import FP4_CODE, NF4_CODE, dynamic_map
from qtool.formats.floats import NUMPY_DTYPES, widen
from qtool.formats.precisions import QuantFormat
from qtool.formats.tensors import SourceDtype
from qtool.quantize.buffers import AbsmaxCollector, BufferPool, CollectedAbsmax, TileBuffers
from qtool.quantize.growing_file import GrowingFile
from qtool.quantize.plan import ShardPlan, TensorPlan
from qtool.quantize.tiles import Tile, cut_tensor

NONFINITE_HINT: Final = (
    "the checkpoint is damaged; ",
    Option("allow_nonfinite", verb="quantize"),
    " quantizes it all the same",
)


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """What may change from run to run without changing a byte of the output.

    `num_workers` and `tile_bytes` None leave the choice to the backend. `nonfinite_hint` is the
    next step where values are not finite.
    """

    num_workers: int | None = None
    tile_bytes: int | None = None
    allow_nonfinite: bool = False
    nonfinite_hint: Words = NONFINITE_HINT


@dataclass(frozen=True, slots=True)
class PipelineContext:
    """What all shards of a run share; `tile_bytes` is what the backend granted."""

    backend: Backend
    format: QuantFormat
    tile_bytes: int
    allow_nonfinite: bool
    nonfinite_hint: Words
    pool: BufferPool


class ShardPipeline:
    """Fills one preallocated output file; leaving it checks that its sources did not change.

        with ShardPipeline(...) as shard:
            for tile in shard.tiles():      # in any order, from any thread
                shard.carry(tile, buffers)

    Args:
        shard: what to write.
        output: the file, its header written or to be written.
        offsets: absolute offset of every output tensor in it.
        open_tensors: where the values come from.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shard: ShardPlan,
        *,
        output: GrowingFile,
        offsets: Mapping[str, int],
        context: PipelineContext,
        open_tensors: OpenTensors = open_shards,
    ) -> None:
        self.output = output
        self._checkpoint = checkpoint
        self._shard = shard
        self._offsets = offsets
        self._backend = context.backend
        self._format = context.format
        self._context = context
        self._constants = _constant_statistics(context.format)
        self._open_tensors = open_tensors
        self._opened = ExitStack()
        self._tensors: TensorReader
        self._absmax = AbsmaxCollector(context.pool, context.format.blocksize)

    def __enter__(self) -> Self:
        names = {cast(TensorInfo, tensor.source).shard for tensor in self._shard.tensors}
        opening = self._open_tensors(self._checkpoint, names)
        self._tensors = self._opened.enter_context(opening)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def tiles(self) -> Iterator[Tile]:
        """All tiles, in the order of the output file, so that it grows from its start."""
        for tensor in sorted(self._shard.tensors, key=lambda t: self._offsets[t.outputs[0].name]):
            yield from cut_tensor(tensor, self._format, self._context.tile_bytes)

    def carry(self, tile: Tile, buffers: TileBuffers) -> None:
        """Bring one tile from the source to the output file, in the buffers of this thread.

        Raises:
            QtoolError: bad_file, if the source is short or holds values that are not finite.
        """
        if tile.tensor.action == "copy":
            self._copy(tile, buffers)
        elif self._format.is_int8:
            self._quantize_int8(tile, buffers)
        else:
            self._quantize_4bit(tile, buffers)

    def _copy(self, tile: Tile, buffers: TileBuffers) -> None:
        source = cast(TensorInfo, tile.tensor.source)
        data = buffers.source[: tile.length]
        self._tensors.read_into(source, data, tile.start)
        if source.dtype in QUANTIZABLE_DTYPES:
            dtype = cast(SourceDtype, source.dtype)
            values = data.view(NUMPY_DTYPES[dtype])
            self._check_finite(tile, values, self._backend.count_nonfinite(values, dtype))
        self.output.write(data, self._offsets[source.name] + tile.start)

    def _quantize_4bit(self, tile: Tile, buffers: TileBuffers) -> None:
        fmt, weight = self._format, tile.tensor.source
        values, dtype = self._read_values(tile, buffers)
        first_block = tile.start // fmt.blocksize
        num_blocks = -(-tile.length // fmt.blocksize)
        packed = buffers.codes[: -(-tile.length // 2)]
        if fmt.double_quant:
            collected = self._absmax.of(tile.tensor).absmax
            absmax = collected[first_block : first_block + num_blocks]
        else:
            absmax = buffers.statistics[: 4 * num_blocks].view(np.float32)
        num_bad = self._backend.quantize_4bit(
            values, dtype, fmt.quant_type, fmt.blocksize, packed, absmax
        )
        self._check_finite(tile, values, num_bad)
        self.output.write(packed, self._offsets[weight.name] + tile.start // 2)
        if not fmt.double_quant:
            self.output.write(absmax, self._offsets[f"{weight.name}.absmax"] + 4 * first_block)
            if tile.start == 0:
                self._write_constants(tile.tensor, nested_offset=None)
        elif (complete := self._absmax.take_complete(tile)) is not None:
            self._write_nested(tile.tensor, complete)

    def _write_nested(self, tensor: TensorPlan, collected: CollectedAbsmax) -> None:
        name = tensor.source.name
        codes, nested_absmax = collected.codes, collected.nested_absmax
        offset = self._backend.quantize_absmax(collected.absmax, codes, nested_absmax)
        self.output.write(codes, self._offsets[f"{name}.absmax"])
        self.output.write(nested_absmax, self._offsets[f"{name}.nested_absmax"])
        collected.give_back()
        self._write_constants(tensor, nested_offset=float(offset))

    def _quantize_int8(self, tile: Tile, buffers: TileBuffers) -> None:
        values, dtype = self._read_values(tile, buffers)
        num_rows, num_columns = tile.num_rows, tile.tensor.outputs[0].shape[-1]
        codes = buffers.codes[: tile.length].view(np.int8).reshape(num_rows, num_columns)
        scb = buffers.statistics[: 4 * num_rows].view(np.float32)
        num_bad = self._backend.quantize_int8(
            values.reshape(num_rows, num_columns), dtype, codes, scb
        )
        self._check_finite(tile, values, num_bad)
        weight = tile.tensor.source.name
        first_row = tile.start // max(num_columns, 1)
        self.output.write(codes, self._offsets[weight] + tile.start)
        scb_name = f"{weight.removesuffix('.weight')}.SCB"
        self.output.write(scb, self._offsets[scb_name] + 4 * first_row)
        if tile.start == 0:
            self._write_constants(tile.tensor, nested_offset=None)

    def _write_constants(self, tensor: TensorPlan, nested_offset: float | None) -> None:
        """Code tables and markers, the same for every tensor; and the quant_state blob."""
        for layout in tensor.outputs[1:]:
            _, _, statistic = layout.name.rpartition(".")
            if statistic in self._constants:
                self.output.write(self._constants[statistic], self._offsets[layout.name])
            elif f".{QUANT_STATE_PREFIX}" in layout.name:
                dtype = cast(SourceDtype, tensor.source.dtype)
                shape = tensor.source.shape[::-1] if tensor.transposed else tensor.source.shape
                blob = quant_state_bytes(shape, dtype, self._format, nested_offset)
                self.output.write(blob, self._offsets[layout.name])

    def _read_values(self, tile: Tile, buffers: TileBuffers) -> tuple[SourceArray, SourceDtype]:
        """The tile's values in output order, in one of the buffers."""
        source = cast(TensorInfo, tile.tensor.source)
        dtype = cast(SourceDtype, source.dtype)
        itemsize = np.dtype(NUMPY_DTYPES[dtype]).itemsize
        data = buffers.source[: tile.source_bytes]
        if not tile.tensor.transposed:
            self._tensors.read_into(source, data, tile.start * itemsize)
            return cast(SourceArray, data.view(NUMPY_DTYPES[dtype])), dtype
        # [in, out] on disk: these output rows are a slab of columns.
        num_in = source.shape[0]
        num_rows = tile.length // num_in
        slab = data.view(NUMPY_DTYPES[dtype]).reshape(num_in, num_rows)
        self._tensors.read_columns(source, slab, tile.start // num_in)
        values = buffers.transposed[: tile.source_bytes].view(NUMPY_DTYPES[dtype])
        np.copyto(values.reshape(num_rows, num_in), slab.T)
        return cast(SourceArray, values), dtype

    def _check_finite(self, tile: Tile, values: SourceArray, num_bad: int) -> None:
        if num_bad and not self._context.allow_nonfinite:
            raise _nonfinite_error(
                tile,
                values,
                num_bad,
                through_float16=self._format.is_int8 and tile.tensor.action == "quantize",
                hint=self._context.nonfinite_hint,
            )


def warm_up_kernels(backend: Backend, dtype: SourceDtype, fmt: QuantFormat) -> None:
    """Run every kernel that the pipeline calls for `dtype` and `fmt` once, on one small block."""
    size = fmt.blocksize
    source = backend.host_buffer(4 * size)
    source.fill(0)
    values = cast(SourceArray, source.view(NUMPY_DTYPES[dtype])[:size])
    codes = backend.host_buffer(size)
    scales = backend.host_buffer(8).view(np.float32)
    backend.count_nonfinite(values, dtype)
    if fmt.is_int8:
        rows, int8_codes = values.reshape(1, size), codes.view(np.int8).reshape(1, size)
        backend.quantize_int8(cast(SourceArray, rows), dtype, int8_codes, scales[:1])
        return
    packed, absmax, nested_absmax = codes[: size // 2], scales[:1], scales[1:]
    backend.quantize_4bit(values, dtype, fmt.quant_type, size, packed, absmax)
    if fmt.double_quant:
        backend.quantize_absmax(absmax, codes[:1], nested_absmax)


def _constant_statistics(fmt: QuantFormat) -> dict[str, NDArray[Any]]:
    """The statistics that are the same for every weight, by the last part of their names."""
    if fmt.is_int8:
        return {"weight_format": np.array(ROW_MAJOR, np.uint8)}
    tables = {"quant_map": NF4_CODE if fmt.quant_type == "nf4" else FP4_CODE}
    return tables | {"nested_quant_map": dynamic_map()} if fmt.double_quant else tables


def _nonfinite_error(
    tile: Tile, values: SourceArray, num_bad: int, *, through_float16: bool, hint: Words
) -> QtoolError:
    source = cast(TensorInfo, tile.tensor.source)
    floats = widen(values.reshape(-1), cast(SourceDtype, source.dtype))
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(floats.astype(np.float16) if through_float16 else floats)
    where = int(np.argmax(bad))
    itemsize = np.dtype(NUMPY_DTYPES[cast(SourceDtype, source.dtype)]).itemsize
    index = tile.start // itemsize if tile.tensor.action == "copy" else tile.start
    overflow = through_float16 and np.isfinite(floats[where])
    found = (
        f"{floats[where]} (beyond float16, which INT8 rows go through)"
        if overflow
        else floats[where]
    )
    return QtoolError(
        f"{source.shard}: {source.name}: {num_bad} {'value is' if num_bad == 1 else 'values are'} "
        "not finite; "
        f"element {index + where} is {found}",
        kind="bad_file",
        hint=hint,
    )
